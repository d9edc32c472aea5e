"""A vTPM whose state is on storage that both hosts have: one directory, or linear file, and a lock.

By swtpm's `--migration incoming,release-lock-outgoing`, as libvirt and Incus give it. Invariant 3
for it: at every instant at most one of the two has the lock, and only that one writes.
"""

import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.lab import Lab
from tests.harness.swtpm_program import OURS, PROGRAMS, TIMEOUT_S, Place
from tests.support.emulator_client import (
    INIT_DELETE_VOLATILE,
    Blob,
    ControlClient,
    ControlError,
)
from tests.support.tpm2 import Handle, ReturnCode, Tpm, TpmError
from tests.system.test_run import run_to_its_end
from vtpmd.store.directory import FLOCK
from vtpmd.testing import migration
from vtpmd.testing.facts import differences
from vtpmd.testing.guest import Machine

BOTH = ("--migration", "incoming,release-lock-outgoing")
RELEASES = ("--migration", "release-lock-outgoing")
INCOMING = ("--migration", "incoming")
INDEX = Handle.NV_FIRST
NV_BYTES = 16
FIRST, SECOND, THIRD = (bytes([n]) * NV_BYTES for n in (1, 2, 3))


class Shared:
    """Storage that hosts share, and what they start on it."""

    def __init__(self, directory: Path, *, is_linear: bool = False, suffix: str = "") -> None:
        self.directory = directory
        self.state = directory / "shared"
        self._tpmstate = f"backend-uri={'file' if is_linear else 'dir'}://{self.state}{suffix}"
        self._hosts: list[Host] = []
        if is_linear:
            self.lock_file = self.state
            return
        self.state.mkdir()
        self.lock_file = self.state / ".lock"

    def host(self, *options: str, program: Path = OURS) -> "Host":
        """Start a host's emulator."""
        directory = self.directory / f"host{len(self._hosts)}"
        place = Place(program, directory)
        self._hosts.append(Host(place, place.start("--tpmstate", self._tpmstate, *options)))
        return self._hosts[-1]

    def is_locked(self) -> bool:
        """Return whether any process has the lock."""
        wanted = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        with self.lock_file.open("rb") as file:
            return bool(FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, wanted))[0] != 2)

    def content(self) -> dict[str, bytes]:
        """Return all that there is."""
        if self.state.is_file():
            return {"": self.state.read_bytes()}
        return {path.name: path.read_bytes() for path in self.state.iterdir()}

    def end(self) -> None:
        """End what runs still."""
        for host in self._hosts:
            host.close()
            host.place.end()


class Host:
    """An emulator with a client that drives it as QEMU does."""

    def __init__(self, place: Place, process: subprocess.Popen[str]) -> None:
        self.place = place
        self.process = process
        self.control_path = place.control
        self.qmp_path = None

    def connect(self) -> Tpm:
        """Connect, as QEMU does when it starts."""
        self.control = ControlClient(self.place.control)
        self.tpm = Tpm(self.control.attach_data().transact)
        return self.tpm

    def start(self) -> Tpm:
        """Start a guest."""
        tpm = self.connect()
        self.control.init()
        tpm.startup()
        return tpm

    def give(self) -> dict[Blob, bytes]:
        """Give the state away, as QEMU asks for it: then its guest has stopped."""
        return {blob: self.control.get_state_blob(blob) for blob in Blob}

    def bring(self, blobs: dict[Blob, bytes]) -> None:
        """Bring a state."""
        self.control.stop()
        for blob, content in blobs.items():
            if content:
                self.control.set_state_blob(blob, content)

    def take(self, blobs: dict[Blob, bytes]) -> Tpm:
        """Bring a state, and start from it."""
        self.bring(blobs)
        self.control.init(INIT_DELETE_VOLATILE)
        return self.tpm

    def stop(self) -> str:
        """Stop it in order; return what it said."""
        self.control.shutdown()
        assert self.process.wait(TIMEOUT_S) == 0
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        """Close the connection."""
        if hasattr(self, "control"):
            self.control.close()


