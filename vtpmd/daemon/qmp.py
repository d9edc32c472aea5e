"""Follow QEMU over QMP: whether the guest runs and how its migration goes, as typed events.

The client is ``qemu.qmp``'s, which is slow to import: import this module only when there is a
monitor to follow. What follows from there is said once, here:

- QEMU starts after the daemon and may be restarted: the socket is tried again and again.
- An event goes from the read that brought it to the consumer in one call, without a queue or a task
  in between. While QEMU stops the guest for the switchover, each hop would be downtime.
- QEMU answers no command while it waits for the emulator: its main thread, or the lock that it
  needs, is taken. So whoever answers the control channel goes by the events that have come, and
  must not wait for :meth:`QemuFollower.execute`.
- What QEMU sends is checked like any other input. Events that are unknown or malformed are ignored.

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
from enum import Enum, StrEnum
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
# What may come while QEMU is asked for its state: four questions.
EARLY_EVENTS_MAX = 1000
# Of QEMU's texts, in errors and in the log.
TEXT_LENGTH_MAX = 200
# What goes wrong does so again at each attempt.
COMPLAINT_INTERVAL_S = 60.0
# QEMU counts in signed and unsigned 64-bit numbers.
NUMBER_MAX = 2**64 - 1

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_WORD = re.compile(r"[a-z][a-z0-9-]{0,63}")


class QmpError(VtpmdError):
    """QEMU could not be asked, or gave no usable answer."""


class QemuNotConnected(QmpError):
    """There is no QEMU to ask, or it went away before it answered."""


class QemuCommandFailed(QmpError):
    """QEMU answered a command with an error; ``error_class`` is QMP's name for its kind."""

    def __init__(self, text: str, error_class: str) -> None:
        super().__init__(text)
        self.error_class = error_class


class MigrationState(StrEnum):
    """The states of a migration, as ``qapi/migration.json`` names them."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"
    OTHER = "other"  # a word of a later QEMU


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuConnected:
    """QEMU answers. Its state is a moment old: what came since follows, and may repeat it."""

    uuid: str  # all zero when QEMU was given none
    running: bool  # the guest's processors
    status: str  # the word of query-status
    migration_status: MigrationState
    migration_events: bool  # False: there will be no MigrationStatus and no MigrationPass


@dataclass(frozen=True, slots=True)
class QemuDisconnected:
    """QEMU ended, or the connection did. Comes once after each QemuConnected."""


@dataclass(frozen=True, slots=True)
class MigrationStatus:
    """The migration has a new state. savevm goes from SETUP to COMPLETED, never to ACTIVE."""

    status: MigrationState


@dataclass(frozen=True, slots=True)
class MigrationPass:
    """QEMU begins to go through guest memory for the ``number``-th time, counted from 1."""

    number: int


@dataclass(frozen=True, slots=True)
class GuestStopped:
    """The guest's processors stand still; since when, by QEMU's clock (µs since 1970), if said."""

    timestamp_us: int | None = None


@dataclass(frozen=True, slots=True)
class GuestResumed:
    """The guest's processors run; since when, by QEMU's clock (µs since 1970), if said."""

    timestamp_us: int | None = None


@dataclass(frozen=True, slots=True)
class QemuShutdown:
    """The guest powered off, or QEMU was told to quit. QEMU may stay (``-no-shutdown``)."""


QemuEvent = (
    QemuConnected
    | QemuDisconnected
    | MigrationStatus
    | MigrationPass
    | GuestStopped
    | GuestResumed
    | QemuShutdown
)


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
        if self.state is not FollowerState.FOLLOWING or self._client is None:
            raise QemuNotConnected(
                f"cannot execute {command}: QEMU's monitor {self._path} is {self.state.name}, must "
                f"be {FollowerState.FOLLOWING.name}; start QEMU with -qmp "
                f"unix:{self._path},server=on,wait=off"
            )
        return await self._execute(self._client, command, arguments)

    async def query_migration(self) -> Migration:
        """Ask QEMU how its migration goes. Raises as :meth:`execute` does."""
        return _migration(await self.execute("query-migrate"))

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
            pass  # _close() says why, if there is anything to say
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
        self.state = FollowerState.CONNECTING
        connected = await self._ask_state(client)
        self._client = client
        self.state = FollowerState.FOLLOWING
        log.info("following QEMU on %s, guest %s", self._path, connected.uuid)
        self._hand_over(connected)
        for event in self._early:
            self._hand_over(event)
        self._early.clear()
        while client.runstate is Runstate.RUNNING:
            await client.runstate_changed()

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
        disconnecting = asyncio.create_task(client.disconnect())
        try:
            await asyncio.shield(disconnecting)
        except asyncio.CancelledError:
            # Else the library's own tasks end with errors that nobody has asked for.
            await asyncio.wait([disconnecting], timeout=GREETING_TIMEOUT_S)
            raise
        except (EOFError, OSError):
            pass  # how a connection ends
        except Exception as error:  # whatever made the library stop reading is raised here
            self._complain(_text(error))

    async def _ask_state(self, client: QMPClient) -> QemuConnected:
        migration_events = await self._enable_events(client)
        uuid = _fields(await self._execute(client, "query-uuid")).get("UUID")
        migration = _migration(await self._execute(client, "query-migrate"))
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
            migration_status=migration.status,
            migration_events=migration_events,
        )

    async def _enable_events(self, client: QMPClient) -> bool:
        """Have QEMU tell how its migration goes; return False if it will not."""
        capability = {"capability": "events", "state": True}
        try:
            await self._execute(client, "migrate-set-capabilities", {"capabilities": [capability]})
        except QemuCommandFailed as error:
            # Refused while a migration runs; then it may have been enabled before.
            enabled = await self._execute(client, "query-migrate-capabilities")
            if not isinstance(enabled, list) or capability not in enabled:
                log.warning("QEMU on %s will give no migration events: %s", self._path, error)
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
        case "MIGRATION_PASS":
            number = _number(fields.get("pass"))
            return None if number is None else MigrationPass(number)
    return None


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
