"""The source of a migration: does what ``vtpmd.migration.source`` decides.

It reads the store, talks to the peer, and gives QEMU the sealed tail. From the freeze on the guest
stands still, so nothing there waits for the network.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from vtpmd import core
from vtpmd.core import LinkCapture, LinkOperation, LinkRetire, Store
from vtpmd.daemon import tls
from vtpmd.daemon.engine import Engine, Meanwhile
from vtpmd.daemon.images import NOTHING, Images, digest
from vtpmd.daemon.wakefulness import Wakefulness
from vtpmd.errors import VtpmdError
from vtpmd.migration import source, tail
from vtpmd.migration.source import Do, Source
from vtpmd.migration.states import ImpossibleEvent, Local, State
from vtpmd.migration.tail import TailCipher
from vtpmd.store.handover import Handover
from vtpmd.wire import peer
from vtpmd.wire.control import Result, StateType

log = logging.getLogger(__name__)

# Rounds where QEMU does not say when its passes begin. A pass of a small guest takes as long.
ROUND_INTERVAL_S: Final = 0.1
# A session may stay armed for days; the report has the last ones, and the sums of all.
ROUNDS_KEPT: Final = 1000
# A guest's driver waits this long for its first command after a failed migration.
RECLAIM_TIMEOUT_S: Final = 10.0
# The first may find out that the old connection is gone.
RECLAIM_ATTEMPTS: Final = 2


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
    HANDED_OVER = "VTPM_HANDED_OVER"
    FALL_BACK = "VTPM_FALL_BACK"
    GO_ON = "VTPM_GO_ON"


class Peer(NamedTuple):
    """Whom to connect to, and as whom."""

    host: str
    port: int
    credentials: Path
    allowed: tuple[str, ...]


class Owner:
    """What the session needs of the vTPM's instance."""

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        uuid: bytes,
        handover: Handover,
        wakefulness: Wakefulness,
        tell: Callable[[Notice, dict[str, object]], None],
    ) -> None:
        self.engine = engine
        self.store = store
        self.uuid = uuid
        self.handover = handover
        self.wakefulness = wakefulness
        self.tell = tell