@pytest.fixture(params=["directory", "linear"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shared]:
    made = Shared(tmp_path, is_linear=request.param == "linear")
    yield made
    made.end()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Shared]:
    made = Shared(tmp_path)
    yield made
    made.end()


def assert_is_served_by_both_programs(shared: Shared, wanted: bytes) -> None:
    """What was stopped in order is anybody's, and has no lock: invariant 9."""
    assert not shared.is_locked()
    for program in PROGRAMS.values():
        host = shared.host(program=program)
        assert host.start().nv_read(INDEX, NV_BYTES) == wanted
        host.stop()


def store(tpm: Tpm, content: bytes) -> None:
    tpm.nv_write(INDEX, content)


def started(shared: Shared, *options: str, program: Path = OURS) -> Host:
    """Start a guest that has stored something."""
    host = shared.host(*options, program=program)
    tpm = host.start()
    tpm.nv_define(INDEX, NV_BYTES)
    store(tpm, FIRST)
    return host


@pytest.mark.parametrize("options", [BOTH, INCOMING], ids=["both", "incoming"])
def test_vtpm_moves_and_the_source_leaves_all_alone(
    shared: Shared, options: tuple[str, str]
) -> None:
    source = started(shared, *RELEASES)
    digest = b"\x07" * 32
    source.tpm.extend(7, digest)
    wanted = source.tpm.pcr(7)
    assert shared.is_locked()
    there = shared.host(*options)
    there.connect()
    blobs = {Blob.PERMANENT: source.control.get_state_blob(Blob.PERMANENT)}
    assert shared.is_locked()
    blobs |= {kind: source.control.get_state_blob(kind) for kind in (Blob.VOLATILE, Blob.SAVESTATE)}
    assert not shared.is_locked()
    before = shared.content()

    there.bring(blobs)
    assert shared.content() == before
    there.control.init(INIT_DELETE_VOLATILE)
    assert shared.is_locked()
    assert there.tpm.pcr(7) == wanted
    assert there.tpm.nv_read(INDEX, NV_BYTES) == FIRST
    store(there.tpm, SECOND)
    content = shared.content()
    assert "journal" not in source.stop()
    assert shared.content() == content
    assert shared.is_locked()
    store(there.tpm, THIRD)
    there.stop()
    assert_is_served_by_both_programs(shared, THIRD)


def test_destination_moves_it_on(directory: Shared) -> None:
    """There and back, and there again: each gives and takes."""
    host = started(directory, *RELEASES)
    for turn in range(3):
        there = directory.host(*BOTH)
        there.connect()
        there.take(host.give())
        host.stop()
        store(there.tpm, bytes([turn]) * NV_BYTES)
        host = there
    host.stop()
    assert_is_served_by_both_programs(directory, b"\x02" * NV_BYTES)


@pytest.mark.parametrize("says", ["LOCK_STORAGE", "nothing"])
def test_source_goes_on_where_the_migration_failed(shared: Shared, says: str) -> None:
    """QEMU says that it does, or its guest's first command does: it is locked before that."""
    source = started(shared, *RELEASES)
    source.give()
    assert not shared.is_locked()
    if says == "LOCK_STORAGE":
        source.control.lock_storage()
        assert shared.is_locked()
    store(source.tpm, SECOND)
    assert shared.is_locked()
    store(source.tpm, THIRD)
    source.kill()
    assert_is_served(shared, THIRD)


def assert_is_served(shared: Shared, wanted: bytes) -> None:
    host = shared.host()
    assert host.start().nv_read(INDEX, NV_BYTES) == wanted
    host.stop()


