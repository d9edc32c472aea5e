"""The destination's side of a session: events in, actions out, in order. No I/O, no clock.

Who uses it does the actions one after another; what one of them leads to is the next event, taken
when all actions of this one are done.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from vtpmd.migration import events
from vtpmd.migration.events import LocalEvent
from vtpmd.migration.states import (
    BEFORE_ACK,
    ON_APPROVAL,
    OWNING,
    ImpossibleEvent,
    State,
    advance,
    check_session,
    is_possible,
)
from vtpmd.wire import peer
from vtpmd.wire.peer import Reason
from vtpmd.wire.state_level import Library, needs_by
from vtpmd.wire.tpm import TpmVersion

NO_UUID = bytes(peer.UUID_BYTES)

Event = peer.Message | LocalEvent


class Own(NamedTuple):
    """What this side can run, to hold against a Hello."""

    busy: str | None  # why no vTPM can be taken now
    uuid: bytes  # all zero: the operator gave none
    lineage: bytes | None  # of the vTPM whose state it holds, empty if not known; None: of none
    tpm_version: int
    library: Library
    image_bytes_max: int
    following: peer.Following


class Send(NamedTuple):
    """Send a message to the source."""

    message: peer.Message


class SetLane(NamedTuple):
    """Have the engine speak with the source's over this connection."""

    descriptor: int


class Apply(NamedTuple):
    """Keep a record, which is the source's word until the round with it is staged."""

    record: bytes


class Stage(NamedTuple):
    """Have libtpms validate the images, and make the permanent one durable; then say how it went.

    Refused unless the images have these generations.
    """

    permanent_generation: int
    volatile_generation: int
    power: int
    is_last: int  # and start the TPM from them, held


class Decline(NamedTuple):
    """Have the engine take nothing; remember that the session ended without a Grant; forget it.

    Tell people why. Then Remembered or RecordFailed, and QEMU may still bring whole blobs; or
    Entitled or Started, if the engine was granted it by then.
    """

    reason: str


class Repeat(NamedTuple):
    """Take an event once more."""

    event: Event


class Discard(NamedTuple):
    """Forget the images: nothing of them was acknowledged; tell people why."""

    reason: str


class Do(Enum):
    """Actions without anything more to say."""

    PREPARE = "make the session's file, have the owner record know it; Prepared or StageFailed"
    LET_GO = "have the engine let go of the TPM that it started ahead; Took, if it is too late"
    START = "start the TPM from the last round, held; then HeldStarted or StageFailed"
    ADMIT = "make durable that the vTPM is ours, have commands executed; Admitted or AdmitFailed"
    SETTLE = "put the state into its own file; then Settled or SettleFailed"
    RELEASE = "fence the engine and remember it, unless a command was served: that is Served"
    SERVE_ON = "have the engine, which was fenced, serve on, unless the vTPM has left elsewhere"
    CLOSE = "close the connection"


Action = Send | SetLane | Apply | Stage | Decline | Discard | Repeat | Do


