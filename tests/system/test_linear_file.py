"""Linear files and block devices, as Proxmox and libvirt use them: ours are swtpm's, and its ours.

Invariant 9 for them: what was stopped cleanly swtpm takes, and what swtpm wrote is taken as it is.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path

import pytest

from tests.harness.swtpm_program import OURS, PROGRAMS, TIMEOUT_S, Place
from tests.support import states
from tests.support.emulator_client import INIT_DELETE_VOLATILE, Blob, ControlClient, ControlError
from tests.support.tpm2 import Handle, StartupType, Tpm, TpmError
from vtpmd.core import LinkDescriptor, LinkNames, LinkOperation, Store, pack_link_serving
from vtpmd.core.boot import LinkControl
from vtpmd.daemon import engine_process
from vtpmd.front.boot import boot_record
from vtpmd.store.linear import LinearFile
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import TpmVersion

DEVICE_BYTES = 4 * 1024 * 1024  # Proxmox's
PCR = 16
STATE_AT = 4096  # of a first state that ours wrote
KEYS = {
    "plain": [],
    "key": ["--key", "pwdfile=password,mode=aes-256-cbc"],
}


class LinearPlace(Place):
    """A linear file, and what is served from it."""

    def __init__(self, program: Path, directory: Path, path: Path) -> None:
        super().__init__(program, directory)
        self.path = path
        (directory / "password").write_text("secret\n")
        (directory / "password").chmod(0o600)

    def options(self, *more: str) -> list[str]:
        """Return a command line that serves, with what comes in addition."""
        return super().options("--tpmstate", f"backend-uri=file://{self.path}", *more)

    @contextmanager
    def serving(self, *more: str) -> Iterator[tuple[ControlClient, Tpm]]:
        """Serve it, and stop it in order."""
        process = self.start(*more)
        with ControlClient(self.control) as control, closing(control.attach_data()) as data:
            yield control, Tpm(data.transact)
            control.shutdown()
        assert process.wait(TIMEOUT_S) == 0


class Places:
    """Makes places."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = count()
        self._made: list[LinearPlace] = []

    def make(self, program: str, path: Path) -> LinearPlace:
        """Return one, for a program and a linear file."""
        directory = self._directory / str(next(self._numbers))
        directory.mkdir()
        self._made.append(LinearPlace(PROGRAMS[program], directory, path))
        return self._made[-1]

    def end(self) -> None:
        """End all of them."""
        for place in self._made:
            place.end()


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    made = Places(tmp_path)
    yield made
    made.end()


