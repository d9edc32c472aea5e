"""The hand-over of a simulated engine, as csrc/engine/blackout.c, by handover.c's own table.

The lane's frames are sealed as they are: what the network may do to them, it does to the real ones.
"""

from __future__ import annotations

import asyncio
from struct import Struct
from typing import TYPE_CHECKING, Final

from tests.sim.network import Stream
from tests.support.image_digest import whole_digest
from tests.support.tail import Header, Tail, TailCipher, TailError
from vtpmd.core import Image
from vtpmd.core.delta import delta_encode
from vtpmd.core.handover import (
    TAIL_TAKEN,
    WITH_TAIL,
    WITHOUT_GRANT,
    Handover,
    HandoverAction,
    HandoverEvent,
    handover_step,
)
from vtpmd.core.lane import LANE_FRAME_BYTES, Lane, LaneError, LaneFrame, LaneKeying, LaneKind
from vtpmd.core.link import LinkQuestion, TailRefusal
from vtpmd.daemon.engine import Question
from vtpmd.wire.tpm import Result

if TYPE_CHECKING:
    from tests.sim.engine import SimEngine

OFFER_S: Final = 1.0  # BLACKOUT_OFFER_MS
GRANT_TIMEOUT_S: Final = 2.0  # BLACKOUT_GRANT_TIMEOUT_MS
REASON_STATE: Final = 7
# struct link_handover
_HANDOVER: Final = Struct("=16s7I4xQQ")

Digests = tuple[bytes, bytes]


