"""The hand-over's table (``csrc/engine/handover.h``)."""

from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from vtpmd._core import lib


class Handover(IntEnum):
    """Where a hand-over is (``enum handover_state``)."""

    NONE = lib.HANDOVER_NONE
    PREPARED = lib.HANDOVER_PREPARED
    OFFERED = lib.HANDOVER_OFFERED
    GIVEN = lib.HANDOVER_GIVEN
    WANTED = lib.HANDOVER_WANTED
    FROZEN = lib.HANDOVER_FROZEN
    RETIRING = lib.HANDOVER_RETIRING
    GRANTED = lib.HANDOVER_GRANTED
    STARTING = lib.HANDOVER_STARTING
    TAKING = lib.HANDOVER_TAKING
    WAITING = lib.HANDOVER_WAITING
    ENTITLED = lib.HANDOVER_ENTITLED
    STARTED = lib.HANDOVER_STARTED


# QEMU gets a tail when it asks.
WITH_TAIL: Final = (Handover.PREPARED, Handover.OFFERED)
# It has got one, and the vTPM has not been granted for it.
WITHOUT_GRANT: Final = (Handover.GIVEN, Handover.WANTED, Handover.FROZEN)
# QEMU has brought one, and the TPM starts, or has started, from what it ends at.
TAIL_TAKEN: Final = (
    Handover.STARTING,
    Handover.TAKING,
    Handover.WAITING,
    Handover.ENTITLED,
    Handover.STARTED,
)


class HandoverEvent(IntEnum):
    """What happens to it (``enum handover_event``)."""

    OFFER = lib.HANDOVER_OFFER
    RECORDED = lib.HANDOVER_RECORDED
    DETACHED = lib.HANDOVER_DETACHED
    LET_GO = lib.HANDOVER_LET_GO
    WITHDRAW = lib.HANDOVER_WITHDRAW
    OWNED = lib.HANDOVER_OWNED
    ASKED = lib.HANDOVER_ASKED
    RUNS = lib.HANDOVER_RUNS
    TAIL = lib.HANDOVER_TAIL
    INIT = lib.HANDOVER_INIT
    TAKE = lib.HANDOVER_TAKE
    TAKE_OTHER = lib.HANDOVER_TAKE_OTHER
    GRANT = lib.HANDOVER_GRANT
    END = lib.HANDOVER_END
    LOST = lib.HANDOVER_LOST
    RETIRED = lib.HANDOVER_RETIRED
    NOT_RETIRED = lib.HANDOVER_NOT_RETIRED
    READY = lib.HANDOVER_READY
    NOT_READY = lib.HANDOVER_NOT_READY
    TIMED_OUT = lib.HANDOVER_TIMED_OUT


class HandoverAction(IntFlag):
    """What is to be done (``enum handover_action``)."""

    GIVE_TAIL = lib.HANDOVER_DO_GIVE_TAIL
    RETIRE = lib.HANDOVER_DO_RETIRE
    EXPECT = lib.HANDOVER_DO_EXPECT
    SEND_TAKE = lib.HANDOVER_DO_SEND_TAKE
    SEND_GRANT = lib.HANDOVER_DO_SEND_GRANT
    SEND_END = lib.HANDOVER_DO_SEND_END
    CLOSE = lib.HANDOVER_DO_CLOSE
    TELL = lib.HANDOVER_DO_TELL


class HandoverStep(NamedTuple):
    """What follows from an event (``struct handover_step``)."""

    state: Handover
    actions: HandoverAction


def handover_step(state: Handover, event: HandoverEvent) -> HandoverStep | None:
    """Return what follows from an event, or None: it is not possible, and changes nothing."""
    step = lib.handover_step(state, event)
    if not step.is_possible:
        return None
    return HandoverStep(Handover(step.state), HandoverAction(step.actions))
