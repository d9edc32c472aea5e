"""What is said on the engine link, but for what a start says (``csrc/engine/link.cdef.h``)."""

from __future__ import annotations

import sys
from enum import IntEnum, IntFlag

from vtpmd._core import ffi, lib
from vtpmd.core.boot import LinkOperation
from vtpmd.core.image import DIGEST_BYTES, GENERATION_MAX, Image
from vtpmd.core.journal import JOURNAL_IDENTITY_BYTES
from vtpmd.core.memory import check_length
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vtpmd.core.lane import LaneKeying


# Of what GET_STAGED answers, before the state.
GENERATION_BYTES = 8


# Of this vtpmd's (``enum link_version``): what the engines say that it attaches to is no later.
LINK_VERSION: int = lib.LINK_VERSION


class LinkQuestion(IntEnum):
    """What the engine asks, and says unasked (``enum link_question``)."""

    ASK_INIT = lib.LINK_ASK_INIT
    ASK_STOP = lib.LINK_ASK_STOP
    ASK_STATE = lib.LINK_ASK_STATE
    ASK_BLOB = lib.LINK_ASK_BLOB
    ASK_TAIL = lib.LINK_ASK_TAIL
    ASK_CONNECTED = lib.LINK_ASK_CONNECTED
    ASK_RUNS = lib.LINK_ASK_RUNS
    TELL_INIT = lib.LINK_TELL_INIT
    TELL_SHUTDOWN = lib.LINK_TELL_SHUTDOWN
    TELL_RESTORED = lib.LINK_TELL_RESTORED
    TELL_RUNNING = lib.LINK_TELL_RUNNING
    TELL_SIGNAL = lib.LINK_TELL_SIGNAL
    TELL_END = lib.LINK_TELL_END
    TELL_HANDOVER = lib.LINK_TELL_HANDOVER
    TELL_GIVEN = lib.LINK_TELL_GIVEN
    TELL_RECORDED = lib.LINK_TELL_RECORDED

    @property
    def is_news(self) -> bool:
        """True for what has no answer."""
        return self >= LinkQuestion.TELL_INIT


# Of which version an operation is; any other is of the first one.
LINK_SINCE = {LinkOperation.COPY: lib.LINK_VERSION_COPIES}


class LinkAskedInit(IntFlag):
    """What ASK_INIT says of QEMU's guest (``enum link_asked_init``)."""

    INCOMING = lib.LINK_ASKED_INCOMING
    BLOBS = lib.LINK_ASKED_BLOBS
    TAIL = lib.LINK_ASKED_TAIL


class TailRefusal(IntEnum):
    """Why a tail is of no use (``enum link_tail``)."""

    CUT = lib.LINK_TAIL_CUT
    FORMAT = lib.LINK_TAIL_FORMAT
    OTHER_SESSION = lib.LINK_TAIL_OTHER_SESSION
    FORGED = lib.LINK_TAIL_FORGED
    IMPOSSIBLE = lib.LINK_TAIL_IMPOSSIBLE
    NOT_NEXT = lib.LINK_TAIL_NOT_NEXT
    UNEXPECTED = lib.LINK_TAIL_UNEXPECTED


class LinkCondition(IntFlag):
    """What GET_CONDITION answers (``enum link_condition``)."""

    RUNNING = lib.LINK_CONDITION_RUNNING
    BLOBS = lib.LINK_CONDITION_BLOBS
    ON = lib.LINK_CONDITION_ON
    STARTED = lib.LINK_CONDITION_STARTED


class LinkCustody(IntEnum):
    """Whose the vTPM is, as its engine knows it (``enum tpm_custody``, csrc/engine/custody.h)."""

    ACTIVE = lib.TPM_ACTIVE
    GIVEN = lib.TPM_GIVEN
    FENCED = lib.TPM_FENCED
    RECLAIMING = lib.TPM_RECLAIMING
    STANDBY = lib.TPM_STANDBY
    PENDING = lib.TPM_PENDING


class LinkAdmit(IntEnum):
    """What ADMIT does (``enum link_admit``)."""

    SERVE = lib.LINK_ADMIT_SERVE
    GOES_BACK = lib.LINK_ADMIT_GOES_BACK


