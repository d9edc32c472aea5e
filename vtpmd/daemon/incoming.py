"""The destination of a migration: does what ``vtpmd.migration.destination`` decides.

Records make images; a round of them is validated by libtpms and made durable before it is
acknowledged. The tail comes by way of QEMU, and the engine takes it by itself: the TPM is started
from it at once, but held. INIT waits for the source's Grant, and the guest's first command for what
is durable: the state that the tail ends at, and that the vTPM was granted.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, NamedTuple, Self

from vtpmd import core
from vtpmd.core import LinkOperation
from vtpmd.core.delta import delta_encode, delta_inspect
from vtpmd.core.handover import TAIL_TAKEN, Handover, HandoverEvent
from vtpmd.core.lane import LaneKeying
from vtpmd.core.link import (
    LinkAdmit,
    LinkHandover,
    LinkShutdown,
    TailRefusal,
    link_held,
    pack_link_lineage,
    pack_link_records,
)
from vtpmd.daemon import lane, tls
from vtpmd.daemon.engine import Engine, EngineDetached, EngineDied, Meanwhile
from vtpmd.daemon.images import NO_RECORDS, NOTHING, ImageChain, Images
from vtpmd.daemon.limited_log import NewsLog
from vtpmd.daemon.session import EventQueue
from vtpmd.daemon.wakefulness import Wakefulness
from vtpmd.errors import VtpmdError
from vtpmd.migration import destination, events
from vtpmd.migration.destination import Destination, Do
from vtpmd.migration.states import ImpossibleEvent, State
from vtpmd.store.directory import StateDirectoryError
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import OwnerRecordError
from vtpmd.wire import peer
from vtpmd.wire.tpm import StateType, epoch_of

log = logging.getLogger(__name__)

# A boot that has to wait for the state that came to be taken up first.
ADOPT_TIMEOUT_S: Final = 2.0
# Of a disk that did not take what a session needs it to.
RETRY_S: Final = 1.0
# The lane's greeting and the Key come over two connections, and either may lose a packet.
KEY_TIMEOUT_S: Final = 2.0
# A source says something several times a second while it is armed.
ALIVE_S: Final = 2.0

_TYPES: Final = (StateType.PERMANENT, StateType.VOLATILE)


class Owner(NamedTuple):
    """What a session needs of the vTPM's instance."""

    engine: Engine
    own: destination.Own
    files: MovingFiles
    wakefulness: Wakefulness
    is_receiving: Callable[[], bool]
    serve_on: Callable[[], Awaitable[None]]  # unless the vTPM is, or may be, another host's


class Overtaken(VtpmdError):
    """QEMU has brought the tail, which has what is staged here, or more."""


class Staged(NamedTuple):
    """What libtpms has validated, and what the guest's last TPM2_Shutdown said by then."""

    chain: ImageChain
    power: int


_NOTHING_STAGED: Final = Staged(ImageChain(NOTHING), 0)


