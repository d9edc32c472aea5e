"""The source of a migration: does what ``vtpmd.migration.source`` decides.

It reads the store, talks to the peer, and gives QEMU the sealed tail. From the freeze on the guest
stands still, so nothing there waits for the network.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from vtpmd import core
from vtpmd.core import LinkOperation, Store
from vtpmd.core.handover import WITHOUT_GRANT, Handover, HandoverEvent
from vtpmd.core.lane import LaneKeying
from vtpmd.core.link import (
    LinkCapture,
    LinkCapturing,
    LinkHandover,
    LinkQuestion,
    link_said,
    unpack_link_digests,
    unpack_link_recorded,
)
from vtpmd.daemon import lane, tls
from vtpmd.daemon.asking import Asking
from vtpmd.daemon.engine import Engine, EngineDied, Meanwhile, Reply
from vtpmd.daemon.images import NOTHING
from vtpmd.daemon.limited_log import NewsLog
from vtpmd.daemon.outgoing_images import OutgoingImages, Records
from vtpmd.daemon.session import EventQueue
from vtpmd.daemon.wakefulness import Wakefulness
from vtpmd.errors import VtpmdError
from vtpmd.migration import events, source
from vtpmd.migration.source import Do, Source
from vtpmd.migration.states import (
    BEFORE_BASE,
    GIVEN_AWAY,
    ON_OFFER,
    PASSING,
    WITH_BASE,
    ImpossibleEvent,
    State,
)
from vtpmd.store.directory import StateDirectoryError
from vtpmd.store.owner import OwnerRecord, OwnerRecordError
from vtpmd.wire import peer
from vtpmd.wire.state_level import Needs
from vtpmd.wire.tpm import Result, StateType

log = logging.getLogger(__name__)

# Between rounds where nobody says whether QEMU migrates.
ROUND_INTERVAL_S: Final = 0.1
# A tail needs a destination that was heard of in the last second: twice that often, and some more.
PING_INTERVAL_S: Final = 0.4
# Then it is gone, whatever TCP knows of it.
SILENCE_MAX_S: Final = 10.0
# A session may stay armed for days; the report has the last ones, and the sums of all.
ROUNDS_KEPT: Final = 1000
# A QEMU that has sent everything may end before the destination asks for the vTPM.
TAKE_TIMEOUT_S: Final = 2.0
# The lane ends by itself, or with the session: then the stream has the reason, about as soon.
WORD_TIMEOUT_S: Final = 0.5
# Of a disk that did not take what the record has to say.
RECORD_RETRY_S: Final = 1.0


class RoundReport(NamedTuple):
    """What one round moved."""

    number: int
    permanent_generation: int
    volatile_generation: int
    record_bytes: int
    acknowledged_us: int | None


class Notice(Enum):
    """What people are told of; the names are those of the management socket's events."""

    ARMED = "VTPM_ARMED"
    ROUND = "VTPM_ROUND"
    FREEZE = "VTPM_FREEZE"
    GRANTED = "VTPM_GRANTED"
    HANDED_OVER = "VTPM_HANDED_OVER"
    FALL_BACK = "VTPM_FALL_BACK"
    GO_ON = "VTPM_GO_ON"


class Peer(NamedTuple):
    """Whom to connect to, and as whom."""

    host: str
    port: int
    credentials: Path
    allowed: tuple[str, ...]

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    async def connect(self) -> tls.Connection:
        """Connect and shake hands. Raises VtpmdError or OSError."""
        context = tls.client_context(self.credentials)
        return await tls.connect(self.host, self.port, context, self.allowed or None)


class Owner(NamedTuple):
    """What the session needs of the vTPM's instance."""

    engine: Engine
    store: Store
    uuid: bytes
    lineage: bytes  # the vTPM's identity
    needs: Needs
    record: OwnerRecord
    wakefulness: Wakefulness
    following: Callable[[], peer.Following]
    tell: Callable[[Notice, dict[str, object]], None]


