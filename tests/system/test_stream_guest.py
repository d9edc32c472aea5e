"""Real guests move with a tail, while they use their TPM; so do what else QEMU saves state for.

Invariants of the design that are checked: 3 (one owner), 5 (the guest finds its TPM as it was) and
6 (a tail only while QEMU migrates). vtpmd follows QEMU's monitor here, so rounds go with its passes
over guest memory. The cases that need no guest's kernel are in the other test_stream files.
"""

import contextlib
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.harness.fake_peer import FakeDestination
from tests.harness.lab import Lab
from tests.harness.proxy import Trigger
from tests.harness.saved_guest import MACHINE, SavedGuest, go_on
from tests.support import tail
from tests.support.emulator_client import Control, ControlClient, ControlError
from tests.support.image_digest import whole_digest
from vtpmd.testing import migration
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Emulator, EmulatorKind, Peering
from vtpmd.testing.facts import Facts, differences
from vtpmd.testing.guest import Guest, Machine
from vtpmd.testing.management import Management
from vtpmd.testing.waiting import WAIT_TIMEOUT_S, wait_until
from vtpmd.testing.workload import WorkloadFailedError
from vtpmd.wire import peer, swtpm_format

FOLLOWING = Peering(credentials=credentials(), follows_qemu=True)
BLOB_HEADER_BYTES = 16  # of the answer to GET_STATEBLOB
GET_STATEBLOB = re.compile(r"GET_STATEBLOB: result 0x\w+, (\d+) bytes")
PERMANENT_BYTES_MIN = 1300  # of a fresh TPM; with the guest's keys and indices it is more


class Host(NamedTuple):
    """A vtpmd that follows the QEMU whose guest uses it."""

    vtpmd: Emulator
    manage: Management
    guest: Guest

    def is_followed(self) -> bool:
        """Tell whether vtpmd has found QEMU's monitor."""
        return bool(self.manage.command("query-status")["qemu"] == "following")

    def blob_bytes(self) -> list[int]:
        """Return the sizes of the blobs that QEMU has got, in order."""
        answers = GET_STATEBLOB.findall(self.vtpmd.program.output)
        return [int(answer) - BLOB_HEADER_BYTES for answer in answers]


def make_source(lab: Lab, machine: Machine = MACHINE) -> Host:
    """Boot a guest that has used its TPM."""
    vtpmd = lab.peer(FOLLOWING)
    host = Host(vtpmd, lab.management(vtpmd), lab.booted_guest(vtpmd, machine))
    wait_until(host.is_followed)
    return host


@pytest.fixture
def source(lab: Lab, saved_guest: SavedGuest) -> Host:
    """Have the guest that was booted once, and has used its TPM, go on."""
    vtpmd = lab.peer(FOLLOWING)
    host = Host(vtpmd, lab.management(vtpmd), go_on(saved_guest, vtpmd, lab))
    wait_until(host.is_followed)
    return host


def make_destination(lab: Lab, *arguments: str, vtpmd: Emulator | None = None) -> Host:
    """Start a QEMU that waits for a guest."""
    vtpmd = vtpmd or lab.peer(FOLLOWING)
    guest = lab.guest(vtpmd, MACHINE, (*migration.INCOMING, *arguments))
    host = Host(vtpmd, lab.management(vtpmd), guest)
    wait_until(host.is_followed)  # else it could not say that a stream comes in
    return host


def listen(lab: Lab, source: Host, destination: Host, *, return_path: bool = True) -> str:
    """Let the destination listen; return the URI for the source."""
    for host in (source, destination):
        migration.set_capabilities(host.guest, return_path=return_path)
    return migration.listen_unix(destination.guest, lab.new_path("stream"))


def migrate(lab: Lab, source: Host, destination: Host) -> migration.MigrationReport:
    """Migrate, as a management program does, and wait until the guest runs there."""
    uri = listen(lab, source, destination)
    return migration.migrate(source.guest, destination.guest, uri)


