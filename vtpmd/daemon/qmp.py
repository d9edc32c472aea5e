"""Follow QEMU over QMP; what it tells goes on as the events of ``qemu_events``.

The client is ``qemu.qmp``'s, which is slow to import: import this module only when there is a
monitor to follow. What follows from there is said once, here:

- QEMU starts after the daemon and may be restarted: the socket is tried again and again.
- An event goes from the read that brought it to the consumer in one call, without a queue or a task
  in between. While QEMU stops the guest for the switchover, each hop would be downtime.
- QEMU answers no command while it waits for the emulator: its main thread, or the lock that it
  needs, is taken. So whoever answers the control channel goes by the events that have come, and
  must not wait for :meth:`QemuFollower.execute`.
- What QEMU sends is checked like any other input. Events that are unknown or malformed are ignored.
- QEMU tells of a migration only while its capability ``events`` is on. It is switched on, and again
  when somebody has switched it off; while that is refused, as in a migration that runs, QEMU is
  asked at intervals, and what it answers is delivered as the event that was missed.

Sources: QEMU's ``docs/interop/qmp-spec``, ``qapi/migration.json``, ``qapi/run-state.json``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from vtpmd.daemon.listener import PATH_BYTES_MAX
from vtpmd.daemon.qemu_events import (
    Capabilities,
    GuestResumed,
    GuestStopped,
    MigrationState,
    MigrationStatus,
    Phase,
    QemuConnected,
    QemuDisconnected,
    QemuEvent,
    QemuShutdown,
)
from vtpmd.errors import VtpmdError

log = logging.getLogger(__name__)
# What the library would say, this module says once and for people.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

# How soon a QEMU that has started is found. It takes longer to boot than this.
POLL_INTERVAL_S = 0.2
# A monitor serves one client and lets the next wait without a word.
GREETING_TIMEOUT_S = 10.0
# QEMU's main thread may load a guest's devices meanwhile, or wait for a slow disk.
COMMAND_TIMEOUT_S = 30.0
# One message. The longest that is asked for here, query-migrate's, has 2 KiB.
MESSAGE_BYTES_MAX = 256 * 1024
# How late it may be seen that a capability was set, and a migration that QEMU tells nothing of.
WATCH_INTERVAL_S = 1.0
# What may come while QEMU is asked for its state: five questions.
EARLY_EVENTS_MAX = 1000
# Of QEMU's texts, in errors and in the log.
TEXT_LENGTH_MAX = 200
# What goes wrong does so again at each attempt.
COMPLAINT_INTERVAL_S = 60.0
# QEMU counts in signed and unsigned 64-bit numbers.
NUMBER_MAX = 2**64 - 1

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_WORD = re.compile(r"[a-z][a-z0-9-]{0,63}")
_HOPED_FOR: Final = Capabilities(events=True, colo=False)


class QmpError(VtpmdError):
    """QEMU could not be asked, or gave no usable answer."""


class QemuNotConnected(QmpError):
    """There is no QEMU to ask, or it went away before it answered."""


class QemuCommandFailed(QmpError):
    """QEMU answered a command with an error; ``error_class`` is QMP's name for its kind."""

    def __init__(self, text: str, error_class: str) -> None:
        super().__init__(text)
        self.error_class = error_class


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """What query-migrate says. A number is None where QEMU gives none, as before the migration."""

    status: MigrationState
    passes: int | None = None
    ram_transferred_bytes: int | None = None
    ram_remaining_bytes: int | None = None
    ram_total_bytes: int | None = None
    dirty_pages_per_s: int | None = None
    setup_ms: int | None = None
    total_ms: int | None = None
    downtime_ms: int | None = None
    expected_downtime_ms: int | None = None
    error: str | None = None


class FollowerState(Enum):
    """Where a follower is."""

    IDLE = "nothing is tried: run() is not running"
    WAITING = "no QEMU answers on the socket; it is tried again and again"
    CONNECTING = "a QEMU has answered and is asked for its state"
    FOLLOWING = "events are delivered, commands can be executed"