def test_invariant_3_while_another_has_the_lock_nothing_is_executed(shared: Shared) -> None:
    source = started(shared, *RELEASES)
    blobs = source.give()
    there = shared.host(*BOTH)
    there.connect()
    there.take(blobs)
    before = shared.content()
    with pytest.raises(ControlError) as refused:
        source.control.lock_storage(retries=5)
    assert refused.value.result == 9  # TPM_FAIL
    for _ in range(2):
        with pytest.raises(TpmError) as failed:
            store(source.tpm, SECOND)
        assert failed.value.return_code == ReturnCode.FAILURE
    with pytest.raises(ControlError):
        source.control.init()
    assert shared.content() == before
    assert there.tpm.nv_read(INDEX, NV_BYTES) == FIRST
    # Once that is over, the source's guest can be gone on with.
    there.kill()
    source.control.lock_storage()
    store(source.tpm, THIRD)
    said = source.stop()
    assert said.count("cannot be locked") == 3
    assert_is_served_by_both_programs(shared, THIRD)


@pytest.mark.parametrize("ends", ["stopped", "killed"])
def test_what_a_destination_has_left_is_replaced(shared: Shared, ends: str) -> None:
    """Its journal, too: that continues a state which is not the source's."""
    source = started(shared, *RELEASES)
    blobs = source.give()
    there = shared.host(*BOTH)
    there.connect()
    there.take(blobs)
    store(there.tpm, SECOND)
    if ends == "stopped":
        there.stop()
    else:
        there.kill()
    source.control.lock_storage()
    source.kill()
    assert_is_served(shared, FIRST)


def test_init_without_a_state_is_refused(shared: Shared) -> None:
    source = started(shared, *RELEASES)
    before = shared.content()
    there = shared.host(*INCOMING)
    there.connect()
    with pytest.raises(ControlError):
        there.control.init()
    assert shared.content() == before
    assert "leave out --migration incoming" in there.stop()
    store(source.tpm, SECOND)
    source.stop()
    assert_is_served_by_both_programs(shared, SECOND)


def test_state_whose_lock_is_not_let_go_of_is_refused(shared: Shared) -> None:
    """As of a source that was not told to: its guest goes on."""
    source = started(shared)
    blobs = source.give()
    there = shared.host(*BOTH)
    there.connect()
    with pytest.raises(ControlError):
        there.take(blobs)
    assert there.stop().count("cannot be locked") == 1
    store(source.tpm, SECOND)
    source.stop()
    assert_is_served_by_both_programs(shared, SECOND)


def test_swtpm_takes_what_vtpmd_has_let_go_of(shared: Shared) -> None:
    """swtpm without --migration locks when it is initialized, until it ends."""
    source = started(shared, *RELEASES)
    blobs = source.give()
    there = shared.host(program=PROGRAMS["swtpm"])
    there.connect()
    there.take(blobs)
    store(there.tpm, SECOND)
    source.stop()
    there.stop()
    assert_is_served_by_both_programs(shared, SECOND)


def test_vtpmd_takes_what_swtpm_has_let_go_of(shared: Shared) -> None:
    """swtpm without --migration lets go of it when it ends."""
    source = shared.host(program=PROGRAMS["swtpm"])
    tpm = source.start()
    tpm.nv_define(INDEX, NV_BYTES)
    store(tpm, FIRST)
    there = shared.host(*BOTH)
    there.connect()
    there.bring(source.give())
    source.stop()
    there.control.init(INIT_DELETE_VOLATILE)
    assert there.tpm.nv_read(INDEX, NV_BYTES) == FIRST
    store(there.tpm, SECOND)
    there.stop()
    assert_is_served_by_both_programs(shared, SECOND)


@pytest.mark.parametrize("ends", ["stopped", "killed"])
def test_changes_outlive_what_swtpm_writes_without_the_lock(shared: Shared, ends: str) -> None:
    """As it does from 0.8 on, when QEMU ends it after its guest has left."""
    source = started(shared, program=PROGRAMS["swtpm"])
    file = shared.state if shared.state.is_file() else shared.state / "tpm2-00.permall"
    there = shared.host(*BOTH)
    there.connect()
    blobs = source.give()
    source.tpm.shutdown()
    source.stop()
    last_word = file.read_bytes()
    there.take(blobs)
    store(there.tpm, SECOND)
    if file == shared.state:
        with file.open("r+b") as opened:
            opened.write(last_word)
    else:
        (shared.directory / "new").write_bytes(last_word)
        (shared.directory / "new").rename(file)
    if ends == "killed":
        store(there.tpm, THIRD)
        there.kill()
    else:
        there.stop()
    assert_is_served(shared, THIRD if ends == "killed" else SECOND)