class Blackout:
    """blackout.c, of an engine that has a vtpmd."""

    def __init__(self, tpm: SimEngine) -> None:
        self.state = Handover.NONE
        self._tpm = tpm
        self._lane: Lane | None = None
        self._stream: Stream | None = None
        self.is_source = False
        self.session = bytes(16)
        self._cipher: TailCipher | None = None
        self._base: tuple[Image, Image] | None = None
        self._ends_at = (0, 0)
        self._frame = b""
        self._tail = b""
        self._digests: Digests = (b"", b"")
        self._offered_s = 0.0
        self._changed = asyncio.Event()

    # Of vtpmd.

    def set_lane(self, stream: Stream, keying: LaneKeying, *, is_source: bool) -> None:
        """blackout_set_lane()."""
        assert self.state not in (Handover.ENTITLED, Handover.STARTED)  # vtpmd sees to that
        self.say(HandoverEvent.WITHDRAW)
        self._end_lane()
        self._tpm.server.unstage()
        self._lane = Lane(keying, is_source=is_source)
        self._stream, self.is_source = stream, is_source
        self.session, self._base = keying.session, None
        self._cipher = TailCipher(key=keying.key, uuid=keying.uuid, lineage=keying.lineage)
        stream.watch(self._receive)

    def keep_base(self, generations: tuple[int, int]) -> int:
        """blackout_keep_base()."""
        captured = self._tpm.captured()
        if self._lane is None or not self.is_source or _generations(captured) != generations:
            return Result.BAD_ORDINAL
        self._base = captured
        return Result.SUCCESS

    def offer(self) -> Digests | None:
        """blackout_capture(), where it offers: what the tail ends at, or None."""
        if self._lane is None or self._base is None or not self._may(HandoverEvent.OFFER):
            return None
        if self._tpm.worked:
            return None
        final = self._tpm.captured()
        records = [
            b"" if before.generation == after.generation else delta_encode(before, after)
            for before, after in zip(self._base, final, strict=True)
        ]
        between = Header.between(self.session, _generations(self._base), _generations(final))
        assert self._cipher is not None
        self._tail = self._cipher.seal(Tail(between, 0, *records))
        permanent, volatile = (whole_digest(image.data) for image in final)
        self._digests = permanent, volatile
        self._offered_s = self._tpm.now_s
        self._take(HandoverEvent.OFFER)
        return self._digests

    @property
    def has_taken(self) -> bool:
        """handover_has_taken()."""
        return self.state in TAIL_TAKEN

    def unstaged(self) -> None:
        """blackout_forget(), where no more comes."""
        if not self.is_source:
            self._end_lane()

    def say(self, event: HandoverEvent) -> int:
        """blackout_say()."""
        if not self._may(event):
            return Result.BAD_ORDINAL
        self._take(event)
        return Result.SUCCESS

    def withdraw(self) -> int:
        """blackout_withdraw()."""
        if self.state is Handover.GRANTED and not self.is_source:
            self._end_lane()
            return Result.SUCCESS
        return self.say(HandoverEvent.WITHDRAW)

    # Of QEMU.

    @property
    def is_armed(self) -> bool:
        """blackout_is_armed()."""
        return self._lane is not None and self.is_source

    def give_tail(self) -> bytes | None:
        """blackout_give_tail()."""
        is_stale = self._tpm.now_s - self._offered_s > OFFER_S
        if not self._may(HandoverEvent.ASKED) or (self.state in WITH_TAIL and is_stale):
            return None
        if self._tpm.worked:
            self._take(HandoverEvent.RUNS)
            return None
        self._take(HandoverEvent.ASKED)
        return self._tail if self.state in WITHOUT_GRANT else None

    def take_tail(self, blob: bytes) -> TailRefusal | None:
        """blackout_take_tail(): why it is of no use; None: it is."""
        if self._lane is None or self.is_source or not self._may(HandoverEvent.TAIL):
            return TailRefusal.UNEXPECTED
        assert self._cipher is not None
        try:
            tail = self._cipher.open(blob, self.session)
        except TailError:
            return TailRefusal.FORGED
        if not self._tpm.server.follow(tail):
            return TailRefusal.NOT_NEXT
        self._digests = self._tpm.held_digests
        self._ends_at = tail.header.permanent_to, tail.header.volatile_to
        self._take(HandoverEvent.TAIL)
        return None

    def start_tail(self) -> None:
        """blackout_start_tail(): libtpms takes it."""
        if self.state is Handover.STARTING:
            self._take(HandoverEvent.READY)

    async def init(self) -> int | None:
        """blackout_init(): INIT's result, or None: that is not for the hand-over to say."""
        if not self._may(HandoverEvent.INIT):
            return None
        self._take(HandoverEvent.INIT)
        try:
            async with asyncio.timeout(GRANT_TIMEOUT_S):
                while self.state is Handover.WAITING:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            if self.state is Handover.WAITING:
                self._take(HandoverEvent.TIMED_OUT)
        return Result.SUCCESS if self.state is Handover.STARTED else Result.FAIL

    def captures(self) -> None:
        """blackout_capture(), where something ran."""
        if self.state in WITH_TAIL:
            self._take(HandoverEvent.LET_GO)
        if self.state in WITHOUT_GRANT:
            self._take(HandoverEvent.RUNS)

    def worked(self) -> None:
        """blackout_worked()."""
        if self.state in (*WITH_TAIL, *WITHOUT_GRANT) and self._tpm.worked:
            self._take(HandoverEvent.RUNS)

    def runs(self) -> None:
        """blackout_runs()."""
        self.say(HandoverEvent.RUNS)

    # The table.

    def _may(self, event: HandoverEvent) -> bool:
        return handover_step(self.state, event) is not None

    def _take(self, event: HandoverEvent) -> None:
        step = handover_step(self.state, event)
        assert step is not None
        self.state = step.state
        if HandoverAction.EXPECT in step.actions:
            self._tpm.expect()
        if HandoverAction.SEND_TAKE in step.actions:
            self._send(LaneFrame(LaneKind.TAKE, 0, *self._digests))
        if HandoverAction.SEND_GRANT in step.actions:
            self._send(LaneFrame(LaneKind.GRANT))
        if HandoverAction.SEND_END in step.actions:
            is_source = self.is_source
            self._send(
                LaneFrame(LaneKind.GO_ON) if is_source else LaneFrame(LaneKind.REFUSE, REASON_STATE)
            )
        if HandoverAction.CLOSE in step.actions:
            self._end_lane()
        if HandoverAction.TELL in step.actions:
            told = _HANDOVER.pack(
                self.session, self.is_source, event, 0, 0, 0, 0, 0, *self._ends_at
            )
            self._tpm.tell(Question(LinkQuestion.TELL_HANDOVER, self.state, told))
        if HandoverAction.RETIRE in step.actions:
            is_retired = self._tpm.retire(unserved=False) == Result.SUCCESS
            self._take(HandoverEvent.RETIRED if is_retired else HandoverEvent.NOT_RETIRED)
        self._changed.set()

    # The lane.

    def _end_lane(self) -> None:
        stream, self._stream = self._stream, None
        self._lane, self._frame = None, b""
        if stream is not None:
            stream.watch(None)
            stream.close()

    def _send(self, frame: LaneFrame) -> None:
        if self._lane is None or self._stream is None:
            return
        self._tpm.note(f"lane: {frame.kind.name}")
        self._stream.write(self._lane.seal(frame))

    def _receive(self) -> None:
        """blackout_receive(), for as long as there is something."""
        while (stream := self._stream) is not None:
            if stream.is_broken:
                self._take(HandoverEvent.LOST)
                return
            data = stream.read_now(LANE_FRAME_BYTES - len(self._frame))
            if data is None:
                return
            self._frame += data
            if not data:
                self._take(HandoverEvent.LOST)
            elif len(self._frame) == LANE_FRAME_BYTES:
                self._take(self._open_frame())

    def _open_frame(self) -> HandoverEvent:
        assert self._lane is not None
        data, self._frame = self._frame, b""
        try:
            frame = self._lane.open(data)
        except LaneError:
            return HandoverEvent.LOST
        event = self._event_of(frame)
        return event if self._may(event) else HandoverEvent.LOST

    def _event_of(self, frame: LaneFrame) -> HandoverEvent:
        match frame.kind:
            case LaneKind.TAKE if frame[2:4] == self._digests:
                return HandoverEvent.TAKE
            case LaneKind.TAKE:
                return HandoverEvent.TAKE_OTHER
            case LaneKind.GRANT:
                return HandoverEvent.GRANT
            case LaneKind.REFUSE | LaneKind.GO_ON:
                return HandoverEvent.END
        return HandoverEvent.LOST


def _generations(images: tuple[Image, Image]) -> tuple[int, int]:
    permanent, volatile = images
    return permanent.generation, volatile.generation
