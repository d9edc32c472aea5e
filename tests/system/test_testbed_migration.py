"""Two hosts, the links that they may have, and a guest that works its TPM while it moves."""

from collections.abc import Callable

import pytest

from tests.harness import saved_guest as saving
from tests.harness.hand_over_case import HandOver, Owner
from tests.harness.saved_guest import MACHINE, SavedGuest
from tests.harness.testbed import Testbed
from tests.harness.wire import Conditions, Side
from vtpmd.testing.facts import differences
from vtpmd.testing.guest import Guest
from vtpmd.testing.moves import Move, move

HOPS = 50
LINKS = {
    "1-gbit": Conditions(rate_bits_s=1_000_000_000),
    "50-mbit-40-ms": Conditions(
        rate_bits_s=50_000_000, delay_us=20_000, jitter_us=2_000, loss_ppm=1_000
    ),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("armed", [True, False], ids=["armed", "not-armed"])
def test_guest_moves_over_a_link(
    testbed: Testbed,
    saved_guest: SavedGuest,
    link: str,
    armed: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """Its checks hold, one host serves the vTPM, and nothing is left."""
    testbed.wire.set(LINKS[link])
    hand_over = HandOver(testbed, saved_guest)
    guest = testbed.a.guest
    assert guest is not None
    guest.command("start mixed")

    moved = move(testbed.a, testbed.b, armed=armed)

    record_property("what QEMU says", str(moved.guest))
    print(moved.guest)
    assert moved.has_tail == armed
    # A tail is one blob; whole blobs are permanent and volatile state.
    assert hand_over.progress.destination_answers("SET_STATEBLOB") == (1 if armed else 2)
    assert hand_over.settle() == [Owner(Side.B, to_guest=True)]
    testbed.assert_ends_cleanly()


def test_guest_moves_to_and_fro_fifty_times(
    testbed: Testbed, saved_guest: SavedGuest, record_property: Callable[[str, object], None]
) -> None:
    """With a tail each time. The two vtpmd go on; each QEMU is new, and killed when it is left."""
    here, there = testbed.a, testbed.b
    saving.load(saved_guest, here.await_guest(MACHINE))
    running(here.guest).command("start mixed")
    moves: list[Move] = []
    for hop in range(HOPS):
        moves.append(move(here, there))
        assert moves[-1].has_tail, f"hop {hop + 1}: {moves[-1].session}"
        here.close_guest()
        here, there = there, here
    running(here.guest).command("stop")
    assert differences(saved_guest.facts, running(here.guest).check(), worked=True) == []
    record_property("downtimes in ms", str([each.guest.downtime_ms for each in moves]))
    testbed.assert_ends_cleanly()


def running(guest: Guest | None) -> Guest:
    """Return a host's guest, which is there."""
    assert guest is not None
    return guest
