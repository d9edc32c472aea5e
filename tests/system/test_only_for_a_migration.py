"""QEMU gets a tail only for the migration that the session was armed for; else whole blobs.

Invariant 6 of the design. What QEMU does with the state that it asks for, it does not say: the
destination's vtpmd, which follows its own QEMU, says whether a stream comes in there. So a file
that QEMU migrates to while the vTPM is armed can be restored, with any emulator.
"""

from pathlib import Path
from typing import Any

from tests.harness.handover import assert_serves, assert_whole, make_pair
from tests.harness.lab import Lab
from tests.harness.saved_guest import MACHINE
from tests.system.test_stream_guest import (
    Host,
    arm,
    assert_used_a_tail,
    assert_used_whole_blobs,
    listen,
    make_destination,
    make_source,
)
from vtpmd.testing import migration
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import EmulatorKind, Peering
from vtpmd.testing.facts import differences
from vtpmd.testing.waiting import wait_until

FOLLOWING = Peering(credentials=credentials(), follows_qemu=True)
SLOW_BYTES_S = 4 << 20


def test_destination_that_has_not_said_receiving_gets_whole_blobs(lab: Lab) -> None:
    """It follows its QEMU, or would if there were one: no stream can be coming in."""
    pair = make_pair(lab, destination=FOLLOWING)
    armed = pair.arm()
    assert armed["data"] == {"qemu": "not-asked-for", "peer-qemu": "not-reachable"}
    facts, blobs = pair.source.guest.facts(), pair.source.guest.save()
    assert_whole(blobs)
    assert "has not said that a stream comes in" in pair.source.manage.migration()["reason"]
    pair.destination.guest.load(blobs)
    assert pair.destination.guest.facts() == facts
    assert_serves(pair.destination.guest)


def set_capability(host: Host, name: str, state: bool) -> None:
    capability = {"capability": name, "state": state}
    host.guest.qmp("migrate-set-capabilities", capabilities=[capability])


def save_to(host: Host, path: Path) -> None:
    """Have QEMU migrate to a file, which is what managers do for a save or a live snapshot."""
    host.guest.qmp("migrate", uri=f"exec:cat > {path}")
    assert migration.wait_until_ended(host.guest) == "completed"
    assert_used_whole_blobs(host)
    assert "stream comes in" in host.manage.wait_for("VTPM_FALL_BACK")["data"]["reason"]


def assert_restores(lab: Lab, path: Path, before: dict[str, str]) -> None:
    """Restore a file with swtpm, and check that the guest finds the TPM that it had."""
    arguments = ("-incoming", f"exec:cat {path}")
    restored = lab.guest(lab.emulator(EmulatorKind.SWTPM), MACHINE, arguments)
    migration.wait_until(restored, "running")
    assert differences(before, restored.check(), worked=False) == []
    restored.close()


def test_what_qemu_saves_to_a_file_while_armed_restores(lab: Lab) -> None:
    """A background snapshot, with the guest running on, and a save that stops it."""
    source, destination = make_source(lab), lab.peer(FOLLOWING)
    migration.set_capabilities(source.guest, return_path=False)
    before = source.guest.check()
    snapshot, save = lab.new_path("snapshot"), lab.new_path("save")

    assert source.manage.arm(destination.address)["event"] == "VTPM_ARMED"
    set_capability(source, "background-snapshot", True)
    save_to(source, snapshot)
    set_capability(source, "background-snapshot", False)
    source.guest.check()  # it runs on, and its TPM works

    assert source.manage.arm(destination.address)["event"] == "VTPM_ARMED"
    save_to(source, save)
    source.guest.resume()
    source.guest.command("work 5")
    for path in (snapshot, save):
        assert_restores(lab, path, before)


def test_postcopy_gets_a_tail(lab: Lab) -> None:
    """QEMU asks for the state when it switches over, and then goes on sending memory."""
    source, destination = make_source(lab), make_destination(lab)
    arm(source, destination)
    before = source.guest.check()
    uri = listen(lab, source, destination)
    for host in (source, destination):
        set_capability(host, "postcopy-ram", True)
    source.guest.qmp("migrate-set-parameters", **{"max-bandwidth": SLOW_BYTES_S})
    source.guest.qmp("migrate", uri=uri)

    def status() -> Any:
        return source.guest.qmp("query-migrate")["status"]

    wait_until(lambda: status() == "active")
    source.guest.qmp("migrate-start-postcopy")
    source.guest.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 30})
    assert migration.wait_until_ended(source.guest) == "completed"
    assert_used_a_tail(source)
    assert differences(before, destination.guest.check(), worked=True) == []
