"""Serve the management socket: commands to the daemon, and what happens in it as events.

``vtpmd.wire.management`` is the protocol; here are the socket, who may use it, and the registry of
commands. A client's commands are carried out one after the other, those of different clients side
by side. A command that has begun is carried out even if its client leaves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple

from vtpmd import __version__
from vtpmd.daemon.listener import BACKLOG
from vtpmd.errors import VtpmdError
from vtpmd.wire.management import (
    CLOSED,
    NEED_DATA,
    NEGOTIATE,
    Command,
    Connection,
    Error,
    ErrorClass,
    Event,
    Greeting,
    Negotiate,
    Negotiated,
    Received,
    Refusal,
    Return,
    Sent,
    State,
    shown,
)

log = logging.getLogger(__name__)

# A shell, a libvirt hook, a `vtpmd migrate`, and some that somebody forgot to end.
CLIENTS_MAX = 8
READ_BYTES_MAX = 64 * 1024
# What a client has not read. A round of a migration makes some hundred bytes of events.
UNREAD_BYTES_MAX = 1024 * 1024
# For a client to read its answer: its next command waits for that.
ANSWER_TIMEOUT_S = 5.0

Arguments = Mapping[str, Any]
Handler = Callable[[Arguments], Awaitable[object]]

_KINDS: Final[dict[type, str]] = {
    str: "a string",
    int: "an integer",
    bool: "true or false",
    list: "an array",
    dict: "an object",
}


class Argument(NamedTuple):
    """What a command's argument must be: of kind str, int, bool, list or dict."""

    kind: type
    required: bool = True


class _Registered(NamedTuple):
    arguments: Mapping[str, Argument]
    handler: Handler


