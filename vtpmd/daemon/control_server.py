"""Serve the control channel: one client at a time, on a listening UNIX socket.

Bytes and descriptors are moved here, ``vtpmd.wire.control`` makes commands of them, a
:class:`Handler` gives the answers. asyncio's streams carry no descriptors, hence recvmsg().

Descriptors belong to the server: it takes over at most DESCRIPTORS_MAX with a command, and has
closed each of them when the command is answered. A handler that keeps one duplicates it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import time
from typing import Protocol

from vtpmd.daemon.acceptor import Acceptor
from vtpmd.daemon.readiness import Readiness
from vtpmd.errors import VtpmdError
from vtpmd.wire import control
from vtpmd.wire.control import Command, ProtocolError, Result

log = logging.getLogger(__name__)

READ_BYTES_MAX = 64 * 1024
# SET_DATAFD has one; the second is there to be noticed. The kernel drops what has no room.
DESCRIPTORS_MAX = 2
# More than a command may have. A client that sends this much without waiting for its answer is no
# client of this protocol.
EXCESS_BYTES_MAX = 1024 * 1024
# A blob does not fit into a socket's buffer, so the client has to read; QEMU does so at once.
ANSWER_TIMEOUT_S = 5.0


class Handler(Protocol):
    """Who answers the commands."""

    async def handle(self, request: control.Request, descriptors: list[int]) -> bytes:
        """Return the encoded response to a command.

        ``descriptors`` holds the one of a SET_DATAFD, a stream socket, and is empty for every
        other command; it is closed after this returns. What is raised is logged and answered with
        TPM_FAIL; an error's text is shown only if it is a VtpmdError's.
        """

    async def finish(self) -> None:
        """Do what a command leads to that its answer need not wait for.

        Called when the answer is out, and before the next command is read.
        """


class ControlServer:
    """The control channel of one vTPM."""

    def __init__(self, listening: socket.socket, handler: Handler) -> None:
        """Take a socket that is bound and listens; it stays the caller's."""
        self._listening = listening
        self._handler = handler
        # Who cancels holds it: no command is left half carried out.
        self.between_commands = asyncio.Lock()

    async def serve(self) -> None:
        """Serve one client after another; the others wait in the socket's backlog.

        Returns after a SHUTDOWN was answered, with whatever result. May be cancelled between
        commands: then the client's connection and every descriptor are closed.
        """
        self._listening.setblocking(False)
        acceptor = Acceptor(self._listening, "the control socket")
        while True:
            client, _ = await acceptor.accept()
            with client:
                connection = _Connection(client, self._handler, self.between_commands)
                try:
                    if await connection.serve():
                        return
                except OSError as error:
                    log.debug("control channel: connection lost: %s", error.strerror)
                finally:
                    connection.close()