class Destination:
    """One session, from the connection to its end."""

    def __init__(self, own: Own) -> None:
        self.state = State.WELCOMING
        self.session = bytes(peer.SESSION_BYTES)
        self.uuid = own.uuid
        self.lineage = bytes(peer.LINEAGE_BYTES)
        self.key: bytes | None = None
        self._own = own
        self._version = peer.VERSION
        self._commit = peer.Commit(0, 0, 0, 0, 0)
        self._ended_by: Event = events.Disarmed("")

    @classmethod
    def found(cls, own: Own, state: State, session: bytes, lineage: bytes) -> Destination:
        """Return a session that another vtpmd has left in this state."""
        machine = cls(own)
        machine.state, machine.session, machine.lineage = state, session, lineage
        return machine

    def can_take(self, kind: type[LocalEvent]) -> bool:
        """Return whether an event of ours is possible now."""
        return is_possible(self.state, kind)

    def step(self, event: Event) -> list[Action]:
        """Take an event. Raises ImpossibleEvent, with nothing changed."""
        if self.state is State.ENDED:
            return []
        if not isinstance(event, LocalEvent | peer.Hello):
            check_session(event, self.session)
        if isinstance(event, events.LaneCame) and self.key is None:
            raise ImpossibleEvent("a lane before Key")
        if isinstance(event, peer.Commit):
            self._check_commit(event)
        before = self.state
        self.state = advance(before, type(event))
        if self.state is State.DECLINING:
            self._ended_by = event
        if isinstance(event, LocalEvent):
            return self._local(event, before)
        return self._message(event, before)

    def _check_commit(self, commit: peer.Commit) -> None:
        if commit.power > peer.POWER_MAX:
            raise ImpossibleEvent(f"Commit with {commit.power} for the guest's TPM2_Shutdown")
        if commit.is_last > 1:
            raise ImpossibleEvent(f"Commit with {commit.is_last} for the last round")

    def _local(self, event: LocalEvent, before: State) -> list[Action]:
        match event:
            case events.Prepared():
                own = self._own
                return [Send(peer.Welcome(self._version, own.following))]
            case events.LaneCame(descriptor=descriptor):
                return [SetLane(descriptor)]
            case events.StageFailed() | events.TailRefused():
                refusal = Send(peer.Refuse(event.refusal, event.reason))
                return [refusal, *self._end(event.reason, before)]
            case events.Staged() | events.HeldStarted() if before is State.STAGING:
                return [Send(peer.Ack(*self._commit[:3]))]
            case events.SetAside(reason=reason):
                refusal = Send(peer.Refuse(Reason.STATE, reason))
                return [refusal, *self._end(reason, before)]
            case events.LinkLost(reason=reason):
                return self._lost(reason, before)
        return self._owning(event, before)

    def _owning(self, event: LocalEvent, before: State) -> list[Action]:
        """What happens once the source has granted the vTPM."""
        match event:
            case events.InitAnswered() | events.Adopt():
                return [Do.ADMIT]
            case events.Admitted():
                running = peer.Running(self.session, event.wait_us, event.start_us)
                return [Send(running), Do.SETTLE]
            case events.SettleDue():
                return [Do.SETTLE]
            case events.Settled():
                return [Do.CLOSE]
            case events.Entitled() | events.Started() if before is State.DECLINING:
                # It was too late to end the session; but who asks for the vTPM gets an answer.
                is_asked = isinstance(self._ended_by, peer.Reclaim)
                return [Repeat(self._ended_by)] if is_asked else []
            case events.Served(was_fenced=True):
                return [Do.SERVE_ON, Send(peer.Kept(self.session))]
            case events.Served():
                return [Send(peer.Kept(self.session))]
            case events.Remembered():
                return [Send(peer.Released(self.session)), Do.CLOSE]
            case events.RecordFailed() if before is State.RELEASING:
                return [Send(peer.Kept(self.session))]
            case events.RecordFailed():
                return [Do.CLOSE]
        return []

    def _message(self, event: peer.Message, before: State) -> list[Action]:
        match event:
            case peer.Hello():
                return self._hello(event)
            case peer.Ping():
                return [Send(peer.Pong(self.session))]
            case peer.Key():
                self.key = event.key
            case peer.Record() | peer.Commit() | peer.Stopped():
                return self._round(event, before)
            case peer.Reclaim() if before is State.TAKING:
                return self._end("the guest runs on at the source", before)
            case peer.Reclaim() if before is State.ADMITTED:
                return [Send(peer.Kept(self.session))]
            case peer.Reclaim():
                return [Do.RELEASE]
            case peer.Disarm():
                return self._end("the source has ended the session", before)
        return []

    def _round(self, event: peer.Message, before: State) -> list[Action]:
        """Take what belongs to a round, unless the freeze has overtaken it."""
        if before is State.TAKING or before in OWNING:
            return []
        let_go: list[Action] = [Do.LET_GO] if before is State.STANDBY else []
        match event:
            case peer.Record(record=record):
                return [*let_go, Apply(record)]
            case peer.Commit():
                self._commit = event
                return [*let_go, Stage(*event[1:])]
            case peer.Stopped() if before is State.HOLDING:
                return [Do.START]
        return []

    def _lost(self, reason: str, before: State) -> list[Action]:
        if before not in (*BEFORE_ACK[1:], *ON_APPROVAL):
            return [Do.CLOSE]
        return self._end(reason, before)

    def _end(self, reason: str, before: State) -> list[Action]:
        """End a session that was not granted; what was acknowledged is asked for later."""
        if before in BEFORE_ACK:
            return [Discard(reason), Do.CLOSE]
        return [Decline(reason)]

    def _hello(self, hello: peer.Hello) -> list[Action]:
        self.session = hello.session
        refusal = why_refused(self._own, hello)
        if refusal is not None:
            self.state = State.ENDED
            return [Send(refusal), Do.CLOSE]
        # Either side may have been given none: the tail is bound to the source's.
        self.uuid, self.lineage = hello.uuid, hello.lineage
        self._version = min(hello.version, peer.VERSION)
        return [Do.PREPARE]


def why_refused(own: Own, hello: peer.Hello) -> peer.Refuse | None:
    """Return why this side could not run the source's state, or None."""
    if hello.version_minimum > peer.VERSION or hello.version < peer.VERSION_MINIMUM:
        return peer.Refuse(
            Reason.VERSION,
            f"the source speaks versions {hello.version_minimum} to {hello.version}, the "
            f"destination {peer.VERSION_MINIMUM} to {peer.VERSION}: install the same vtpmd on both",
        )
    if hello.tpm_version != own.tpm_version:
        return peer.Refuse(
            Reason.TPM_VERSION,
            f"the source has {_tpm(hello.tpm_version)}, the destination {_tpm(own.tpm_version)}: "
            "give it a vtpmd with a directory of its own there",
        )
    needs = needs_by(hello.format_level, hello.profile)
    if not own.library.reads(needs):
        return peer.Refuse(
            Reason.LIBTPMS_VERSION,
            f"the state needs {needs}, and the destination has {own.library}: update libtpms on "
            "the destination",
        )
    if own.busy is not None:
        return peer.Refuse(Reason.BUSY, own.busy)
    if NO_UUID not in (hello.uuid, own.uuid) and hello.uuid != own.uuid:
        return peer.Refuse(Reason.UUID, "it is another VM: the UUIDs differ")
    # Invariant 13. A vTPM that left, and comes back, is the one whose state is here.
    if own.lineage not in (None, hello.lineage):
        return peer.Refuse(
            Reason.LINEAGE,
            "the state directory there holds another vTPM, or one of which nobody knows whether it "
            "is this one, and which must not be lost: give that host's vtpmd a directory of this "
            "vTPM's own",
        )
    if hello.image_bytes_max > own.image_bytes_max:
        return peer.Refuse(
            Reason.LIMIT,
            f"its state may have {hello.image_bytes_max} bytes, here {own.image_bytes_max} fit",
        )
    return None


def _tpm(version: int) -> str:
    """Write a TPM's version as people do."""
    known = version in tuple(TpmVersion)
    return f"a TPM {TpmVersion(version).facts.word}" if known else "a TPM of an unknown version"