class Incoming:
    """One session of the destination, from the connection to its end."""

    def __init__(self, owner: Owner, connection: tls.Connection) -> None:
        self._begin(owner, Destination(owner.own), str(connection.name), connection)

    @classmethod
    def found(cls, owner: Owner, machine: Destination, peer_name: str, used: int) -> Self:
        """Go on with a session that another vtpmd has left; no generation above ``used`` was used.

        Its file is to be open for more (``IncomingStates.resume``).
        """
        session = cls.__new__(cls)
        session._begin(owner, machine, peer_name, None)
        last = core.Image(StateType.PERMANENT, used, b"")  # the file has the state itself
        session._staged = Staged(ImageChain(Images(last, NOTHING.volatile)), 0)
        session._durable_generation = used
        return session

    def _begin(
        self,
        owner: Owner,
        machine: Destination,
        peer_name: str,
        connection: tls.Connection | None,
    ) -> None:
        self._owner = owner
        self._machine = machine
        self._connection = connection
        self.peer = peer_name
        self._staged = _NOTHING_STAGED
        self._records: dict[StateType, bytes] = {}  # that have come of the next round
        self._durable_generation = 0  # of the permanent state
        # What the tail ends at that the engine has taken, which has the images of it.
        self._taken: tuple[int, int] | None = None
        self._events: EventQueue[destination.Event] = EventQueue(self._take)
        self._retry: asyncio.TimerHandle | None = None
        self._retrying: asyncio.Task[None] | None = None
        self._wait_us = self._start_us = 0
        self._news = NewsLog(log.error)  # of what is tried again

    @property
    def state(self) -> State:
        """Where the session is."""
        return self._machine.state

    @property
    def session(self) -> bytes:
        """The session's name, which the source has chosen."""
        return self._machine.session

    @property
    def is_granted(self) -> bool:
        """True from the Grant until that is durable."""
        return self.state in (State.ENTITLED, State.STARTED)

    async def was_granted(self) -> bool:
        """Return is_granted, once what has been heard by now is taken."""
        await self._events.wait_until_idle()
        return self.is_granted

    @property
    def is_settled(self) -> bool:
        """True once nothing of the session's is under way."""
        return self.state in (State.WELCOMING, State.SETTLED, State.ENDED)

    @property
    def is_releasing(self) -> bool:
        """True while the vTPM is on its way back to the source."""
        return self.state is State.RELEASING

    def has_ended(self, session: bytes) -> bool:
        """Return whether a session of this name is not, or no more, what this one is about."""
        return self.session != session or self.state is State.ENDED

    @property
    def is_alive(self) -> bool:
        """True while the source was heard of a moment ago."""
        if self._connection is None:
            return False
        return (time.monotonic_ns() - self._connection.stream.heard_ns) / 1e9 < ALIVE_S

    async def run(self, decoder: peer.Decoder, first: peer.Message) -> None:
        """Take what the source says until the session needs no connection, or has none."""
        connection = self._connection
        try:
            await self._take_message(first)
            while connection is not None and connection is self._connection:
                message = decoder.next_message()
                if message is not None:
                    await self._take_message(message)
                    await connection.stream.give_way()
                    continue
                data = await connection.stream.read()
                if not data:
                    raise ConnectionError("the source closed the connection")
                decoder.receive_data(data)
        except (OSError, EOFError, peer.StreamError, ImpossibleEvent, VtpmdError) as error:
            if connection is self._connection:
                await self._happened(events.LinkLost(str(error)))
        finally:
            if connection is self._connection:
                self._close()

    async def reclaim(self, connection: tls.Connection) -> None:
        """The source asks for the vTPM over a new connection; it is answered there."""

        def goes_there() -> bool:
            # Not before its turn: what was heard before may end with closing the connection.
            self._close()
            self._connection = connection
            return True

        try:
            await self._events.run(peer.Reclaim(self.session), goes_there)
        except ImpossibleEvent:
            # It was not granted, and who asks has forgotten what it was about.
            await self._happened(events.LinkLost("the source asks for its vTPM"))
        finally:
            if self._connection is connection:
                self._connection = None

    async def set_aside(self, reason: str) -> None:
        """The session is of no use, unless it is too late for that."""
        await self._happened(events.SetAside(reason))

    async def lose(self, reason: str) -> None:
        """The source is known to have forgotten the session."""
        await self._happened(events.LinkLost(reason))
        self._close()

    async def take_lane(self, accepted: socket.socket, hello: bytes) -> None:
        """Have the engine speak with the source's over this connection, and say so there.

        ``hello`` is how that begins; the Key may come a little later. Raises VtpmdError, OSError.
        """
        await self._events.wait_for(lambda: self._machine.key is not None, KEY_TIMEOUT_S)
        answer = lane.greet_back(self._keying(), hello)
        came = events.LaneCame(accepted.fileno())
        if not await self._events.run(came, lambda: self.state is State.WELCOMED):
            raise VtpmdError(
                f"a lane is refused: the session is {self.state.name}, must be WELCOMED"
            )
        accepted.send(answer)

    def _keying(self) -> LaneKeying:
        machine = self._machine
        if machine.key is None:
            raise VtpmdError("a lane is refused: its session has no key yet; is the link slow?")
        return LaneKeying(self.session, machine.key, machine.uuid, machine.lineage)

    async def receiving(self, is_receiving: bool) -> None:
        """Tell the source whether this side's QEMU takes a stream."""
        if self.session != bytes(peer.SESSION_BYTES):
            self._send(peer.Receiving(self.session, int(is_receiving)))

    async def refuse_tail(self, why: TailRefusal) -> None:
        """QEMU has brought a tail that the engine has no use for: the session ends.

        Raises VtpmdError, which says so.
        """
        before, words = self.state, _REFUSALS[why]
        if not await self._happened(events.TailRefused(peer.Reason.STATE, words)):
            words = f"the session is {before.name}, must be HOLDING"
        raise VtpmdError(
            f"the tail is refused: {words}; the guest goes on at the source: migrate again"
        )

    async def told(self, state: Handover, told: LinkHandover) -> None:
        """Take what the engine has done by itself."""
        if told.session != self.session:
            return  # of a session before
        match state:
            case Handover.TAKING:
                self._taken, self._start_us = told.generations, told.start_us
                self._owner.wakefulness.give_way()
                await self._happened(events.Took())
            case Handover.ENTITLED | Handover.STARTED:
                self._owner.wakefulness.take_back()  # its guest waits for what comes next
                self._wait_us = told.wait_us
                await self._happened(_GRANTED[state])
            case Handover.NONE:
                await self._happened(events.LinkLost(_REASONS[HandoverEvent(told.event)]))

    async def init_answered(self) -> None:
        """QEMU has the answer to its INIT: have the guest's commands executed."""
        # It is heard of after the Grant, but both may have to wait for what is under way.
        await self._events.run(
            events.InitAnswered(), lambda: self.state is State.STARTED and self._retry is None
        )

    async def go_on(self) -> None:
        """Do what a session that was found is to do next, and go on trying where a disk fails."""
        match self.state:
            case State.ENTITLED:
                await self._happened(events.Adopt())
            case State.ADMITTED:
                await self._happened(events.SettleDue())
            case State.RELEASING:
                await self._events.run(peer.Reclaim(self.session))

    async def adopt(self) -> bool:
        """Take up a vTPM that was granted, as QEMU starts otherwise; return False if it cannot."""
        await self._happened(events.Adopt())
        ready = (State.ADMITTED, State.SETTLED)
        await self._events.wait_for(lambda: self.state in ready, ADOPT_TIMEOUT_S)
        return self.state in ready

    async def settle_now(self) -> None:
        """Before the end: which generations the last host has used must be known at the start."""
        await self._happened(events.InitAnswered())
        await self._happened(events.SettleDue())

    async def close(self) -> None:
        """Do no more; what is not settled stays in the session's file."""
        await self.settle_now()
        self._cancel_retry()
        with suppress(EngineDetached):  # it goes on with what the session is
            await self.set_aside("its vtpmd stops")
        self._close()

    def abandon(self) -> None:
        """Do no more: what the disk says of the session is what a crash would have left."""
        self._cancel_retry()
        if self._retrying is not None:
            self._retrying.cancel()

    async def _take_message(self, message: peer.Message) -> None:
        if _says_that_guest_stands_still(message):
            self._owner.wakefulness.give_way()
        await self._events.run(message)
        if isinstance(message, peer.Hello) and self._owner.is_receiving():
            await self.receiving(True)

    async def _happened(self, event: events.LocalEvent) -> bool:
        """Take an event if it means anything to the session as it is; return whether it does."""
        return await self._events.run(event, lambda: self._machine.can_take(type(event)))

    async def _take(self, event: destination.Event) -> None:
        for action in self._machine.step(event):
            if action is Do.LET_GO and not await self._let_go():
                # The freeze has overtaken the round that begins: the tail has it.
                self._events.put(events.Took())
                return
            await self._perform(action)

    async def _perform(self, action: destination.Action) -> None:
        match action:
            case destination.Send(message=message):
                self._send(message)
            case destination.SetLane(descriptor=descriptor):
                keying = self._keying()._replace(is_greeted=True)
                await self._owner.engine.set_lane(descriptor, keying, is_source=False)
            case destination.Apply(record=record):
                self._take_record(record)
            case destination.Stage():
                await self._stage(action)
            case destination.Decline(reason=reason):
                await self._decline(reason)
            case destination.Discard(reason=reason):
                await self._discard(reason)
            case destination.Repeat(event=event):
                self._events.put(event)
            case Do() if action is not Do.LET_GO:
                await _DO[action](self)

    def _send(self, message: peer.Message) -> None:
        if self._connection is not None:
            self._connection.stream.write(peer.encode(message))

    # What the session's actions do.

    async def _prepare(self) -> None:
        try:
            self._owner.files.owner.expect(self.session, self.peer)
            self._owner.files.incoming.make(self.session, self._machine.lineage)
        except VtpmdError as error:
            self._events.put(events.StageFailed(peer.Reason.STORAGE, str(error)))
        else:
            self._events.put(events.Prepared())

    def _take_record(self, record: bytes) -> None:
        kind = StateType(delta_inspect(record).type)
        if kind not in _TYPES or kind in self._records:
            raise peer.StreamError(f"a record of type {kind.name}")
        self._records[kind] = record
        _ = self._staged.chain.images  # the last round's, which was kept waiting

    async def _stage(self, wanted: destination.Stage) -> None:
        records = [self._records.pop(kind, b"") for kind in _TYPES]
        try:
            await self._stage_round(records, wanted)
        except Overtaken:
            self._events.put(events.Took())
        except VtpmdError as error:
            self._events.put(events.StageFailed(_refusal(error), str(error)))
        else:
            self._events.put(events.HeldStarted() if wanted.is_last else events.Staged())

    async def _stage_round(self, records: list[bytes], wanted: destination.Stage) -> None:
        """Stage what a round has brought. Raises VtpmdError."""
        after = self._staged.chain.follow(records)
        if wanted[:2] != after.generations:
            raise VtpmdError("the round does not end at the generations that it says")
        starts = LinkShutdown(wanted.power) if wanted.is_last else None
        to_send = records
        if self._staged is _NOTHING_STAGED:
            self._warn_of_fork(wanted.permanent_generation)
            await self._try_to_start(records, LinkShutdown(wanted.power))
            to_send = NO_RECORDS
        self._staged = Staged(after, wanted.power)

        def keep() -> None:
            self._make_durable(after, records[0])
            if not wanted.is_last:
                _ = after.images  # a guest that stands still does not wait for that

        try:
            await self._have_staged(to_send, starts, Meanwhile(keep))
        except VtpmdError:
            _ = after.images  # where the records are to blame, that says why
            raise

    def _warn_of_fork(self, generation: int) -> None:
        """Say so where the state that comes, or the one here, was put back, and the other was not.

        Raises StateDirectoryError.
        """
        own = self._owner.files.stands_at()
        if own is None or own.identity != self._machine.lineage:
            return
        theirs, ours = epoch_of(generation), epoch_of(own.generation)
        if theirs != ours:
            log.warning(
                "possible fork: the vTPM of %s is of restore epoch %d, the one here of %d: one was "
                "imported, or a snapshot was loaded, and what either has written may not be in the "
                "other",
                *(self.peer, theirs, ours),
            )

    async def _try_to_start(self, records: list[bytes], said: LinkShutdown) -> None:
        """Start the TPM from the first round, and let go of it again. Raises VtpmdError.

        That it can is known when the source arms; and what libtpms does once in its life is done by
        the time that a guest stands still.
        """
        await self._have_staged(records, said)
        await self._forget_state(goes_on=True)

    def _make_durable(self, chain: ImageChain, record: bytes) -> None:
        """Make the permanent state that a record ends at durable. Raises VtpmdError."""
        generation, _ = chain.generations
        if generation == self._durable_generation:
            return
        if not record or delta_inspect(record).to_generation != generation:
            raise VtpmdError("the state goes back to an earlier generation")
        self._owner.files.incoming.append(record, lambda: chain.images.permanent)
        self._durable_generation = generation

    async def _have_staged(
        self,
        records: list[bytes],
        starts: LinkShutdown | None,
        writing: Meanwhile | None = None,
    ) -> None:
        """Have libtpms take what records make of the states, while that is made durable.

        The TPM is started from it, held, if it ``starts`` with what the guest's last TPM2_Shutdown
        said. The engine may take the tail before that is durable: if the source grants the vTPM for
        that by then, what comes first is Do.ADMIT, which begins with making it durable. Raises
        VtpmdError.
        """
        writing = writing or Meanwhile(lambda: None)
        argument = 0 if starts is None else link_held(starts)
        payload = pack_link_records(*records)
        reply = await self._owner.engine.request(LinkOperation.STAGE, argument, payload, writing)
        if reply.result and Handover(reply.argument) in TAIL_TAKEN:
            raise Overtaken("the round is overtaken by the tail, which QEMU has brought")
        if writing.error is not None:
            raise writing.error
        if reply.result:
            raise VtpmdError(
                f"libtpms at the destination refuses the state with {reply.result:#x}; is it older "
                "than the source's?"
            )

    async def _start(self) -> None:
        try:
            await self._start_held()
        except Overtaken:
            self._events.put(events.Took())
        except VtpmdError as error:
            self._events.put(events.StageFailed(peer.Reason.STATE, str(error)))
        else:
            self._events.put(events.HeldStarted())

    async def _start_held(self) -> None:
        """Start the TPM from what was staged last; it executes nothing. Raises VtpmdError."""
        await self._have_staged(NO_RECORDS, LinkShutdown(self._staged.power))

    async def _let_go(self) -> bool:
        """Have the TPM that is on standby off; return False if QEMU has brought the tail."""
        return await self._forget_state(goes_on=True)

    async def _forget_state(self, *, goes_on: bool) -> bool:
        """Have what was given, and a TPM that was started from it, gone; or more ``goes_on`` it.

        Return False if QEMU has brought the tail.
        """
        reply = await self._owner.engine.request(LinkOperation.FORGET_STATE, int(goes_on))
        return not reply.result

    async def _admit(self) -> None:
        """Make it durable that the vTPM is ours, then have the guest's commands executed."""
        self._cancel_retry()
        try:
            await self._complete_file()
            self._owner.files.incoming.grant(self._generation)
            # Invariant 10: what is committed here comes after all that the source has used.
            await self._owner.engine.raise_generations(self._generation)
            await self._ask_to_admit(LinkAdmit.SERVE, "the TPM cannot be served")
        except VtpmdError as error:
            self._news.write(f"{error}; the guest's commands wait, and it is tried again")
            self._events.put(events.AdmitFailed())
            self._try_again(events.InitAnswered())
            return
        log.info("the vTPM has moved: it came from %s, and is served here", self.peer)
        self._events.put(events.Admitted(self._wait_us, self._start_us))

    async def _complete_file(self) -> None:
        """Have the session's file end at what the TPM was started from, if it did not take that."""
        generation, _ = self._generations
        if generation == self._durable_generation:
            return
        permanent = await self._owner.engine.staged()
        if permanent.generation != generation:
            raise VtpmdError("the engine has another state than the TPM was started from")
        record = delta_encode(NOTHING.permanent, permanent)
        self._owner.files.incoming.append(record, lambda: permanent)
        self._durable_generation = generation

    async def _ask_to_admit(self, how: LinkAdmit, failure: str) -> None:
        lineage = pack_link_lineage(self._machine.lineage, self._generation)
        await self._ask_engine(LinkOperation.ADMIT, failure, lineage, how)

    @property
    def _generations(self) -> tuple[int, int]:
        """What the TPM was started from, the permanent state and the volatile one."""
        return self._taken or self._staged.chain.generations

    @property
    def _generation(self) -> int:
        """The highest that the source is known to have used."""
        return max(self._generations)

    async def _settle(self) -> None:
        """With the guest running: put the state into its own file."""
        self._cancel_retry()
        files = self._owner.files
        try:
            await self._ask_engine(LinkOperation.STORE_PERMANENT, "its own file cannot be written")
            floor = files.owner.take(self.session, self._generation)
            await self._owner.engine.raise_generations(floor)
            files.incoming.remove()
        except VtpmdError as error:
            self._news.write(f"the state stays in {files.names.incoming}: {error}; trying again")
            self._events.put(events.SettleFailed())
            self._try_again(events.SettleDue())
            return
        self._forget_images()
        self._events.put(events.Settled())

    async def _release(self) -> None:
        """Give the vTPM back, unless the guest has used it here."""
        self._cancel_retry()
        record = self._owner.files.owner
        is_fenced = False
        try:
            # Before the engine is fenced: what is not to be given back is served on.
            record.check_give_back(self.session)
            if not await self._fence():
                self._events.put(events.Served())
                return
            is_fenced = True
            record.give_back(self.session)
            self._owner.files.incoming.remove()
        except OwnerRecordError:
            # It has been used, or has moved on, though its guest sent no command here.
            self._events.put(events.Served(is_fenced))
            return
        except VtpmdError as error:
            self._news.write(f"the vTPM cannot be given back yet: {error}")
            self._events.put(events.RecordFailed(str(error)))
            return
        log.warning("the vTPM was given back: its guest runs on at the source")
        # It may have been on without QEMU's knowing: nothing else could be started then.
        with suppress(EngineDied):  # which is off, too
            await self._owner.engine.request(LinkOperation.STOP)
        self._forget_images()
        self._events.put(events.Remembered())

    async def _fence(self) -> bool:
        """Have the engine serve no more; return False if a guest's command was served.

        Raises VtpmdError where that is not known, or the directory would be left half changed.
        """
        try:
            await self._ask_to_admit(LinkAdmit.GOES_BACK, "its own file cannot be written")
            reply = await self._owner.engine.request(LinkOperation.RETIRE)
        except EngineDetached:
            raise  # it serves on
        except EngineDied:
            # What is dead serves no more, and executed nothing before the file said granted.
            found = self._owner.files.incoming.find()
            if found is None or found.granted:
                raise
            return True
        return not reply.result

    async def _decline(self, reason: str) -> None:
        granted = await self._granted_meanwhile()
        if granted is not None:
            self._events.put(granted)
            return
        log.warning("the state that a peer has sent is set aside: %s", reason)
        try:
            await self._forget()
        except VtpmdError as error:
            log.error("that a state was set aside is not remembered: %s", error)
            self._events.put(events.RecordFailed(str(error)))
        else:
            self._events.put(events.Remembered())

    async def _granted_meanwhile(self) -> events.LocalEvent | None:
        """Have the engine ask for the vTPM no more; return what has happened if it was granted.

        Raises EngineDetached: it may have been, and who attaches next finds out.
        """
        try:
            reply = await self._owner.engine.request(LinkOperation.WITHDRAW)
        except EngineDetached:
            raise
        except EngineDied:
            return None  # it can start nothing any more, and no Grant is durable
        return _GRANTED.get(Handover(reply.argument)) if reply.result else None

    async def _discard(self, reason: str) -> None:
        log.warning("what a peer has sent is set aside: %s", reason)
        try:
            await self._owner.engine.request(LinkOperation.WITHDRAW)  # the lane goes, too
            await self._forget()
        except VtpmdError as error:
            log.error("%s", error)

    async def _forget(self) -> None:
        """Remember that the session was not granted, then forget what it brought.

        Raises VtpmdError: its file is still there then.
        """
        self._forget_images()
        await self._forget_state(goes_on=False)
        self._owner.files.owner.decline(self.session)
        self._owner.files.incoming.remove()

    async def _serve_on(self) -> None:
        with suppress(EngineDied):  # which is said already
            await self._owner.serve_on()

    async def _close_link(self) -> None:
        self._close()

    def _forget_images(self) -> None:
        self._records, self._durable_generation = {}, 0
        self._staged, self._taken = _NOTHING_STAGED, None

    async def _ask_engine(
        self, operation: LinkOperation, failure: str, payload: bytes = b"", argument: int = 0
    ) -> None:
        """Have the engine do something. Raises VtpmdError, which begins with ``failure``."""
        reply = await self._owner.engine.request(operation, argument, payload)
        if reply.result:
            raise VtpmdError(f"{failure}: the engine says {reply.result:#x}")

    def _try_again(self, event: events.LocalEvent) -> None:
        """Have an event come once more, when the disk may have recovered."""

        def retry() -> None:
            self._retry = None
            self._retrying = asyncio.create_task(again())

        async def again() -> None:
            try:
                await self._happened(event)
            except Exception as error:  # a mistake of ours must not leave the guest waiting
                self._news.write(f"it could not be tried again: {error!r}; trying again")
                log.debug("the error was raised here", exc_info=error)
                self._try_again(event)

        self._retry = asyncio.get_running_loop().call_later(RETRY_S, retry)

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.stream.close()
            self._connection = None


