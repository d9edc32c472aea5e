"""The state directory: made, locked against swtpm and vtpmd both ways, cleaned, read with care."""

import os
import re
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import versions
from tests.harness.lab import Lab
from tests.support.emulator_client import ControlClient
from vtpmd.store.directory import (
    StateDirectory,
    StateDirectoryError,
    StateDirectoryInUse,
    look_into,
)
from vtpmd.testing.emulator import EmulatorKind
from vtpmd.testing.program import Program
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType

OTHER_USER = 65534
NAMES = ["tpm2-00.permall", "tpm2-00.volatilestate", "tpm2-00.savestate"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def open_descriptors() -> int:
    """Count this process's descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


def refusal(path: Path) -> str:
    """Return why the states of a directory cannot be read."""
    with StateDirectory.open(path) as directory, pytest.raises(StateDirectoryError) as caught:
        directory.read_states()
    return str(caught.value)


def test_a_new_directory_is_its_owners_alone_and_empty(path: Path) -> None:
    with StateDirectory.open(path) as directory:
        assert directory.read_states() == {}
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert os.path.samestat(os.fstat(directory.directory_fd), path.stat())
        assert os.path.samestat(os.fstat(directory.lock_fd), (path / ".lock").stat())
        for descriptor in (directory.directory_fd, directory.lock_fd):
            assert not os.get_inheritable(descriptor)
    assert [entry.name for entry in path.iterdir()] == [".lock"]


def test_states_are_read(path: Path) -> None:
    path.mkdir()
    for name in NAMES:
        (path / name).write_bytes(swtpm_format.encode_file(name.encode()))
    with StateDirectory.open(path) as directory:
        states = directory.read_states()
    assert states == {StateType(n): name.encode() for n, name in enumerate(NAMES, start=1)}


def test_states_of_a_swtpm_are_read(lab: Lab) -> None:
    swtpm = lab.emulator(EmulatorKind.SWTPM)
    with ControlClient(swtpm.control_path) as control:
        control.init()
        control.store_volatile()
        control.shutdown()
    assert swtpm.program.wait() == 0
    with StateDirectory.open(swtpm.state) as directory:
        states = directory.read_states()
    assert states.keys() == {StateType.PERMANENT, StateType.VOLATILE}
    # The magic numbers of libtpms' PERSISTENT_ALL and VOLATILE_STATE.
    assert states[StateType.PERMANENT][2:6] == bytes.fromhex("ab364723")
    assert states[StateType.VOLATILE][2:6] == bytes.fromhex("45637889")


def test_what_a_crash_left_half_written_is_removed(path: Path) -> None:
    path.mkdir()
    for name in ("TMP2-00.permall", "TMP2-00.volatilestate", "TMP2-00.savestate"):
        (path / name).write_bytes(b"half")
    (path / "TMP2-00.notes").write_bytes(b"somebody's")
    StateDirectory.open(path).close()
    assert {entry.name for entry in path.iterdir()} == {".lock", "TMP2-00.notes"}


def test_a_second_one_is_refused_and_removes_nothing(path: Path) -> None:
    with StateDirectory.open(path):
        half_written = path / "TMP2-00.permall"
        half_written.write_bytes(b"half")
        with pytest.raises(StateDirectoryInUse, match="in use by another vtpmd") as caught:
            StateDirectory.open(path)
        assert caught.value.exit_status == 3
        assert str(path) in str(caught.value)
        assert half_written.exists()
    StateDirectory.open(path).close()


def test_the_lock_lasts_as_long_as_a_process_that_inherited_it(path: Path) -> None:
    with StateDirectory.open(path) as directory:
        heir = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=[directory.lock_fd],
        )
    with pytest.raises(StateDirectoryInUse):
        StateDirectory.open(path)
    heir.communicate(timeout=20)
    StateDirectory.open(path).close()


def test_a_swtpm_keeps_us_out(lab: Lab) -> None:
    swtpm = lab.emulator(EmulatorKind.SWTPM)
    with ControlClient(swtpm.control_path) as control:
        control.init()
        expected = f"is in use by process {swtpm.program.pid};"
        with pytest.raises(StateDirectoryInUse, match=expected):
            StateDirectory.open(swtpm.state)
        control.shutdown()
    assert swtpm.program.wait() == 0
    StateDirectory.open(swtpm.state).close()


def test_we_keep_a_swtpm_out(lab: Lab) -> None:
    state = lab.directory / "state"
    arguments = ["--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={lab.directory}/s"]
    with StateDirectory.open(state):
        # Without not-need-init swtpm would look at the directory only when told to.
        options = ["--flags", "not-need-init", *arguments]
        swtpm = Program("swtpm", ["swtpm", "socket", "--tpm2", *options], lab.directory)
        assert swtpm.wait() == 1
    assert re.search("[Ll]ock", swtpm.output), swtpm.output
    left = ["tpm2-00.permall"] if versions.swtpm().writes_in_a_locked_directory else []
    assert sorted(entry.name for entry in state.iterdir()) == [".lock", *left]


def make_fifo(file: Path) -> None:
    os.mkfifo(file)


def make_link(file: Path) -> None:
    target = file.with_name("elsewhere")
    target.write_bytes(swtpm_format.encode_file(b"state"))
    file.symlink_to(target)


def make_empty(file: Path) -> None:
    file.touch()


def make_huge(file: Path) -> None:
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)


def make_truncated(file: Path) -> None:
    file.write_bytes(swtpm_format.encode_file(b"secret state")[:-1])


def make_encrypted(file: Path) -> None:
    file.write_bytes(struct.pack(">BBHHIHI", 2, 1, 10, 1, 16, 2, 0))


def content_of_inode(path: Path) -> tuple[int, ...]:
    """Return what a change would change; reading sets the time of access."""
    now = os.lstat(path)
    return (*now[: stat.ST_ATIME], now.st_mtime_ns, now.st_ctime_ns)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_fifo, "it is not a regular file"),
        (Path.mkdir, "it is not a regular file"),
        (make_link, "it is a symbolic link"),
        (make_empty, "it is empty"),
        (make_huge, "no state has more than"),
        (make_truncated, "it has 27 bytes, but its header says 28"),
        (make_encrypted, "it is encrypted with swtpm's file key"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_state_file_is_refused_and_left(
    path: Path, name: str, make: Callable[[Path], None], reason: str
) -> None:
    path.mkdir()
    make(path / name)
    before = content_of_inode(path / name)
    said = refusal(path)
    assert reason in said
    assert str(path / name) in said
    assert "secret" not in said
    assert content_of_inode(path / name) == before


def test_a_lock_that_is_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.mkdir()
    (path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateDirectoryError, match="no regular file"):
        StateDirectory.open(path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("make", [Path.touch, make_fifo], ids=["file", "fifo"])
def test_what_is_no_directory_is_refused(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with pytest.raises(StateDirectoryError, match=f"cannot use state directory {path}"):
        StateDirectory.open(path)


def test_a_missing_parent_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StateDirectoryError, match="No such file or directory"):
        StateDirectory.open(tmp_path / "no" / "state")
    assert list(tmp_path.iterdir()) == []


def test_no_descriptor_is_left_by_what_fails(path: Path) -> None:
    with StateDirectory.open(path):
        before = open_descriptors()
        for _ in range(10):
            with pytest.raises(StateDirectoryInUse):
                StateDirectory.open(path)
        assert open_descriptors() == before
    (path / NAMES[0]).mkdir()
    before = open_descriptors()
    for _ in range(10):
        refusal(path)
    assert open_descriptors() == before


@pytest.fixture
def others() -> Iterator[Path]:
    """Give root's state directory, made by a vtpmd, and become another user while it is used."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory(prefix="vtpmd-", dir="/tmp") as directory:
        state = Path(directory) / "state"
        with StateDirectory.open(state) as opened:
            opened.write_state(StateType.PERMANENT, b"state", None)
        Path(directory).chmod(0o755)
        state.chmod(0o755)
        os.seteuid(OTHER_USER)
        try:
            yield state
        finally:
            os.seteuid(0)


def as_root(act: Callable[[], object]) -> None:
    """Do what another user may not."""
    os.seteuid(0)
    try:
        act()
    finally:
        os.seteuid(OTHER_USER)


def denial(act: Callable[[], object], file: Path, mode: str) -> str:
    """Check that an error is a line that names a file, its owner, and who is to have all."""
    with pytest.raises(StateDirectoryError) as caught:
        act()
    said = str(caught.value)
    state = file if file.is_dir() else file.parent
    what = "the directory" if file.is_dir() else file.name
    rights = f"{what} is user 0's, with mode {mode}: be that user, or as root: "
    assert said.endswith(f"{rights}chown -R {OTHER_USER} {state}")
    return said


def test_another_users_file_is_named_with_what_to_do(others: Path) -> None:
    """Root started it once, now a service's user does; there is nothing to restore."""

    def opened() -> None:
        with StateDirectory.open(others) as directory:
            directory.read_states()

    lock, permanent = others / ".lock", others / "tpm2-00.permall"
    mode = f"{stat.S_IMODE(lock.stat().st_mode):04o}"
    assert ".lock: Permission denied" in denial(opened, lock, mode)
    as_root(lock.unlink)
    assert ".lock: Permission denied" in denial(opened, others, "0755")
    as_root(lambda: os.chown(others, OTHER_USER, -1))
    as_root(lambda: permanent.chmod(0o600))
    assert f"{permanent}: Permission denied" in denial(opened, permanent, "0600")
    temporary = others / "TMP2-00.permall"
    as_root(lambda: os.chown(permanent, OTHER_USER, -1))
    as_root(lambda: os.chown(others, 0, -1))
    as_root(temporary.touch)
    as_root(lambda: temporary.chmod(0o600))
    as_root(lambda: others.chmod(0o1777))
    assert f"{temporary.name}: Operation not permitted" in denial(opened, temporary, "0600")
    as_root(temporary.unlink)
    opened()


def test_another_users_directory_is_read_as_far_as_it_may_be(others: Path) -> None:
    """And where it may not, the line is the same for who only looks."""
    record = others / "tpm2-00.owner"
    as_root(record.touch)
    as_root(lambda: record.chmod(0o600))
    as_root((others / ".lock").unlink)
    with look_into(others) as directory:
        assert not directory.is_in_use()
        denial(lambda: directory.read(record.name, 100), record, "0600")