def migrate_slowly(lab: Lab, source: Host, destination: Host) -> None:
    """Begin to migrate so that it does not end before the test does something about it."""
    uri = listen(lab, source, destination)
    source.guest.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
    source.guest.qmp("migrate", uri=uri)
    wait_until(lambda: source.guest.qmp("query-migrate")["status"] == "active")


def migrate_to_a_paused_guest(lab: Lab, source: Host, destination: Host) -> None:
    """Migrate to a QEMU that was started with -S: its guest has not run when this returns."""
    uri = listen(lab, source, destination)
    source.guest.qmp("migrate", uri=uri)
    assert migration.wait_until_ended(source.guest) == "completed"
    migration.wait_until(destination.guest, "paused")


def assert_goes_on(source: Host, before: Facts) -> None:
    """Resume the source if QEMU has not, and check that its TPM lost nothing and works."""
    if source.guest.status != "running":
        source.guest.resume()
    source.guest.command("stop")
    assert differences(before, source.guest.check(), worked=True) == []
    source.guest.command("work 60")
    source.guest.check()
    wait_until(lambda: source.manage.migration()["outcome"] == "go-on")


def arm(source: Host, destination: Host) -> None:
    """Arm a session; its base is acknowledged then."""
    event = source.manage.arm(destination.vtpmd.address)
    assert event["event"] == "VTPM_ARMED", event


def assert_used_a_tail(source: Host) -> dict[str, Any]:
    """Check that QEMU's stream carried a tail and nothing else; return vtpmd's report."""
    source.manage.wait_for("VTPM_HANDED_OVER")
    report = source.manage.migration()
    assert report["outcome"] == "handed-over"
    assert source.blob_bytes()[-3:] == [report["tail-bytes"], 0, 0]
    return report


def assert_used_whole_blobs(source: Host) -> None:
    """Check that QEMU's stream carried permanent and volatile state."""
    permanent, volatile, _ = source.blob_bytes()[-3:]
    assert permanent > PERMANENT_BYTES_MIN
    assert volatile > PERMANENT_BYTES_MIN


def assert_guest_is_not_served(source: Host) -> None:
    """Check that the guest's TPM fails, or is asked in vain; its load may have noticed already."""
    with pytest.raises(WorkloadFailedError, match=r"TPM_RC 0x(101|922)"):
        source.guest.command("stop")
        source.guest.check()


