"""What happens to a session that is no message, with its data. Messages are in ``wire.peer``."""

from __future__ import annotations

from typing import NamedTuple

from vtpmd.wire.peer import Reason


class Round(NamedTuple):
    """What a round brings the destination to."""

    number: int
    permanent_generation: int
    volatile_generation: int
    power: int  # what the guest's last TPM2_Shutdown said (csrc/engine/link.cdef.h)


# Both sides.


class LinkLost(NamedTuple):
    """The connection broke, or the peer closed it."""

    reason: str


class Remembered(NamedTuple):
    """The owner record says it, durably."""


class RecordFailed(NamedTuple):
    """The owner record could not be written: it may say either."""

    reason: str


# The source's.


class Connected(NamedTuple):
    """The peer is reached and authenticated."""


class LaneOpened(NamedTuple):
    """The engines of both hosts have a connection between them."""


class Disarmed(NamedTuple):
    """The operator ends the session, or it cannot go on here."""

    reason: str


class RoundDue(NamedTuple):
    """QEMU began another pass, or time has passed."""


class RoundSent(NamedTuple):
    """What changed since the last round is on its way."""

    round: Round


class NothingChanged(NamedTuple):
    """No command ran since the last round."""


class GuestStopped(NamedTuple):
    """The guest stands still while QEMU migrates: it will soon ask for the state."""


class GuestResumed(NamedTuple):
    """The guest runs at the source, or wants to."""


class QemuLeft(NamedTuple):
    """Another QEMU uses the TPM: the guest that was handed over can run here no more."""


class MigrationEnded(NamedTuple):
    """QEMU's migration is over, whatever became of it."""


class Freeze(NamedTuple):
    """QEMU asks for the state, and a tail is what it gets."""


class TailMade(NamedTuple):
    """The tail is sealed, and the engine's to give."""

    was_sent: bool  # all of it went over the link, too


class Frozen(NamedTuple):
    """The tail is QEMU's: the engine has given it."""


class Revoked(NamedTuple):
    """The engine gives no tail any more, and grants nothing: the session ends."""

    was_given: bool  # QEMU has got the tail


class OfferEnded(NamedTuple):
    """The engine gives no tail for now: the guest runs, and the session goes on."""


class OfferEndedEarly(NamedTuple):
    """As OfferEnded, and the destination has not acknowledged the last round yet."""


class Granted(NamedTuple):
    """The destination has asked, and the engine has stopped serving and granted it the vTPM."""


class CameBack(NamedTuple):
    """The vTPM has come to this host by another session, whole blobs, or an operator's claim."""


# The destination's.


class Prepared(NamedTuple):
    """There is a file for what the source sends, and the owner record knows the session."""


class Staged(NamedTuple):
    """The round is durable, and libtpms takes the state."""


class LaneCame(NamedTuple):
    """The source has connected the lane, and shown that it has the session's key."""

    descriptor: int


class StageFailed(NamedTuple):
    """libtpms refuses the state, or it cannot be made durable."""

    refusal: Reason
    reason: str


class HeldStarted(NamedTuple):
    """The TPM is on, ahead of time."""


class TailRefused(NamedTuple):
    """QEMU has brought a tail that is not the session's next."""

    refusal: Reason
    reason: str


class SetAside(NamedTuple):
    """The session is of no use: QEMU starts from something else, or another source comes."""

    reason: str


class Took(NamedTuple):
    """QEMU has brought the tail; the engine has started from it, and asked for the vTPM."""


class Entitled(NamedTuple):
    """The source has granted the vTPM; QEMU has not started it."""


class Started(NamedTuple):
    """It has, and may be told so: the engine has the guest's commands wait."""


class Adopt(NamedTuple):
    """QEMU does something else than starting what came: the vTPM is taken up first."""


class InitAnswered(NamedTuple):
    """QEMU has its answer: now, or once more, it is to be made durable that the vTPM is ours."""


class Admitted(NamedTuple):
    """It is durable, and commands are executed."""

    wait_us: int
    start_us: int


class AdmitFailed(NamedTuple):
    """It cannot be made durable yet: commands wait."""


class SettleDue(NamedTuple):
    """It is time to put the state into its own file, once more."""


class Settled(NamedTuple):
    """The state is in its own file, and the owner record says ours."""


class SettleFailed(NamedTuple):
    """One of the two could not be written yet: the state stays where it is."""


class Served(NamedTuple):
    """A guest's command was served: there is no way back."""

    was_fenced: bool = False  # the engine was, for nothing: it was found out from the record then


LocalEvent = (
    LinkLost
    | Remembered
    | RecordFailed
    | Connected
    | LaneOpened
    | LaneCame
    | Disarmed
    | RoundDue
    | RoundSent
    | NothingChanged
    | GuestStopped
    | GuestResumed
    | QemuLeft
    | MigrationEnded
    | Freeze
    | TailMade
    | Frozen
    | Revoked
    | OfferEnded
    | OfferEndedEarly
    | Granted
    | CameBack
    | Prepared
    | Staged
    | StageFailed
    | HeldStarted
    | TailRefused
    | SetAside
    | Took
    | Entitled
    | Started
    | Adopt
    | InitAnswered
    | Admitted
    | AdmitFailed
    | SettleDue
    | Settled
    | SettleFailed
    | Served
)
