"""`vtpmd migrate` with real guests: what it moves, says and returns.

The guest's migration comes first: whatever keeps the vTPM's state from moving beside QEMU's stream,
the guest moves, unless the destination cannot take the state in any way; and whatever keeps the
guest from moving, it goes on at the source, with its TPM (invariant 3 of the design), and can be
moved again. No QEMU here was told of a return path but by the command.
"""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.fake_peer import FakeDestination
from tests.harness.lab import Lab
from tests.harness.proxy import Trigger
from tests.support.emulator_client import Control
from vtpmd.testing import migration
from vtpmd.testing.credentials import credentials, stranger_credentials
from vtpmd.testing.disk import Disk
from vtpmd.testing.emulator import Emulator, Peering
from vtpmd.testing.facts import differences
from vtpmd.testing.guest import Guest, Machine
from vtpmd.testing.management import Management
from vtpmd.wire import peer

MACHINE = Machine()
TIMEOUT_S = 60.0
SLOW_BYTES_S = 1 << 20  # a migration at this rate takes longer than a test
UUID = "8f2c0d6e-5a5b-4c1e-9d1a-3f0c7d1f2b11"
OTHER_UUID = "8f2c0d6e-5a5b-4c1e-9d1a-3f0c7d1f2b12"
NOBODY = "localhost:1"  # a port that no service has
NOBODY_URI = "tcp:127.0.0.1:1"