class Outgoing:
    """One session of the source, from arming to its end.

    Events are taken one at a time, each with all that it leads to. That waits for the engine at
    most, never for the network: what is sent is buffered.
    """

    def __init__(self, owner: Owner, to: Peer) -> None:
        self._owner = owner
        self._peer = to
        self._to = f"{to.host}:{to.port}"
        self._key = os.urandom(peer.KEY_BYTES)
        self._machine = Source(hello=self._hello(), key=self._key)
        self._connection: tls.Connection | None = None
        self._sent = self._acknowledged = NOTHING
        self._cipher: TailCipher | None = None
        self._tail: bytes | None = None
        self._guest_stands_still = False
        self._stopped_at: tuple[int, int] | None = None
        self._was_kept = False
        self._round_began_ns = 0
        self._answered = asyncio.Event()
        self._lock = asyncio.Lock()
        self._resuming = asyncio.Lock()
        self.ended = asyncio.Event()
        self.rounds: deque[RoundReport] = deque(maxlen=ROUNDS_KEPT)
        self.round_bytes = 0
        self.outcome: str | None = None
        self.reason: str | None = None
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
        """True from the freeze until the guest's TPM is served here again."""
        return self.state in (State.FROZEN, State.RETIRING, State.GRANTED, State.RECLAIMING)

    @property
    def tail_bytes(self) -> int | None:
        """How long the tail is that QEMU got, if it got one."""
        return None if self._tail is None else len(self._tail)

    def _hello(self) -> peer.Hello:
        return peer.Hello(
            version=peer.VERSION,
            version_minimum=peer.VERSION_MINIMUM,
            session=os.urandom(peer.SESSION_BYTES),
            uuid=self._owner.uuid,
            tpm_version=peer.TPM_VERSION,
            libtpms_version=self._owner.engine.libtpms_version,
            image_bytes_max=core.IMAGE_BYTES_MAX,
        )

    async def run(self) -> None:
        """Connect, and take what the destination says, until the session ends."""
        try:
            # Made before the guest stands still: the record, its thread, and what seals the tail.
            await self._reserve_generations()
            self._owner.handover.prepare_to_hand_over()
            self._cipher = TailCipher(key=self._key, uuid=self._owner.uuid)
            await self._connect()
            await self._take(Local.CONNECTED)
            await self._read()
        except VtpmdError as error:
            await self._lose(str(error))
        except ssl.SSLError as error:
            await self._lose(str(tls.explain(error, self._to)))
        except (OSError, EOFError, peer.StreamError, ImpossibleEvent) as error:
            await self._lose(f"the link to the destination broke: {error}")
        finally:
            self._close()
            self._owner.handover.close()

    async def guest_stopped(self) -> None:
        """QEMU has stopped the guest, and will soon ask for the state."""
        self._expect_take()
        self._guest_stands_still = True
        await self.round_due()

    def _expect_take(self) -> None:
        """The guest stands still: have ready what it will wait for."""
        self._owner.wakefulness.hold()
        self._owner.handover.expect_hand_over(self._to)

    async def _say_stopped(self) -> None:
        """Tell the destination that it has all there is, or will have."""
        if self._stopped_at != self._sent.generations:
            self._stopped_at = self._sent.generations
            await self._step(Local.GUEST_STOPPED)

    async def round_due(self) -> None:
        """QEMU begins another pass, or time has passed, or the guest has stopped."""
        async with self._lock:
            if self.state is not State.ARMED:
                return
            try:
                await self._step(Local.ROUND_DUE)
                if self._guest_stands_still:
                    self._guest_stands_still = False
                    await self._say_stopped()
            except VtpmdError as error:
                await self._disarm(str(error))

    async def disarm(self, reason: str) -> None:
        """End the session; QEMU's stream carries whole blobs from now on."""
        async with self._lock:
            await self._disarm(reason)

    async def freeze(self) -> bytes | None:
        """Return the tail for QEMU's stream, or None: it has to carry whole blobs.

        The guest stands still. The same tail is returned again until the guest resumes.
        """
        async with self._lock:
            if self.state in (State.FROZEN, State.GRANTED):
                return self._tail
            if not self._machine.has_base:
                await self._disarm("QEMU asked for the state before the destination held a base")
                return None
            try:
                self._tail = await self._make_tail()
            except VtpmdError as error:
                await self._disarm(str(error))
                return None
            self._owner.tell(Notice.FREEZE, {"tail-bytes": len(self._tail)})
            return self._tail

    async def guest_resumed(self) -> bool:
        """The guest runs here again: return True if its TPM may be served here.

        QEMU says so twice, on its monitor and on the control channel: the second waits for what the
        first finds out.
        """
        async with self._resuming:
            async with self._lock:
                if self.state is State.FROZEN:
                    await self._step(Local.GUEST_RESUMED)
            if self.state is State.GRANTED:
                await self._reclaim()
            return self.state not in (State.GRANTED, State.RECLAIMING)

    async def _disarm(self, reason: str) -> None:
        if self.state not in (State.GRANTED, State.RECLAIMING, State.ENDED):
            await self._step(Local.DISARM, reason)

    async def _take(self, event: source.Event, reason: str = "") -> None:
        async with self._lock:
            await self._step(event, reason)

    async def _reserve_generations(self) -> None:
        store = self._owner.store
        used = max(store.generation(StateType.PERMANENT), store.generation(StateType.VOLATILE))
        floor = self._owner.handover.reserve_generations(used)
        await self._owner.engine.raise_generations(floor)

    async def _connect(self) -> None:
        to = self._peer
        context = tls.client_context(to.credentials)
        self._connection = await tls.connect(to.host, to.port, context, to.allowed or None)

    async def _read(self) -> None:
        assert self._connection is not None  # noqa: S101 - run() has connected
        decoder = peer.Decoder()
        while self.state is not State.ENDED:
            data = await self._connection.stream.read()
            if not data:
                await self._lose("the destination closed the connection; its log says why")
                return
            decoder.receive_data(data)
            while (message := decoder.next_message()) is not None:
                self._note(message)
                await self._take(message)
                if self._guest_stands_still:
                    # It stopped while a round was under way.
                    await self.round_due()
                if isinstance(message, peer.Released | peer.Kept):
                    self._answered.set()

    def _note(self, message: peer.Message) -> None:
        """Keep what the report will say of a message."""
        now_ns = time.perf_counter_ns()
        if isinstance(message, peer.Ack) and self.rounds:
            took_us = (now_ns - self._round_began_ns) // 1000
            self.rounds[-1] = self.rounds[-1]._replace(acknowledged_us=took_us)
        elif isinstance(message, peer.Take):
            self.phases_us["destination: apply the tail"] = message.apply_us
            self.phases_us["destination: validate by libtpms"] = message.validate_us
            self.phases_us["destination: make durable"] = message.store_us
        elif isinstance(message, peer.Running):
            self.phases_us["destination: wait for the grant"] = message.wait_us
            self.phases_us["destination: start the TPM"] = message.init_us

    async def _step(self, event: source.Event, reason: str = "") -> None:
        """Take an event and do what it leads to."""
        for action in self._machine.step(event, reason):
            await self._perform(action)
        if self.state is State.ENDED:
            self.ended.set()
            self._answered.set()

    async def _perform(self, action: source.Action) -> None:
        match action:
            case source.Send(message=message):
                self._send(message)
            case source.FallBack(reason=reason):
                self.outcome, self.reason = "fall-back", reason
                log.warning("whole blobs are moved instead of a tail: %s", reason)
                self._owner.tell(Notice.FALL_BACK, {"reason": reason})
            case source.GoOn(reason=reason):
                self.outcome, self.reason = "go-on", reason
                log.warning("the vTPM goes on here: %s", reason)
                self._owner.tell(Notice.GO_ON, {"reason": reason})
            case Do():
                await _DO[action](self)

    def _send(self, *messages: peer.Message) -> None:
        if self._connection is not None:
            self._connection.stream.write(b"".join(map(peer.encode, messages)))

    async def _start_round(self) -> None:
        images = await self._capture()
        if images is None:
            await self._step(Local.NOTHING_CHANGED)
            return
        self._send_round(*_records(self._sent, images))

    def _send_round(self, images: Images, records: list[bytes]) -> None:
        """Send what turns the images that were sent last into these."""
        number = self._machine.round.number + 1
        generations = (images.permanent.generation, images.volatile.generation)
        self._machine.round = source.Round(number, *generations)
        self._sent = images
        self._round_began_ns = time.perf_counter_ns()
        record_bytes = sum(map(len, records))
        self.round_bytes += record_bytes
        self.rounds.append(RoundReport(number, *generations, record_bytes, None))
        messages: list[peer.Message] = [peer.Record(record) for record in records if record]
        self._send(*messages, peer.Commit(*self._machine.round))
        self._owner.tell(Notice.ROUND, {"round": number, "bytes": record_bytes})

    async def _capture(self, meanwhile: Meanwhile | None = None) -> Images | None:
        """Return the state as it is now, or None if nothing ran since it was captured last."""
        reply = await self._owner.engine.request(LinkOperation.CAPTURE, meanwhile=meanwhile)
        if reply.result == Result.BAD_ORDINAL and self._sent is not NOTHING:
            return None  # the guest restarts, and its TPM with it
        if reply.result == Result.BAD_ORDINAL:
            raise VtpmdError("the guest has not started its TPM; arm when it runs")
        if reply.result:
            raise VtpmdError(f"the TPM's state cannot be captured: result {reply.result:#x}")
        if not reply.argument & LinkCapture.CHANGED and self._sent is not NOTHING:
            return None
        store = self._owner.store
        return Images(store.read(StateType.PERMANENT), store.read(StateType.VOLATILE))

    async def _make_tail(self) -> bytes:
        began_ns = time.perf_counter_ns()
        final = await self._capture(Meanwhile(self._expect_take)) or self._sent
        captured_ns = time.perf_counter_ns()
        base = self._acknowledged
        final, records = _records(base, final)
        encoded_ns = time.perf_counter_ns()
        if base is self._sent and any(records):
            # The tail has it all; but by the time that QEMU has brought it, this has been applied.
            self._send_round(final, records)
        if final.generations == self._sent.generations:
            await self._say_stopped()
        header = tail.Header(
            self._machine.session,
            base.permanent.generation,
            final.permanent.generation,
            base.volatile.generation,
            final.volatile.generation,
        )
        assert self._cipher is not None  # noqa: S101 - run() has made it
        sealed = self._cipher.seal(tail.Tail(header, *records), os.urandom(tail.NONCE_BYTES))
        self._machine.step(Local.FREEZE)
        digests = (digest(final.permanent), digest(final.volatile))
        self._machine.final_digests = digests
        self.digests = {"permanent": digests[0].hex(), "volatile": digests[1].hex()}
        self.phases_us["source: capture"] = (captured_ns - began_ns) // 1000
        self.phases_us["source: encode"] = (encoded_ns - captured_ns) // 1000
        self.phases_us["source: seal"] = (time.perf_counter_ns() - encoded_ns) // 1000
        return sealed

    async def _keep_base(self) -> None:
        first = self._acknowledged is NOTHING
        self._acknowledged = self._sent
        if first:
            self._owner.tell(Notice.ARMED, {})

    async def _retire(self) -> None:
        began_ns = time.perf_counter_ns()
        writing = Meanwhile(lambda: self._owner.handover.hand_over(self._to))
        reply = await self._owner.engine.request(
            LinkOperation.RETIRE, LinkRetire.UNCHANGED, meanwhile=writing
        )
        if writing.error is not None or reply.result:
            await self._stay(writing.error)
            return
        self.phases_us["source: retire"] = (time.perf_counter_ns() - began_ns) // 1000
        await self._step(Local.RETIRED)

    async def _stay(self, error: VtpmdError | None) -> None:
        """Undo a retirement, of which one half has failed."""
        await self._owner.engine.request(LinkOperation.UNRETIRE)
        try:
            if error is not None:
                raise error
            self._owner.handover.strike_out()
        except VtpmdError as failure:
            log.error("%s", failure)
        await self._step(Local.RETIRE_FAILED)

    async def _handed_over(self) -> None:
        self.outcome = "handed-over"
        self._owner.tell(Notice.HANDED_OVER, {"to": self._to})

    async def _unretire(self) -> None:
        self._owner.handover.strike_out()
        await self._owner.engine.request(LinkOperation.UNRETIRE)

    async def _kept(self) -> None:
        self._was_kept = True
        log.error("the destination serves the guest's TPM: it is not served here; stop this guest")

    async def _close_link(self) -> None:
        self._close()

    async def _reclaim(self) -> None:
        """Ask the destination to let go, over a new connection if the old one is gone."""
        reason = "the connection was lost twice"
        try:
            async with asyncio.timeout(RECLAIM_TIMEOUT_S):
                for _ in range(RECLAIM_ATTEMPTS):
                    if self.state is State.GRANTED and not self._was_kept:
                        await self._ask_to_let_go()
        except TimeoutError:
            reason = "it does not answer"
        except (VtpmdError, OSError) as error:
            reason = str(error)
        if self.state is State.RECLAIMING:
            await self._take(Local.LINK_LOST)
        if self.state is State.GRANTED and not self._was_kept:
            log.error(
                "the destination does not say that it lets go of the vTPM, so it is not served "
                "here (%s); stop the guest there, then remove tpm2-00.owner and start vtpmd again",
                reason,
            )

    async def _ask_to_let_go(self) -> None:
        """Return when there is an answer, or the connection is lost."""
        self._answered.clear()
        reading = None
        if self._connection is None:
            await self._connect()
            reading = asyncio.create_task(self._read_answer())
        try:
            await self._take(Local.GUEST_RESUMED)
            await self._answered.wait()
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def _read_answer(self) -> None:
        try:
            await self._read()
        except (OSError, EOFError, peer.StreamError, ImpossibleEvent) as error:
            await self._lose(str(error))
        finally:
            self._close()

    async def _lose(self, reason: str) -> None:
        async with self._lock:
            if self.state not in (State.ENDED, State.RETIRING):
                await self._step(Local.LINK_LOST, reason)
        self._answered.set()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.stream.close()
            self._connection = None


_DO: Final[dict[Do, Callable[[Outgoing], Awaitable[None]]]] = {
    Do.START_ROUND: Outgoing._start_round,
    Do.KEEP_BASE: Outgoing._keep_base,
    Do.RETIRE: Outgoing._retire,
    Do.HANDED_OVER: Outgoing._handed_over,
    Do.UNRETIRE: Outgoing._unretire,
    Do.KEPT: Outgoing._kept,
    Do.CLOSE: Outgoing._close_link,
}


def _records(base: Images, following: Images) -> tuple[Images, list[bytes]]:
    """Return what turns one state into the other, empty where nothing differs, and the other.

    The digests that encoding has to work out are kept with it: they are most of the work.
    """
    images, records = [], []
    for before, after in zip(base, following, strict=True):
        if after.generation == before.generation:
            images.append(before)
            records.append(b"")
            continue
        record = core.delta_encode(before, after)
        images.append(after._replace(digest=core.delta_inspect(record).result_digest))
        records.append(record)
    return Images(*images), records
