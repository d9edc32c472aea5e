"""vtpmd's end of the engine link: requests, the engine's questions, and the process' death."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import socket
import struct
from array import array
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vtpmd import core
from vtpmd.core import LinkHeader, LinkOperation
from vtpmd.core.link import (
    LINK_SINCE,
    LinkCondition,
    LinkCopy,
    LinkCustody,
    LinkQuestion,
    link_condition,
    pack_link_lane,
    unpack_link_copy,
    unpack_link_staged,
)
from vtpmd.daemon.attachment import Attachment
from vtpmd.errors import VtpmdError
from vtpmd.wire.tpm import Result

if TYPE_CHECKING:
    from vtpmd.core.lane import LaneKeying

log = logging.getLogger(__name__)

# Longer than any command (an RSA key takes a second or two under load) and any disk that is well.
# What is slower is waited for.
WARN_AFTER_S = 60.0
WAIT_S = 1.0
READ_BYTES_MAX = 64 * 1024
# How long an answer is waited for without looking elsewhere: a capture takes 0.05 ms, a start 0.2.
SOON_MS = 1
# What a clean stop may take: the command that runs, TPM2_Shutdown, one write of the state. Nor is
# any answer waited for longer then.
STOP_TIMEOUT_S = 20.0
# An engine that ends closes the link a moment before its process is gone.
GONE_TIMEOUT_S = 1.0
# Of an engine that has stopped in order (csrc/engine/main.c); the other one leaves a journal.
EXIT_STOPPED, EXIT_JOURNAL, EXIT_REMOVED = 0, 7, 9
EXITS_IN_ORDER = (EXIT_STOPPED, EXIT_JOURNAL, EXIT_REMOVED)


class EngineDied(VtpmdError):
    """The engine process is gone; the vTPM's volatile state is lost with it."""


class EngineDetached(EngineDied):
    """The link is closed. The process may be gone, or serve on: nothing is known of its TPM."""


class EngineOlder(VtpmdError):
    """The engine is of an earlier version of vtpmd, and does not know what it was to be asked."""


class EngineState(Enum):
    """Where an engine is in its life, as its vtpmd sees it."""

    SERVING = "requests are answered"
    STOPPING = "it was told to end; the process is on its way out"
    LOST = "the link is closed; it is not known yet why"
    DETACHED = "the link is closed, and the process serves on: vtpmd may attach again"
    DEAD = "the process is gone"


class Reply(NamedTuple):
    """The engine's answer to one request."""

    result: int
    argument: int
    payload: bytearray


class Question(NamedTuple):
    """What the engine asks, or says unasked."""

    number: LinkQuestion
    argument: int
    payload: bytes


class Answer(NamedTuple):
    """What it is answered."""

    result: int = 0  # a TPM_RESULT
    argument: int = 0
    payload: bytes = b""


class Answerer(Protocol):
    """Who answers what the engine asks."""

    async def answer(self, question: Question) -> Answer:
        """Return the answer. QEMU waits for it."""

    def hear(self, news: Question) -> None:
        """Take what needs no answer."""


class _Asked(NamedTuple):
    """A request that is on its way, and where its answer will be."""

    operation: LinkOperation
    reply: asyncio.Future[Reply]