class _Connection:
    """One client's connection."""

    def __init__(
        self, client: socket.socket, handler: Handler, between_commands: asyncio.Lock
    ) -> None:
        self._socket = client
        self._handler = handler
        self._between_commands = between_commands
        self._receiver = control.Receiver()
        self._descriptors: list[int] = []
        self._readiness = Readiness(client)

    async def serve(self) -> bool:
        """Answer commands until the connection is of no more use; return True for a SHUTDOWN."""
        while (event := await self._next_event()) is not None:
            async with self._between_commands:
                sent = await self._carry_out(event)
            if isinstance(event, control.Bare) and event.command is Command.SHUTDOWN:
                return True
            if not sent or (isinstance(event, ProtocolError) and event.close):
                return False
        return False

    async def _carry_out(self, event: control.Request | ProtocolError) -> bool:
        """Answer a command, and do what it leads to; return False if the answer was not sent."""
        start = time.perf_counter_ns()
        answer = await self._answer(event)
        self.close_descriptors()
        sent = await self._send(answer)
        if log.isEnabledFor(logging.DEBUG):
            _log_command(event, answer, time.perf_counter_ns() - start)
        await self._finish()
        return sent

    async def _next_event(self) -> control.Request | ProtocolError | None:
        """Wait for a command; None if the client closes, or leaves one incomplete for too long."""
        deadline_s: float | None = None
        while True:
            try:
                data = self._read()
            except BlockingIOError:
                if not await self._wait(deadline_s):
                    log.debug("control channel: a command was not completed; connection closed")
                    return None
                continue
            if not data:
                return None
            self._receiver.receive_data(data)
            event = self._receiver.next_event()
            if not isinstance(event, control.NeedData):
                return event
            if deadline_s is None:
                now_s = asyncio.get_running_loop().time()
                deadline_s = now_s + control.COMMAND_TIMEOUT_S

    async def _wait(self, deadline_s: float | None) -> bool:
        """Return True when there may be something to read, False at the deadline."""
        if deadline_s is None:
            await self._readiness.wait()
            return True
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._readiness.wait()
        except TimeoutError:
            return False
        return True

    def _read(self) -> bytes:
        """Read once and keep the descriptors that came along. Raises OSError."""
        data, descriptors, _, _ = socket.recv_fds(
            self._socket, READ_BYTES_MAX, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
        )
        self._descriptors += descriptors
        # A command in pieces may bring some with each piece.
        while len(self._descriptors) > DESCRIPTORS_MAX:
            os.close(self._descriptors.pop())
        return data

    async def _answer(self, event: control.Request | ProtocolError) -> bytes:
        if isinstance(event, ProtocolError):
            return control.encode_error(event.number, event.result)
        descriptors = []
        if event.command is Command.SET_DATAFD:
            if len(self._descriptors) != 1 or not _is_stream_socket(self._descriptors[0]):
                return control.encode_error(event.command, Result.BAD_PARAMETER)
            descriptors = self._descriptors
        try:
            return await self._handler.handle(event, descriptors)
        except Exception as error:  # whatever it is: this client, and the next, must be served on
            _log_failure(f"{event.command.name} failed: %s; answered TPM_FAIL", error)
            return control.encode_error(event.command, Result.FAIL)

    async def _finish(self) -> None:
        try:
            await self._handler.finish()
        except Exception as error:  # as above
            _log_failure("what follows an answer failed: %s", error)

    async def _send(self, answer: bytes) -> bool:
        """Send an answer; return False if this connection is of no more use."""
        try:
            self._drain()
            sent = self._send_now(answer)
            if sent < len(answer):
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_sendall(self._socket, answer[sent:])
        except TimeoutError:
            log.debug("control channel: the client does not read its answer; connection closed")
            return False
        except OSError as error:
            log.debug("control channel: no answer could be sent: %s", error.strerror or error)
            return False
        return True

    def _send_now(self, answer: bytes) -> int:
        """Send what fits into the socket's buffer; return how much did. Raises OSError."""
        try:
            return self._socket.send(answer)
        except BlockingIOError:
            return 0

    def _drain(self) -> None:
        """Drop what came in excess of the command. Raises OSError if there is no end to it."""
        excess_bytes = 0
        while excess_bytes <= EXCESS_BYTES_MAX:
            try:
                data = self._read()
            except BlockingIOError:
                return
            finally:
                self.close_descriptors()
            if not data:
                # The client sends no more; it may still read its answer.
                return
            excess_bytes += len(data)
        raise ConnectionError(f"more than {EXCESS_BYTES_MAX} bytes in excess of a command")

    def close(self) -> None:
        """Let go of everything but the socket itself."""
        self._readiness.close()
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close what the client has sent along."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def _is_stream_socket(descriptor: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        return sock.type is socket.SOCK_STREAM


def _log_failure(text: str, error: Exception) -> None:
    # Only our own errors are known to hold nothing of the TPM's state.
    reason = str(error) if isinstance(error, VtpmdError) else type(error).__name__
    log.error(text, reason)
    log.debug("the error was raised here", exc_info=error)


def _log_command(event: control.Request | ProtocolError, answer: bytes, duration_ns: int) -> None:
    if isinstance(event, ProtocolError):
        what = f"command {event.number:#x} refused ({event.reason})"
    else:
        what = event.command.name
    result = int.from_bytes(answer[:4], "big")
    log.debug("%s: result %#x, %d bytes, %d µs", what, result, len(answer), duration_ns // 1000)