class ManagementServer:
    """The management socket and the commands that it takes."""

    def __init__(self, listening: socket.socket, on_quit: Callable[[], None]) -> None:
        """Take a UNIX socket that is bound and listens; it stays the caller's.

        ``on_quit`` is called, once for each command ``quit``, just before that is answered; it
        must return at once.
        """
        self._listening = listening
        self._on_quit = on_quit
        self._clients: set[_Client] = set()  # that are served
        self._commands: dict[str, _Registered] = {}
        self.register("query-commands", {}, self._query_commands)
        self.register("query-version", {}, self._query_version)
        self.register("quit", {}, self._quit)

    def register(self, name: str, arguments: Mapping[str, Argument], handler: Handler) -> None:
        """Add a command.

        ``handler`` gets the arguments that the client gave, each of its kind and none missing but
        optional ones, and returns what JSON can say. A VtpmdError's text and exit status are the
        client's answer; anything else that is raised is an internal error. Raises ValueError for a
        name that is taken or a kind that is none.
        """
        if name in (NEGOTIATE, *self._commands) or any(
            a.kind not in _KINDS for a in arguments.values()
        ):
            raise ValueError(f"the command {name} with the arguments {dict(arguments)}")
        self._commands[name] = _Registered(arguments, handler)

    async def serve(self) -> None:
        """Serve until cancelled; then commands that are being carried out are cancelled, too."""
        async with asyncio.TaskGroup() as group:

            def connected(reader: StreamReader, writer: StreamWriter) -> None:
                # Here the connection still is there to be asked who it is.
                group.create_task(self._serve(_Client(reader, writer)))

            server = await asyncio.start_unix_server(
                connected,
                sock=self._listening.dup(),
                limit=READ_BYTES_MAX,
                backlog=BACKLOG,
            )
            try:
                # Not serve_forever(): from Python 3.12 on it waits for clients when cancelled.
                await asyncio.get_running_loop().create_future()
            finally:
                server.close()

    def broadcast(self, name: str, data: Mapping[str, object]) -> None:
        """Send an event to every client that has negotiated.

        Does not wait: a client with more than UNREAD_BYTES_MAX unread is disconnected. Raises
        TypeError or ValueError for data that JSON cannot say.
        """
        event = Event(name, data, time.time_ns() // 1000)
        for client in list(self._clients):
            if client.connection.state is State.READY:
                client.send(event)

    async def _serve(self, client: _Client) -> None:
        try:
            if (reason := self._reason_to_refuse(client)) is not None:
                log.warning("management socket: process %d refused: %s", client.pid, reason)
                client.send(Refusal(reason))
                return
            self._clients.add(client)
            client.send(Greeting(_version()))
            while (received := await client.receive()) is not CLOSED:
                client.idle_since_s = None
                await self._answer(client, received)
                await client.sent()
                client.idle_since_s = time.monotonic()
        except OSError as error:
            log.debug("management socket: process %d lost: %s", client.pid, error.strerror)
        except Exception:  # one client's, whatever it is: the others must be served on
            log.exception("management socket: process %d given up", client.pid)
        finally:
            self._clients.discard(client)
            client.close()

    def _reason_to_refuse(self, client: _Client) -> str | None:
        # The socket's mode keeps others out; this holds when somebody has changed that.
        if client.uid not in (0, os.geteuid()):
            return f"user {client.uid} may not manage this vtpmd: only root and its own user may"
        if len(self._clients) == CLIENTS_MAX and not self._make_room():
            return f"{CLIENTS_MAX} clients wait for an answer already: end one of them"
        return None

    def _make_room(self) -> bool:
        """Disconnect the client that nobody misses most; return False if all wait for answers."""
        idle = [
            (client.connection.state is State.READY, client.idle_since_s, client)
            for client in self._clients
            if client.idle_since_s is not None
        ]
        if not idle:
            return False
        # Who has not negotiated gets no events, and so cannot be listening to them.
        _, since_s, client = min(idle, key=lambda each: each[:2])
        log.warning(
            "management socket: process %d disconnected to let another in: of %d clients it has "
            "asked for nothing the longest, %.0f s",
            client.pid,
            CLIENTS_MAX,
            time.monotonic() - since_s,
        )
        self._clients.discard(client)
        client.close()
        return True

    async def _answer(self, client: _Client, received: Received) -> None:
        match received:
            case Command():
                start = time.perf_counter_ns()
                await self._execute(client, received)
                duration_us = (time.perf_counter_ns() - start) // 1000
                log.debug("management socket: %s, %d µs", shown(received.name), duration_us)
            case Negotiate(id=id_):
                client.send(Negotiated(id_))
            case Error():
                client.send(received)

    async def _execute(self, client: _Client, command: Command) -> None:
        registered = self._commands.get(command.name)
        if registered is None:
            reason = f"there is no command {shown(command.name)}; query-commands lists them"
            client.send(Error(ErrorClass.COMMAND_NOT_FOUND, reason, command.id))
            return
        try:
            _check_arguments(command, registered.arguments)
            client.send(Return(await registered.handler(command.arguments), command.id))
        except VtpmdError as error:
            status = error.exit_status
            client.send(Error(ErrorClass.GENERIC, str(error), command.id, status))
        except Exception as error:  # a handler's fault: this client, and the next, is served on
            # Only our own errors are known to hold nothing secret.
            log.error("the command %s failed: %s", command.name, type(error).__name__)
            log.debug("the error was raised here", exc_info=True)
            reason = "internal error; vtpmd's log says more"
            client.send(Error(ErrorClass.GENERIC, reason, command.id))

    async def _query_commands(self, _: Arguments) -> object:
        return [{"name": name} for name in sorted((NEGOTIATE, *self._commands))]

    async def _query_version(self, _: Arguments) -> object:
        return _version()

    async def _quit(self, _: Arguments) -> object:
        self._on_quit()
        return {}


class _Client:
    """One client: its process, its bytes, its connection's state."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.connection = Connection()
        # Since when it waits for no answer; None: it does.
        self.idle_since_s: float | None = time.monotonic()
        self._reader = reader
        self._writer = writer
        # sent() waits until nothing is left.
        writer.transport.set_write_buffer_limits(high=0)
        ucred = struct.Struct("=iII")  # pid, uid, gid: struct ucred of unix(7)
        peer = writer.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, ucred.size
        )
        self.pid, self.uid, _ = ucred.unpack(peer)

    async def receive(self) -> Received:
        """Wait for the next command, or what else is to be answered, or CLOSED. Raises OSError."""
        while (received := self.connection.next_event()) is NEED_DATA:
            self.connection.receive_data(await self._reader.read(READ_BYTES_MAX))
        return received

    def send(self, message: Sent) -> None:
        """Send a message without waiting; a client that does not read is disconnected."""
        data = self.connection.send(message)
        transport = self._writer.transport
        if transport.is_closing():
            return
        self._writer.write(data)
        if transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            log.warning("management socket: process %d does not read; disconnected", self.pid)
            transport.abort()

    async def sent(self) -> None:
        """Wait until the client has taken what was sent. Raises OSError, also for its time."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await self._writer.drain()

    def close(self) -> None:
        """Close the connection; what the client has not taken by now is dropped."""
        self._writer.transport.abort()


def _check_arguments(command: Command, expected: Mapping[str, Argument]) -> None:
    """Raise VtpmdError, which says what is wrong, unless the arguments are what is expected."""
    for name, value in command.arguments.items():
        if name not in expected:
            takes = ", ".join(expected) or "none"
            raise VtpmdError(f"{command.name} has no argument {shown(name)}; it takes {takes}")
        # In Python a bool is an int, in JSON it is not.
        if type(value) is not expected[name].kind:
            kind = _KINDS[expected[name].kind]
            raise VtpmdError(f"the argument '{name}' of {command.name} must be {kind}")
    for name, argument in expected.items():
        if argument.required and name not in command.arguments:
            raise VtpmdError(f"{command.name} needs the argument '{name}'")


def _version() -> dict[str, object]:
    # qmp-shell looks for the version under this name, and so may others.
    numbers = zip(("major", "minor", "micro"), __version__.split("."), strict=True)
    return {"qemu": {name: int(number) for name, number in numbers}, "package": "vtpmd"}
