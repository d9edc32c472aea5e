"""The source's side of a session: events in, actions out, in order. No I/O, no clock.

Who uses it does the actions one after another; what one of them leads to is the next event, taken
when all actions of this one are done. What must be durable is an action before the one that sends.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from vtpmd.migration import events
from vtpmd.migration.events import LocalEvent, Round
from vtpmd.migration.states import (
    BEFORE_BASE,
    GIVEN_AWAY,
    ON_OFFER,
    PASSING,
    WITH_BASE,
    State,
    advance,
    check_session,
    is_possible,
)
from vtpmd.wire import peer

# A tail is of use only to a destination that answers; whole blobs are to any.
HEARD_US_MAX: Final = 1_000_000


Event = peer.Message | LocalEvent


class Send(NamedTuple):
    """Send a message to the destination."""

    message: peer.Message


class FallBack(NamedTuple):
    """QEMU's stream will carry whole blobs; tell people why."""

    reason: str
    refusal: peer.Reason | None = None  # the destination's, if it is one


class GoOn(NamedTuple):
    """The guest's TPM is served here; tell people why."""

    reason: str


class Do(Enum):
    """Actions without anything more to say."""

    OPEN_LANE = "open the lane, and hand it down; then LaneOpened"
    START_ROUND = "capture, unless that is done, and send it; then RoundSent or NothingChanged"
    KEEP_BASE = "the images of the round are the destination's now; the engine is to know"
    TELL_ARMED = "tell people, and the engine, that a tail will do from now on"
    RECORD_AHEAD = "have the owner record say offered, while the guest works: nobody waits for it"
    OFFER = "wait until the owner record says offered, durably; the engine may grant then"
    WITHDRAW = "have it say ours again, if it says offered; the guest need not wait for that"
    WIND_UP = "capture what the guest has left, once its command is done; offer it; write that down"
    MAKE_TAIL = "have the engine give what changed since the base, unless it does; then TailMade"
    END_OFFER = "have it give no tail for now, then OfferEnded or OfferEndedEarly; else as REVOKE"
    REVOKE = "have it give no tail, and grant nothing; then Revoked, or Granted if it has"
    TELL_FREEZE = "tell people that QEMU has the tail"
    TELL_GRANTED = "tell people that the destination may have the vTPM"
    RECORD_MOVED = "have the owner record say moved, and tell people: the destination has said so"
    HOLD_COMMANDS = "the guest's commands wait, for a while, instead of failing"
    FAIL_COMMANDS = "they fail: the destination has the vTPM; tell people"
    ASK = "ask the destination, over a new connection unless there is one, until it has let go"
    RECORD_RELEASED = "have the owner record say ours; then Remembered or RecordFailed"
    SERVE = "have the engine serve again"
    CLOSE = "close the connection"


class Repeat(NamedTuple):
    """Take an event once more."""

    event: Event


Action = Send | FallBack | GoOn | Repeat | Do
_GOODBYE: Final = (Do.WITHDRAW, Do.CLOSE)
# What the engine may do by itself is to be ended first.
REVOCABLE: Final = (*PASSING, *ON_OFFER, State.FROZEN)


