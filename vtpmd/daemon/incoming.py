"""The destination of a migration: does what ``vtpmd.migration.destination`` decides.

Records make images; a round of them is validated by libtpms and made durable before it is
acknowledged. The tail comes by way of QEMU. The TPM is started from it at once, but held: INIT
waits for the source's Grant, and the guest's first command for the durable record of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from vtpmd import core
from vtpmd.core import LinkInit, LinkOperation, LinkRetire
from vtpmd.daemon import tls
from vtpmd.daemon.engine import Engine, Meanwhile, Reply
from vtpmd.daemon.images import NOTHING, Images, digest
from vtpmd.daemon.wakefulness import Wakefulness
from vtpmd.errors import VtpmdError
from vtpmd.migration import destination, tail
from vtpmd.migration.destination import Destination, Do
from vtpmd.migration.states import ImpossibleEvent, Local, State
from vtpmd.migration.tail import TailCipher
from vtpmd.store.handover import Handover
from vtpmd.wire import peer
from vtpmd.wire.control import Result, StateType

log = logging.getLogger(__name__)

# From the tail to the Grant: a round trip, and a durable record at the source.
GRANT_TIMEOUT_S: Final = 10.0

_TYPES: Final = (StateType.PERMANENT, StateType.VOLATILE)


class Owner:
    """What a session needs of the vTPM's instance."""

    def __init__(
        self,
        *,
        engine: Engine,
        own: destination.Own,
        handover: Handover,
        wakefulness: Wakefulness,
    ) -> None:
        self.engine = engine
        self.own = own
        self.handover = handover
        self.wakefulness = wakefulness