class Outgoing:
    """One session of the source, from arming to its end."""

    def __init__(self, owner: Owner, to: Peer, machine: Source | None = None) -> None:
        """Begin a session, or go on with one that an owner record tells of."""
        self._owner = owner
        self._peer = to
        self._key = os.urandom(peer.KEY_BYTES)
        self._machine = machine or Source(hello=self._hello(), key=self._key)
        self._connection: tls.Connection | None = None
        self._images = OutgoingImages()
        self.tail_bytes: int | None = None  # of the tail that QEMU got, if it got one
        self._round_began_ns = 0
        self._events: EventQueue[source.Event] = EventQueue(self._take)
        self._asking = Asking(to, self._question, self._answered)
        self._soon: set[asyncio.Task[None]] = set()
        # By the engine, that the vTPM is offered; the result is why that failed.
        self._recording: asyncio.Task[VtpmdError | None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self.ended = asyncio.Event()
        self.rounds: deque[RoundReport] = deque(maxlen=ROUNDS_KEPT)
        self.round_bytes = 0
        self.outcome: str | None = None
        self.reason: str | None = None
        self.refusal: peer.Reason | None = None
        self.armed_following: peer.Following | None = None
        self.phases_us: dict[str, int] = {}
        self.digests: dict[str, str] = {}

    @property
    def state(self) -> State:
        """Where the session is."""
        return self._machine.state

    @property
    def session(self) -> bytes:
        """The session's name."""
        return self._machine.session

    @property
    def is_frozen(self) -> bool:
        """True while the tail is QEMU's, and the destination has not asked for the vTPM."""
        return self.state is State.FROZEN

    @property
    def is_fenced(self) -> bool:
        """True while the vTPM may be the destination's: it is not served here."""
        return self._machine.is_fenced

    @property
    def is_its_qemus(self) -> bool:
        """True while the vTPM may be the destination's, and the QEMU here is the one it left."""
        return self.state in (State.GRANTED, State.MOVED, State.RECLAIMING)

    @property
    def peer_following(self) -> peer.Following | None:
        """What the destination knew of its QEMU when it welcomed the session."""
        return self._machine.peer_following

    @property
    def _silence_us(self) -> int:
        """How long ago the destination was heard of."""
        if self._connection is None:
            return 0
        return (time.monotonic_ns() - self._connection.stream.heard_ns) // 1000

    def _hello(self) -> peer.Hello:
        return peer.Hello(
            version=peer.VERSION,
            version_minimum=peer.VERSION_MINIMUM,
            session=os.urandom(peer.SESSION_BYTES),
            uuid=self._owner.uuid,
            lineage=self._owner.lineage,
            tpm_version=self._owner.engine.tpm_version,
            format_level=self._owner.needs.level,
            profile=self._owner.needs.profile.encode(),
            image_bytes_max=core.IMAGE_BYTES_MAX,
        )

    async def run(self) -> None:
        """Connect, and take what the destination says, until there is no more connection.

        A session that was found asks the destination from now on.
        """
        if self.state in GIVEN_AWAY:
            self._asking.begin()
            await self._asking.finished()
            return
        pinging = asyncio.create_task(self._ping())
        try:
            await self._reserve()
            self._connection = await self._peer.connect()
            await self._events.run(events.Connected(), self._is_connecting)
            await self._read()
        except VtpmdError as error:
            await self._lose(str(error))
        except ssl.SSLError as error:
            await self._lose(str(tls.explain(error, str(self._peer))))
        except (OSError, EOFError, peer.StreamError, ImpossibleEvent) as error:
            await self._lose(f"the link to the destination broke: {error}")
        finally:
            pinging.cancel()
            if self._opening is not None:
                self._opening.cancel()
            self._close()
        await self._asking.finished()

    def _is_connecting(self) -> bool:
        return self.state is State.CONNECTING

    async def guest_stopped(self) -> None:
        """QEMU has stopped the guest, and will soon ask for the state.

        It asks only once it has the response to the command that runs, so that comes first.
        """
        await self._happened(events.GuestStopped())

    async def guest_resumed(self) -> None:
        """The guest runs here, or wants to: an answer is not waited for."""
        self._asking.hurry()
        await self._happened(events.GuestResumed())

    async def round_due(self) -> None:
        """Time has passed."""
        await self._happened(events.RoundDue())

    async def qemu_left(self) -> None:
        """Another QEMU uses the TPM."""
        await self._happened(events.QemuLeft())

    async def migration_ended(self) -> None:
        """QEMU's migration is over: what the destination received, it does not receive any more."""
        await self._happened(events.MigrationEnded())

    async def came_back(self) -> None:
        """The vTPM is this host's by another way."""
        await self._happened(events.CameBack())

    async def fall_back(self, reason: str) -> None:
        """End the session, if it is not too late; QEMU's stream carries whole blobs from now on."""
        await self._happened(events.Disarmed(reason))

    async def disarm(self, reason: str) -> None:
        """End the session, as an operator wishes. Raises VtpmdError when it is too late."""
        if self.is_fenced:
            raise VtpmdError(
                f"it is too late to disarm: the session is {self.state.name}, and the vTPM may be "
                f"at {self._peer} already; cancel QEMU's migration, and let the guest run on here"
            )
        await self._happened(events.Disarmed(reason))

    async def wait_until_served(self, timeout_s: float) -> bool:
        """Wait for the destination to let go of the vTPM; return False if it is not in time."""
        return await self._events.wait_for(lambda: not self.is_fenced, timeout_s)

    async def freeze(self) -> None:
        """Have the engine give QEMU a tail, unless its stream has to carry whole blobs.

        The guest stands still.
        """
        await self._events.wait_until_idle()  # what it has left is captured
        if self.state is State.FROZEN:
            return  # by a tail that was offered after it was asked for, and before this
        why = self._machine.why_no_tail(self._silence_us)
        if why is not None:
            await self.fall_back(why)
            return
        self._owner.wakefulness.hold()
        await self._happened(events.Freeze())

    async def state_given(self) -> None:
        """QEMU has taken whole blobs: a destination without a base is of no use for those."""
        if self.state in BEFORE_BASE:
            await self.fall_back("QEMU asked for the state before the destination held a base")

    async def told(self, state: Handover, told: LinkHandover) -> None:
        """Take what the engine has done by itself."""
        if told.session != self.session:
            return  # of a session before
        match state:
            case Handover.GIVEN | Handover.FROZEN:
                self._owner.wakefulness.hold()
                self.tail_bytes = told.tail_bytes
                await self._happened(events.Frozen())
            case Handover.GRANTED:
                self.phases_us["source: retire"] = told.retire_us
                self.phases_us["destination: apply the tail"] = told.apply_us
                self._owner.wakefulness.take_back()
                await self._happened(events.Granted())
            case Handover.NONE:
                if self.state in WITH_BASE:
                    # Nothing but whole blobs is at stake, and the stream may say why.
                    await self._events.wait_for(lambda: self.state is State.ENDED, WORD_TIMEOUT_S)
                await self._happened(events.LinkLost(_REASONS[HandoverEvent(told.event)]))

    async def close(self) -> None:
        """End what can be ended. A guest that has just left is not left without its vTPM."""
        self._asking.end()
        await self._events.wait_until_idle()  # what is heard by now is taken
        if self.is_frozen:
            await self._events.wait_for(lambda: not self.is_frozen, TAKE_TIMEOUT_S)
        await self._happened(events.Disarmed("vtpmd stops"))
        if self.state is State.GRANTED and self._connection is not None:
            await self._events.wait_for(lambda: self.state is not State.GRANTED, TAKE_TIMEOUT_S)
        if self._connection is not None:
            await self._drain(self._connection)
        if self._soon:
            _, late = await asyncio.wait(self._soon, timeout=TAKE_TIMEOUT_S)
            for task in late:
                task.cancel()

    async def wait_until_written(self) -> None:
        """Wait until the owner record says how the session has ended; not for long for the disk."""
        if self._soon:
            await asyncio.wait(self._soon, timeout=TAKE_TIMEOUT_S)

    def abandon(self) -> None:
        """Do no more: what the disk says of the session is what a crash would have left."""
        self._asking.abandon()
        for task in self._soon:
            task.cancel()

    async def _drain(self, connection: tls.Connection) -> None:
        try:
            async with asyncio.timeout(TAKE_TIMEOUT_S):
                await connection.stream.drain()
        except (OSError, TimeoutError) as error:
            log.debug("what was said last has not all been sent: %s", error)

    async def _happened(self, event: events.LocalEvent) -> None:
        """Take an event, if it means anything to the session as it is."""
        await self._events.run(event, lambda: self._machine.can_take(type(event)))

    async def _take(self, event: source.Event) -> None:
        """Take an event and do what it leads to; an action that fails ends what can be ended."""
        for action in self._machine.step(event):
            try:
                await self._perform(action)
            except VtpmdError as error:
                if not self._machine.can_take(events.Disarmed) or self.state is State.ENDED:
                    log.error("%s", error)
                    continue
                self._events.put(events.Disarmed(str(error)))
                break
        if self.state is State.ENDED and not self.ended.is_set():
            self.ended.set()
            self._do_soon(self._disarm_engine())

    async def _perform(self, action: source.Action) -> None:
        match action:
            case source.Send(message=message):
                self._send(message)
            case source.FallBack(reason=reason, refusal=refusal):
                self.outcome, self.reason, self.refusal = "fall-back", reason, refusal
                log.warning("whole blobs are moved instead of a tail: %s", reason)
                word = None if refusal is None else refusal.word
                self._owner.tell(Notice.FALL_BACK, {"reason": reason, "refusal": word})
            case source.GoOn(reason=reason):
                self.outcome, self.reason = "go-on", reason
                log.warning("the vTPM goes on here: %s", reason)
                self._owner.tell(Notice.GO_ON, {"reason": reason})
            case source.Repeat(event=event):
                self._events.put(event)
            case Do():
                await _DO[action](self)

    async def _reserve(self) -> None:
        store = self._owner.store
        used = max(store.generation(StateType.PERMANENT), store.generation(StateType.VOLATILE))
        floor = self._owner.record.reserve(self.session, str(self._peer), used)
        await self._owner.engine.raise_generations(floor)

    async def _read(self) -> None:
        assert self._connection is not None  # noqa: S101 - run() has connected
        decoder = peer.Decoder()
        while self.state is not State.ENDED and (connection := self._connection) is not None:
            data = await connection.stream.read()
            if not data:
                await self._lose("the destination closed the connection; its log says why")
                return
            decoder.receive_data(data)
            while (message := decoder.next_message()) is not None:
                self._note(message)
                await self._events.run(message)
                await connection.stream.give_way()

    async def _ping(self) -> None:
        """Have a destination that is there heard of, and notice one that is not."""
        while self.state is not State.ENDED:
            await asyncio.sleep(PING_INTERVAL_S)
            silence_s = self._silence_us / 1e6
            if self.state in (*BEFORE_BASE, *WITH_BASE) and silence_s > SILENCE_MAX_S:
                await self._lose(f"the destination has not been heard of for {silence_s:.0f} s")
            if self.state in WITH_BASE:
                self._send(peer.Ping(self.session))

    def _note(self, message: peer.Message) -> None:
        """Keep what the report will say of a message."""
        now_ns = time.perf_counter_ns()
        if isinstance(message, peer.Ack) and self.rounds:
            took_us = (now_ns - self._round_began_ns) // 1000
            self.rounds[-1] = self.rounds[-1]._replace(acknowledged_us=took_us)
        elif isinstance(message, peer.Running):
            self.phases_us["destination: start the TPM"] = message.init_us
            self.phases_us["destination: wait for the grant"] = message.wait_us

    def _send(self, *messages: peer.Message) -> None:
        if self._connection is not None:
            self._connection.stream.write(b"".join(map(peer.encode, messages)))

    # What the session's actions do, in the order of source.Do.

    async def _open_lane(self) -> None:
        self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        owner = self._owner
        keying = LaneKeying(self.session, self._key, owner.uuid, owner.lineage)
        try:
            with await lane.connect(self._peer, keying) as sock:
                greeted = keying._replace(is_greeted=True)
                await owner.engine.set_lane(sock.fileno(), greeted, is_source=True)
        except VtpmdError as error:
            await self._lose(str(error))
        else:
            await self._happened(events.LaneOpened())

    async def _start_round(self) -> None:
        if self.state is not State.CAPTURING:
            await self._capture()
        if self._images.is_all_sent:
            self._events.put(events.NothingChanged())
            return
        began_ns = time.perf_counter_ns()
        records = self._images.to_send()
        self.phases_us["source: encode"] = (time.perf_counter_ns() - began_ns) // 1000
        self._send_round(records)

    def _send_round(self, last: Records) -> None:
        """Send what turns the images that were sent last into others."""
        generations = last.final.generations
        number = self._machine.round.number + 1
        is_last = self.state in PASSING
        sent = events.Round(number, *generations, self._images.power)
        self._images.note_sent(last)
        self._round_began_ns = time.perf_counter_ns()
        record_bytes = sum(map(len, last.records))
        self.round_bytes += record_bytes
        self.rounds.append(RoundReport(number, *generations, record_bytes, None))
        messages: list[peer.Message] = [peer.Record(record) for record in last.records if record]
        self._send(*messages, peer.Commit(*sent, int(is_last)))
        self._events.put(events.RoundSent(sent))
        self._owner.tell(Notice.ROUND, {"round": number, "bytes": record_bytes})

    async def _capture(self, how: LinkCapturing | None = None) -> None:
        """Have what was captured last be the state as it is now, or after the command that runs.

        Of a guest that is to leave (``how``) the owner record says offered, or is to. Raises
        VtpmdError.
        """
        began_ns = time.perf_counter_ns()
        if how is None:
            reply = await self._owner.engine.request(LinkOperation.CAPTURE)
        else:
            reply = await self._capture_and_record(how)
        self.phases_us["source: capture"] = (time.perf_counter_ns() - began_ns) // 1000
        self._take_captured(reply)

    async def _capture_and_record(self, how: LinkCapturing) -> Reply:
        """Have the engine write the record meanwhile: a disk takes as long as all else.

        From then on QEMU waits for the engines alone.
        """
        engine, record = self._owner.engine, self._owner.record
        meanwhile = Meanwhile(self._owner.wakefulness.give_way)
        if record.is_offered(self.session):
            how |= LinkCapturing.RECORDED
        with record.offering(self.session) as sector:
            if sector is None:
                return await engine.request(LinkOperation.CAPTURE, how, meanwhile=meanwhile)
            news = engine.promise(LinkQuestion.TELL_RECORDED)
            given, file = sector
            reply = await engine.request(
                LinkOperation.CAPTURE, how, given, meanwhile, descriptor=file
            )
        self._note_recording(news, is_so=bool(reply.argument & LinkCapture.RECORDS))
        return reply

    def _note_recording(self, news: asyncio.Future[bytes], *, is_so: bool) -> None:
        """Note that the engine writes the record, or has refused to."""
        if is_so:
            self._recording = asyncio.create_task(self._note_recorded(news))
        else:
            self._owner.record.end_offering(is_durable=False)

    def _take_captured(self, reply: Reply) -> None:
        is_first = self._images.captured is NOTHING
        if reply.result == Result.BAD_ORDINAL and not is_first:
            return  # the guest restarts, and its TPM with it
        if reply.result == Result.BAD_ORDINAL:
            raise VtpmdError("the guest has not started its TPM; arm when it runs")
        if reply.result:
            raise VtpmdError(f"the TPM's state cannot be captured: result {reply.result:#x}")
        self._images.power = link_said(reply.argument)
        if reply.argument & LinkCapture.ABANDONED:
            log.info("the guest stops in the middle of a TPM command, which it will send again")
        if reply.argument & LinkCapture.CHANGED or is_first:
            self._images.capture(self._owner.store)
        if reply.argument & LinkCapture.OFFERED:
            digests = unpack_link_digests(reply.payload)
            self._images.note_offered()
            self.digests = {name: digest.hex() for name, digest in digests._asdict().items()}

    async def _keep_base(self) -> None:
        self._images.note_acknowledged()
        if self.state in (State.ARMED, State.CAPTURING):  # nothing was captured since
            generations = struct.pack("=QQ", *self._images.sent.generations)
            await self._owner.engine.request(LinkOperation.KEEP_BASE, payload=generations)

    async def _tell_armed(self) -> None:
        self.armed_following = self._owner.following()
        if self.armed_following is not peer.Following.NOT_ASKED_FOR:
            await self._owner.engine.request(LinkOperation.ARM, 1)
        theirs = self._machine.peer_following
        words: dict[str, object] = {
            "qemu": self.armed_following.word,
            "peer-qemu": None if theirs is None else theirs.word,
        }
        self._owner.tell(Notice.ARMED, words)

    async def _disarm_engine(self) -> None:
        if self.armed_following is None:
            return
        try:
            await self._owner.engine.request(LinkOperation.ARM, 0)
        except EngineDied as error:
            log.debug("it need not be told that the session has ended: %s", error)

    async def _record_ahead(self) -> None:
        engine, record = self._owner.engine, self._owner.record
        try:
            with record.offering(self.session) as sector:
                if sector is None:
                    return
                news = engine.promise(LinkQuestion.TELL_RECORDED)
                given, file = sector
                reply = await engine.request(LinkOperation.RECORD, payload=given, descriptor=file)
        except StateDirectoryError as error:
            log.warning("%s; trying again when the guest stops", error)
        else:
            self._note_recording(news, is_so=reply.result == 0)

    async def _wind_up(self) -> None:
        how = LinkCapturing.STOPPED
        if self._machine.why_no_tail(self._silence_us) is None:
            how |= LinkCapturing.OFFERS
        await self._capture(how)

    async def _note_recorded(self, news: asyncio.Future[bytes]) -> VtpmdError | None:
        """Take what became of the record that the engine writes; return why it failed.

        Of an engine that is gone it is not known, and it may have granted: it stays handed out.
        """
        try:
            recorded = unpack_link_recorded(await news)
        except EngineDied as error:
            return error
        self._owner.record.end_offering(is_durable=recorded.error == 0)
        self.phases_us["source: write the owner record"] = recorded.took_us
        if recorded.error:
            return VtpmdError(f"the owner record cannot be written: {os.strerror(recorded.error)}")
        return None

    async def _offer(self) -> None:
        if self._recording is not None:
            await asyncio.wait({self._recording})
            if (error := self._recording.result()) is not None:
                raise error
        if self._owner.record.is_offered(self.session):
            await self._owner.engine.request(LinkOperation.RECORDED)  # if it is still on offer

    async def _withdraw(self) -> None:
        """Strike the offer out when whoever waits now has got its answer."""
        self._write_soon(self._owner.record.withdraw, lambda: self._machine.may_withdraw)

    def _write_soon(self, write: Callable[[bytes], None], is_due: Callable[[], bool]) -> None:
        """Make a transition of the record, which may be repeated, while it ``is_due``."""
        self._do_soon(self._write_until_done(write, is_due))

    def _do_soon(self, work: Coroutine[object, object, None]) -> None:
        """Do what nobody waits for, but the session's end."""
        task = asyncio.create_task(work)
        self._soon.add(task)
        task.add_done_callback(self._soon.discard)

    async def _write_until_done(
        self, write: Callable[[bytes], None], is_due: Callable[[], bool]
    ) -> None:
        if self._recording is not None:
            await asyncio.wait({self._recording})
        news = NewsLog(log.error)
        while is_due():
            try:
                write(self.session)
            except OwnerRecordError as error:
                log.error("%s", error)
                return
            except VtpmdError as error:
                text = f"the owner record still says offered: {error}; trying again"
                news.write(text)
            except Exception as error:  # a mistake of ours must not leave it as it is
                log.exception("the owner record could not be written: %s", type(error).__name__)
            else:
                return
            await asyncio.sleep(RECORD_RETRY_S)

    async def _make_tail(self) -> None:
        """Have QEMU get the tail of what was captured last, or else of what there is now."""
        is_early = self.state in ON_OFFER
        if is_early and self._machine.why_no_tail(self._silence_us) is not None:
            return  # it is asked once more when QEMU asks
        if not is_early or not self._images.is_offered:
            await self._capture(LinkCapturing.OFFERS)
        if not self._images.is_offered and not is_early:
            raise VtpmdError(
                "the lane to the destination is gone, or the guest uses its TPM while QEMU takes "
                "the state"
            )
        self._events.put(events.TailMade(self._images.is_all_sent))

    async def _tell_freeze(self) -> None:
        self._owner.tell(Notice.FREEZE, {"tail-bytes": self.tail_bytes})

    async def _end_offer(self) -> None:
        reply = await self._ask_engine(LinkOperation.LET_GO)
        if reply is not None and not reply.result:
            self._images.note_offered_no_more()
            is_early = not self._images.is_all_acknowledged
            self._events.put(events.OfferEndedEarly() if is_early else events.OfferEnded())
        else:
            await self._revoke()

    async def _revoke(self) -> None:
        """Have the engine grant nothing; where it has, or that is not known, it has."""
        reply = await self._ask_engine(LinkOperation.WITHDRAW)
        if reply is None or reply.result:
            self._events.put(events.Granted())
        else:
            self._events.put(events.Revoked(Handover(reply.argument) in WITHOUT_GRANT))

    async def _ask_engine(self, operation: LinkOperation) -> Reply | None:
        try:
            return await self._owner.engine.request(operation)
        except EngineDied:
            return None

    async def _tell_granted(self) -> None:
        self.outcome = "granted"
        self._owner.tell(Notice.GRANTED, {"to": str(self._peer)})

    async def _record_moved(self) -> None:
        """Tell what the destination has said, also where the disk takes it only later."""
        self._write_soon(self._owner.record.confirm, lambda: self.is_fenced)
        if self.outcome != "handed-over":
            self.outcome = "handed-over"
            log.info("the vTPM has moved: %s says that it has it", self._peer)
            self._owner.tell(Notice.HANDED_OVER, {"to": str(self._peer)})

    async def _hold_commands(self) -> None:
        await self._owner.engine.request(LinkOperation.AWAIT, 1)

    async def _fail_commands(self) -> None:
        await self._owner.engine.request(LinkOperation.AWAIT, 0)
        log.error(
            "%s has the vTPM and does not let go of it: it is not served here; stop this guest",
            self._peer,
        )

    async def _ask(self) -> None:
        self._asking.begin()

    async def _record_released(self) -> None:
        try:
            self._owner.record.release(self.session)
        except VtpmdError as error:
            self._events.put(events.RecordFailed(str(error)))
            raise
        self._events.put(events.Remembered())

    async def _serve(self) -> None:
        await self._owner.engine.request(LinkOperation.UNRETIRE, 1)

    async def _close_link(self) -> None:
        self._close()
        if not self.is_fenced:
            await self._ask_engine(LinkOperation.WITHDRAW)  # the lane goes, too

    def _question(self) -> peer.Message | None:
        """Return what the destination is to be asked now; None: nothing more."""
        if self.state is State.RECLAIMING:
            return peer.Reclaim(self.session)
        return peer.Ask(self.session) if self.state in GIVEN_AWAY else None

    async def _answered(self, answer: peer.Message) -> None:
        """Take what the destination has answered. Raises ImpossibleEvent for what is none."""
        self._note(answer)
        await self._events.run(answer)

    async def _lose(self, reason: str) -> None:
        await self._happened(events.LinkLost(reason))

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.stream.close()
            self._connection = None


_DO: Final[dict[Do, Callable[[Outgoing], Awaitable[None]]]] = {
    Do.OPEN_LANE: Outgoing._open_lane,
    Do.START_ROUND: Outgoing._start_round,
    Do.KEEP_BASE: Outgoing._keep_base,
    Do.TELL_ARMED: Outgoing._tell_armed,
    Do.WIND_UP: Outgoing._wind_up,
    Do.RECORD_AHEAD: Outgoing._record_ahead,
    Do.OFFER: Outgoing._offer,
    Do.WITHDRAW: Outgoing._withdraw,
    Do.MAKE_TAIL: Outgoing._make_tail,
    Do.END_OFFER: Outgoing._end_offer,
    Do.REVOKE: Outgoing._revoke,
    Do.TELL_FREEZE: Outgoing._tell_freeze,
    Do.TELL_GRANTED: Outgoing._tell_granted,
    Do.RECORD_MOVED: Outgoing._record_moved,
    Do.HOLD_COMMANDS: Outgoing._hold_commands,
    Do.FAIL_COMMANDS: Outgoing._fail_commands,
    Do.ASK: Outgoing._ask,
    Do.RECORD_RELEASED: Outgoing._record_released,
    Do.SERVE: Outgoing._serve,
    Do.CLOSE: Outgoing._close_link,
}


# Why the engine has ended what it does by itself.
_REASONS: Final = {
    HandoverEvent.END: "the destination has let go of it",
    HandoverEvent.LOST: "the lane to the destination broke",
    HandoverEvent.ASKED: "QEMU has asked for the state once more",
    HandoverEvent.RUNS: "the guest runs here again",
    HandoverEvent.TAKE_OTHER: "the destination's state is not the one that was sent",
    HandoverEvent.NOT_RETIRED: "the guest has used its TPM since QEMU took the state",
}
