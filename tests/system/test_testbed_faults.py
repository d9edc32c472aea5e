"""Two hosts, a guest that works its TPM, and faults at each step of its move.

Afterwards exactly one host serves the vTPM (invariant 3), and what the guest had acknowledged is in
it. Where no process was killed the guest itself goes on, at either host, and finds its TPM as its
own model says. Steps, faults and what is done about them: tests/harness/faults.py and
hand_over_case.py.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from tests.harness.faults import (
    ARMED,
    CONDITIONS,
    STEPS,
    LinkFault,
    Step,
    hanging,
)
from tests.harness.hand_over_case import HandOver, Owner
from tests.harness.saved_guest import SavedGuest
from tests.harness.testbed import Testbed
from tests.harness.wire import Side
from vtpmd.testing.faults import Victim

# Longer than anybody waits for a peer while a guest or QEMU waits for an answer.
LINK_DOWN_S = 3.0
BY_NAME = {step.name: step for step in STEPS}


class Kill(NamedTuple):
    """A process that is killed, and the host that it is on."""

    victim: Victim
    side: Side


class Case(NamedTuple):
    """A step, and what strikes when it has come: first the link, then a process."""

    step: Step
    link: LinkFault | None = None
    kill: Kill | None = None
    hangs: Side | None = None  # whose vtpmd does
    stream_over_link: bool = True  # QEMU's; else it comes through whatever the link does

    def __str__(self) -> str:
        """Name the case for people."""
        words = [self.step.name]
        if self.link is not None:
            words.append(self.link.value)
        if self.kill is not None:
            words.append(f"{self.kill.victim.value}-of-{self.kill.side}")
        if self.hangs is not None:
            words.append(f"of-{self.hangs}")
        if self.link is not None and self.stream_over_link:
            words.append("with-stream")
        return "-".join(words)


LINK_CASES = [
    Case(step, link=fault, stream_over_link=fault is LinkFault.CUT)
    for step in STEPS
    for fault in LinkFault
]
KILL_CASES = [
    Case(step, kill=Kill(victim, side)) for step in STEPS for side in Side for victim in Victim
]
HANG_CASES = [Case(ARMED, hangs=side) for side in Side]
# Messages that nobody knows to be lost, and then somebody who could have told is gone, too.
DOUBLE_CASES = [
    Case(BY_NAME[name], fault, Kill(victim, side), stream_over_link=False)
    for name, fault, victim, side in [
        ("tail-set", LinkFault.DROP_TO_A, Victim.QEMU, Side.B),  # Take is lost
        ("tail-set", LinkFault.CUT, Victim.VTPMD, Side.B),
        ("granted", LinkFault.DROP_TO_B, Victim.QEMU, Side.B),  # Grant is lost
        ("granted", LinkFault.CUT, Victim.VTPMD, Side.A),
        ("granted", LinkFault.CUT, Victim.VTPMD, Side.B),
        ("started", LinkFault.DROP_TO_A, Victim.VTPMD, Side.A),  # the sign of life is lost
        ("started", LinkFault.CUT, Victim.QEMU, Side.B),
    ]
]


@pytest.fixture
def hand_over(testbed: Testbed, saved_guest: SavedGuest) -> HandOver:
    """Have a guest run at host a, armed for host b, over a link with a delay."""
    testbed.wire.set(CONDITIONS)
    hand_over = HandOver(testbed, saved_guest)
    hand_over.arm()
    return hand_over


@contextmanager
def struck(testbed: Testbed, hand_over: HandOver, case: Case) -> Iterator[None]:
    """Let the guest move until the faults strike; the link is as it was after the block."""
    if case.step is not ARMED:
        hand_over.begin(over_link=case.stream_over_link)
        hand_over.progress.wait_for(case.step)
    print(f"struck when the session was {hand_over.progress.state}")
    if case.link is not None:
        case.link.strike(testbed)
    if case.kill is not None:
        case.kill.victim.strike(testbed.hosts[case.kill.side])
    yield
    testbed.wire.restore()


def assert_one(
    owners: list[Owner], testbed: Testbed, record_property: Callable[[str, object], None]
) -> None:
    """Check that exactly one host serves, and that all ends in order."""
    record_property("who serves the vTPM", str(owners))
    print(f"who serves the vTPM: {owners}")
    assert len(owners) == 1
    testbed.assert_ends_cleanly()


@pytest.mark.parametrize("case", LINK_CASES, ids=str)
def test_invariant_3_one_owner_when_the_link_fails(
    testbed: Testbed,
    hand_over: HandOver,
    case: Case,
    record_property: Callable[[str, object], None],
) -> None:
    with struck(testbed, hand_over, case):
        if case.step is ARMED:
            hand_over.begin(over_link=case.stream_over_link)
        time.sleep(LINK_DOWN_S)  # how long the fault is; nothing is waited for
    assert sum(count.dropped for count in testbed.wire.count().values()) > 0

    owners = hand_over.settle()

    assert_one(owners, testbed, record_property)
    assert owners[0].to_guest


@pytest.mark.parametrize("case", KILL_CASES, ids=str)
def test_invariant_3_one_owner_when_a_process_is_killed(
    testbed: Testbed,
    hand_over: HandOver,
    case: Case,
    record_property: Callable[[str, object], None],
) -> None:
    with struck(testbed, hand_over, case):
        pass
    assert_one(hand_over.settle(), testbed, record_property)


@pytest.mark.parametrize("case", HANG_CASES, ids=str)
def test_invariant_3_one_owner_when_a_vtpmd_hangs(
    testbed: Testbed,
    hand_over: HandOver,
    case: Case,
    record_property: Callable[[str, object], None],
) -> None:
    """QEMU gets its answers meanwhile; what its engine has done, a vtpmd that goes on finds."""
    assert case.hangs is not None
    with struck(testbed, hand_over, case), hanging(testbed.hosts[case.hangs].vtpmd):
        if case.step is ARMED:
            hand_over.begin(over_link=case.stream_over_link)
        hand_over.wait_until_decided()

    owners = hand_over.settle()

    assert_one(owners, testbed, record_property)
    assert owners[0].to_guest


@pytest.mark.parametrize("case", DOUBLE_CASES, ids=str)
def test_invariant_3_one_owner_when_link_and_process_fail(
    testbed: Testbed,
    hand_over: HandOver,
    case: Case,
    record_property: Callable[[str, object], None],
) -> None:
    """The supervisor acts while the link is down; host a goes on asking until it knows."""
    with struck(testbed, hand_over, case):
        hand_over.restart()
        time.sleep(LINK_DOWN_S)  # how long the fault is; nothing is waited for
    assert_one(hand_over.settle(), testbed, record_property)


def test_invariant_3_one_owner_when_the_source_is_resumed_after_all(
    testbed: Testbed, hand_over: HandOver, record_property: Callable[[str, object], None]
) -> None:
    """The guest may have run already where it came to, or not; it runs twice, its TPM does not."""
    hand_over.begin(over_link=False)
    assert_one(hand_over.resume_source(), testbed, record_property)