@pytest.fixture(params=["file", "device"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Give a test a path where nothing is, and then a block device, where there can be one."""
    file = tmp_path / "linear"
    if request.param == "file":
        yield file
        return
    with loop_device(file, DEVICE_BYTES) as device:
        yield device


@contextmanager
def loop_device(file: Path, n_bytes: int) -> Iterator[Path]:
    """Have a file of zeros as a block device; for who is not root, as it is."""
    if not file.exists():
        file.write_bytes(bytes(n_bytes))
    made = subprocess.run(
        ["losetup", "--find", "--show", file], check=False, capture_output=True, text=True
    )
    if made.returncode != 0:
        yield file
        return
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def fill(tpm: Tpm, first: int, how_many: int, size: int = 1000) -> None:
    """Have the permanent state grow: each index is a change of its own, and twice."""
    for number in range(first, first + how_many):
        tpm.nv_define(Handle.NV_FIRST + number, size)
        tpm.nv_write(Handle.NV_FIRST + number, content(number, size))


def content(number: int, size: int = 1000) -> bytes:
    return (number + 1).to_bytes(2, "big") * (size // 2)


def assert_filled(tpm: Tpm, how_many: int) -> None:
    for number in range(how_many):
        assert tpm.nv_read(Handle.NV_FIRST + number, 1000) == content(number)


@pytest.mark.parametrize("options", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("programs", [("swtpm", "vtpmd"), ("vtpmd", "swtpm")], ids="-".join)
def test_one_goes_on_from_what_the_other_wrote(
    places: Places, path: Path, programs: tuple[str, str], options: list[str]
) -> None:
    """Again and again, as the state outgrows its section, and is beside the volatile one."""
    for turn in range(3):
        with places.make(programs[turn % 2], path).serving(*options) as (control, tpm):
            control.init()
            tpm.startup()
            assert_filled(tpm, 3 * turn)
            fill(tpm, 3 * turn, 3)
    for turn in range(3):  # the volatile state is stored, resumed from and gone
        with places.make(programs[turn % 2], path).serving(*options) as (control, tpm):
            control.init()
            if turn > 0:
                assert tpm.pcr(PCR) != bytes(32)
            else:
                tpm.startup()
            tpm.extend(PCR, bytes(32))
            fill(tpm, 20 + turn, 1)
            control.store_volatile()
    assert printed_states(OURS, path) == printed_states(PROGRAMS["swtpm"], path)
    assert b"volatilestate" in printed_states(OURS, path)


def printed_states(program: Path, path: Path) -> bytes:
    command = [str(program), "socket", "--print-states", "--tpm2"]
    command += ["--tpmstate", f"backend-uri=file://{path}"]
    return subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S).stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_printing_the_states_makes_a_file_that_is_not_there(
    places: Places, tmp_path: Path, program: str
) -> None:
    """And no TPM in it: swtpm_setup removes it before it makes one."""
    path = tmp_path / "not-there"
    assert b'"states": []' in printed_states(PROGRAMS[program], path)
    assert path.stat().st_mode & 0o777 == 0o640
    for each in PROGRAMS.values():
        assert b'"states": []' in printed_states(each, path)
    with places.make("vtpmd", path).serving() as (control, _):
        control.init()


def test_volatile_state_serves_once(places: Places, path: Path) -> None:
    with places.make("vtpmd", path).serving() as (control, tpm):
        control.init()
        tpm.startup()
        control.store_volatile()
    with places.make("vtpmd", path).serving() as (control, tpm):
        control.init()
        assert len(tpm.random(8)) == 8  # resumed: no TPM2_Startup
        assert b"volatilestate" not in printed_states(OURS, path)
    with (
        pytest.raises(TpmError, match="0x100"),  # TPM_RC_INITIALIZE
        places.make("vtpmd", path).serving() as (control, tpm),
    ):
        control.init()
        tpm.random(8)


def test_what_was_acknowledged_outlives_a_kill(places: Places, path: Path) -> None:
    for turn in range(3):
        place = places.make("vtpmd", path)
        process = place.start()
        with ControlClient(place.control) as control, closing(control.attach_data()) as data:
            control.init()
            tpm = Tpm(data.transact)
            tpm.startup()
            assert_filled(tpm, 2 * turn)
            fill(tpm, 2 * turn, 2)
            process.send_signal(signal.SIGKILL)
            process.wait(TIMEOUT_S)


@pytest.mark.parametrize("destination", PROGRAMS)
@pytest.mark.parametrize("source", PROGRAMS)
def test_whole_blobs_go_from_one_file_to_another(
    places: Places, tmp_path: Path, source: str, destination: str
) -> None:
    """As QEMU's own migration carries them."""
    with (
        places.make(source, tmp_path / "from").serving() as (giving, gives),
        places.make(destination, tmp_path / "to").serving() as (taking, takes),
    ):
        giving.init()
        gives.startup(StartupType.CLEAR)
        fill(gives, 0, 2)
        gives.extend(PCR, bytes(32))
        for kind in Blob:
            if blob := giving.get_state_blob(kind, 0):
                taking.set_state_blob(kind, blob)
        taking.init(INIT_DELETE_VOLATILE)
        assert_filled(takes, 2)
        assert takes.pcr(PCR) == gives.pcr(PCR)
    with places.make("vtpmd", tmp_path / "to").serving() as (control, tpm):
        control.init()
        tpm.startup()
        assert_filled(tpm, 2)


def test_file_that_is_used_is_refused_to_another(places: Places, path: Path) -> None:
    with places.make("vtpmd", path).serving():
        assert_refused(places.make("vtpmd", path), path, "in use")


def test_device_of_two_hosts_that_have_no_lock_in_common_has_one_writer(
    places: Places, tmp_path: Path
) -> None:
    """Two loop devices on one file: as on storage that both hosts have."""
    disk = tmp_path / "disk"
    with loop_device(disk, DEVICE_BYTES) as here, loop_device(disk, DEVICE_BYTES) as there:
        if here == there:
            return  # only root makes devices, and a file is locked
        first, second = places.make("vtpmd", here), places.make("vtpmd", there)
        with first.serving() as (control, tpm):
            control.init()
            tpm.startup()
            fill(tpm, 0, 1)
            process = second.start()
            with ControlClient(second.control) as other, closing(other.attach_data()) as data:
                other.get_capability()  # it has read what it starts from
                fill(tpm, 1, 1)
                other.init()
                with pytest.raises(TpmError, match="0x101"):  # its first change
                    Tpm(data.transact).startup()
                other.shutdown()
            _, errors = process.communicate(timeout=TIMEOUT_S)
            assert "another process has written to the file" in errors
            fill(tpm, 2, 1)
        with places.make("vtpmd", here).serving() as (control, tpm):
            control.init()
            tpm.startup()
            assert_filled(tpm, 3)


def test_device_that_both_hosts_have_is_migrated_on(places: Places, tmp_path: Path) -> None:
    """As Proxmox does it: QEMU's whole blobs, and the same device on both sides."""
    disk = tmp_path / "disk"
    with loop_device(disk, DEVICE_BYTES) as here, loop_device(disk, DEVICE_BYTES) as there:
        if here == there:
            return
        source, destination = places.make("vtpmd", here), places.make("vtpmd", there)
        with destination.serving() as (taking, takes):
            with source.serving() as (giving, gives):
                giving.init()
                gives.startup()
                for kind in Blob:
                    if blob := giving.get_state_blob(kind, 0):
                        taking.set_state_blob(kind, blob)
                taking.init(INIT_DELETE_VOLATILE)
            fill(takes, 0, 3)
        with places.make("vtpmd", here).serving() as (control, tpm):
            control.init()
            tpm.startup()
            assert_filled(tpm, 3)


def assert_refused(place: LinearPlace, path: Path, why: str) -> None:
    before = path.read_bytes() if path.is_file() else b""
    done = subprocess.run(
        place.options(), check=False, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 1
    assert done.stderr.startswith("swtpm: ") and done.stderr.count("\n") == 1
    assert why in done.stderr
    assert not path.is_file() or path.read_bytes() == before


def linear(permanent: bytes) -> bytes:
    """Return a linear file that has what a permanent state's file has."""
    header = b"nilmptws\x01\0\xc0\0"
    for number in (192, len(permanent), len(permanent)):
        header += number.to_bytes(4, "little")
    return header.ljust(192, b"\0") + permanent


def with_byte(file: bytes, at: int, value: int) -> bytes:
    return file[:at] + bytes([value]) + file[at + 1 :]


def test_what_is_no_state_of_a_tpm_is_refused_and_stays(places: Places, tmp_path: Path) -> None:
    path = tmp_path / "linear"
    place = places.make("vtpmd", path)
    with place.serving() as (control, _):
        control.init()
    good = path.read_bytes()
    for content_there, why in (
        (b"hello", "something else"),
        (bytes(65536) + b"a file system of somebody's" + bytes(65536), "something else"),
        (with_byte(good, 8, 2), "later version"),
        (with_byte(good, 15, 0xFF), "damaged"),
        (with_byte(good, 12 + 14 * 12, 1), "more than one"),
        (with_byte(good, STATE_AT + 9, 7), "cannot read the permanent state"),
    ):
        path.write_bytes(content_there)
        assert_refused(place, path, why)
    bad = with_byte(good, STATE_AT + 18, 7)  # of libtpms' own: it answers INIT
    path.write_bytes(bad)
    with place.serving() as (control, _), pytest.raises(ControlError, match="0x101"):
        control.init()
    assert path.read_bytes() == bad
    path.write_bytes(good)
    with place.serving() as (control, _):
        control.init()
    assert_refused(places.make("vtpmd", tmp_path), tmp_path, "Is a directory")
    os.mkfifo(tmp_path / "fifo")
    assert_refused(places.make("vtpmd", tmp_path / "fifo"), tmp_path / "fifo", "no file or block")


def test_a_link_is_followed_to_a_device_alone(places: Places, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").touch()
    assert_refused(places.make("vtpmd", tmp_path / "link"), tmp_path / "file", "symbolic link")
    with loop_device(tmp_path / "disk", DEVICE_BYTES) as device:
        if device == tmp_path / "disk":
            return  # only root makes devices
        (tmp_path / "name").symlink_to(device)
        with places.make("vtpmd", tmp_path / "name").serving() as (control, _):
            control.init()


def test_new_tpm_is_said_and_nothing_else(places: Places, path: Path) -> None:
    for expected in (1, 0):
        place = places.make("vtpmd", path)
        process = place.start()
        with ControlClient(place.control) as control, closing(control.attach_data()) as data:
            control.init()
            Tpm(data.transact).startup()
            fill(Tpm(data.transact), expected, 1)
            control.shutdown()
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert errors.count("swtpm: a new TPM 2.0 was made") == expected
        assert errors.count("\n") == expected


def test_key_that_is_missing_wrong_or_too_much_is_said(places: Places, tmp_path: Path) -> None:
    path = tmp_path / "linear"
    place = places.make("vtpmd", path)
    with place.serving(*KEYS["key"]) as (control, _):
        control.init()
    assert_refused(place, path, "it is encrypted")
    (place.directory / "password").write_text("another\n")
    before = path.read_bytes()
    done = subprocess.run(
        place.options(*KEYS["key"]),
        cwd=place.directory,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "give the right key" in done.stderr
    assert path.read_bytes() == before


def test_device_that_is_too_small_says_so_and_keeps_what_it_has(
    places: Places, tmp_path: Path
) -> None:
    with loop_device(tmp_path / "disk", 5 * 4096) as device:
        if device == tmp_path / "disk":
            return  # a file grows
        place = places.make("vtpmd", device)
        process = place.start()
        with ControlClient(place.control) as control, closing(control.attach_data()) as data:
            control.init()
            tpm = Tpm(data.transact)
            tpm.startup()
            kept = 0
            with pytest.raises(TpmError, match="0x101"):  # TPM_RC_FAILURE
                for kept in range(20):
                    fill(tpm, kept, 1)
            control.shutdown()
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert "No space left on device" in errors
        with places.make("vtpmd", device).serving() as (control, tpm):
            control.init()
            tpm.startup()
            assert_filled(tpm, kept)
        device_bytes = int(
            subprocess.run(
                ["blockdev", "--getsize64", device], check=True, capture_output=True
            ).stdout
        )
        assert device_bytes == 5 * 4096


def test_mode_is_that_which_was_asked_for(places: Places, tmp_path: Path) -> None:
    path = tmp_path / "linear"
    place = places.make("vtpmd", path)
    for option, mode in (("", 0o640), (",mode=0600", 0o600), ("", 0o600)):
        uri = f"backend-uri=file://{path}{option}"
        with place.serving("--tpmstate", uri) as (control, _):
            control.init()
        assert path.stat().st_mode & 0o777 == mode


def test_device_of_a_state_directorys_file_is_refused_while_a_journal_continues_it(
    places: Places, tmp_path: Path
) -> None:
    """Somebody copied it while the vTPM was served."""
    source = Place(OURS, tmp_path / "source")
    process = source.start()
    with ControlClient(source.control) as control, closing(control.attach_data()) as data:
        control.init()
        tpm = Tpm(data.transact)
        tpm.startup()
        fill(tpm, 0, 2)
        process.kill()
    source.end()
    path = tmp_path / "linear"
    path.write_bytes(linear((source.state / "tpm2-00.permall").read_bytes()))
    assert_refused(places.make("vtpmd", path), path, "a journal continues it")


def test_state_of_a_later_libtpms_is_said_to_be_that_and_stays(
    places: Places, tmp_path: Path
) -> None:
    path = tmp_path / "linear"
    path.write_bytes(linear(swtpm_format.encode_file(states.LATER)))
    why = f"cannot use the state in {path}: it needs a later libtpms, which is no damage"
    assert_refused(places.make("vtpmd", path), path, why)


def test_what_needs_a_directory_says_that_a_file_has_no_place_for_it(tmp_path: Path) -> None:
    path = tmp_path / "linear"
    path.write_bytes(bytes(192))
    vtpmd = OURS.with_name("vtpmd")
    for name, *options in (["run", "--socket", str(tmp_path / "s")], ["status"], ["fold"]):
        done = subprocess.run(
            [vtpmd, name, path, *options],
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 1
        assert "moves by QEMU's own migration" in done.stderr
        assert done.stderr.count("\n") == 1


def test_blob_that_is_refused_leaves_the_file_as_it_was(places: Places, tmp_path: Path) -> None:
    path = tmp_path / "linear"
    with places.make("vtpmd", path).serving() as (control, tpm):
        control.init()
        tpm.startup()
        fill(tpm, 0, 1)
        blob = control.get_state_blob(Blob.PERMANENT, 0)
    place = places.make("vtpmd", path)
    with place.serving() as (control, _), pytest.raises(ControlError):
        control.set_state_blob(Blob.PERMANENT, blob[:-200])
    with places.make("vtpmd", path).serving() as (control, tpm):
        control.init()
        tpm.startup()
        assert_filled(tpm, 1)


@pytest.mark.parametrize("is_outdated", [False, True])
def test_states_that_are_older_than_the_header_are_not_started_from(
    places: Places, tmp_path: Path, capfd: pytest.CaptureFixture[str], *, is_outdated: bool
) -> None:
    """Another host has written between the reading of the one and of the other."""
    path = tmp_path / "linear"
    with places.make("vtpmd", path).serving() as (control, _):
        control.init()
    with LinearFile.open(str(path)) as file, Store.create() as store, ExitStack() as stack:
        begun = file.start(TpmVersion.TPM_2_0, None)
        header = with_byte(file.header, 16, 1) if is_outdated else file.header
        serving = pack_link_serving("vtpmd", LinkNames(), control=LinkControl.NONE, is_alone=True)
        expecting = [(LinkOperation.EXPECT_HEADER, 0, header)]
        null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null_fd)
        descriptors = {
            LinkDescriptor.SOCKET: null_fd,
            LinkDescriptor.DIRECTORY: file.fd,
            LinkDescriptor.LOCK: file.fd,
            LinkDescriptor.STORE: store.fd,
            LinkDescriptor.BOOT: stack.enter_context(
                boot_record(begun, None, None, serving, expecting)
            ),
        }
        pid = engine_process.spawn(descriptors)
        os.kill(pid, signal.SIGTERM if not is_outdated else 0)
        _, status = os.waitpid(pid, 0)
    errors = capfd.readouterr().err
    assert ("another process has written to the file" in errors) == is_outdated
    assert (os.waitstatus_to_exitcode(status) == 1) == is_outdated
