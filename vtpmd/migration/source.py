"""The source's side of a session: events in, actions out, in order. No I/O, no clock.

Who uses it does the actions one after another before the next event; what must be durable is an
action before the one that sends.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from vtpmd.migration.states import Local, State, advance, check_session
from vtpmd.wire import peer


class Round(NamedTuple):
    """What a round sends: the generations that the destination has after it."""

    number: int
    permanent_generation: int
    volatile_generation: int


class Send(NamedTuple):
    """Send a message to the destination."""

    message: peer.Message


class FallBack(NamedTuple):
    """QEMU's stream will carry whole blobs; tell people why."""

    reason: str


class GoOn(NamedTuple):
    """The guest's TPM is served here; tell people why."""

    reason: str


class Do(Enum):
    """Actions without anything more to say."""

    START_ROUND = "capture, and send what changed, or say that nothing did"
    KEEP_BASE = "the images of the round are the destination's now"
    RETIRE = "have the engine serve no more, and write down durably whose the vTPM is"
    HANDED_OVER = "tell people that the destination has the vTPM"
    UNRETIRE = "strike out the record, then serve again"
    KEPT = "tell people that the destination serves the guest, and this side must not"
    CLOSE = "close the connection"


Action = Send | FallBack | GoOn | Do
Event = peer.Message | Local

# Ways to end before QEMU has the tail: its stream carries whole blobs then.
_BEFORE_FREEZE = {State.CONNECTING, State.GREETING, State.SYNCING, State.ARMED, State.ROUND}


class Source:
    """One session, from arming to its end."""

    def __init__(self, *, hello: peer.Hello, key: bytes) -> None:
        self.state = State.CONNECTING
        self.session = hello.session
        self.round = Round(0, 0, 0)
        self.final_digests: tuple[bytes, bytes] | None = None
        self._hello = hello
        self._key = key

    @property
    def has_base(self) -> bool:
        """True while a freeze may be answered with a tail."""
        return self.state in (State.ARMED, State.ROUND)

    def step(self, event: Event, reason: str = "") -> list[Action]:
        """Take an event; ``reason`` is for people, with a lost link and a disarming.

        Raises ImpossibleEvent, with nothing changed.
        """
        if not isinstance(event, Local):
            check_session(event, self.session)
        before = self.state
        self.state = advance(before, event if isinstance(event, Local) else type(event))
        if isinstance(event, Local):
            return self._local(event, before, reason)
        return self._message(event, before)

    def _local(self, event: Local, before: State, reason: str) -> list[Action]:
        match event:
            case Local.CONNECTED:
                return [Send(self._hello)]
            case Local.ROUND_DUE:
                return [Do.START_ROUND]
            case Local.GUEST_STOPPED:
                return [Send(peer.Stopped(self.session))]
            case Local.RETIRED:
                return [Send(peer.Grant(self.session)), Do.HANDED_OVER]
            case Local.RETIRE_FAILED:
                return self._give_up(
                    "it could not be retired: the guest has used its TPM since QEMU took the "
                    "state, or the state directory cannot be written"
                )
            case Local.GUEST_RESUMED if before is State.GRANTED:
                return [Send(peer.Reclaim(self.session))]
            case Local.GUEST_RESUMED:
                return self._give_up("the guest runs here again")
            case Local.DISARM | Local.LINK_LOST if before in _BEFORE_FREEZE:
                return [FallBack(reason), *self._parting(event)]
            case Local.DISARM | Local.LINK_LOST if before is State.FROZEN:
                return [GoOn(reason), *self._parting(event)]
        return []

    def _message(self, event: peer.Message, before: State) -> list[Action]:
        match event:
            case peer.Welcome():
                return [Send(peer.Key(self._key)), Do.START_ROUND]
            case peer.Ack() if before is State.FROZEN:
                return []
            case peer.Ack():
                if Round(*event) != self.round:
                    return self._wrong(f"it acknowledged {Round(*event)}, not {self.round}")
                return [Do.KEEP_BASE]
            case peer.Refuse() if before is State.FROZEN:
                return [GoOn(f"the destination refuses: {event.text}"), Do.CLOSE]
            case peer.Refuse():
                return [FallBack(f"the destination refuses: {event.text}"), Do.CLOSE]
            case peer.Take():
                if (event.permanent_digest, event.volatile_digest) != self.final_digests:
                    return self._give_up("the destination's state is not the one that was sent")
                return [Do.RETIRE]
            case peer.Released():
                return [Do.UNRETIRE, GoOn("the destination has let go of it"), Do.CLOSE]
            case peer.Kept():
                return [Do.KEPT]
        return []

    def _parting(self, event: Local) -> list[Action]:
        goodbye: list[Action] = [Send(peer.Disarm(self.session))] if event is Local.DISARM else []
        return [*goodbye, Do.CLOSE]

    def _wrong(self, what: str) -> list[Action]:
        self.state = State.ENDED
        return [FallBack(f"the destination broke the protocol: {what}"), Do.CLOSE]

    def _give_up(self, reason: str) -> list[Action]:
        self.state = State.ENDED
        return [GoOn(reason), Send(peer.Disarm(self.session)), Do.CLOSE]