class Source:
    """One session, from arming to its end."""

    def __init__(self, *, hello: peer.Hello, key: bytes) -> None:
        self.state = State.CONNECTING
        self.session = hello.session
        self.round = Round(0, 0, 0, 0)
        self._wanted: tuple[Event, State] | None = None  # what something is revoked for
        self.peer_following: peer.Following | None = None
        self.is_received = False  # the destination's QEMU takes a stream
        self._idled_after = 0  # the round that was the last one when a guest was seen to idle
        self._hello = hello
        self._key = key

    @classmethod
    def found(cls, session: bytes, state: State) -> Source:
        """Return the session of an owner record that says offered or moved.

        LEFT, or another one of GIVEN_AWAY where its QEMU is still there.
        """
        nobody = peer.Hello(peer.VERSION, peer.VERSION_MINIMUM, session, b"", b"", 0, 0, b"", 0)
        found = cls(hello=nobody, key=b"")
        found.state = state
        return found

    @property
    def may_withdraw(self) -> bool:
        """True while an offer that the record still has is over: no tail of it is at QEMU."""
        return self.state in (State.ARMED, State.ROUND, State.ENDED)

    @property
    def is_fenced(self) -> bool:
        """True while the vTPM may be the destination's."""
        return self.state in (*GIVEN_AWAY, State.RELEASED)

    def why_no_tail(self, heard_us: int) -> str | None:
        """Return why a freeze must be answered with whole blobs, or None: a tail will do.

        Invariant 6. ``heard_us`` is how long ago the destination was heard of.
        """
        if self.state not in (*WITH_BASE, State.CAPTURING):
            return "QEMU asked for the state before the destination held a base"
        if heard_us > HEARD_US_MAX:
            return f"the destination has not been heard of for {heard_us / 1e6:.1f} s"
        if self.peer_following is not peer.Following.NOT_ASKED_FOR and not self.is_received:
            return (
                "the destination's QEMU has not said that a stream comes in: this one saves to a "
                "file, or migrates to another"
            )
        return None

    def can_take(self, kind: type[LocalEvent]) -> bool:
        """Return whether an event of ours is possible now."""
        return is_possible(self.state, kind)

    def step(self, event: Event) -> list[Action]:
        """Take an event. Raises ImpossibleEvent, with nothing changed."""
        if self.state is State.ENDED:
            return []
        if not isinstance(event, LocalEvent):
            check_session(event, self.session)
        before = self.state
        self.state = advance(before, type(event))
        if isinstance(event, LocalEvent):
            return self._local(event, before)
        return self._message(event, before)

    def _local(self, event: LocalEvent, before: State) -> list[Action]:
        match event:
            case events.Connected():
                return [Send(self._hello)]
            case events.LaneOpened():
                return [Do.START_ROUND]
            case events.RoundDue() if before is State.ARMED:
                return [Do.START_ROUND]
            case events.RoundSent(round=sent):
                self.round = sent
                # The record is written while the destination is at it.
                return self._offer()
            case events.NothingChanged() if before is State.ROUND:
                return self._say_that_it_idles()
            case events.NothingChanged():
                return [Send(peer.Stopped(self.session)), *self._offer()]
            case events.MigrationEnded():
                return self._received(now=False, before=before)
            case events.TailMade(was_sent=was_sent) if before is State.FREEZING and was_sent:
                return [Send(peer.Stopped(self.session))]
            case events.CameBack():
                return [Do.CLOSE]
            case events.Remembered():
                return [Do.SERVE, GoOn("the destination has let go of it"), Do.CLOSE]
            case events.RecordFailed() | events.QemuLeft():
                return [Do.ASK]
            case events.LinkLost() | events.Disarmed() if before in REVOCABLE:
                return self._revoke(event, before)
            case events.LinkLost(reason=reason):
                return self._lost(reason, before)
            case events.Disarmed(reason=reason):
                return self._disarm(reason, before)
            case events.GuestStopped() | events.GuestResumed() | events.Freeze():
                return self._guest(event, before)
        return self._handover(event, before)

    def _handover(self, event: LocalEvent, before: State) -> list[Action]:
        """What the engine has done, or lets be."""
        match event:
            case events.Frozen() if before in REVOCABLE:
                return [Do.TELL_FREEZE]
            case events.OfferEnded() | events.OfferEndedEarly():
                return [Do.WITHDRAW]
            case events.Revoked(was_given=was_given):
                return self._revoked(was_given=was_given)
            case events.Granted() if before is State.REVOKING:
                assert self._wanted is not None  # noqa: S101 - something is revoked for it
                wanted, _ = self._wanted
                is_too_late = isinstance(wanted, events.Disarmed)
                return [Do.TELL_GRANTED, *([] if is_too_late else [Repeat(wanted)])]
            case events.Granted() if before is State.FROZEN:
                return [Do.TELL_GRANTED]
        return []

    def _revoke(self, event: Event, before: State) -> list[Action]:
        """End what the engine may do by itself, before anything is said or written."""
        self._wanted = event, before
        return [Do.REVOKE]

    def _revoked(self, *, was_given: bool) -> list[Action]:
        assert self._wanted is not None  # noqa: S101 - something is revoked for it
        event, before = self._wanted
        if was_given:  # which is heard of later
            before = State.FROZEN
        match event:
            case peer.Refuse():
                return self._refused(event, before)
            case peer.Released():
                return [GoOn("the destination has let go of it"), *_GOODBYE]
            case peer.Running():
                return [GoOn("the destination runs what it was not granted"), *_GOODBYE]
            case events.Disarmed(reason=reason):
                return self._disarm(reason, before)
            case events.LinkLost(reason=reason):
                return [*self._parting(reason, before), *_GOODBYE]
        return self._give_up("the guest runs here again")

    def _guest(self, event: LocalEvent, before: State) -> list[Action]:
        """The guest stops, runs again, or its state is asked for."""
        match event:
            case events.GuestStopped() if before is State.ARMED:
                return [Do.WIND_UP, Do.START_ROUND]
            case events.Freeze():
                return [Do.MAKE_TAIL, Do.OFFER]
            case events.GuestResumed() if before in ON_OFFER:
                self._wanted = event, before
                return [Do.END_OFFER]
            case events.GuestResumed() if before in WITH_BASE:
                return [Do.WITHDRAW]
            case events.GuestResumed() if before is State.FROZEN:
                return self._revoke(event, before)
            case events.GuestResumed() if before in (State.GRANTED, State.MOVED):
                return [Do.HOLD_COMMANDS, Do.ASK]
        return []

    def _message(self, event: peer.Message, before: State) -> list[Action]:
        match event:
            case peer.Welcome():
                return self._welcome(event)
            case peer.Receiving():
                return self._received(now=bool(event.is_receiving), before=before)
            case peer.Ack() if before not in (State.FROZEN, *GIVEN_AWAY):
                return self._acknowledged(event, before)
            case peer.Refuse() | peer.Released() | peer.Running() if before in REVOCABLE:
                return self._revoke(event, before)
            case peer.Refuse() if before not in GIVEN_AWAY:
                return self._refused(event, before)
            case peer.Released() if before not in GIVEN_AWAY:
                return [FallBack("the destination has ended the session"), *_GOODBYE]
            case peer.Released():
                return [Do.RECORD_RELEASED]
            case peer.Running() | peer.Kept() if before in (State.GRANTED, State.LEFT):
                return [Do.RECORD_MOVED]
            case peer.Kept() if before is State.RECLAIMING:
                return [Do.RECORD_MOVED, Do.FAIL_COMMANDS]
        return []

    def _welcome(self, welcome: peer.Welcome) -> list[Action]:
        known = [following.value for following in peer.Following]
        if welcome.following not in known:
            return self._wrong(f"it follows its QEMU as {welcome.following}")
        self.peer_following = peer.Following(welcome.following)
        return [Send(peer.Key(self._key)), Do.OPEN_LANE]

    def _acknowledged(self, ack: peer.Ack, before: State) -> list[Action]:
        if tuple(ack) != tuple(self.round)[: len(ack)]:
            return self._wrong(f"it acknowledged {tuple(ack)}, not {self.round}")
        match before:
            case State.SYNCING:
                ahead = [Do.RECORD_AHEAD] if self.is_received else []
                return [Do.KEEP_BASE, Do.TELL_ARMED, *ahead]
            case State.STOPPING:
                return [Do.KEEP_BASE, Do.WIND_UP, Do.START_ROUND]
        return [Do.KEEP_BASE]

    def _received(self, *, now: bool, before: State) -> list[Action]:
        """The destination's QEMU takes a stream, or does so no more: the guest may soon leave.

        A disk may take longer than QEMU, from its STOP to its question.
        """
        self.is_received = now
        if before not in (State.ARMED, State.ROUND):
            return []
        return [Do.RECORD_AHEAD if now else Do.WITHDRAW]

    def _offer(self) -> list[Action]:
        """Have the engine give QEMU the tail by itself, and the record written meanwhile."""
        return [Do.MAKE_TAIL, Do.OFFER] if self.state in ON_OFFER else []

    def _refused(self, refuse: peer.Refuse, before: State) -> list[Action]:
        why = f"the destination refuses: {refuse.text}"
        known = {reason.value for reason in peer.Reason}
        if before is State.FROZEN:
            return [GoOn(why), *_GOODBYE]
        refusal = peer.Reason(refuse.reason) if refuse.reason in known else None
        return [FallBack(why, refusal), *_GOODBYE]

    def _say_that_it_idles(self) -> list[Action]:
        """While a migration is under way, that is as if it had stopped; once for each round."""
        if not self.is_received or self._idled_after == self.round.number:
            return []
        self._idled_after = self.round.number
        return [Send(peer.Stopped(self.session))]

    def _lost(self, reason: str, before: State) -> list[Action]:
        if before is State.MOVED:
            return [Do.CLOSE]
        if before in GIVEN_AWAY:
            return [Do.CLOSE, Do.ASK]
        return [*self._parting(reason, before), *_GOODBYE]

    def _disarm(self, reason: str, before: State) -> list[Action]:
        said = [] if before is State.CONNECTING else [Send(peer.Disarm(self.session))]
        return [*self._parting(reason, before), *said, *_GOODBYE]

    def _parting(self, reason: str, before: State) -> list[Action]:
        if before in (*BEFORE_BASE, *WITH_BASE, *PASSING):
            return [FallBack(reason)]
        return [GoOn(reason)]

    def _wrong(self, what: str) -> list[Action]:
        self.state = State.ENDED
        return [FallBack(f"the destination broke the protocol: {what}"), *_GOODBYE]

    def _give_up(self, reason: str) -> list[Action]:
        self.state = State.ENDED
        return [GoOn(reason), Send(peer.Disarm(self.session)), *_GOODBYE]