_REFUSALS: Final = {
    TailRefusal.CUT: "it was cut, or is none",
    TailRefusal.FORMAT: "it is of a format that is not known here: install the same vtpmd on both",
    TailRefusal.OTHER_SESSION: "it is of another session: it is an old one, or another vTPM's",
    TailRefusal.FORGED: "it was altered on its way, or is for another VM",
    TailRefusal.IMPOSSIBLE: "its source has not made it as a tail is made",
    TailRefusal.NOT_NEXT: "it does not continue what was acknowledged here, or libtpms refuses it",
    TailRefusal.UNEXPECTED: "the lane to the source is gone",
}
_GRANTED: Final[dict[Handover, events.LocalEvent]] = {
    Handover.ENTITLED: events.Entitled(),
    Handover.STARTED: events.Started(),
}
# Why the engine has ended what it does by itself.
_REASONS: Final = {
    HandoverEvent.END: "the guest goes on at the source",
    HandoverEvent.LOST: "the lane to the source broke",
    HandoverEvent.NOT_READY: "libtpms does not start from the tail that QEMU has brought",
    HandoverEvent.TIMED_OUT: "the source did not grant the vTPM in time",
}

_DO: Final[dict[Do, Callable[[Incoming], Awaitable[None]]]] = {
    Do.PREPARE: Incoming._prepare,
    Do.START: Incoming._start,
    Do.ADMIT: Incoming._admit,
    Do.SETTLE: Incoming._settle,
    Do.RELEASE: Incoming._release,
    Do.SERVE_ON: Incoming._serve_on,
    Do.CLOSE: Incoming._close_link,
}


def _says_that_guest_stands_still(message: peer.Message) -> bool:
    match message:
        case peer.Stopped():
            return True
        case peer.Commit(is_last=is_last):
            return bool(is_last)
    return False


def _refusal(error: Exception) -> peer.Reason:
    is_storage = isinstance(error, StateDirectoryError)
    return peer.Reason.STORAGE if is_storage else peer.Reason.STATE
