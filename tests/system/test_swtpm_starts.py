"""Starts by swtpm's command line that go wrong, or nearly: beside swtpm, where that says how.

Whose the files are, what is left of them, what is said, and what the one who waits for --daemon is
told. Nothing but what a command line names is written to or removed.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.harness.swtpm_program import OURS, PROGRAMS, TIMEOUT_S, Place
from tests.support.emulator_client import ControlClient
from tests.support.tpm2 import Tpm, TpmError
from vtpmd.testing.disk import Disk
from vtpmd.testing.waiting import wait_until

USER = 65534
PCR, DIGEST_BYTES = 16, 32  # of SHA-256
DAMAGED = b"no state of a TPM"
STARTED = ("--flags", "not-need-init,startup-clear")

no_file = pytest.mark.parametrize(
    "make",
    [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("elsewhere")],
    ids=["FIFO", "directory", "link"],
)


def run(place: Place, *options: str) -> subprocess.CompletedProcess[str]:
    """Have it end by itself; where it serves instead, TimeoutExpired."""
    return subprocess.run(
        place.options(*options),
        cwd=place.directory,
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def assert_says_one_line(place: Place, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1
    if place.program == OURS:
        assert done.stderr.startswith("swtpm: ")
        assert done.stderr.count("\n") == 1, done.stderr


@pytest.fixture(params=PROGRAMS)
def users_place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Give a test a place that is another user's; the way to pytest's own is root's alone."""
    with TemporaryDirectory() as path:
        place = Place(PROGRAMS[request.param], Path(path))
        for each in (place.directory, place.state):
            os.chown(each, USER, USER)
        yield place
        place.end()


def test_what_is_made_for_a_user_is_that_user_s(users_place: Place) -> None:
    """So it can remove them, too."""
    place = users_place
    data, log = place.directory / "data", place.directory / "log"
    process = place.start(
        *("--runas", str(USER), "--server", f"type=unixio,path={data}", "--log", f"file={log}")
    )
    for path in (place.control, data, log, place.pid_file):
        assert path.stat().st_uid == USER, path
    with ControlClient(place.control) as control:
        control.init()
        control.shutdown()
    assert process.wait(TIMEOUT_S) == 0
    assert not any(path.exists() for path in (place.control, data, place.pid_file))


def test_what_a_user_may_not_write_to_is_said_and_nothing_is_left(place: Place) -> None:
    before = sorted(place.directory.rglob("*"))
    assert_says_one_line(place, run(place, "--runas", str(USER)))
    assert sorted(place.directory.rglob("*")) == before


def test_process_number_is_not_written_through_a_symbolic_link(place: Place) -> None:
    """Who may make one would have root overwrite any file."""
    target, link = place.directory / "target", place.directory / "link"
    target.write_text("kept")
    link.symlink_to(target)
    assert_says_one_line(place, run(place, "--pid", f"file={link}"))
    assert target.read_text() == "kept"


def test_log_is_not_written_through_a_symbolic_link(ours: Place) -> None:
    """As swtpm refuses it, which says so where nobody looks."""
    target, link = ours.directory / "target", ours.directory / "link"
    target.write_text("kept")
    link.symlink_to(target)
    assert_says_one_line(ours, run(ours, "--log", f"file={link},truncate"))
    assert target.read_text() == "kept"


def test_device_that_the_process_number_is_written_to_stays(ours: Place) -> None:
    """swtpm removes /dev/null at its end."""
    null = ours.directory / "null"
    os.mknod(null, 0o600 | 0o020000, os.makedev(1, 3))
    process = subprocess.Popen(ours.options("--pid", f"file={null}"), cwd=ours.directory)
    wait_until(ours.control.exists)
    with ControlClient(ours.control) as control:
        control.shutdown()
    assert process.wait(TIMEOUT_S) == 0
    assert null.is_char_device()


@pytest.mark.parametrize("more", [(), ("--daemon",)], ids=["in the foreground", "daemon"])
@pytest.mark.parametrize("flags", [STARTED, ("--flags", "not-need-init")], ids=" ".join)
def test_tpm_that_does_not_start_is_said_once_also_to_who_waits(
    place: Place, more: Sequence[str], flags: Sequence[str]
) -> None:
    """It is powered on before the parent returns; nothing is left of it but what was there."""
    file = place.state / place.names.permanent
    file.write_bytes(DAMAGED)
    assert_says_one_line(place, run(place, *flags, *more))
    wait_until(lambda: not place.control.exists())
    assert not place.pid_file.exists()
    assert file.read_bytes() == DAMAGED


def test_startup_that_the_tpm_refuses_leaves_it_on(place: Place) -> None:
    """A new one has no state to resume from. Who uses it starts it up."""
    place.start("--flags", "startup-state")
    with ControlClient(place.control) as control:
        Tpm(control.attach_data().transact).startup()


