"""The states of a session, of both sides, in one table. docs/stream-format.md has it too.

Messages count as events of the side that receives them. What is not in the table is not possible:
from the peer it ends the session, from ourselves it is a mistake in this program.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from vtpmd.wire import peer


class State(Enum):
    """Where a session is, with a sentence each."""

    CONNECTING = "source: the peer has not answered yet"
    GREETING = "source: HELLO is sent; the destination decides"
    SYNCING = "source: the whole images are under way; a migration now takes whole blobs"
    ARMED = "source: the destination holds a base; a migration now takes a tail"
    ROUND = "source: as ARMED, and a round is under way"
    FROZEN = "source: the tail is QEMU's; the destination has not asked for the vTPM yet"
    RETIRING = "source: the destination has asked; the engine stops serving, durably"
    GRANTED = "source: retired; the vTPM is the destination's"
    RECLAIMING = "source: the guest runs here again; the destination is asked to let go"
    WELCOMING = "destination: connected; nothing is known of the peer yet"
    RECEIVING = "destination: there is no whole state yet"
    STAGING = "destination: a round is being validated and made durable"
    HOLDING = "destination: the last round is durable and acknowledged"
    TAKING = "destination: the tail is applied; the source has not granted the vTPM yet"
    OWNING = "destination: the vTPM is ours"
    ENDED = "both: the session is over"


class Local(Enum):
    """Events that are not messages."""

    CONNECTED = "the peer is reached and authenticated"
    LINK_LOST = "the connection broke, or the peer closed it"
    ROUND_DUE = "QEMU began another pass, or time has passed"
    NOTHING_CHANGED = "no command ran since the last round"
    GUEST_STOPPED = "the guest stands still; what was sent last is its TPM's state"
    FREEZE = "QEMU asks for the state"
    GUEST_RESUMED = "the guest runs at the source again"
    RETIRED = "the engine serves no more, and a durable record says so"
    RETIRE_FAILED = "the guest has used the TPM since the freeze"
    DISARM = "the operator ends the session, or the state was asked for too early"
    STAGED = "the round is durable, and libtpms takes the state"
    STAGE_FAILED = "libtpms refuses the state, or it cannot be made durable"
    TAIL_APPLIED = "QEMU has brought the tail, and it fits"
    TAIL_REFUSED = "QEMU has brought a tail that cannot be used"
    RELEASE = "the source has the vTPM back"


Event = type[peer.Message] | Local

TABLE: Final[dict[tuple[State, Event], State]] = {
    (State.CONNECTING, Local.CONNECTED): State.GREETING,
    (State.CONNECTING, Local.LINK_LOST): State.ENDED,
    (State.CONNECTING, Local.DISARM): State.ENDED,
    (State.GREETING, peer.Welcome): State.SYNCING,
    (State.GREETING, peer.Refuse): State.ENDED,
    (State.GREETING, Local.LINK_LOST): State.ENDED,
    (State.GREETING, Local.DISARM): State.ENDED,
    (State.SYNCING, peer.Ack): State.ARMED,
    (State.SYNCING, peer.Refuse): State.ENDED,
    (State.SYNCING, Local.LINK_LOST): State.ENDED,
    (State.SYNCING, Local.DISARM): State.ENDED,
    (State.ARMED, Local.ROUND_DUE): State.ROUND,
    (State.ARMED, Local.GUEST_STOPPED): State.ARMED,
    (State.ARMED, Local.FREEZE): State.FROZEN,
    (State.ARMED, peer.Refuse): State.ENDED,
    (State.ARMED, Local.LINK_LOST): State.ENDED,
    (State.ARMED, Local.DISARM): State.ENDED,
    (State.ROUND, peer.Ack): State.ARMED,
    (State.ROUND, Local.NOTHING_CHANGED): State.ARMED,
    (State.ROUND, Local.GUEST_STOPPED): State.ROUND,
    (State.ROUND, Local.FREEZE): State.FROZEN,
    (State.ROUND, peer.Refuse): State.ENDED,
    (State.ROUND, Local.LINK_LOST): State.ENDED,
    (State.ROUND, Local.DISARM): State.ENDED,
    (State.FROZEN, peer.Ack): State.FROZEN,  # of the round that the freeze overtook
    (State.FROZEN, peer.Take): State.RETIRING,
    (State.FROZEN, peer.Refuse): State.ENDED,
    (State.FROZEN, Local.LINK_LOST): State.ENDED,
    (State.FROZEN, Local.GUEST_RESUMED): State.ENDED,
    (State.FROZEN, Local.DISARM): State.ENDED,
    (State.RETIRING, Local.RETIRED): State.GRANTED,
    (State.RETIRING, Local.RETIRE_FAILED): State.ENDED,
    (State.GRANTED, peer.Running): State.GRANTED,
    (State.GRANTED, Local.LINK_LOST): State.GRANTED,
    (State.GRANTED, Local.GUEST_RESUMED): State.RECLAIMING,
    (State.RECLAIMING, peer.Running): State.RECLAIMING,  # crossed the Reclaim
    (State.RECLAIMING, peer.Released): State.ENDED,
    (State.RECLAIMING, peer.Kept): State.GRANTED,
    (State.RECLAIMING, Local.LINK_LOST): State.GRANTED,
    (State.WELCOMING, peer.Hello): State.RECEIVING,
    (State.WELCOMING, Local.LINK_LOST): State.ENDED,
    (State.RECEIVING, peer.Key): State.RECEIVING,
    (State.RECEIVING, peer.Record): State.RECEIVING,
    (State.RECEIVING, peer.Commit): State.STAGING,
    (State.RECEIVING, peer.Disarm): State.ENDED,
    (State.RECEIVING, Local.LINK_LOST): State.ENDED,
    (State.STAGING, Local.STAGED): State.HOLDING,
    (State.STAGING, Local.STAGE_FAILED): State.ENDED,
    (State.HOLDING, peer.Record): State.HOLDING,
    (State.HOLDING, peer.Commit): State.STAGING,
    (State.HOLDING, peer.Stopped): State.HOLDING,
    (State.HOLDING, Local.TAIL_APPLIED): State.TAKING,
    (State.HOLDING, Local.TAIL_REFUSED): State.ENDED,
    (State.HOLDING, peer.Disarm): State.ENDED,
    (State.HOLDING, Local.LINK_LOST): State.ENDED,
    (State.TAKING, peer.Record): State.TAKING,  # of the round that the freeze overtook
    (State.TAKING, peer.Commit): State.TAKING,
    (State.TAKING, peer.Stopped): State.TAKING,
    (State.TAKING, peer.Grant): State.OWNING,
    (State.TAKING, peer.Disarm): State.ENDED,
    (State.TAKING, peer.Reclaim): State.ENDED,
    (State.TAKING, Local.LINK_LOST): State.ENDED,
    (State.OWNING, peer.Reclaim): State.OWNING,  # answered Released or Kept
    (State.OWNING, Local.RELEASE): State.ENDED,
    (State.OWNING, Local.LINK_LOST): State.OWNING,
}


class ImpossibleEvent(Exception):
    """An event that the table does not have in this state."""


def check_session(message: peer.Message, session: bytes) -> None:
    """Raise ImpossibleEvent for a message of another session."""
    named = getattr(message, "session", session)
    if named != session:
        raise ImpossibleEvent(f"{type(message).__name__} of another session")


def advance(state: State, event: Event) -> State:
    """Return the state after an event. Raises ImpossibleEvent."""
    try:
        return TABLE[state, event]
    except KeyError:
        name = event.name if isinstance(event, Local) else event.__name__
        raise ImpossibleEvent(f"{name} while {state.name}") from None
