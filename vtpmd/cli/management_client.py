"""A client of vtpmd's management socket. Imports qemu.qmp, which is slow: import it when needed."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

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

from vtpmd.errors import VtpmdError

# What the library would say, the errors raised here say once and for people.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

# vtpmd answers in a millisecond; it may be asked while it validates a state of 143 KB.
ANSWER_TIMEOUT_S: Final = 10.0
# Another program's socket may say nothing.
GREETING_TIMEOUT_S: Final = 5.0
NOT_FOUND: Final = "CommandNotFound"  # an error's class
# Of what the daemon says, in an error.
TEXT_LENGTH_MAX: Final = 300

Deliver = Callable[[str, Mapping[str, object]], None]


class ManagementError(VtpmdError):
    """vtpmd could not be asked, refused, or gave no usable answer."""


class ManagementRefusal(ManagementError):
    """vtpmd answered a command with an error.

    ``its_status`` is the exit status that vtpmd gave it, any number; 1 if it gave none. Which
    of them mean the same to who asked, that command line says.
    """

    def __init__(self, said: str, its_status: int) -> None:
        super().__init__(said)
        self.its_status = its_status


class Round(NamedTuple):
    """What one round brought to the destination."""

    number: int
    record_bytes: int
    permanent_generation: int
    volatile_generation: int
    acknowledged_us: int | None  # None: QEMU's stream was faster


@dataclass(frozen=True, kw_only=True)
class Session:
    """What vtpmd says of a session to another vtpmd."""

    session: str = ""
    state: str = "none"
    outcome: str | None = None
    reason: str | None = None
    refusal: str | None = None  # the destination's reason in a word, if it refused
    qemu: str | None = None  # how this vtpmd follows its QEMU
    peer_qemu: str | None = None  # how the destination's does
    rounds: tuple[Round, ...] = ()
    tail_bytes: int | None = None
    phases_us: Mapping[str, int]
    digests: Mapping[str, str]


class ManagementClient:
    """A connection to one vtpmd."""

    def __init__(self, path: Path, client: QMPClient) -> None:
        self._path = path
        self._client = client

    async def execute(self, command: str, **arguments: object) -> object:
        """Execute a command and return its result, unchecked.

        Raises ManagementRefusal when vtpmd answers an error, else ManagementError.
        """
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            if error.error_class == NOT_FOUND:
                raise ManagementError(
                    f"vtpmd on {self._path} is of an earlier version, which has no {command}: "
                    "end it, and attach this one: vtpmd attach DIR"
                ) from error
            raise ManagementRefusal(line(error), _exit_status(error)) from error
        except TimeoutError as error:
            raise ManagementError(
                f"vtpmd on {self._path} has not answered {command} within {ANSWER_TIMEOUT_S:.0f} s"
            ) from error
        except (ExecInterruptedError, StateError) as error:
            raise ManagementError(
                f"vtpmd on {self._path} went away before it answered {command}"
            ) from error
        except QMPError as error:
            raise ManagementError(f"{command} on {self._path}: {line(error)}") from error

    async def query_migration(self) -> Session:
        """Return the session that there is, or was last. Raises ManagementError."""
        answer = await self.execute("query-migration")
        try:
            return _session(answer)
        except (KeyError, TypeError, ValueError) as error:
            raise ManagementError(
                f"vtpmd on {self._path} answers query-migration with what this vtpmd cannot read; "
                "use the same version of both"
            ) from error


@asynccontextmanager
async def connect(path: Path, deliver: Deliver) -> AsyncIterator[ManagementClient]:
    """Connect to the vtpmd that manages itself on ``path``, and disconnect afterwards.

    ``deliver`` gets each event's name and data as it is read, and must return at once. Raises
    ManagementError.
    """
    client = QMPClient()

    def take(message: Message) -> bool:
        # The library's own listener would keep the event.
        name, data = message.get("event"), message.get("data")
        if isinstance(name, str) and isinstance(data, dict):
            deliver(name, data)
        return False

    client.events.event_filter = take
    with _open(path) as sock:
        try:
            await _greet(client, sock, path)
            yield ManagementClient(path, client)
        finally:
            # A greeting that failed may have left the library half connected.
            if client.runstate is not Runstate.IDLE:
                with suppress(QMPError, OSError, EOFError):
                    await client.disconnect()


def _open(path: Path) -> socket.socket:
    # The library leaves a socket open that it made for a greeting that did not come.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        reason = f"{error.strerror or error}; start vtpmd with --manage {path}"
        raise ManagementError(f"cannot manage vtpmd on {path}: {reason}") from error
    return sock


async def _greet(client: QMPClient, sock: socket.socket, path: Path) -> None:
    try:
        async with asyncio.timeout(GREETING_TIMEOUT_S):
            await client.connect(sock)
    except (ConnectError, TimeoutError, AssertionError) as error:
        # The library asserts that no connection ends as soon as it is made.
        raise _not_vtpmd(path) from error
    if client.greeting is None or client.greeting.QMP.version.get("package") != "vtpmd":
        raise _not_vtpmd(path)


def _not_vtpmd(path: Path) -> ManagementError:
    return ManagementError(
        f"cannot manage vtpmd on {path}: no vtpmd greets there; give what vtpmd run has as "
        "--manage, as root or the user that runs it"
    )


def _exit_status(error: ExecuteError) -> int:
    answered = error.received["error"]
    status = answered.get("exit-status") if isinstance(answered, dict) else None
    return status if type(status) is int else VtpmdError.exit_status


def line(said: object) -> str:
    """Return what was said as one short line without control characters."""
    text = " ".join(str(said).split())[:TEXT_LENGTH_MAX]
    return "".join(c if c.isprintable() else "?" for c in text)


def _session(answer: object) -> Session:
    """Check an answer to query-migration. Raises KeyError, TypeError or ValueError."""
    fields = _object(answer)
    if fields["state"] == "none":
        return Session(phases_us={}, digests={})
    rounds = fields["rounds"]
    if not isinstance(rounds, list):
        raise TypeError("rounds")
    return Session(
        session=_text(fields["session"]),
        state=_text(fields["state"]),
        outcome=_text_or_none(fields["outcome"]),
        reason=_text_or_none(fields["reason"]),
        refusal=_text_or_none(fields["refusal"]),
        qemu=_text_or_none(fields["qemu"]),
        peer_qemu=_text_or_none(fields["peer-qemu"]),
        rounds=tuple(_round(_object(each)) for each in rounds),
        tail_bytes=_number_or_none(fields["tail-bytes"]),
        phases_us={_text(k): _number(v) for k, v in _object(fields["phases-us"]).items()},
        digests={_text(k): _text(v) for k, v in _object(fields["digests"]).items()},
    )


def _round(fields: dict[str, object]) -> Round:
    return Round(
        number=_number(fields["round"]),
        record_bytes=_number(fields["bytes"]),
        permanent_generation=_number(fields["permanent-generation"]),
        volatile_generation=_number(fields["volatile-generation"]),
        acknowledged_us=_number_or_none(fields["acknowledged-us"]),
    )


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} is no object")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{type(value).__name__} is no number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return line(value)


def _number_or_none(value: object) -> int | None:
    return None if value is None else _number(value)


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value)