class QemuFollower:
    """One QEMU's monitor, connected whenever there is one."""

    def __init__(self, path: Path, deliver: Callable[[QemuEvent], None]) -> None:
        """Follow the QEMU whose QMP monitor is, or will be, the UNIX socket ``path``.

        ``deliver`` gets each event as soon as it is read. It runs in the reader's place: it must
        return at once. Raises QmpError if the path is too long for a socket.
        """
        if len(os.fsencode(path)) > PATH_BYTES_MAX:
            raise QmpError(
                f"cannot follow QEMU on {path}: a socket's path has at most {PATH_BYTES_MAX} "
                "bytes; give QEMU's monitor a shorter one"
            )
        self.state = FollowerState.IDLE
        self._path = path
        self._deliver = deliver
        self._client: QMPClient | None = None
        self._early: list[QemuEvent] = []
        self._capabilities = _HOPED_FOR
        self._migration = Migration(status=MigrationState.NONE)
        self._look_now = asyncio.Event()
        self._silent_until_s = 0.0

    async def run(self) -> None:
        """Follow QEMU until cancelled, through any number of its restarts.

        When it is cancelled while FOLLOWING, QemuDisconnected still comes.
        """
        try:
            while True:
                self.state = FollowerState.WAITING
                sock = self._connect()
                if sock is not None:
                    with sock:
                        await self._converse(sock)
                await asyncio.sleep(POLL_INTERVAL_S)
        finally:
            self.state = FollowerState.IDLE

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute a QMP command and return its result, unchecked.

        Raises QemuNotConnected unless FOLLOWING, or when QEMU goes away meanwhile (it may have
        carried the command out); QemuCommandFailed when it answers an error; QmpError when it does
        not answer within COMMAND_TIMEOUT_S, or answers what is no QMP.
        """
        return await self._execute(self._client_for(command), command, arguments)

    async def query_migration(self) -> Migration:
        """Ask QEMU how its migration goes. Raises as :meth:`execute` does."""
        return _migration(await self.execute("query-migrate"))

    async def look(self) -> Capabilities:
        """Ask QEMU for what its events may have left out, deliver it; return the capabilities.

        Raises as :meth:`execute` does.
        """
        client = self._client_for("query-migrate-capabilities")
        before, capabilities = self._capabilities, await self._ask_capabilities(client)
        if capabilities != before:
            self._capabilities = capabilities
            self._hand_over(capabilities)
        if not (before.events and capabilities.events):
            await self._look_at_migration()
        return capabilities

    def _client_for(self, command: str) -> QMPClient:
        if self.state is not FollowerState.FOLLOWING or self._client is None:
            raise QemuNotConnected(
                f"cannot execute {command}: QEMU's monitor {self._path} is {self.state.name}, must "
                f"be {FollowerState.FOLLOWING.name}; start QEMU with -qmp "
                f"unix:{self._path},server=on,wait=off"
            )
        return self._client

    def _connect(self) -> socket.socket | None:
        """Connect to the monitor's socket; None if nobody listens there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(os.fspath(self._path))
        except OSError as error:
            sock.close()
            if not isinstance(error, FileNotFoundError | ConnectionRefusedError):
                self._complain(f"{error.strerror}; give vtpmd a monitor that it may connect to")
            return None
        return sock

    async def _converse(self, sock: socket.socket) -> None:
        """Follow one QEMU until the connection ends; say why, unless QEMU hung up."""
        client = QMPClient(readbuflen=MESSAGE_BYTES_MAX)
        # The library's own listener keeps every event that passes its filter, for ever.
        client.events.event_filter = self._take
        try:
            await self._greet(client, sock)
            await self._follow(client)
        except QemuNotConnected:
            pass  # _disconnect() says why, if there is anything to say
        except QmpError as error:
            self._complain(str(error))
        finally:
            self._lose(client)
            await self._close(client, sock)

    async def _greet(self, client: QMPClient, sock: socket.socket) -> None:
        """Have the library begin its session. Raises QmpError."""
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await client.connect(sock)
        except TimeoutError as error:
            raise QmpError(
                "no greeting; if another program is connected, start QEMU with one more -qmp"
            ) from error
        except ConnectError as error:
            raise QmpError(_text(error)) from error
        except AssertionError as error:
            # The library's own: it expects no connection to end as soon as it is made.
            raise QemuNotConnected("the connection ended") from error

    async def _follow(self, client: QMPClient) -> None:
        self._early.clear()
        self._capabilities = _HOPED_FOR
        self.state = FollowerState.CONNECTING
        connected = await self._ask_state(client)
        self._client = client
        self.state = FollowerState.FOLLOWING
        log.info("following QEMU on %s, guest %s", self._path, connected.uuid)
        self._hand_over(connected)
        for event in self._early:
            self._hand_over(event)
        self._early.clear()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            while client.runstate is Runstate.RUNNING:
                await client.runstate_changed()
            watching.cancel()

    async def _watch(self) -> None:
        """Look at intervals, and when a migration is being set up."""
        while True:
            try:
                async with asyncio.timeout(WATCH_INTERVAL_S):
                    await self._look_now.wait()
            except TimeoutError:
                # A migration that QEMU tells of is left in peace: nothing can be set meanwhile.
                if self._capabilities.events and self._migration.status.phase is not Phase.IDLE:
                    continue
            self._look_now.clear()
            try:
                await self.look()
            except QemuNotConnected:
                return
            except QmpError as error:
                self._complain(str(error))

    async def _look_at_migration(self) -> None:
        before = self._migration
        migration = await self.query_migration()
        if self._migration is not before:
            return  # an event has come meanwhile, and is newer
        if migration.status is not before.status:
            self._hand_over(MigrationStatus(migration.status))
        self._migration = migration

    def _lose(self, client: QMPClient) -> None:
        was_following = self._client is client
        self._client, self.state = None, FollowerState.WAITING
        if was_following:
            log.info("no longer following QEMU on %s", self._path)
            self._hand_over(QemuDisconnected())

    async def _close(self, client: QMPClient, sock: socket.socket) -> None:
        if client.runstate is Runstate.IDLE:
            return
        # Nothing waits for a QEMU that does not read.
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        disconnecting = asyncio.create_task(self._disconnect(client))
        try:
            await asyncio.shield(disconnecting)
        except asyncio.CancelledError:
            # Else the library's own tasks end with errors that nobody has asked for.
            await asyncio.wait([disconnecting], timeout=GREETING_TIMEOUT_S)
            raise

    async def _disconnect(self, client: QMPClient) -> None:
        """End the library's session; whatever made it stop reading is raised, and said, here."""
        try:
            await client.disconnect()
        except (EOFError, OSError):
            pass  # how a connection ends
        except Exception as error:
            self._complain(_text(error))

    async def _ask_state(self, client: QMPClient) -> QemuConnected:
        self._capabilities = await self._ask_capabilities(client)
        uuid = _fields(await self._execute(client, "query-uuid")).get("UUID")
        self._migration = _migration(await self._execute(client, "query-migrate"))
        guest = _fields(await self._execute(client, "query-status"))
        running, status = guest.get("running"), guest.get("status")
        if (
            not isinstance(uuid, str)
            or _UUID.fullmatch(uuid) is None
            or not isinstance(running, bool)
            or not isinstance(status, str)
            or _WORD.fullmatch(status) is None
        ):
            raise QmpError("QEMU's answer to query-uuid or query-status is malformed")
        return QemuConnected(
            uuid=uuid.lower(),
            running=running,
            status=status,
            migration_status=self._migration.status,
            capabilities=self._capabilities,
        )

    async def _ask_capabilities(self, client: QMPClient) -> Capabilities:
        """Return what is switched on, with events, unless QEMU refuses them."""
        on = _switched_on(await self._execute(client, "query-migrate-capabilities"))
        return Capabilities(
            events="events" in on or await self._enable_events(client), colo="x-colo" in on
        )

    async def _enable_events(self, client: QMPClient) -> bool:
        """Have QEMU tell how its migration goes; return False if it will not."""
        capability = {"capability": "events", "state": True}
        try:
            await self._execute(client, "migrate-set-capabilities", {"capabilities": [capability]})
        except QemuCommandFailed as error:
            # As while a migration runs. It is said once.
            if self._capabilities.events:
                log.warning(
                    "QEMU on %s gives no migration events, it is asked every %.0f s: %s",
                    self._path,
                    WATCH_INTERVAL_S,
                    error,
                )
            return False
        return True

    async def _execute(
        self, client: QMPClient, command: str, arguments: Mapping[str, object] | None = None
    ) -> object:
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                return await client.execute(command, arguments)
        except TimeoutError as error:
            raise QmpError(
                f"cannot execute {command}: QEMU on {self._path} has not answered within "
                f"{COMMAND_TIMEOUT_S:.0f} s"
            ) from error
        except ExecuteError as error:
            text = f"QEMU on {self._path} refuses {command}: {_text(error)}"
            raise QemuCommandFailed(text, error.error_class) from error
        except (ExecInterruptedError, StateError) as error:
            raise QemuNotConnected(
                f"cannot execute {command}: QEMU on {self._path} went away before it answered"
            ) from error
        except QMPError as error:
            raise QmpError(f"cannot execute {command}: {_text(error)}") from error

    def _take(self, message: Message) -> bool:
        """Take an event in the library's reader; return False, for the library to forget it."""
        event = _event(message)
        if event is None:
            return False
        if self.state is FollowerState.FOLLOWING:
            self._hand_over(event)
        elif self.state is FollowerState.CONNECTING:
            if len(self._early) == EARLY_EVENTS_MAX:
                raise QmpError(f"more than {EARLY_EVENTS_MAX} events before QEMU's state is known")
            self._early.append(event)
        return False

    def _hand_over(self, event: QemuEvent) -> None:
        log.debug("QEMU: %s", event)
        if isinstance(event, MigrationStatus):
            self._migration = Migration(status=event.status)
            if event.status is MigrationState.SETUP:
                self._look_now.set()
        try:
            self._deliver(event)
        except Exception:  # the consumer's fault: the reader, and the next event, must go on
            log.exception("the event %s was not handled", event)

    def _complain(self, reason: str) -> None:
        """Log why QEMU cannot be followed; not for each of the attempts."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._silent_until_s:
            self._silent_until_s = now_s + COMPLAINT_INTERVAL_S
            log.warning("cannot follow QEMU on %s: %s; trying again", self._path, reason)


def _event(message: Mapping[str, object]) -> QemuEvent | None:
    """Return the event that a message tells of; None if it is unknown or malformed."""
    data = message.get("data")
    fields: dict[str, object] = data if isinstance(data, dict) else {}
    match message.get("event"):
        case "STOP":
            return GuestStopped(_timestamp_us(message))
        case "RESUME":
            return GuestResumed(_timestamp_us(message))
        case "SHUTDOWN":
            return QemuShutdown()
        case "MIGRATION":
            status = _migration_state(fields.get("status"))
            return None if status is None else MigrationStatus(status)
    return None


def _switched_on(answer: object) -> set[object]:
    """Return the names that an answer to query-migrate-capabilities says are on."""
    capabilities = answer if isinstance(answer, list) else []
    return {
        name
        for capability in capabilities
        if isinstance(capability, dict) and capability.get("state") is True
        if isinstance(name := capability.get("capability"), str)
    }


def _migration_state(word: object) -> MigrationState | None:
    if not isinstance(word, str) or _WORD.fullmatch(word) is None:
        return None
    try:
        return MigrationState(word)
    except ValueError:
        return MigrationState.OTHER


def _timestamp_us(message: Mapping[str, object]) -> int | None:
    timestamp = message.get("timestamp")
    if not isinstance(timestamp, dict):
        return None
    seconds, microseconds = (_number(timestamp.get(key)) for key in ("seconds", "microseconds"))
    # QEMU writes -1 when it has no clock.
    return None if seconds is None or microseconds is None else seconds * 10**6 + microseconds


def _number(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= NUMBER_MAX:
        return value
    return None


def _fields(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise QmpError("QEMU's answer is no object")
    return value


def _text(said: object) -> str:
    """Return what QEMU or the library said as one short line."""
    text = " ".join(str(said).split())
    return "".join(c if c.isprintable() else "?" for c in text[:TEXT_LENGTH_MAX])


_RAM_NUMBERS: Final = {
    "passes": "dirty-sync-count",
    "ram_transferred_bytes": "transferred",
    "ram_remaining_bytes": "remaining",
    "ram_total_bytes": "total",
    "dirty_pages_per_s": "dirty-pages-rate",
}
_NUMBERS: Final = {
    "setup_ms": "setup-time",
    "total_ms": "total-time",
    "downtime_ms": "downtime",
    "expected_downtime_ms": "expected-downtime",
}


def _migration(answer: object) -> Migration:
    """Check an answer to query-migrate; without a status there was no migration yet."""
    fields = _fields(answer)
    ram = fields.get("ram")
    counters: dict[str, object] = ram if isinstance(ram, dict) else {}
    numbers = {name: _number(counters.get(key)) for name, key in _RAM_NUMBERS.items()}
    numbers |= {name: _number(fields.get(key)) for name, key in _NUMBERS.items()}
    error = fields.get("error-desc")
    status = _migration_state(fields.get("status", "none"))
    if status is None:
        raise QmpError("QEMU's answer to query-migrate is malformed")
    return Migration(status=status, error=None if error is None else _text(error), **numbers)
