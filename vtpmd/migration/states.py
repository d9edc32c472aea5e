"""The states of a session, of both sides, in one table. docs/stream-format.md has it too.

Messages count as events of the side that receives them; the others are in ``events``. What is not
in the table is not possible: from the peer it ends the session, from ourselves it is a mistake in
this program.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from vtpmd.migration import events
from vtpmd.migration.events import LocalEvent
from vtpmd.wire import peer


class State(Enum):
    """Where a session is, with a sentence each."""

    CONNECTING = "source: the peer has not answered yet"
    GREETING = "source: HELLO is sent; the destination decides"
    OPENING = "source: it has agreed; the lane between the two engines is being opened"
    SYNCING = "source: the whole images are under way; a migration now takes whole blobs"
    ARMED = "source: the destination holds a base; a migration now takes a tail"
    ROUND = "source: as ARMED, and a round is under way"
    STOPPING = "source: the guest stands still; a round is under way, and one more follows"
    CAPTURING = "source: the guest stands still; what it has left is captured"
    LAST_ROUND = "source: the last round is under way; the engine has a tail that has it, too"
    OFFERED = "source: as LAST_ROUND, and the destination has acknowledged all there is"
    FREEZING = "source: QEMU has asked for the state; the tail is made"
    FROZEN = "source: the tail is QEMU's; the destination has not asked for the vTPM yet"
    REVOKING = "source: the engine is to give no tail and grant nothing, if it has not yet"
    GRANTED = "source: fenced; the vTPM is the destination's, or may be: it has not said so yet"
    MOVED = "source: fenced; the destination has said that it has the vTPM"
    RECLAIMING = "source: fenced; the guest runs here again; the destination is asked to let go"
    LEFT = "source: fenced; QEMU has left, or vtpmd was restarted: whose the vTPM is, is asked"
    RELEASED = "source: fenced; the destination has let go; the record is to say so first"
    WELCOMING = "destination: connected; nothing is known of the peer yet"
    WELCOMED = "destination: the source is welcome; its lane is not there yet"
    RECEIVING = "destination: there is no whole state yet"
    STAGING = "destination: a round is being validated and made durable"
    HOLDING = "destination: the last round is durable and acknowledged"
    STANDBY = "destination: as HOLDING, and the TPM is started from it, held"
    TAKING = "destination: QEMU has brought the tail; the source has not granted the vTPM yet"
    ENTITLED = "destination: granted; QEMU has not sent INIT yet"
    STARTED = "destination: granted, INIT may be answered; that it is granted is not durable yet"
    ADMITTED = "destination: that it is granted is durable, and the guest's commands are executed"
    SETTLED = "destination: the state is in its own file, and the owner record says ours"
    RELEASING = "destination: the source asks for it back: fenced, if no command was served"
    DECLINING = "destination: the session ends without a Grant: that is written down first"
    ENDED = "both: the session is over"


Event = type[peer.Message] | type[LocalEvent]

# Before QEMU has the tail: what goes wrong here costs no more than whole blobs.
BEFORE_BASE: Final = (State.CONNECTING, State.GREETING, State.OPENING, State.SYNCING)
WITH_BASE: Final = (State.ARMED, State.ROUND, State.STOPPING, State.LAST_ROUND, State.OFFERED)
# As WITH_BASE, and the engine gives QEMU no tail by itself.
UNOFFERED: Final = WITH_BASE[:3]
# It may.
ON_OFFER: Final = WITH_BASE[3:]
# On the way from one state to another: nothing is heard of meanwhile.
PASSING: Final = (State.CAPTURING, State.FREEZING)
# The vTPM is, or may be, the destination's.
GIVEN_AWAY: Final = (State.GRANTED, State.MOVED, State.RECLAIMING, State.LEFT)
# The destination has acknowledged nothing.
BEFORE_ACK: Final = (State.WELCOMING, State.WELCOMED, State.RECEIVING)
# The destination has what the source may still grant to somebody else, or keep.
ON_APPROVAL: Final = (State.STAGING, State.HOLDING, State.STANDBY, State.TAKING)
OWNING: Final = (State.ENTITLED, State.STARTED, State.ADMITTED, State.SETTLED)

_SOURCE: Final[dict[tuple[State, Event], State]] = {
    (State.CONNECTING, events.Connected): State.GREETING,
    (State.GREETING, peer.Welcome): State.OPENING,
    (State.OPENING, events.LaneOpened): State.SYNCING,
    (State.SYNCING, events.RoundSent): State.SYNCING,
    (State.SYNCING, peer.Ack): State.ARMED,
    **{(state, events.RoundDue): state for state in BEFORE_BASE},
    **{(state, events.GuestStopped): state for state in BEFORE_BASE},
    **{(state, events.GuestResumed): state for state in BEFORE_BASE},
    **{(state, peer.Refuse): State.ENDED for state in (*BEFORE_BASE[1:], *UNOFFERED)},
    **{(state, peer.Released): State.ENDED for state in UNOFFERED},
    **{(state, events.LinkLost): State.ENDED for state in (*BEFORE_BASE, *UNOFFERED)},
    **{(state, events.Disarmed): State.ENDED for state in (*BEFORE_BASE, *UNOFFERED)},
    **{(state, peer.Receiving): state for state in (State.OPENING, State.SYNCING, *WITH_BASE)},
    **{
        (state, events.MigrationEnded): state
        for state in (State.OPENING, State.SYNCING, *WITH_BASE)
    },
    **{(state, peer.Pong): state for state in WITH_BASE},
    (State.ARMED, events.RoundDue): State.ROUND,
    (State.ROUND, events.RoundDue): State.ROUND,
    (State.ROUND, events.RoundSent): State.ROUND,
    (State.ROUND, events.NothingChanged): State.ARMED,
    (State.ROUND, peer.Ack): State.ARMED,
    (State.ARMED, events.GuestStopped): State.CAPTURING,
    (State.ROUND, events.GuestStopped): State.STOPPING,
    (State.STOPPING, peer.Ack): State.CAPTURING,
    (State.CAPTURING, events.RoundSent): State.LAST_ROUND,
    (State.CAPTURING, events.NothingChanged): State.OFFERED,
    **{(state, events.Disarmed): State.REVOKING for state in PASSING},
    (State.LAST_ROUND, peer.Ack): State.OFFERED,
    **{(state, events.RoundDue): state for state in WITH_BASE[2:]},
    **{(state, events.GuestStopped): state for state in WITH_BASE[2:]},
    (State.ARMED, events.GuestResumed): State.ARMED,
    (State.ROUND, events.GuestResumed): State.ROUND,
    (State.STOPPING, events.GuestResumed): State.ROUND,
    **{(state, events.TailMade): state for state in ON_OFFER},
    **{(state, events.Frozen): State.FROZEN for state in ON_OFFER},
    **{(state, events.Freeze): State.FREEZING for state in WITH_BASE},
    (State.FREEZING, events.RoundSent): State.FREEZING,
    (State.FREEZING, events.TailMade): State.FROZEN,
    **{
        (State.FROZEN, event): State.FROZEN
        for event in (
            peer.Ack,
            peer.Receiving,
            peer.Pong,
            events.RoundDue,
            events.GuestStopped,
            events.MigrationEnded,
            events.Frozen,
        )
    },
    (State.FROZEN, events.Granted): State.GRANTED,
    **{
        (state, event): State.REVOKING
        for state in (*ON_OFFER, State.FROZEN)
        for event in (
            peer.Refuse,
            peer.Released,
            peer.Running,  # it came before the word of this host's engine
            events.LinkLost,
            events.GuestResumed,
            events.Disarmed,
        )
    },
    (State.REVOKING, events.OfferEnded): State.ARMED,
    (State.REVOKING, events.OfferEndedEarly): State.ROUND,
    (State.REVOKING, events.Revoked): State.ENDED,
    (State.REVOKING, events.Granted): State.GRANTED,
    **{(state, events.LinkLost): state for state in GIVEN_AWAY},
    **{(state, events.GuestStopped): state for state in GIVEN_AWAY},
    **{(state, events.RoundDue): state for state in GIVEN_AWAY},
    **{(state, peer.Ack): state for state in GIVEN_AWAY},  # of a round that the Grant overtook
    **{(state, peer.Receiving): state for state in GIVEN_AWAY},
    **{(state, peer.Pong): state for state in GIVEN_AWAY},
    **{(state, peer.Unknown): state for state in GIVEN_AWAY},
    **{(state, peer.Refuse): state for state in GIVEN_AWAY},
    **{(state, peer.Released): State.RELEASED for state in GIVEN_AWAY},
    **{(state, events.CameBack): State.ENDED for state in GIVEN_AWAY},
    **{(state, events.QemuLeft): State.LEFT for state in GIVEN_AWAY},
    **{(state, events.GuestResumed): State.RECLAIMING for state in GIVEN_AWAY[:3]},
    (State.LEFT, events.GuestResumed): State.LEFT,  # another QEMU's
    (State.LEFT, peer.Running): State.LEFT,
    (State.LEFT, peer.Kept): State.LEFT,
    (State.GRANTED, peer.Running): State.MOVED,
    (State.GRANTED, peer.Kept): State.MOVED,
    (State.MOVED, peer.Running): State.MOVED,
    (State.MOVED, peer.Kept): State.MOVED,
    (State.RECLAIMING, peer.Running): State.RECLAIMING,  # crossed the Reclaim
    (State.RECLAIMING, peer.Kept): State.RECLAIMING,
    (State.RELEASED, events.Remembered): State.ENDED,
    (State.RELEASED, events.RecordFailed): State.LEFT,  # asked again, it says so again
}

_DESTINATION: Final[dict[tuple[State, Event], State]] = {
    (State.WELCOMING, peer.Hello): State.WELCOMED,
    (State.WELCOMING, events.LinkLost): State.ENDED,
    (State.WELCOMED, events.Prepared): State.WELCOMED,
    (State.WELCOMED, peer.Key): State.WELCOMED,
    (State.WELCOMED, events.LaneCame): State.RECEIVING,
    (State.RECEIVING, peer.Record): State.RECEIVING,
    (State.RECEIVING, peer.Commit): State.STAGING,
    **{
        (state, event): State.ENDED
        for state in BEFORE_ACK[1:]
        for event in (peer.Disarm, events.LinkLost, events.SetAside)
    },
    (State.WELCOMED, events.StageFailed): State.ENDED,
    (State.STAGING, events.Staged): State.HOLDING,
    (State.STAGING, events.HeldStarted): State.STANDBY,
    (State.STAGING, events.StageFailed): State.DECLINING,
    (State.HOLDING, peer.Record): State.HOLDING,
    (State.HOLDING, peer.Commit): State.STAGING,
    (State.HOLDING, peer.Stopped): State.STANDBY,
    (State.STANDBY, events.HeldStarted): State.STANDBY,
    (State.STANDBY, events.StageFailed): State.DECLINING,
    (State.STANDBY, peer.Record): State.HOLDING,
    (State.STANDBY, peer.Commit): State.STAGING,
    (State.STANDBY, peer.Stopped): State.STANDBY,
    (State.HOLDING, events.TailRefused): State.DECLINING,
    (State.STANDBY, events.TailRefused): State.DECLINING,
    **{
        (state, events.Took): State.TAKING
        for state in (State.STAGING, State.HOLDING, State.STANDBY)
    },
    # Of the round that the freeze overtook, and the lane's Grant after it: the tail has it.
    **{
        (state, event): state
        for state in (State.TAKING, *OWNING)
        for event in (peer.Record, peer.Commit, peer.Stopped)
    },
    (State.TAKING, events.Entitled): State.ENTITLED,
    (State.TAKING, events.Started): State.STARTED,
    (State.TAKING, peer.Reclaim): State.DECLINING,
    **{(state, peer.Disarm): State.DECLINING for state in ON_APPROVAL},
    **{(state, events.LinkLost): State.DECLINING for state in ON_APPROVAL},
    **{(state, events.SetAside): State.DECLINING for state in ON_APPROVAL},
    (State.DECLINING, events.Remembered): State.ENDED,
    (State.DECLINING, events.RecordFailed): State.ENDED,
    # The engine was granted it before it was asked to let it be.
    (State.DECLINING, events.Entitled): State.ENTITLED,
    (State.DECLINING, events.Started): State.STARTED,
    (State.ENTITLED, events.Started): State.STARTED,
    (State.ENTITLED, events.Adopt): State.STARTED,
    (State.ENTITLED, peer.Reclaim): State.RELEASING,
    (State.STARTED, events.InitAnswered): State.STARTED,
    (State.STARTED, events.AdmitFailed): State.STARTED,
    (State.STARTED, events.Admitted): State.ADMITTED,
    (State.STARTED, peer.Reclaim): State.RELEASING,
    (State.ADMITTED, events.SettleDue): State.ADMITTED,
    (State.ADMITTED, events.SettleFailed): State.ADMITTED,
    (State.ADMITTED, events.Settled): State.SETTLED,
    (State.ADMITTED, peer.Reclaim): State.ADMITTED,  # answered Kept: ask again
    (State.SETTLED, peer.Reclaim): State.RELEASING,
    (State.RELEASING, events.Served): State.SETTLED,
    (State.RELEASING, events.Remembered): State.ENDED,
    (State.RELEASING, events.RecordFailed): State.RELEASING,
    (State.RELEASING, peer.Reclaim): State.RELEASING,
    **{(state, events.LinkLost): state for state in (*OWNING, State.RELEASING)},
    **{
        (state, peer.Ping): state
        for state in State
        if state.value.startswith("destination") and state is not State.WELCOMING
    },
}

TABLE: Final[dict[tuple[State, Event], State]] = {**_SOURCE, **_DESTINATION}


class ImpossibleEvent(Exception):
    """An event that the table does not have in this state."""


def check_session(message: peer.Message, session: bytes) -> None:
    """Raise ImpossibleEvent for a message of another session."""
    named = getattr(message, "session", session)
    if named != session:
        raise ImpossibleEvent(f"{type(message).__name__} of another session")


def is_possible(state: State, event: Event) -> bool:
    """Return whether the table has an event in a state; a session that is over ignores all."""
    return state is State.ENDED or (state, event) in TABLE


def advance(state: State, event: Event) -> State:
    """Return the state after an event. Raises ImpossibleEvent."""
    if not is_possible(state, event):
        raise ImpossibleEvent(f"{event.__name__} while {state.name}")
    return TABLE.get((state, event), State.ENDED)