def test_nothing_is_attached_there_and_what_looks_into_it_needs_nothing(directory: Shared) -> None:
    """The line names who serves, at the source and where the state is to come."""
    source = started(directory, *RELEASES)
    directory.host(*BOTH).connect()
    done = run_to_its_end(directory.state, command="attach")
    assert done.returncode == 1
    assert f"process {source.process.pid}, since" in done.stderr
    assert "with --migration, for storage that hosts share: nothing can be attached" in done.stderr
    assert done.stderr.count("\n") == 1
    for command in ("status", "inspect", "log", "verify"):
        assert run_to_its_end(directory.state, command=command).returncode == 0
    for command in ("export", "backup"):
        to = directory.directory / command
        words = ("--out", to) if command == "export" else (to,)
        assert run_to_its_end(directory.state, *words, command=command).returncode == 0
    store(source.tpm, SECOND)
    source.stop()
    assert_is_served_by_both_programs(directory, SECOND)


def test_nothing_is_attached_to_swtpm_or_a_file(shared: Shared) -> None:
    """It is said what it is, and not that there is nobody."""
    swtpm = started(shared, program=PROGRAMS["swtpm"])
    done = run_to_its_end(shared.state, command="attach")
    assert done.returncode == 1
    wanted = "moves by QEMU's own migration" if shared.state.is_file() else "as swtpm has none"
    assert wanted in done.stderr
    assert done.stderr.count("\n") == 1
    swtpm.stop()


def test_tpm_that_is_to_start_at_once_has_no_state_to_come(tmp_path: Path) -> None:
    place = Place(OURS, tmp_path)
    done = subprocess.run(
        place.options(*INCOMING, "--flags", "not-need-init"),
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("swtpm: --migration incoming has the state come before")


def test_guest_sees_no_difference_on_shared_storage(lab: Lab) -> None:
    """There and back, of a QEMU guest that works its TPM."""
    shared, machine = Shared(lab.directory), Machine()
    try:
        guest = lab.booted_guest(shared.host(*RELEASES), machine)
        before = guest.check()
        for hop in range(2):
            destination = lab.guest(shared.host(*BOTH), machine, migration.INCOMING)
            migration.set_capabilities(guest)
            migration.set_capabilities(destination)
            guest.command("start mixed")
            path = lab.directory / f"stream{hop}"
            migration.migrate(guest, destination, migration.listen_unix(destination, path))
            destination.command("stop")
            assert shared.is_locked()
            guest.close()
            guest = destination
        assert differences(before, guest.check(), worked=True) == []
        guest.close()
    finally:
        shared.end()


def test_guest_goes_on_at_the_source_if_its_destination_fails(lab: Lab) -> None:
    """QEMU takes the lock again (LOCK_STORAGE)."""
    shared, machine = Shared(lab.directory), Machine()
    try:
        guest = lab.booted_guest(shared.host(*RELEASES), machine)
        before = guest.check()
        there = shared.host(*BOTH)
        destination = lab.guest(there, machine, migration.INCOMING)
        migration.set_capabilities(guest)
        uri = migration.listen_unix(destination, lab.directory / "stream")
        there.kill()
        guest.qmp("migrate", uri=uri)
        migration.wait_until_ended(guest)
        destination.close()
        if guest.status != "running":
            guest.resume()
        guest.command("work 5")
        assert differences(before, guest.check(), worked=True) == []
        assert shared.is_locked()
        guest.close()
    finally:
        shared.end()