def test_tpm_that_resumes_is_started_up(ours: Place) -> None:
    """Its volatile state was stored; that it is said to be started up is no fault."""
    for is_resumed in (False, True):
        process = ours.start(*STARTED)
        with ControlClient(ours.control) as control:
            tpm = Tpm(control.attach_data().transact)
            if is_resumed:
                assert tpm.pcr(PCR) == sha256(bytes(2 * DIGEST_BYTES)).digest()
            else:
                tpm.extend(PCR, bytes(DIGEST_BYTES))
                control.store_volatile()
            control.shutdown()
        assert process.wait(TIMEOUT_S) == 0
        assert process.stderr is not None
        assert "started up" not in process.stderr.read()


def test_log_that_cannot_be_written_to_is_none(ours: Place) -> None:
    with Path(os.devnull).open() as only_read:
        done = subprocess.run(
            ours.options("--log", f"fd={only_read.fileno()}"),
            pass_fds=(only_read.fileno(),),
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert_says_one_line(ours, done)
    assert "not open for writing" in done.stderr


def test_daemon_says_nothing_more_once_it_serves(ours: Place) -> None:
    """Whoever reads its standard error reads it to the end, and finds the news of the start."""
    done = run(ours, "--daemon", *STARTED)
    assert done.returncode == 0
    assert done.stderr == "swtpm: a new TPM 2.0 was made, as there was no state of one\n"
    pid = int(ours.pid_file.read_text())
    assert Path(f"/proc/{pid}/fd/2").readlink() == Path(os.devnull)
    with ControlClient(ours.control) as control:
        Tpm(control.attach_data().transact).random(8)
        control.shutdown()


@pytest.mark.parametrize("more", [(), ("--daemon",)], ids=["in the foreground", "daemon"])
def test_kernel_without_seccomp_is_said_once_also_to_who_waits(
    ours: Place, more: Sequence[str]
) -> None:
    """By strace such a kernel's answer to the engine, which knows of it once it would serve."""
    without = ["strace", "-f", "-qq", "-o", os.devnull, "-e", "inject=seccomp:error=EINVAL"]
    done = subprocess.run(
        [*without, *ours.options(*more)],
        cwd=ours.directory,
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert_says_one_line(ours, done)
    assert "cannot give up system calls: " in done.stderr
    assert "CONFIG_SECCOMP_FILTER" in done.stderr
    assert not ours.control.exists()


@no_file
def test_lock_that_is_no_file_is_said_to_be_none(ours: Place, make: Callable[[Path], None]) -> None:
    make(ours.state / ".lock")
    done = run(ours)
    assert_says_one_line(ours, done)
    assert ".lock: it is no regular file; remove it" in done.stderr


@no_file
def test_state_that_is_no_file_is_no_state(ours: Place, make: Callable[[Path], None]) -> None:
    make(ours.state / ours.names.permanent)
    done = run(ours, "--print-states")
    assert_says_one_line(ours, done)
    assert f"{ours.names.permanent} is no regular file; " in done.stderr


def test_tpm_that_finds_no_room_is_not_said_to_be_made(ours: Place, disk: Disk) -> None:
    """It is on, as swtpm's is, and answers that it has failed; that was said, and why."""
    state = disk.path / "state"
    state.mkdir()
    (state / ".lock").touch()
    disk.fill()
    process = ours.start(*STARTED, "--tpmstate", f"dir={state}")
    with ControlClient(ours.control) as control:
        with pytest.raises(TpmError, match="TPM_RC 0x101"):
            Tpm(control.attach_data().transact).startup()
        control.shutdown()
    assert process.wait(TIMEOUT_S) == 0
    assert process.stderr is not None
    said = process.stderr.read()
    assert "No space left on device" in said
    assert "was made" not in said
    assert "started up" not in said


def test_lines_for_people_go_into_no_file_of_the_vtpm_s(ours: Place) -> None:
    """Where a standard descriptor is closed the first file that is opened has its number."""
    linear = ours.directory / "linear"
    options = ours.options("--daemon", *STARTED, "--tpmstate", f"backend-uri=file://{linear}")
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    for _ in range(2):  # the second start finds what the first has left
        subprocess.run([*closed, *options], check=True, timeout=TIMEOUT_S)
        with ControlClient(ours.control) as control:
            Tpm(control.attach_data().transact).random(8)
            control.shutdown()
        wait_until(lambda: not ours.control.exists())


def test_parent_learns_that_its_child_has_ended(ours: Place) -> None:
    """Also where it was started with SIGCHLD ignored."""
    done = subprocess.run(
        ours.options("--daemon", "--key", "file=nowhere"),
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
        cwd=ours.directory,
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert_says_one_line(ours, done)