class Meanwhile:
    """Something that is done while the engine is busy, and why it failed if it did."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do
        self.error: VtpmdError | None = None

    def run(self) -> None:
        """Do it, and keep the VtpmdError that it raises."""
        try:
            self._do()
        except VtpmdError as error:
            self.error = error


class Engine:
    """One vTPM's engine, for as long as vtpmd is attached to it.

    Its coroutines belong to one event loop and are cancelled only together with the engine: half a
    message on the link cannot be taken back. Requests are answered one at a time, in order. After
    :exc:`EngineDied` every further request raises it too.
    """

    def __init__(self, attachment: Attachment, *, is_child: bool) -> None:
        """Take an attachment's connection, which is closed here. Raises EngineDied."""
        self.pid = attachment.pid
        self._pidfd = _open_process(attachment)
        self.link_version = attachment.link_version
        self.library = attachment.library
        self.tpm_version = attachment.tpm_version
        self.state = EngineState.SERVING
        self.death: str | None = None
        self.exit_status = EXIT_STOPPED  # once it has ended in order
        self.detached = asyncio.Event()  # set once it is that
        self._is_child = is_child
        self._questions: list[Question] = []  # that came before there was who answers
        self._answerer: Answerer | None = None
        self._link = attachment.link
        self._poll = select.poll()
        self._poll.register(self._link, select.POLLIN)
        self._received = bytearray(attachment.received)
        self._lock = asyncio.Lock()  # a request is under way
        self._sending = asyncio.Lock()
        self._asked: deque[_Asked] = deque()  # and not answered yet
        self._promised: dict[LinkQuestion, asyncio.Future[bytes]] = {}  # news that somebody awaits
        self._ends = False
        self._told_status: int | None = None  # with what it exits, as it says
        self._answering: set[asyncio.Task[None]] = set()
        self._exited = asyncio.Event()
        self._known = asyncio.Event()  # what became of it, once the link is closed
        self._on_death: Callable[[str], None] | None = None
        self._on_end: Callable[[], None] | None = None

    def begin(self, on_death: Callable[[str], None], on_end: Callable[[], None]) -> None:
        """Take what the engine says, and see it end.

        From now on ``on_death`` is called once, with one line for a person, if the process does not
        stop in order; ``on_end`` if it does so before :meth:`stop`.
        """
        self._on_death, self._on_end = on_death, on_end
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pidfd, self._reap)
        loop.add_reader(self._link, self._on_readable)
        while self._take_message():
            pass  # of what has come with the greeting

    def answer_by(self, answerer: Answerer) -> None:
        """Have somebody answer what the engine asks, and what it has asked by now."""
        waiting, self._questions = self._questions, []
        self._answerer = answerer
        for question in waiting:
            self._take_question(question)

    async def request(
        self,
        operation: LinkOperation,
        argument: int = 0,
        payload: bytes | bytearray | memoryview = b"",
        meanwhile: Meanwhile | None = None,
        *,
        soon: bool = True,
        descriptor: int | None = None,
    ) -> Reply:
        """Send one request and return its answer.

        ``payload`` has at most LINK_PAYLOAD_BYTES_MAX bytes. ``meanwhile`` is run while the engine
        is at it. ``soon`` is false where the event loop has something to do until the answer comes.
        Raises EngineDied; EngineOlder for an operation that this engine does not know, and then
        nothing was asked.
        """
        if LINK_SINCE.get(operation, 0) > self.link_version:
            raise EngineOlder(
                f"the vTPM's engine (pid {self.pid}) is of an earlier version of vtpmd, which has "
                f"no {operation.name}: stop the vTPM, and start it again by this version"
            )
        if len(payload) > core.LINK_PAYLOAD_BYTES_MAX:
            raise ValueError(f"a payload of {len(payload)} bytes on the engine link")
        async with self._lock:
            if self.state is EngineState.LOST:
                await self._known.wait()
            if self.state is not EngineState.SERVING:
                raise self._error()
            return await self._transact(
                operation, argument, payload, meanwhile, soon=soon, descriptor=descriptor
            )

    async def _transact(
        self,
        operation: LinkOperation,
        argument: int = 0,
        payload: bytes | bytearray | memoryview = b"",
        meanwhile: Meanwhile | None = None,
        *,
        soon: bool = True,
        descriptor: int | None = None,
    ) -> Reply:
        header = LinkHeader(operation, 0, argument, len(payload))
        reply = await self._ask(header, payload, descriptor)
        if meanwhile is not None:
            meanwhile.run()
        return await self._receive_reply(reply, soon=soon)

    async def _ask(
        self,
        header: LinkHeader,
        payload: bytes | bytearray | memoryview,
        descriptor: int | None = None,
    ) -> asyncio.Future[Reply]:
        """Send a request; return where its answer will be."""
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._asked.append(_Asked(LinkOperation(header.operation), reply))
        await self._send(header, payload, descriptor)
        return reply

    def promise(self, number: LinkQuestion) -> asyncio.Future[bytes]:
        """Return where the payload of the next news of a kind will be; EngineDied if none comes."""
        promised: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._promised[number] = promised
        return promised

    async def set_lane(self, lane: int, keying: LaneKeying, *, is_source: bool) -> None:
        """Have the engine speak over a connection, of which it gets a descriptor of its own.

        Raises VtpmdError.
        """
        payload = pack_link_lane(keying, is_source=is_source)
        reply = await self.request(LinkOperation.SET_LANE, payload=payload, descriptor=lane)
        payload[:] = bytes(len(payload))
        if reply.result:
            raise VtpmdError(f"the engine cannot use the lane: it says {reply.result:#x}")

    async def raise_generations(self, floor: int) -> None:
        """Make every generation that is still to come larger than ``floor``. Raises EngineDied."""
        floors = struct.pack("=QQ", floor, floor)
        await self.request(LinkOperation.RAISE_GENERATION, payload=floors)

    async def staged(self) -> core.Image:
        """Return the permanent state that the records of STAGE have made. Raises VtpmdError."""
        reply = await self.request(LinkOperation.GET_STAGED)
        if reply.result:
            raise VtpmdError(f"the engine has no state that came: it says {reply.result:#x}")
        return unpack_link_staged(reply.payload)

    async def copy(self) -> LinkCopy:
        """Return the states of the TPM that runs, of one moment.

        Raises VtpmdError: it does not, or has stopped as its state could not be stored.
        """
        try:
            reply = await self.request(LinkOperation.COPY)
        except EngineOlder as error:
            what = f"cannot copy the states of the TPM: {error}; or leave out --volatile"
            raise EngineOlder(what) from error
        if reply.result == Result.BAD_ORDINAL:
            raise VtpmdError(
                "the vTPM's TPM does not run here, so it has no volatile state to copy: leave out "
                "--volatile, or boot its guest"
            )
        if reply.result == Result.IOERROR:
            raise VtpmdError(
                "the vTPM's TPM has stopped, as its state could not be stored (see its log), and "
                "no TPM goes on from that: make room or repair the file system, then restart the "
                "guest; or leave out --volatile: what was acknowledged is in the state directory"
            )
        if reply.result:
            raise VtpmdError(f"the engine cannot copy its states: it says {reply.result:#x}")
        copy = unpack_link_copy(reply.payload)
        reply.payload[:] = bytes(len(reply.payload))
        return copy

    async def condition(self) -> tuple[LinkCondition, LinkCustody]:
        """Return what QEMU has made of the TPM, and whose that is. Raises EngineDied."""
        reply = await self.request(LinkOperation.GET_CONDITION)
        return link_condition(reply.argument)

    async def end_control(self) -> None:
        """Have no more of QEMU's commands begun, and wait until what is asked is answered."""
        self._ends = True
        with suppress(EngineDied):
            await self.request(LinkOperation.END_CONTROL)
        await asyncio.gather(*self._answering)

    async def stop(self) -> None:
        """End the engine: it sends TPM2_Shutdown if the guest did not, and exits.

        Returns when the process is gone; one that hangs is killed after STOP_TIMEOUT_S. One that
        was killed has died. One that this vtpmd is not attached to any more is sent SIGTERM.
        """
        if self.state is not EngineState.DEAD:
            self._ends = True
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._ask_to_end()
                    await self._exited.wait()
            except TimeoutError:
                await self._kill()
        await self.detach()

    async def _ask_to_end(self) -> None:
        async with self._lock:
            if self.state is EngineState.SERVING:
                self.state = EngineState.STOPPING
                with suppress(EngineDied):
                    await self._transact(LinkOperation.END, soon=False)
        if self.state is EngineState.LOST:
            await self._known.wait()
        if self.state is EngineState.DETACHED:
            self.state = EngineState.STOPPING
            self._signal_end()

    def _signal_end(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def leave(self) -> None:
        """Close the link under whatever waits for the engine: that raises EngineDetached soon."""
        if self.state is EngineState.SERVING:
            self._lose(TimeoutError("this vtpmd ends"))

    async def detach(self) -> None:
        """Close the link, and see the process no more: it serves on, if it lives."""
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)
        self._close()
        if self.state is not EngineState.DEAD:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self.state = EngineState.DETACHED

    def _close(self) -> None:
        if self._link.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._link)
        self._link.close()

    async def _send(
        self,
        header: LinkHeader,
        payload: bytes | bytearray | memoryview = b"",
        descriptor: int | None = None,
    ) -> None:
        rights = [] if descriptor is None else [_rights(descriptor)]
        packed = core.pack_link_header(header)
        try:
            async with self._sending:
                # Most messages fit into the socket's buffer.
                while not (sent := self._send_some([packed, payload], rights)):
                    await self._writable()
                if sent < len(packed) + len(payload):
                    rest = memoryview(packed + bytes(payload))[sent:]
                    await asyncio.get_running_loop().sock_sendall(self._link, rest)
        except OSError as error:
            self._lose(error)
            await self._known.wait()
            raise self._error() from error

    def _send_some(self, pieces: list[Any], rights: list[Any]) -> int:
        """Send what there is room for, with the descriptor; return how many bytes."""
        try:
            return self._link.sendmsg(pieces, rights)
        except BlockingIOError:
            return 0

    async def _writable(self) -> None:
        loop, writable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_writer(self._link, writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(self._link)

    async def _receive_reply(self, reply: asyncio.Future[Reply], *, soon: bool) -> Reply:
        # Most answers come sooner than the event loop could look elsewhere and back.
        while soon and not reply.done() and self._poll.poll(SOON_MS):
            self._on_readable()
        waited_s = 0.0
        while not reply.done():
            await asyncio.wait({reply}, timeout=WAIT_S)
            waited_s += WAIT_S
            if self._ends and waited_s >= STOP_TIMEOUT_S and not reply.done():
                await self._kill()
                raise self._error()
            if waited_s % WARN_AFTER_S == 0:
                log.warning(
                    "the engine has not answered %s for %.0f s: its storage may stand still; the "
                    "guest's TPM waits for it",
                    *(self._asked[0].operation.name, waited_s),
                )
        try:
            return reply.result()
        except OSError as error:
            await self._known.wait()
            raise self._error() from error

    def _on_readable(self) -> bool:
        """Take what has come; return whether there may be more."""
        try:
            data = self._link.recv(READ_BYTES_MAX)
            if not data:
                raise ConnectionError("closed")
            self._received += data
            while self._take_message():
                pass
        except BlockingIOError:
            return False
        except (OSError, ValueError) as error:
            self._lose(error)
            return False
        return True

    def _lose(self, error: Exception) -> None:
        """The link is closed, or carries what is no message: half of one is not taken back."""
        if self.state is EngineState.SERVING:
            self.state = EngineState.LOST
            self._run(self._see_what_became())
        elif self.state is EngineState.STOPPING:
            self._signal_end()  # it may not have heard of it
        self._close()
        for each in self._asked:
            each.reply.set_exception(OSError(str(error)))
            each.reply.exception()  # whoever waits hears of it, and maybe nobody does
        self._asked.clear()
        for promised in self._promised.values():
            promised.set_exception(self._error())
            promised.exception()  # as above
        self._promised.clear()

    async def _see_what_became(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(GONE_TIMEOUT_S):
                await self._exited.wait()
        if self.state is EngineState.LOST:
            self.state = EngineState.DETACHED
            self._known.set()
            self.detached.set()

    def _error(self) -> EngineDied:
        """Return what a request is refused with now."""
        if self.state is EngineState.DEAD:
            return EngineDied(self.death or f"the engine (pid {self.pid}) has stopped")
        return EngineDetached("the link to the engine is closed, which serves on")

    def _take_message(self) -> bool:
        """Take a message that is there whole. Raises OSError for one that is none."""
        head = core.LINK_HEADER_BYTES
        if len(self._received) < head:
            return False
        header = core.unpack_link_header(self._received[:head])
        if header.payload_bytes > core.LINK_PAYLOAD_BYTES_MAX:
            raise ConnectionError("a message that is too long")
        if len(self._received) < head + header.payload_bytes:
            return False
        payload = self._received[head : head + header.payload_bytes]
        del self._received[: head + header.payload_bytes]
        if header.operation == LinkQuestion.TELL_END:
            self._told_status = header.argument
        elif header.operation >= LinkQuestion.ASK_INIT:
            question = Question(LinkQuestion(header.operation), header.argument, bytes(payload))
            self._take_question(question)
        elif not self._asked or header.operation != self._asked[0].operation:
            raise ConnectionError("an answer to no request")
        else:
            self._asked.popleft().reply.set_result(Reply(header.result, header.argument, payload))
        return True

    def _take_question(self, question: Question) -> None:
        if (promised := self._promised.pop(question.number, None)) is not None:
            promised.set_result(question.payload)
        elif self._answerer is None:
            self._questions.append(question)
        elif question.number.is_news:
            self._answerer.hear(question)
        else:
            self._run(self._answer(self._answerer, question))

    def _run(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, answerer: Answerer, question: Question) -> None:
        answer = await answerer.answer(question)
        if self.state is not EngineState.SERVING:
            return  # the link is closed, and it ends in order
        header = LinkHeader(question.number, answer.result, answer.argument, len(answer.payload))
        with suppress(EngineDied):
            await self._send(header, answer.payload)

    async def _kill(self) -> None:
        if not self._exited.is_set():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await self._exited.wait()

    def _reap(self) -> None:
        """Take the exit status of the process, which has ended."""
        while self._link.fileno() >= 0 and self._on_readable():
            pass  # up to its last word
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = self._told_status
        if self._is_child:
            _, status = os.waitpid(self.pid, 0)
            code = os.waitstatus_to_exitcode(status)
        was_stopping = self.state is EngineState.STOPPING
        self.state = EngineState.DEAD
        self._exited.set()
        self._known.set()
        if code is None or code not in EXITS_IN_ORDER:
            self.death = describe_death(self.pid, code, was_stopping=was_stopping)
            if self._on_death is not None:
                self._on_death(self.death)
            return
        self.exit_status = code
        if not was_stopping and self._on_end is not None:
            self._on_end()


def _rights(descriptor: int) -> tuple[int, int, array[int]]:
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor])