class Incoming:
    """One session of the destination, from the connection to its end."""

    def __init__(self, owner: Owner, connection: tls.Connection) -> None:
        self._owner = owner
        self._machine = Destination(owner.own)
        self._connection: tls.Connection | None = connection
        self._images: dict[StateType, core.Image] = {}
        self._staged: Images = NOTHING
        self._staged_before: Images = NOTHING
        self._permanent_record = b""  # the one that came last
        self._durable_generation = 0  # of the permanent state
        self._forget_images()
        self._cipher: TailCipher | None = None
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._took_ns = self._granted_ns = 0
        self._starting: asyncio.Task[Reply] | None = None
        self._start_us = 0
        self._started = self._admitted = False

    @property
    def state(self) -> State:
        """Where the session is."""
        return self._machine.state

    @property
    def session(self) -> bytes:
        """The session's name, which the source has chosen."""
        return self._machine.session

    @property
    def has_ended(self) -> bool:
        """True once the session is of no more use."""
        return self.state is State.ENDED

    @property
    def awaits_init(self) -> bool:
        """True from the tail until the TPM has started from it."""
        return self.state in (State.TAKING, State.OWNING) and not self._started

    @property
    def awaits_admission(self) -> bool:
        """True from the start of the TPM until its commands are executed."""
        return self.state is State.OWNING and self._started and not self._admitted

    async def run(self, decoder: peer.Decoder, first: peer.Message) -> None:
        """Take what the source says until the session ends or the connection does."""
        try:
            await self._take(first)
            if self.state is State.RECEIVING:
                # Made before the guest stands still.
                self._owner.handover.prepare_to_take(self.session)
            while self._connection is not None:
                message = decoder.next_message()
                if message is not None:
                    await self._take(message)
                    continue
                data = await self._connection.stream.read()
                if not data:
                    raise ConnectionError("the source closed the connection")
                decoder.receive_data(data)
        except (OSError, EOFError, peer.StreamError, ImpossibleEvent, VtpmdError) as error:
            await self._lose(str(error))
        finally:
            self._close()

    async def reclaim_over(self, connection: tls.Connection) -> None:
        """The source asks again, over a new connection: its old one is gone."""
        self._close()
        self._connection = connection
        await self._take(peer.Reclaim(self.session))

    async def apply_tail(self, blob: bytes) -> None:
        """Take the tail that QEMU's stream has brought, and ask the source for the vTPM.

        Raises VtpmdError, in one line, for a tail that is not this session's next; nothing of it is
        used then.
        """
        self._owner.wakefulness.hold()
        async with self._lock:
            if self.state is not State.HOLDING:
                raise VtpmdError(
                    f"the tail is refused: the session is {self.state.name}, must be HOLDING; the "
                    "guest goes on at the source: migrate again"
                )
            try:
                await self._use_tail(blob)
            except (tail.TailError, VtpmdError) as error:
                for action in self._machine.step(Local.TAIL_REFUSED, str(error)):
                    await self._perform(action)
                raise VtpmdError(f"the tail is refused: {error}") from error

    async def _use_tail(self, blob: bytes) -> None:
        began_ns = time.perf_counter_ns()
        assert self._cipher is not None  # noqa: S101 - HOLDING comes after Key
        opened = self._cipher.open(blob, self.session)
        final = self._apply_tail(opened)
        apply_us = (time.perf_counter_ns() - began_ns) // 1000
        validate_us = store_us = 0
        if final is not self._staged:
            validate_us, store_us = await self._stage_images(final, opened.permanent)
        if self._starting is None:
            self._start()
        self._machine.step(Local.TAIL_APPLIED)
        durations_us = (apply_us, validate_us, store_us)
        self._staged = final
        self._took_ns = time.perf_counter_ns()
        digests = (digest(final.permanent), digest(final.volatile))
        await self._perform(self._machine.take(digests=digests, durations_us=durations_us))

    def _start(self) -> None:
        """Have the TPM start from what was staged last, while QEMU or the source is at work."""
        self._starting = asyncio.create_task(self._start_held())

    async def _end_start(self) -> None:
        """The TPM has been started from a state that is not the last."""
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
            self._starting = None
            await self._owner.engine.request(LinkOperation.FORGET_STATE)

    async def _start_held(self) -> Reply:
        """Start the TPM while the source decides; it executes nothing before it is admitted."""
        began_ns = time.perf_counter_ns()
        start = LinkInit.CAME | LinkInit.HELD
        reply = await self._owner.engine.request(LinkOperation.INIT, start, soon=False)
        self._start_us = (time.perf_counter_ns() - began_ns) // 1000
        return reply

    def _apply_tail(self, opened: tail.Tail) -> Images:
        """Return the images that a tail ends at. Raises TailError, DeltaError."""
        base = self._base_of(opened.header)
        if self._staged.generations == (opened.header.permanent_to, opened.header.volatile_to):
            # The round that the freeze sent over the link has come first.
            return self._staged
        return _apply(base, opened)

    def _base_of(self, header: tail.Header) -> Images:
        """Return the images that a tail continues. Raises TailError."""
        for base in (self._staged, self._staged_before):
            if (header.permanent_from, header.volatile_from) == base.generations:
                return base
        raise tail.TailError("it does not continue what was acknowledged here")

    async def start(self) -> int:
        """Wait for the Grant and the TPM; return libtpms' result.

        Raises VtpmdError when the vTPM is not ours: it must not run then.
        """
        assert self._starting is not None  # noqa: S101 - TAKING comes after it
        reply = await self._starting
        if reply.result == Result.SUCCESS:
            reply = await self._owner.engine.request(LinkOperation.EXPECT)
        await self._wait_for_grant()
        self._started = reply.result == Result.SUCCESS
        return reply.result

    async def _wait_for_grant(self) -> None:
        try:
            async with asyncio.timeout(GRANT_TIMEOUT_S):
                while self.state is State.TAKING:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            await self._lose("the source did not grant the vTPM in time")
        if self.state is not State.OWNING:
            raise VtpmdError(
                "the source has not granted the vTPM, so it is not started here; the guest goes on "
                "at the source: migrate again"
            )

    async def admit(self) -> bool:
        """Write down durably that the vTPM is ours, then have the guest's commands executed.

        INIT is answered already. Return False if it cannot be written: nothing is executed then.
        """
        async with self._lock:
            if not self.awaits_admission:
                return False
            self._admitted = True
            try:
                self._owner.handover.take()
                # Invariant 10: what is committed here comes after all that the source has used.
                await self._owner.engine.raise_generations(self._generation)
                await self._ask_engine(LinkOperation.ADMIT, "the TPM cannot be served")
            except VtpmdError as error:
                log.error("%s; the guest's TPM answers with errors; migrate it back", error)
                await self._owner.engine.request(LinkOperation.RETIRE, LinkRetire.UNSERVED)
                return False
            self._tell_running()
            return True

    def _tell_running(self) -> None:
        """Tell the source that the TPM runs, and what that took."""
        wait_us = (self._granted_ns - self._took_ns) // 1000
        self._send(peer.Running(self.session, wait_us, self._start_us))

    @property
    def _generation(self) -> int:
        """The highest that the source is known to have used."""
        return max(image.generation for image in self._staged)

    async def settle(self) -> None:
        """With the guest running: put the state into its own file."""
        engine, handover = self._owner.engine, self._owner.handover
        await engine.raise_generations(handover.reserve_generations(self._generation))
        reply = await engine.request(LinkOperation.STORE_PERMANENT)
        if reply.result:
            log.error("the state stays in tpm2-00.incoming: its own file cannot be written")
            return
        handover.finish_taking()
        self._forget_images()

    async def set_aside(self, reason: str) -> None:
        """QEMU brings whole blobs, or starts from the directory: the session is of no use."""
        if self.state not in (State.OWNING, State.ENDED):
            refusal = peer.Refuse(peer.Reason.STATE, f"{reason}; does its vtpmd follow its QEMU?")
            await self._perform(destination.Send(refusal))
            await self._lose(reason)
            self._close()

    async def _take(self, message: peer.Message) -> None:
        async with self._lock:
            for action in self._machine.step(message):
                await self._perform(action)
            if isinstance(message, peer.Key):
                self._cipher = TailCipher(key=message.key, uuid=self._machine.uuid)
        self._changed.set()

    async def _lose(self, reason: str) -> None:
        async with self._lock:
            if self.state not in (State.ENDED, State.STAGING):
                for action in self._machine.step(Local.LINK_LOST, reason):
                    await self._perform(action)
        self._changed.set()

    async def _perform(self, action: destination.Action) -> None:
        match action:
            case destination.Send(message=message):
                self._send(message)
            case destination.Apply(record=record):
                self._apply_record(record)
            case destination.Stage():
                await self._stage(action)
            case destination.Discard(reason=reason):
                await self._discard(reason)
            case Do.START:
                self._owner.wakefulness.hold()
                if self._starting is None:
                    self._start()
            case Do.MAY_RUN:
                self._granted_ns = time.perf_counter_ns()
            case Do.RELEASE:
                await self._release()
            case Do.CLOSE:
                self._close()

    def _send(self, message: peer.Message) -> None:
        if self._connection is not None:
            self._connection.stream.write(peer.encode(message))

    async def _ask_engine(self, operation: LinkOperation, failure: str) -> None:
        """Have the engine do something. Raises VtpmdError, which begins with ``failure``."""
        reply = await self._owner.engine.request(operation)
        if reply.result:
            raise VtpmdError(f"{failure}: the engine says {reply.result:#x}")

    def _apply_record(self, record: bytes) -> None:
        kind = StateType(core.delta_inspect(record).type)
        if kind not in self._images:
            raise peer.StreamError(f"a record of type {kind.name}")
        self._images[kind] = core.delta_apply(self._images[kind], record)
        if kind is StateType.PERMANENT:
            self._permanent_record = record

    async def _stage(self, wanted: destination.Stage) -> None:
        images = Images(*(self._images[kind] for kind in _TYPES))
        try:
            if wanted != images.generations:
                raise VtpmdError("the round does not end at the generations that it says")
            await self._stage_images(images, self._permanent_record)
        except VtpmdError as error:
            event, reason = Local.STAGE_FAILED, str(error)
        else:
            event, reason = Local.STAGED, ""
            self._staged_before, self._staged = self._staged, images
        for action in self._machine.step(event, reason):
            await self._perform(action)

    async def _stage_images(self, images: Images, record: bytes) -> tuple[int, int]:
        """Have libtpms validate images while they are made durable; return how long each took, µs.

        ``record`` ends at the permanent one. Raises VtpmdError.
        """
        await self._end_start()
        began_ns = time.perf_counter_ns()
        writing = Meanwhile(lambda: self._make_durable(images.permanent, record))
        await self._validate(images, meanwhile=writing)
        validated_ns = time.perf_counter_ns()
        if writing.error is not None:
            raise writing.error
        return (validated_ns - began_ns) // 1000, writing.took_us

    def _make_durable(self, state: core.Image, record: bytes) -> None:
        if state.generation == self._durable_generation:
            return
        if not record or core.delta_inspect(record).to_generation != state.generation:
            raise VtpmdError("the state goes back to an earlier generation")
        self._owner.handover.stage(record, state)
        self._durable_generation = state.generation

    async def _validate(self, images: Images, meanwhile: Meanwhile) -> None:
        """Have libtpms take both images, as INIT's start. Raises VtpmdError."""
        permanent, volatile = (image.data for image in images)
        reply = await self._owner.engine.request(
            LinkOperation.SET_BOTH_STATES,
            len(permanent),
            permanent + volatile,
            meanwhile=meanwhile,
        )
        if reply.result:
            raise VtpmdError(
                f"libtpms at the destination refuses the state with {reply.result:#x}; is it older "
                "than the source's?"
            )

    async def _discard(self, reason: str) -> None:
        log.warning("the state that a peer has sent is set aside: %s", reason)
        self._forget_images()
        self._owner.handover.finish_taking()
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._owner.engine.request(LinkOperation.FORGET_STATE)

    def _forget_images(self) -> None:
        self._images = dict(zip(_TYPES, NOTHING, strict=True))
        self._permanent_record, self._durable_generation = b"", 0
        # The last two rounds: the source may not have heard of the last when it made the tail.
        self._staged = self._staged_before = NOTHING

    async def _release(self) -> None:
        """Give the vTPM back, unless the guest has used it here."""
        reply = await self._owner.engine.request(LinkOperation.RETIRE, LinkRetire.UNSERVED)
        if reply.result:
            await self._perform(destination.Send(peer.Kept(self.session)))
            return
        self._owner.handover.hand_over("the source, which has reclaimed it")
        # Else a start after a crash would take up what was granted.
        self._owner.handover.finish_taking()
        for action in self._machine.step(Local.RELEASE):
            await self._perform(action)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.stream.close()
            self._connection = None


def _apply(base: Images, opened: tail.Tail) -> Images:
    """Return the images that a tail makes of those it continues. Raises TailError, DeltaError."""
    header = opened.header
    final = Images(
        *(
            core.delta_apply(image, record) if record else image
            for image, record in zip(base, (opened.permanent, opened.volatile), strict=True)
        )
    )
    if (header.permanent_to, header.volatile_to) != final.generations:
        raise tail.TailError("its records do not end at the generations that it says")
    return final
