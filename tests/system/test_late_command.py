"""A guest's command that reaches its TPM when QEMU has said that the guest stands still.

It was on its way. Invariant 2: what it has changed moves, too, whatever was under way by then.
"""

from tests.harness.followed import followed
from tests.harness.handover import assert_serves, assert_serves_nothing, assert_tail
from tests.harness.lab import Lab
from tests.harness.owners import outgoing
from vtpmd.testing.link import Direction, MessageLink
from vtpmd.testing.waiting import wait_until
from vtpmd.wire import peer


def test_invariant_2_command_while_a_round_is_under_way_moves(lab: Lab) -> None:
    """The tail has it, and continues what the destination has by then: the round, or the last."""
    source, monitor = followed(lab, is_incoming=False)
    destination, incoming = followed(lab, is_incoming=True)
    link = lab.link(destination.vtpmd, MessageLink)
    source.guest.boot()
    assert source.manage.arm(link.address)["event"] == "VTPM_ARMED"
    for each in (incoming, monitor):
        each.migration("setup")
        each.migration("active")
    wait_until(lambda: outgoing(source) == "armed")
    link.hold(Direction.TO_SOURCE)
    source.guest.work()
    link.wait_for_held(peer.Ack)
    monitor.stop()
    wait_until(lambda: outgoing(source) == "stopping")
    source.guest.work()
    facts = source.guest.facts()
    link.hold(None)
    wait_until(lambda: outgoing(source) == "offered")
    blobs = source.guest.save()
    assert_tail(blobs)
    destination.guest.load(blobs)
    assert destination.guest.facts() == facts
    assert_serves_nothing(source.guest)
    assert_serves(destination.guest)
