"""The pytest plugin's pair of hosts: its faults strike where they say, by real means.

The other fixtures are those of test_engine_failure.py; what others are shown is run as they would
run it by test_packages.py.
"""

import pytest

from tests.harness import saved_guest as saving
from tests.harness.hand_over_case import COUNTER_AUTH, COUNTER_BYTES, COUNTER_INDEX
from tests.harness.raw_guest import RawGuest
from tests.harness.saved_guest import SavedGuest
from vtpmd.testing.facts import differences
from vtpmd.testing.faults import MESSAGES, Message, Victim
from vtpmd.testing.guest import Guest
from vtpmd.testing.host import Host
from vtpmd.testing.hosts import Hosts
from vtpmd.testing.link import Ending
from vtpmd.testing.migration import MigrationFailedError

# Where the guest goes on, and what QEMU carried there: a tail, whole blobs, or nothing that counts.
MOVED = {
    Message.HELLO: ("b", "blobs"),
    Message.BASE: ("b", "blobs"),
    Message.ACK: ("b", "blobs"),
    Message.TAKE: ("a", "nothing"),
    Message.GRANT: ("a", "nothing"),
    Message.RUNNING: ("b", "tail"),
}


def load(saved: SavedGuest, host: Host) -> Guest:
    """Have a guest that has booted go on at a host."""
    guest = host.await_guest(saving.MACHINE)
    saving.load(saved, guest)
    return guest


def carried(hosts: Hosts) -> str:
    """Move the guest from a to b; say what QEMU carried."""
    try:
        return "tail" if hosts.migrate().has_tail else "blobs"
    except MigrationFailedError:
        return "nothing"


def test_guest_moves_to_and_fro(vtpm_hosts: Hosts, saved_guest: SavedGuest) -> None:
    """What was measured is there, each way."""
    load(saved_guest, vtpm_hosts.a)
    for source, destination in [(vtpm_hosts.a, vtpm_hosts.b), (vtpm_hosts.b, vtpm_hosts.a)]:
        moved = vtpm_hosts.migrate(source, destination)
        assert moved.has_tail
        assert moved.tail_bytes is not None and moved.tail_bytes > 0
        assert 0 < moved.guest.downtime_ms <= moved.guest.total_ms
        assert moved.phases_us["source: retire"] > 0
        source.close_guest()
    assert vtpm_hosts.a.guest is not None
    assert differences(saved_guest.facts, vtpm_hosts.a.guest.check(), worked=False) == []


@pytest.mark.parametrize("message", MESSAGES)
def test_link_is_cut_at_a_message(
    vtpm_hosts: Hosts, saved_guest: SavedGuest, message: Message
) -> None:
    """Wherever that is, the guest goes on at one host, and its vTPM with it."""
    load(saved_guest, vtpm_hosts.a)
    vtpm_hosts.cut_link(message)
    was_carried = carried(vtpm_hosts)
    assert vtpm_hosts.b.link.was_cut.is_set()
    host = vtpm_hosts.settle()
    assert (host.name, was_carried) == MOVED[message]
    assert host.guest is not None
    assert differences(saved_guest.facts, host.guest.check(), worked=False) == []
    assert [each.has_guest() for each in (vtpm_hosts.a, vtpm_hosts.b)].count(True) == 1


def test_link_that_was_cut_in_silence_is_healed(vtpm_hosts: Hosts, saved_guest: SavedGuest) -> None:
    """Until then nothing gets through, and nobody is told of that."""
    load(saved_guest, vtpm_hosts.a)
    vtpm_hosts.cut_link(Message.HELLO, Ending.SILENCE)
    assert vtpm_hosts.a.manage.arm(vtpm_hosts.b.peer_address)["event"] == "VTPM_FALL_BACK"
    vtpm_hosts.b.link.heal()
    assert vtpm_hosts.a.manage.arm(vtpm_hosts.b.peer_address)["event"] == "VTPM_ARMED"


@pytest.mark.parametrize("victim", [Victim.ENGINE, Victim.VTPMD])
def test_guest_goes_on_when_the_destination_is_killed(
    vtpm_hosts: Hosts, saved_guest: SavedGuest, victim: Victim
) -> None:
    """After it was armed for; and what has ended there is started again."""
    load(saved_guest, vtpm_hosts.a)
    vtpm_hosts.a.manage.arm(vtpm_hosts.b.peer_address)
    victim.strike(vtpm_hosts.b)
    assert not vtpm_hosts.b.is_serving
    host = vtpm_hosts.settle()
    assert host is vtpm_hosts.a and host.guest is not None
    assert differences(saved_guest.facts, host.guest.check(), worked=False) == []
    assert vtpm_hosts.b.is_serving


def test_host_loses_power(vtpm_hosts_on_disks: Hosts, saved_guest: SavedGuest) -> None:
    """What the guest's TPM had acknowledged is there when another one boots with it."""
    host = vtpm_hosts_on_disks.a
    running = load(saved_guest, host)
    running.command("work 30")
    counter = int(running.check()["counter"])
    assert counter > int(saved_guest.facts["counter"])
    # Not durable, on the same disk: what shows that the disk has lost something.
    (host.state / "lost").write_text("lost")
    host.lose_power()
    assert not host.is_serving and not host.has_guest()
    host.restore_power()
    assert not (host.state / "lost").exists()
    guest = RawGuest(host.vtpmd.control_path)
    host.lab.close_at_end(guest)
    guest.control.init()
    guest.tpm.startup()
    found = guest.tpm.nv_read(COUNTER_INDEX, COUNTER_BYTES, COUNTER_AUTH)
    assert int.from_bytes(found, "big") == counter


def test_a_disk_is_needed_to_lose_power(vtpm_hosts: Hosts) -> None:
    with pytest.raises(ValueError, match="on_disks"):
        vtpm_hosts.b.lose_power()


def test_logs_are_of_both_hosts(vtpm_hosts: Hosts) -> None:
    titles = [title for title, _ in vtpm_hosts.logs()]
    assert sum(title.startswith("vtpmd") for title in titles) == 2
