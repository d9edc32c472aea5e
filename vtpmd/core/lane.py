"""The lane's frames (``csrc/engine/lane.h``, docs/lane-format.md)."""

from enum import IntEnum
from typing import NamedTuple

from vtpmd._core import ffi, lib
from vtpmd.core.image import DIGEST_BYTES
from vtpmd.core.memory import check_error, check_length
from vtpmd.errors import VtpmdError

LANE_SESSION_BYTES: int = lib.LANE_SESSION_BYTES
LANE_KEY_BYTES: int = lib.LANE_KEY_BYTES
LANE_UUID_BYTES: int = lib.LANE_UUID_BYTES
LANE_LINEAGE_BYTES: int = lib.LANE_LINEAGE_BYTES
LANE_CONTENT_BYTES: int = lib.LANE_CONTENT_BYTES
LANE_FRAME_BYTES: int = lib.LANE_FRAME_BYTES
LANE_FRAMES_MAX: int = lib.LANE_FRAMES_MAX


class LaneKind(IntEnum):
    """What a frame says (``enum lane_kind``)."""

    HELLO = lib.LANE_HELLO
    TAKE = lib.LANE_TAKE
    GRANT = lib.LANE_GRANT
    REFUSE = lib.LANE_REFUSE
    GO_ON = lib.LANE_GO_ON


class LaneRefusal(IntEnum):
    """Why there is no next frame (``enum lane_refusal``)."""

    FORGED = lib.LANE_FORGED
    IMPOSSIBLE = lib.LANE_IMPOSSIBLE
    ENDED = lib.LANE_ENDED


_REASONS = {
    LaneRefusal.FORGED: "what came is not what the other side sealed next",
    LaneRefusal.IMPOSSIBLE: "the other side has sealed what is no frame, or has no place here",
    LaneRefusal.ENDED: "it has ended before",
}


class LaneError(VtpmdError):
    """The lane has ended; nothing can be sealed or opened any more."""

    def __init__(self, refusal: LaneRefusal) -> None:
        super().__init__(f"the lane has ended: {_REASONS[refusal]}; migrate again")
        self.refusal = refusal


class LaneFrame(NamedTuple):
    """What one side says; what is not of its kind is 0 (``struct lane_frame``)."""

    kind: LaneKind
    reason: int = 0
    permanent_digest: bytes = bytes(DIGEST_BYTES)
    volatile_digest: bytes = bytes(DIGEST_BYTES)
    apply_us: int = 0
    start_us: int = 0


class LaneKeying(NamedTuple):
    """What both sides know of a session; its key makes one lane (``struct lane_keying``)."""

    session: bytes
    key: bytes
    uuid: bytes
    lineage: bytes
    is_greeted: bool = False  # HELLO has passed both ways, in another process

    def __repr__(self) -> str:
        """Leave the key out."""
        return f"LaneKeying(session={self.session.hex()})"


class Lane:
    """One side of a lane; for one thread at a time."""

    def __init__(self, keying: LaneKeying, *, is_source: bool) -> None:
        """Make its keys. Raises ValueError for what has a wrong length, OSError without memory."""
        for name, data, n_bytes in (
            ("session", keying.session, LANE_SESSION_BYTES),
            ("key", keying.key, LANE_KEY_BYTES),
            ("uuid", keying.uuid, LANE_UUID_BYTES),
            ("lineage", keying.lineage, LANE_LINEAGE_BYTES),
        ):
            check_length(name, data, n_bytes)
        c_keying, lane = ffi.new("struct lane_keying *", tuple(keying)), ffi.new("struct lane **")
        try:
            check_error(lib.lane_new(lane, c_keying, is_source))
        finally:
            lib.explicit_bzero(c_keying, ffi.sizeof("struct lane_keying"))
        self._lane = ffi.gc(lane[0], lib.lane_free)

    def seal(self, frame: LaneFrame) -> bytes:
        """Return the bytes of the next frame for the other side, LANE_FRAME_BYTES of them.

        Raises LaneError once the lane has ended; ValueError for what cannot be the next frame,
        and nothing has changed then.
        """
        for name, data in zip(("permanent", "volatile"), frame[2:4], strict=True):
            check_length(f"{name} digest", data, DIGEST_BYTES)
        data = ffi.new("uint8_t[]", LANE_FRAME_BYTES)
        result = lib.lane_seal(self._lane, ffi.new("struct lane_frame *", tuple(frame)), data)
        if result == LaneRefusal.IMPOSSIBLE:
            raise ValueError(f"{frame!r} cannot be the next frame")
        _check(result)
        return bytes(ffi.buffer(data))

    def open(self, data: bytes) -> LaneFrame:
        """Return the other side's next frame, from LANE_FRAME_BYTES bytes.

        Raises LaneError, and ever after, if they are not that; ValueError for another length.
        """
        check_length("frame", data, LANE_FRAME_BYTES)
        frame = ffi.new("struct lane_frame *")
        _check(lib.lane_open(self._lane, data, frame))
        return LaneFrame(
            kind=LaneKind(frame.kind),
            reason=frame.reason,
            permanent_digest=bytes(frame.permanent_digest),
            volatile_digest=bytes(frame.volatile_digest),
            apply_us=frame.apply_us,
            start_us=frame.start_us,
        )


def _check(result: int) -> None:
    check_error(result)
    if result > 0:
        raise LaneError(LaneRefusal(result))