@dataclass(frozen=True, kw_only=True)
class Host:
    """A vtpmd, a guest, and a monitor of that which nobody uses yet."""

    vtpmd: Emulator
    guest: Guest
    monitor: Path

    def command(self, to: str, uri: str, *options: str) -> list[str | Path]:
        """Return the command that moves the guest."""
        vtpmd = Path(sys.executable).with_name("vtpmd")
        where: list[str | Path] = ["--manage", self.vtpmd.manage_path, "--qmp", self.monitor]
        return [vtpmd, "migrate", *where, "--to", to, "--uri", uri, *options]

    def migrate(self, to: str, uri: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Move the guest, or try to; return what was said."""
        return run(self.command(to, uri, *options))


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which is not late."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def host(
    lab: Lab,
    name: str = "source",
    arguments: Sequence[str] = (),
    *,
    peers: Path | None = None,
    is_followed: bool = True,
    uuid: str | None = None,
    state: Path | None = None,
) -> Host:
    """Start a vtpmd and a QEMU that it follows, or could; the guest has not booted yet."""
    peering = Peering(credentials=peers or credentials(), follows_qemu=True, uuid=uuid)
    vtpmd = lab.peer(peering, state)
    if not is_followed:
        vtpmd.qmp_path = None  # QEMU gets no monitor there
    monitor = lab.directory / name
    guest = lab.guest(vtpmd, MACHINE, ("-qmp", f"unix:{monitor},server=on,wait=off", *arguments))
    return Host(vtpmd=vtpmd, guest=guest, monitor=monitor)


def boot(source: Host) -> Host:
    """Wait until the guest has booted and filled its TPM."""
    source.guest.wait_for_workload()
    source.guest.command("setup")
    source.guest.command("work 30")
    migration.set_capabilities(source.guest, return_path=False)
    return source


def waiting_host(
    lab: Lab, name: str = "destination", *, uuid: str | None = None, state: Path | None = None
) -> tuple[Host, str]:
    """Start a vtpmd and a QEMU that wait; return them and where QEMU waits."""
    destination = host(lab, name, migration.INCOMING, uuid=uuid, state=state)
    migration.set_capabilities(destination.guest, return_path=False)
    return destination, migration.listen_tcp(destination.guest)


def assert_goes_on(source: Host, before: dict[str, str]) -> None:
    """Check that the guest runs, that its TPM lost nothing and works, and that no session is on."""
    assert source.guest.status == "running"
    assert differences(before, source.guest.check(), worked=False) == []
    source.guest.command("work 10")
    assert query_migration(source)["state"] in ("none", "ended")


def query_migration(source: Host) -> dict[str, Any]:
    """Ask vtpmd for the session."""
    with closing(Management(source.vtpmd)) as manage:
        return manage.migration()


def test_guest_moves_with_a_tail_and_on_again(lab: Lab) -> None:
    """First for a program, which gets one JSON object; then for a person at a terminal."""
    first, (second, uri) = boot(host(lab)), waiting_host(lab)
    before = first.guest.check()

    moved = first.migrate(second.vtpmd.address, uri, "--json")
    assert moved.returncode == 0, moved.stderr
    check_json(json.loads(moved.stdout), query_migration(first))
    assert "round 1" in moved.stderr
    assert "tail" in moved.stderr.splitlines()[-1]
    assert differences(before, second.guest.check(), worked=False) == []

    third, uri = waiting_host(lab, "c")
    status, report, shown = migrate_at_a_terminal(second, third.vtpmd.address, uri)
    assert status == 0, shown
    assert report.startswith(
        "The guest has moved, and its vTPM beside it: both run at the destination.\n"
    )
    assert "the sealed tail" in report
    assert "guest memory" in shown
    assert "\x1b[" in shown
    assert differences(before, third.guest.check(), worked=False) == []


def check_json(report: dict[str, Any], session: dict[str, Any]) -> None:
    """Compare a report with what vtpmd says itself, and with what must be so."""
    assert report["ending"] == "tail"
    assert report["reason"] is None
    guest, vtpm = report["guest"], report["vtpm"]
    assert guest["status"] == "completed"
    assert guest["ram-transferred-bytes"] > 0
    assert guest["total-ms"] >= guest["downtime-ms"]
    assert vtpm["outcome"] == "handed-over"
    assert "destination: start the TPM" in vtpm["phases-us"]
    for name in ("session", "outcome", "refusal", "qemu", "rounds", "tail-bytes", "phases-us"):
        assert vtpm[name] == session[name]
    assert (vtpm["qemu"], vtpm["refusal"]) == ("following", None)
    assert vtpm["rounds"][0]["bytes"] > vtpm["tail-bytes"] > 0
    assert {name.partition(":")[0] for name in vtpm["phases-us"]} == {"source", "destination"}
    assert set(vtpm["digests"]) == {"permanent", "volatile"}
    for name, digests in vtpm["digests"].items():
        assert digests["at-freeze"] == digests["after-load"] == session["digests"][name]


def migrate_at_a_terminal(source: Host, to: str, uri: str) -> tuple[int, str, str]:
    """Move the guest with progress on a terminal; return exit status, report and what was shown."""
    terminal, standard_error = pty.openpty()
    process = subprocess.Popen(
        source.command(to, uri),
        stdout=subprocess.PIPE,
        stderr=standard_error,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
    )
    os.close(standard_error)
    shown = b""
    with suppress(OSError):  # EIO: the other side is closed (pty(7))
        while data := os.read(terminal, 4096):
            shown += data
    os.close(terminal)
    report, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, report, shown.decode(errors="replace")


@pytest.mark.parametrize("case", ["nobody", "not-allowed", "not-followed"])
def test_guest_moves_with_whole_blobs_when_the_vtpm_cannot(lab: Lab, case: str) -> None:
    """Exit status 4; the warning on standard error and the report say why."""
    peers = stranger_credentials() if case == "not-allowed" else None
    source = boot(host(lab, peers=peers, is_followed=case != "not-followed"))
    destination, uri = waiting_host(lab)
    # Where vtpmd follows no QEMU, a session with another peer stays armed to the end.
    other = lab.peer() if case == "not-followed" else destination.vtpmd
    to = NOBODY if case == "nobody" else other.address
    before = source.guest.check()

    moved = source.migrate(to, uri, "--json")

    assert moved.returncode == 4, moved.stderr
    report = json.loads(moved.stdout)
    assert report["ending"] == "whole-blobs"
    assert report["guest"]["status"] == "completed"
    reason = {
        "nobody": f"nobody listens at {NOBODY}",
        "not-allowed": "the destination refuses: peer stranger.example is not allowed",
        "not-followed": "vtpmd did not see QEMU migrate",
    }[case]
    assert reason in report["reason"]
    if case == "not-followed":
        assert report["vtpm"]["qemu"] == "not-reachable"
        # Which of its states is seen first depends on when QEMU is asked.
        warned, begun = moved.stderr.index("no QEMU answers on"), moved.stderr.index("; guest: ")
        assert warned < begun
    else:
        warning = f"vtpmd: warning: the vTPM's whole state goes into QEMU's stream: {reason}"
        assert warning in moved.stderr
    assert differences(before, destination.guest.check(), worked=False) == []


def test_guest_goes_on_when_qemu_refuses_or_finds_nobody(lab: Lab) -> None:
    """Exit status 1 and one line that says what QEMU says; the session has ended."""
    source, other = boot(host(lab)), lab.peer()
    before = source.guest.check()
    for uri, said in {
        "no-uri": "migration protocol",  # the rest differs between versions
        NOBODY_URI: "Connection refused",
    }.items():
        failed = source.migrate(other.address, uri)
        assert (failed.returncode, failed.stdout) == (1, "")
        last = failed.stderr.splitlines()[-1]
        assert last.startswith("vtpmd: the guest has not moved")
        assert said in last
        assert_goes_on(source, before)
        before = source.guest.check()


def refused(source: Host, to: str, uri: str, refusal: str) -> str:
    """Try to move a guest to where its vTPM cannot run; return why that was not done."""
    before = source.guest.check()

    failed = source.migrate(to, uri, "--json")

    assert failed.returncode == 1, failed.stderr
    report = json.loads(failed.stdout)
    assert report["ending"] == "failed"
    assert report["vtpm"]["refusal"] == refusal
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("vtpmd: the guest has not moved")
    assert last.endswith("gives --whole-blobs")
    assert_goes_on(source, before)
    return str(report["reason"])


def test_guest_stays_when_the_destination_is_another_vms(lab: Lab) -> None:
    """QEMU is not told to migrate; with --whole-blobs it is, and these know no UUID."""
    source = boot(host(lab, uuid=UUID))
    destination, uri = waiting_host(lab, uuid=OTHER_UUID)
    reason = refused(source, destination.vtpmd.address, uri, "uuid")
    assert "it is another VM: the UUIDs differ" in reason
    assert "status" not in source.guest.qmp("query-migrate")

    before = source.guest.check()
    moved = source.migrate(destination.vtpmd.address, uri, "--whole-blobs", "--json")
    assert moved.returncode == 4, moved.stderr
    assert json.loads(moved.stdout)["ending"] == "whole-blobs"
    assert differences(before, destination.guest.check(), worked=False) == []


def test_guest_stays_when_the_destination_has_an_older_libtpms(lab: Lab) -> None:
    source, (_, uri) = boot(host(lab)), waiting_host(lab)
    older = FakeDestination(credentials())
    lab.close_at_end(older)

    def refuse() -> None:
        stream = older.accept()
        stream.receive(peer.Hello)
        stream.send(peer.Refuse(peer.Reason.LIBTPMS_VERSION, "its libtpms is newer"))

    thread = threading.Thread(target=refuse)
    thread.start()
    reason = refused(source, older.address, uri, "libtpms-version")
    thread.join()
    assert "the destination refuses: its libtpms is newer" in reason
    assert "status" not in source.guest.qmp("query-migrate")


def test_guest_stays_when_the_disk_of_the_destination_is_full(lab: Lab) -> None:
    """And moves there when there is room."""
    disk = Disk(lab.directory / "disk")
    lab.close_at_end(disk)
    source = boot(host(lab))
    destination, uri = waiting_host(lab, state=disk.path / "state")
    disk.fill()
    reason = refused(source, destination.vtpmd.address, uri, "storage")
    assert "No space left on device" in reason

    disk.make_room()
    before = source.guest.check()
    moved = source.migrate(destination.vtpmd.address, uri)
    assert moved.returncode == 0, moved.stderr
    assert differences(before, destination.guest.check(), worked=False) == []


def test_disk_that_fails_while_qemu_migrates_keeps_the_guest_here(lab: Lab) -> None:
    """The round that cannot be stored is refused, and QEMU's migration is cancelled.

    QEMU waits before it asks for the state, so that the refusal comes before that.
    """
    disk = Disk(lab.directory / "disk")
    lab.close_at_end(disk)
    source = boot(host(lab))
    destination, uri = waiting_host(lab, state=disk.path / "state")
    pause = {"capability": "pause-before-switchover", "state": True}
    source.guest.qmp("migrate-set-capabilities", capabilities=[pause])
    source.guest.qmp("migrate-set-parameters", **{"max-bandwidth": SLOW_BYTES_S})
    before = source.guest.check()
    with started(source.command(destination.vtpmd.address, uri, "--json")) as migrating:
        assert migrating.stderr is not None
        assert any("guest: active" in line for line in migrating.stderr)
        disk.fail_writes(True)
        # A round comes with a pass of QEMU's, and brings what the guest has done before it.
        source.guest.command("work 30")
        source.guest.qmp(
            "migrate-set-parameters", **{"max-bandwidth": migration.BANDWIDTH_BYTES_S_MAX}
        )
        said, shown = migrating.communicate(timeout=TIMEOUT_S)
    assert migrating.returncode == 1, shown
    report = json.loads(said)
    assert (report["ending"], report["vtpm"]["refusal"]) == ("failed", "storage")
    assert report["guest"]["status"] in migration.GIVEN_UP
    assert source.guest.status == "running"
    assert differences(before, source.guest.check(), worked=True) == []


def test_guest_that_the_destination_loses_has_not_moved(lab: Lab) -> None:
    """QEMU here would call it completed, but for the return path."""
    source = boot(host(lab, peers=stranger_credentials()))
    second = lab.peer()
    trigger = Trigger(control=Control.SET_STATEBLOB, action=second.kill)
    destination = lab.guest(lab.proxy(second, trigger), MACHINE, migration.INCOMING)
    migration.set_capabilities(destination, return_path=False)
    uri = migration.listen_tcp(destination)
    before = source.guest.check()

    failed = source.migrate(second.address, uri, "--json")

    assert failed.returncode == 1, failed.stderr
    assert json.loads(failed.stdout)["guest"]["run-state"] == "running"
    assert_goes_on(source, before)


def test_guest_goes_on_when_the_destination_dies_with_the_tail(lab: Lab) -> None:
    """Its vtpmd is killed when QEMU brings the tail."""
    source, second = boot(host(lab)), lab.peer()
    trigger = Trigger(control=Control.SET_STATEBLOB, action=second.kill)
    destination = lab.guest(lab.proxy(second, trigger), MACHINE, migration.INCOMING)
    migration.set_capabilities(destination, return_path=False)
    uri = migration.listen_tcp(destination)
    before = source.guest.check()

    failed = source.migrate(second.address, uri, "--json")

    assert failed.returncode == 1, failed.stderr
    report = json.loads(failed.stdout)
    assert report["ending"] == "failed"
    assert report["guest"]["run-state"] == "running"
    assert report["vtpm"]["outcome"] == "go-on"
    assert report["vtpm"]["tail-bytes"] > 0
    assert "the vTPM goes on here" in report["reason"]
    assert_goes_on(source, before)


def test_interrupt_cancels_qemus_migration_and_the_session(lab: Lab) -> None:
    """Exit status 130; the guest goes on with its TPM, and can be moved afterwards."""
    source = boot(host(lab))
    for number, name in [(signal.SIGINT, "b"), (signal.SIGTERM, "c")]:
        before = source.guest.check()
        destination, uri = waiting_host(lab, name)
        source.guest.qmp("migrate-set-parameters", **{"max-bandwidth": SLOW_BYTES_S})
        with started(source.command(destination.vtpmd.address, uri, "--json")) as migrating:
            assert migrating.stderr is not None
            assert any("guest: active" in line for line in migrating.stderr)
            said, shown = interrupt(migrating, number)
        assert json.loads(said)["ending"] == "interrupted"
        last = shown.splitlines()[-1]
        assert last.startswith("vtpmd: interrupted, the guest is running at the source: ")
        assert source.guest.qmp("query-migrate")["status"] in migration.GIVEN_UP
        assert_goes_on(source, before)

    destination, uri = waiting_host(lab, "d")
    source.guest.qmp("migrate-set-parameters", **{"max-bandwidth": migration.BANDWIDTH_BYTES_S_MAX})
    before = source.guest.check()
    moved = source.migrate(destination.vtpmd.address, uri)
    assert moved.returncode == 0, moved.stderr
    assert differences(before, destination.guest.check(), worked=False) == []


@contextmanager
def started(command: Sequence[str | Path]) -> Iterator[subprocess.Popen[str]]:
    """Start a command whose output is read; it has ended when the block has."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def interrupt(process: subprocess.Popen[str], number: signal.Signals) -> tuple[str, str]:
    """Send a signal; return what was said until the end, which is that of an interrupt."""
    process.send_signal(number)
    said, shown = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, shown
    return said, shown


def test_interrupt_while_the_peer_is_silent_leaves_qemu_alone(lab: Lab) -> None:
    """And so does a second command meanwhile: the session is another's."""
    source = host(lab)
    with socket.create_server(("localhost", 0)) as silent:
        silent.settimeout(TIMEOUT_S)
        to = f"localhost:{silent.getsockname()[1]}"
        with started(source.command(to, NOBODY_URI)) as migrating, silent.accept()[0]:
            second = source.migrate(to, NOBODY_URI)
            assert second.returncode == 1
            assert "vtpmd has a session already, which is connecting" in second.stderr
            assert query_migration(source)["state"] == "connecting"
            _, shown = interrupt(migrating, signal.SIGINT)
    assert shown.splitlines()[-1] == "vtpmd: interrupted before QEMU began to migrate"
    assert query_migration(source)["state"] == "ended"
    assert "status" not in source.guest.qmp("query-migrate")


def test_sockets_that_are_missing_wrong_or_busy_are_one_line(lab: Lab) -> None:
    """Exit status 1; each line says what is wrong with which socket, and what to do."""
    source, missing = host(lab), lab.directory / "missing"
    vtpmd = Path(sys.executable).with_name("vtpmd")
    manage, monitor = source.vtpmd.manage_path, source.monitor
    busy = source.vtpmd.qmp_path
    assert busy is not None
    for manage_path, qmp_path, said in [
        (missing, monitor, f"{missing}: No such file or directory; start vtpmd with --manage"),
        (monitor, monitor, f"{monitor}: no vtpmd greets there; give what vtpmd run has"),
        (manage, missing, f"{missing}: there is no such socket; start QEMU with -qmp unix:"),
        (manage, busy, f"{busy}: no answer; a monitor serves one client"),
    ]:
        where: list[str | Path] = ["--manage", manage_path, "--qmp", qmp_path]
        failed = run([vtpmd, "migrate", *where, "--to", NOBODY, "--uri", NOBODY_URI])
        assert (failed.returncode, failed.stdout) == (1, "")
        (line,) = failed.stderr.splitlines()
        assert said in line