class LinkStage(IntEnum):
    """That the engine starts the TPM ahead of time (``enum link_stage``)."""

    HELD = lib.LINK_STAGE_HELD


class LinkCapturing(IntFlag):
    """What CAPTURE is told (``enum link_capturing``)."""

    STOPPED = lib.LINK_CAPTURING_STOPPED
    OFFERS = lib.LINK_CAPTURING_OFFERS
    RECORDED = lib.LINK_CAPTURING_RECORDED


class LinkCapture(IntFlag):
    """What the engine says of a capture (``enum link_capture``)."""

    CHANGED = lib.LINK_CAPTURE_CHANGED
    ABANDONED = lib.LINK_CAPTURE_ABANDONED
    OFFERED = lib.LINK_CAPTURE_OFFERED
    RECORDS = lib.LINK_CAPTURE_RECORDS


class LinkShutdown(IntEnum):
    """The guest's last TPM2_Shutdown since its TPM2_Startup (``enum link_shutdown``)."""

    NONE = lib.LINK_SHUTDOWN_NONE
    CLEAR = lib.LINK_SHUTDOWN_CLEAR
    STATE = lib.LINK_SHUTDOWN_STATE


class LinkRecorded(NamedTuple):
    """What became of the owner record that came with a CAPTURE (``struct link_recorded``)."""

    error: int  # an errno; 0: it is durable
    took_us: int


class LinkDigests(NamedTuple):
    """The digests of what a tail ends at (``struct link_digests``)."""

    permanent: bytes
    volatile: bytes


class LinkCopy(NamedTuple):
    """A running TPM's states at one moment, as COPY answers (``struct link_copy``)."""

    identity: bytes
    generation: int  # of the permanent state; 0, with an identity of zeros: it is not known
    permanent: bytes
    volatile: bytes
    savestate: bytes  # empty: there is none

    def __repr__(self) -> str:
        """Leave the states out."""
        return f"LinkCopy(generation={self.generation})"


class LinkHandover(NamedTuple):
    """How a hand-over came to the state that it is in (``struct link_handover``)."""

    session: bytes
    is_source: bool
    event: int  # HandoverEvent
    tail_bytes: int
    retire_us: int
    apply_us: int
    start_us: int
    wait_us: int
    generations: tuple[int, int]  # destination: what the tail ends at, permanent and volatile


LINK_DIGESTS_BYTES: int = ffi.sizeof("struct link_digests")
LINK_LINEAGE_BYTES: int = ffi.sizeof("struct link_lineage")
LINK_SHARED: int = lib.LINK_SHARED  # how many descriptors READY brings: enum link_shared


def link_held(said: LinkShutdown) -> int:
    """Return the argument of STAGE for a held start, of a guest that has ``said`` so elsewhere."""
    return int(LinkStage.HELD | said << lib.LINK_SAID_SHIFT)


def link_said(argument: int) -> LinkShutdown:
    """Return what the answer to CAPTURE has of the guest's last TPM2_Shutdown.

    Raises ValueError for what the engine never says.
    """
    return LinkShutdown((argument & lib.LINK_SAID_MASK) >> lib.LINK_SAID_SHIFT)


def link_condition(argument: int) -> tuple[LinkCondition, LinkCustody]:
    """Return what GET_CONDITION answers. Raises ValueError for what the engine never says."""
    custody = LinkCustody((argument & lib.LINK_CUSTODY_MASK) >> lib.LINK_CUSTODY_SHIFT)
    return LinkCondition(argument & ~lib.LINK_CUSTODY_MASK), custody


def unpack_link_digests(payload: bytes | bytearray) -> LinkDigests:
    """Return what the answer to a CAPTURE that offers brings, LINK_DIGESTS_BYTES long.

    Raises ValueError for another length.
    """
    digests = bytes(payload)
    check_length("digests", digests, LINK_DIGESTS_BYTES)
    return LinkDigests(digests[:DIGEST_BYTES], digests[DIGEST_BYTES:])


def pack_link_lane(keying: LaneKeying, *, is_source: bool) -> bytearray:
    """Return the payload of SET_LANE (``struct link_lane``), which has a key: overwrite it."""
    lane = ffi.new("struct link_lane *", (*keying, is_source))
    packed = bytearray(ffi.buffer(lane))
    lib.explicit_bzero(lane, ffi.sizeof("struct link_lane"))
    return packed