def _open_process(attachment: Attachment) -> int:
    """Return a descriptor of the engine's process, and of no other that has got its number since.

    Raises EngineDied.
    """
    died = EngineDied(f"the engine (pid {attachment.pid}) has ended just now")
    try:
        pidfd = os.pidfd_open(attachment.pid)
    except ProcessLookupError:
        raise died from None
    with suppress(BlockingIOError):
        if not attachment.link.recv(1, socket.MSG_PEEK):
            os.close(pidfd)
            raise died
    return pidfd


def describe_death(pid: int, code: int | None, *, was_stopping: bool = False) -> str:
    """Return a line for a person about an engine that has not stopped in order."""
    if code is None:  # of no child of this process it is not told
        how = "ended without a word"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    else:
        how = f"exited with status {code}"
    if code == -signal.SIGSYS:
        how += (
            " for a system call that its sandbox forbids (its number is in the kernel's log, as "
            "syscall=; somebody may have broken into it)"
        )
    if was_stopping:
        return (
            f"the engine (pid {pid}) {how} before it had stopped in order; the state is safe, in "
            "its file and its journal together: see vtpmd fold"
        )
    return (
        f"the engine (pid {pid}) {how}; the guest's TPM answers with errors until vtpmd and the "
        "guest are started again"
    )