def generations(report: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the generations of each round."""
    return [
        (each["permanent-generation"], each["volatile-generation"]) for each in report["rounds"]
    ]


def test_guest_migrates_there_and_back_with_a_tail_under_load(
    lab: Lab, record_property: Callable[[str, object], None]
) -> None:
    """A to B to A to B: rounds with QEMU's passes, a small tail, and a guest that sees nothing."""
    here = make_source(lab)
    facts = here.guest.check()
    here.guest.command("start mixed")
    tails, last = [], (0, 0)
    vtpmds = [here.vtpmd, lab.peer(FOLLOWING)]
    for hop in range(3):
        there = make_destination(lab, vtpmd=vtpmds[(hop + 1) % 2])
        arm(here, there)
        migrate(lab, here, there)
        report = assert_used_a_tail(here)
        tails.append(report["tail-bytes"])
        assert report["rounds"], "no round came with QEMU's passes"
        for each in generations(report):
            assert each[0] >= last[0] and each[1] > last[1]
            last = each
        here.guest.close()
        here = there
    here.guest.command("stop")
    assert differences(facts, here.guest.check(), worked=True) == []
    here.guest.command("work 60")
    here.guest.check()
    record_property("tail-bytes", tails)
    assert max(tails) < PERMANENT_BYTES_MIN


def test_state_that_arrives_is_the_state_at_the_freeze(lab: Lab, source: Host) -> None:
    """The destination's guest does not run yet: what its vtpmd has is what was loaded."""
    destination = make_destination(lab, "-S")
    arm(source, destination)
    before = source.guest.check()
    migrate_to_a_paused_guest(lab, source, destination)
    report = assert_used_a_tail(source)

    path = destination.vtpmd.state / "tpm2-00.permall"
    wait_until(lambda: not path.with_suffix(".incoming").exists())
    arrived = swtpm_format.decode_file(path.read_bytes())
    assert whole_digest(arrived).hex() == report["digests"]["permanent"]
    destination.guest.resume()
    assert differences(before, destination.guest.check(), worked=False) == []


def test_source_refuses_after_the_guest_has_left(lab: Lab) -> None:
    """No command, no snapshot, no start of a vtpmd there later: each would be a second owner."""
    source = make_source(lab, Machine(disk=lab.new_disk()))
    destination = make_destination(lab)
    arm(source, destination)
    migrate(lab, source, destination)
    assert_used_a_tail(source)
    destination.guest.check()
    blobs = len(source.blob_bytes())

    assert source.guest.human_monitor("savevm late") != ""
    assert all(size <= BLOB_HEADER_BYTES for size in source.blob_bytes()[blobs:])
    source.guest.resume()
    assert_guest_is_not_served(source)
    destination.guest.check()
    source.guest.close()
    source.vtpmd.kill()
    again = lab.peer(FOLLOWING, source.vtpmd.state)
    with ControlClient(again.control_path) as control, pytest.raises(ControlError):
        control.init()
    assert destination.vtpmd.address in again.program.output


def test_invariant_6_whole_blobs_when_nobody_armed(lab: Lab, source: Host) -> None:
    destination = make_destination(lab)
    before = source.guest.check()
    migrate(lab, source, destination)
    assert_used_whole_blobs(source)
    assert differences(before, destination.guest.check(), worked=False) == []
    assert source.manage.migration() == {"state": "none"}


def test_guest_migrates_with_whole_blobs_when_the_peer_goes_meanwhile(
    lab: Lab, source: Host
) -> None:
    """The link breaks between arming and the freeze; QEMU notices nothing."""
    destination = make_destination(lab)
    link = lab.link(destination.vtpmd)
    assert source.manage.arm(link.address)["event"] == "VTPM_ARMED"
    before = source.guest.check()
    source.guest.command("start mixed")
    link.close()
    source.manage.wait_for("VTPM_FALL_BACK")
    migrate(lab, source, destination)
    destination.guest.command("stop")
    assert_used_whole_blobs(source)
    assert differences(before, destination.guest.check(), worked=True) == []
    assert source.manage.migration()["outcome"] == "fall-back"


def test_invariant_6_armed_guest_migrates_to_swtpm_with_whole_blobs(lab: Lab, source: Host) -> None:
    """Armed for one host, migrated to another, which has swtpm: the operator's mistake.

    QEMU really migrates, and vtpmd cannot see where to. So it has to be disarmed; then it works.
    """
    peer = lab.peer()
    assert source.manage.arm(peer.address)["event"] == "VTPM_ARMED"
    source.manage.command("migrate-disarm")
    emulator = lab.emulator(EmulatorKind.SWTPM)
    guest = lab.guest(emulator, MACHINE, migration.INCOMING)
    before = source.guest.check()
    for each in (source.guest, guest):
        migration.set_capabilities(each)
    uri = migration.listen_unix(guest, lab.new_path("stream"))
    migration.migrate(source.guest, guest, uri)
    assert_used_whole_blobs(source)
    assert differences(before, guest.check(), worked=False) == []


def test_invariant_6_snapshot_while_armed_has_whole_blobs_that_swtpm_loads(lab: Lab) -> None:
    """savevm, stop and cont while armed change nothing; then the guest migrates with a tail."""
    machine = Machine(disk=lab.new_disk())
    source = make_source(lab, machine)
    armed_for = lab.peer()
    assert source.manage.arm(armed_for.address)["event"] == "VTPM_ARMED"
    before = source.guest.check()

    assert source.guest.human_monitor("savevm checked") == ""
    assert_used_whole_blobs(source)
    source.guest.pause()
    source.guest.resume()
    source.guest.command("work 30")
    assert source.manage.migration()["state"] in ("armed", "round")
    assert source.manage.migration()["outcome"] is None
    source.guest.close()

    restored = lab.guest(lab.emulator(EmulatorKind.SWTPM), machine, ("-loadvm", "checked"))
    assert differences(before, restored.check(), worked=False) == []


def test_guest_migrates_with_a_tail_after_a_snapshot_and_a_pause(lab: Lab) -> None:
    """What QEMU did while armed does not end the session."""
    source = make_source(lab, Machine(disk=lab.new_disk()))
    destination = make_destination(lab)
    arm(source, destination)
    before = source.guest.check()
    assert source.guest.human_monitor("savevm checked") == ""
    source.guest.command("start mixed")
    for _ in range(3):
        source.guest.pause()
        source.guest.resume()
    migrate(lab, source, destination)
    destination.guest.command("stop")
    assert_used_a_tail(source)
    assert differences(before, destination.guest.check(), worked=True) == []


@pytest.mark.parametrize("vtpmd_lives", [True, False], ids=["qemu-dies", "host-dies"])
def test_guest_goes_on_at_the_source_when_the_destination_dies_before_it_runs(
    lab: Lab, source: Host, vtpmd_lives: bool
) -> None:
    """All has arrived and was granted; no guest's command was served there.

    A vtpmd that lives lets go of the vTPM. One that is gone cannot say that it served nobody.
    """
    destination = make_destination(lab, "-S")
    arm(source, destination)
    before = source.guest.check()
    source.guest.command("start mixed")
    migrate_to_a_paused_guest(lab, source, destination)
    assert_used_a_tail(source)
    destination.guest.program.kill()
    if vtpmd_lives:
        assert_goes_on(source, before)
        return
    destination.vtpmd.kill()
    source.guest.resume()
    assert_guest_is_not_served(source)


@pytest.mark.parametrize("answered", [False, True], ids=["at-init", "after-init"])
def test_guest_goes_on_at_the_source_when_qemu_dies_while_it_loads(
    lab: Lab, source: Host, answered: bool
) -> None:
    """The tail is applied and granted; the destination's QEMU dies at or after INIT.

    After it, QEMU may have told the source that all is well before it dies.
    """
    vtpmd = lab.peer(FOLLOWING)
    guests: list[Guest] = []

    def qemu_dies() -> None:
        guests[0].program.kill()

    trigger = Trigger(control=Control.INIT, answered=answered, action=qemu_dies)
    proxy = lab.proxy(vtpmd, trigger)
    guests.append(lab.guest(proxy, MACHINE, (*migration.INCOMING, "-S")))
    destination = Host(vtpmd, lab.management(vtpmd), guests[0])
    arm(source, destination)
    before = source.guest.check()
    source.guest.command("start mixed")

    source.guest.qmp("migrate", uri=listen(lab, source, destination))

    ended = migration.wait_until_ended(source.guest)
    assert ended == "failed" or (answered and ended == "completed")
    assert proxy.triggered.wait(WAIT_TIMEOUT_S)
    assert_goes_on(source, before)


def test_migration_can_be_repeated_after_the_destination_has_died(lab: Lab, source: Host) -> None:
    """The second time it succeeds, with a tail, to the same vtpmd."""
    first = make_destination(lab, "-S")
    arm(source, first)
    before = source.guest.check()
    migrate_to_a_paused_guest(lab, source, first)
    first.guest.close()
    source.guest.resume()
    source.guest.command("work 30")

    second = make_destination(lab, vtpmd=first.vtpmd)
    arm(source, second)
    migrate(lab, source, second)
    assert_used_a_tail(source)
    assert differences(before, second.guest.check(), worked=True) == []


def test_guest_keeps_its_tpm_at_the_destination_when_the_source_is_resumed(
    lab: Lab, source: Host
) -> None:
    """Somebody lets the source's guest run although the migration has succeeded."""
    destination = make_destination(lab)
    arm(source, destination)
    before = source.guest.check()
    source.guest.command("start mixed")
    migrate(lab, source, destination)
    destination.guest.command("stop")
    destination.guest.check()

    source.guest.resume()

    assert_guest_is_not_served(source)
    destination.guest.command("work 60")
    assert differences(before, destination.guest.check(), worked=True) == []


class TamperingProxy:
    """Forwards QEMU's migration stream, and alters what is in it once."""

    def __init__(self, listen: Path, target: Path, position: int) -> None:
        """Flip a bit at `position`, counted from where a tail begins."""
        self._position = position
        self._target = target
        self.altered = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """Wait until the stream has ended."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # close() ended it, or QEMU did
            source, _ = self._listener.accept()
            with source, socket.socket(socket.AF_UNIX) as target:
                target.connect(str(self._target))
                self._forward(source, target)

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        pending = b""
        while received := source.recv(1 << 16):
            pending += received
            begin = pending.find(tail.MAGIC)
            if begin >= 0 and len(pending) > begin + self._position:
                at = begin + self._position
                pending = pending[:at] + bytes([pending[at] ^ 1]) + pending[at + 1 :]
                self.altered.set()
                target.sendall(pending)
                pending = b""
            elif begin < 0:
                # The magic may begin in this piece and go on in the next.
                keep = len(tail.MAGIC) - 1
                target.sendall(pending[:-keep])
                pending = pending[-keep:]
        target.sendall(pending)


def test_guest_goes_on_at_the_source_when_its_tail_was_altered(lab: Lab, source: Host) -> None:
    """QEMU's stream is not encrypted, and somebody is in between."""
    destination = make_destination(lab)
    arm(source, destination)
    before = source.guest.check()
    source.guest.command("start mixed")
    uri = listen(lab, source, destination, return_path=False)
    path = lab.new_path("between")
    target = Path(uri.removeprefix("unix:"))
    proxy = TamperingProxy(path, target, tail.HEADER.size + 1)
    lab.close_at_end(proxy)

    source.guest.qmp("migrate", uri=f"unix:{path}")
    migration.wait_until_ended(source.guest)

    # The source has ended when its last bytes are in a socket, perhaps before they were read.
    assert destination.guest.program.wait() != 0
    assert proxy.altered.is_set()
    refusals = destination.vtpmd.program.output.count("the tail is refused: ")
    assert refusals == 1
    assert_goes_on(source, before)


def test_last_round_waits_for_the_one_that_is_under_way(lab: Lab) -> None:
    """The guest is stopped, runs on, and is stopped again; what it had done is sent each time."""
    source, destination = make_source(lab), make_destination(lab)
    fake = FakeDestination(credentials())
    lab.close_at_end(fake)
    source.manage.command("migrate-arm", to=fake.address)
    stream, _ = fake.hold_base()
    source.manage.wait_for("VTPM_ARMED")
    migrate_slowly(lab, source, destination)
    source.guest.pause()
    stream.acknowledge_until_stopped()  # there may have been rounds before

    source.guest.resume()
    source.guest.command("work 5")
    first = stream.receive_round()  # while it runs
    source.guest.pause()
    source.guest.resume()
    source.guest.command("work 5")
    source.guest.pause()
    wait_until(lambda: source.vtpmd.program.output.count("GuestStopped") == 3)
    stream.acknowledge(first)

    second = stream.receive_round()
    assert second.round == first.round + 1
    assert second.permanent_generation > first.permanent_generation
    stream.receive(peer.Stopped)


def test_guest_goes_on_when_its_migration_is_cancelled(lab: Lab, source: Host) -> None:
    """While armed, before the freeze: the session stays, for the next attempt."""
    destination = make_destination(lab)
    arm(source, destination)
    before = source.guest.check()
    source.guest.command("start mixed")
    migrate_slowly(lab, source, destination)
    source.guest.qmp("migrate_cancel")
    assert migration.wait_until_ended(source.guest) in migration.GIVEN_UP
    assert source.manage.migration()["state"] in ("armed", "round")
    destination.guest.close()

    again = make_destination(lab, vtpmd=destination.vtpmd)
    migrate(lab, source, again)
    again.guest.command("stop")
    assert_used_a_tail(source)
    assert differences(before, again.guest.check(), worked=True) == []