def unpack_link_staged(payload: bytes | bytearray) -> Image:
    """Return the permanent state that GET_STAGED answers. Raises ValueError for too few bytes."""
    if len(payload) < GENERATION_BYTES:
        raise ValueError(f"an answer to GET_STAGED of {len(payload)} bytes")
    generation = int.from_bytes(payload[:GENERATION_BYTES], sys.byteorder)
    return Image(lib.LINK_STATE_PERMANENT, generation, bytes(payload[GENERATION_BYTES:]))


def pack_link_records(permanent: bytes, volatile: bytes) -> bytes:
    """Return the payload of STAGE: a delta record for each state, or none."""
    return len(permanent).to_bytes(4, sys.byteorder) + permanent + volatile


def unpack_link_handover(payload: bytes | bytearray) -> LinkHandover:
    """Return what TELL_HANDOVER brings. Raises ValueError for another length."""
    check_length("news of a hand-over", bytes(payload), ffi.sizeof("struct link_handover"))
    told = ffi.new("struct link_handover *")
    ffi.memmove(told, payload, len(payload))
    return LinkHandover(
        bytes(told.session),
        bool(told.is_source),
        told.event,
        told.tail_bytes,
        told.retire_us,
        told.apply_us,
        told.start_us,
        told.wait_us,
        (told.permanent_generation, told.volatile_generation),
    )


def pack_link_lineage(identity: bytes, generation: int) -> bytes:
    """Return the payload of ADMIT (``struct link_lineage``).

    Raises ValueError for what is no identity or generation.
    """
    check_length("identity", identity, JOURNAL_IDENTITY_BYTES)
    if not 0 <= generation <= GENERATION_MAX:
        raise ValueError(f"{generation} is no generation")
    return bytes(ffi.buffer(ffi.new("struct link_lineage *", (generation, identity))))


def unpack_link_lineage(payload: bytes | bytearray) -> tuple[bytes, int]:
    """Return the identity and the generation that GET_LINEAGE answers; of a state without, 0.

    Raises ValueError for another length than LINK_LINEAGE_BYTES.
    """
    check_length("answer to GET_LINEAGE", bytes(payload), LINK_LINEAGE_BYTES)
    lineage = ffi.new("struct link_lineage *")
    ffi.memmove(lineage, payload, LINK_LINEAGE_BYTES)
    return bytes(ffi.buffer(lineage.identity)), lineage.generation


def unpack_link_copy(payload: bytes | bytearray) -> LinkCopy:
    """Return what COPY answers. Raises ValueError for another length than it says."""
    head_bytes = ffi.sizeof("struct link_copy")
    if len(payload) < head_bytes:
        raise ValueError(f"an answer to COPY of {len(payload)} bytes")
    says = ffi.new("struct link_copy *")
    ffi.memmove(says, payload, head_bytes)
    lengths = (says.permanent_bytes, says.volatile_bytes, says.savestate_bytes)
    check_length("answer to COPY", payload, head_bytes + sum(lengths))
    states, at = [], head_bytes
    for n_bytes in lengths:
        states.append(bytes(payload[at : at + n_bytes]))
        at += n_bytes
    identity = bytes(ffi.buffer(says.lineage.identity))
    return LinkCopy(identity, says.lineage.generation, *states)


def unpack_link_recorded(payload: bytes | bytearray) -> LinkRecorded:
    """Return what TELL_RECORDED brings. Raises ValueError for another length."""
    check_length("TELL_RECORDED", bytes(payload), ffi.sizeof("struct link_recorded"))
    recorded = ffi.new("struct link_recorded *")
    ffi.memmove(recorded, payload, len(payload))
    return LinkRecorded(recorded.error, recorded.took_us)


def unpack_link_restored(payload: bytes | bytearray) -> tuple[int, int]:
    """Return what TELL_RESTORED says: the generation that runs, and the newest that there was."""
    check_length("TELL_RESTORED", bytes(payload), ffi.sizeof("struct link_restored"))
    restored = ffi.new("struct link_restored *")
    ffi.memmove(restored, payload, len(payload))
    return restored.generation, restored.newest
