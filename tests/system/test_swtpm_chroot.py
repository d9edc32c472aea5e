"""`--chroot DIR` and `--runas USER` of swtpm's command line, as XAPI gives them: for root only.

Debian's swtpm has no --chroot; what is expected is what the sources of later ones do.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.harness.handover import assert_tail, make_host
from tests.harness.lab import Lab
from tests.harness.raw_guest import RawGuest
from tests.harness.swtpm_program import OURS, TIMEOUT_S
from tests.support import states
from tests.support.emulator_client import ControlClient
from tests.support.tpm2 import Handle, Tpm
from vtpmd.store.directory import LINK_NAME
from vtpmd.store.libtpms import library
from vtpmd.testing.credentials import HOST, credentials
from vtpmd.testing.emulator import ATTACHED, VTPMD
from vtpmd.testing.monitor import Monitor
from vtpmd.testing.program import Program
from vtpmd.testing.sockets import connect
from vtpmd.testing.waiting import wait_until
from vtpmd.wire import swtpm_format

UID = 54321  # of nobody that is known
INDEX = Handle.NV_FIRST
CONTENT = b"within"
RUNAS = ["--runas", str(UID)]
IN_DIRECTORY = ["--tpmstate", "dir=/state"]
STATES = {
    "directory": IN_DIRECTORY,
    "relative": ["--tpmstate", "dir=state"],
    "backup": ["--tpmstate", "dir=/state,backup"],
    "linear": ["--tpmstate", "backend-uri=file:///state/linear"],
    "key": [*IN_DIRECTORY, "--key", "file=/key,mode=aes-256-cbc"],
    "password": [*IN_DIRECTORY, "--key", "pwdfile=/key", "--migration-key", "pwdfile=/key"],
}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has another root directory")


class Jail:
    """A root directory, with nothing in it but what a vTPM needs."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "jail"
        self.control = self.path / "ctrl"
        self.log = self.path / "log"
        self.pid_file = self.path / "pid"
        self.state = self.path / "state"
        self.state.mkdir(parents=True)
        key = self.path / "key"
        key.write_text("0123456789abcdef" * 4)
        for path in (self.path, self.state, key):
            os.chown(path, UID, UID)
        key.chmod(0o400)
        self.processes: list[subprocess.Popen[str]] = []

    def command(self, *more: str) -> list[str]:
        """Return a command line whose paths are below it."""
        return [
            *(str(OURS), "socket", "--tpm2", "--chroot", str(self.path)),
            *("--ctrl", "type=unixio,path=ctrl", "--pid", "file=/pid", "--log", "file=/log"),
            *more,
        ]

    def start(self, *more: str) -> subprocess.Popen[str]:
        """Start what serves."""
        process = subprocess.Popen(self.command(*more), stderr=subprocess.PIPE, text=True)
        self.processes.append(process)
        wait_until(self.pid_file.exists)
        return process

    def end(self) -> None:
        """Kill what runs still."""
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[Jail]:
    made = Jail(tmp_path)
    yield made
    made.end()


def numbers(pid: int, field: str) -> list[str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{field}:")).split()[1:]


def assert_is_confined(pid: int, jail: Jail, uid: int) -> None:
    wait_until(lambda: Path(f"/proc/{pid}/comm").read_text() == "vtpmd-engine\n")
    wait_until(lambda: Path(f"/proc/{pid}/root").readlink() == jail.path)
    assert Path(f"/proc/{pid}/cwd").readlink() == jail.path
    wait_until(lambda: numbers(pid, "Uid") == numbers(pid, "Gid") == [str(uid)] * 4)
    if uid != 0:
        assert numbers(pid, "Groups") == []
        assert int(numbers(pid, "CapPrm")[0], 16) == 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the boot record's, which is closed once it is read
            assert fd.readlink() not in (Path("/"), jail.path.parent)


def work(jail: Jail, *, is_new: bool, kills: int | None = None) -> None:
    """Have a guest store something, or find it."""
    with ControlClient(jail.control) as control, closing(control.attach_data()) as data:
        control.init()
        tpm = Tpm(data.transact)
        tpm.startup()
        if is_new:
            tpm.nv_define(INDEX, len(CONTENT))
            tpm.nv_write(INDEX, CONTENT)
        assert tpm.nv_read(INDEX, len(CONTENT)) == CONTENT
        if kills is not None:
            os.kill(kills, signal.SIGKILL)
        else:
            control.shutdown()


@pytest.mark.parametrize("options", STATES.values(), ids=STATES)
@pytest.mark.parametrize("uid", [0, UID])
def test_vtpm_is_served_below_another_root(jail: Jail, uid: int, options: list[str]) -> None:
    runas = RUNAS if uid else []
    for is_new in (True, False):
        process = jail.start(*options, *runas)
        assert_is_confined(process.pid, jail, uid)
        work(jail, is_new=is_new)
        assert process.wait(TIMEOUT_S) == 0, jail.log.read_text()
    assert not jail.control.exists()
    assert not jail.pid_file.exists()
    for path in jail.state.iterdir():
        assert path.stat().st_uid == uid


def test_what_a_crash_has_left_is_taken_up_below_it(jail: Jail) -> None:
    process = jail.start(*IN_DIRECTORY, *RUNAS)
    work(jail, is_new=True, kills=process.pid)
    process.wait(TIMEOUT_S)
    assert (jail.state / "tpm2-00.journal").exists()
    jail.control.unlink()
    jail.pid_file.unlink()
    process = jail.start(*IN_DIRECTORY, *RUNAS)
    work(jail, is_new=False)
    assert process.wait(TIMEOUT_S) == 0


def attached(jail: Jail, lab: Lab, uid: int, *options: str | Path) -> Program:
    """Start a vtpmd out here for the engine below, as the user that this runs as."""
    here = lab.new_path("attach")
    here.mkdir()
    # The way to the directory is root's alone: what is started is there already.
    there = ("sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", jail.state)
    user = ("setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups")
    program = Program("attach", (*there, *user, VTPMD, "attach", ".", *options), here)
    lab.kill_at_end(program)
    program.wait_for_output(ATTACHED)
    return program


@pytest.mark.parametrize("uid", [0, UID])
def test_invariant_11_vtpmd_is_attached_to_an_engine_below_it(
    jail: Jail, lab: Lab, uid: int
) -> None:
    """And is killed, and attached again: the guest sees nothing. The link is the engine's own."""
    process = jail.start(*IN_DIRECTORY, *(RUNAS if uid else []))
    link = jail.state / LINK_NAME
    wait_until(link.exists)
    assert link.stat().st_uid == uid
    with ControlClient(jail.control) as control, closing(control.attach_data()) as data:
        control.init()
        tpm = Tpm(data.transact)
        tpm.startup()
        tpm.nv_define(INDEX, len(CONTENT))
        for _ in range(3):
            attached(jail, lab, uid).kill()
            control.lock_storage()
            tpm.nv_write(INDEX, CONTENT)
        last = attached(jail, lab, uid)
        assert tpm.nv_read(INDEX, len(CONTENT)) == CONTENT
        control.shutdown()
    assert last.wait() == 0
    assert process.wait(TIMEOUT_S) == 0
    assert not (jail.state / LINK_NAME).exists()
    assert {path.stat().st_uid for path in jail.state.iterdir()} == {uid}


def test_vtpm_moves_from_below_it_with_a_tail(jail: Jail, lab: Lab) -> None:
    """To a vtpmd run, as one that was started without another root does."""
    process = jail.start(*IN_DIRECTORY)
    there = make_host(lab)
    manage = lab.new_path("manage")
    options = ("--tls-creds", credentials(), "--allow", HOST, "--manage", manage)
    source = attached(jail, lab, 0, *options)
    guest = RawGuest(jail.control)
    lab.close_at_end(guest)
    guest.boot()
    monitor = Monitor(connect(manage))
    monitor.connect()
    with closing(monitor):
        monitor.cmd("migrate-arm", to=there.vtpmd.address)
        wait_for(monitor, "VTPM_ARMED")
        guest.work()
        wanted = guest.facts()
        blobs = guest.save()
        assert_tail(blobs)
        there.guest.load(blobs)
        wait_for(monitor, "VTPM_HANDED_OVER")
    assert there.guest.facts() == wanted
    guest.control.shutdown()
    assert source.wait() == process.wait(TIMEOUT_S) == 0


def wait_for(monitor: Monitor, name: str) -> None:
    """Wait for an event of vtpmd's."""
    told = ""
    while told != name:
        event = monitor.pull_event(wait=TIMEOUT_S)
        assert event is not None
        told = event["event"]
        assert told != "VTPM_FALL_BACK", event


def test_links_lead_nowhere_else(jail: Jail, tmp_path: Path) -> None:
    """An absolute link is followed below it: nothing outside is opened."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (jail.path / "link").symlink_to(outside)
    done = subprocess.run(
        jail.command("--tpmstate", "dir=/link"),
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert list(outside.iterdir()) == []


def test_in_the_background_under_a_small_limit(jail: Jail) -> None:
    """Much as XAPI has it."""
    command = jail.command(*IN_DIRECTORY, *RUNAS, "--daemon")
    limited = ["prlimit", "--fsize=262144", *command]
    done = subprocess.run(limited, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    pid = int(jail.pid_file.read_text())
    try:
        assert_is_confined(pid, jail, UID)
        work(jail, is_new=True)
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    assert "RLIMIT_FSIZE" in jail.log.read_text()


def test_start_that_fails_removes_nothing_outside(jail: Jail) -> None:
    """Below it the control socket has the path of what is another's out here."""
    outside = jail.path.parent / "socket"
    outside.touch()
    below = jail.path / outside.relative_to("/")
    below.parent.mkdir(parents=True)
    options = [*IN_DIRECTORY, "--ctrl", f"type=unixio,path={outside}"]
    # Too few for what the engine is given, which it is when all else is done.
    done = subprocess.run(
        ["prlimit", "--nofile=16", *jail.command(*options)],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1
    assert "too many open files" in done.stderr
    assert outside.exists()
    assert not below.exists()


@pytest.mark.parametrize("runas", [[], RUNAS], ids=["root", "user"])
def test_libtpms_is_asked_of_a_state_below_it(jail: Jail, runas: list[str]) -> None:
    """It is not in there."""
    path = jail.state / "tpm2-00.permall"
    path.write_bytes(swtpm_format.encode_file(states.LATER))
    os.chown(path, UID, UID)
    done = subprocess.run(
        jail.command(*IN_DIRECTORY, *runas),
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1
    assert "cannot use the state in /state: it needs a later libtpms" in done.stderr


def test_a_profile_is_read_below_it_and_libtpms_asked(jail: Jail) -> None:
    (jail.path / "profile").write_text('{"Name":"default-v1"}')
    options = [*IN_DIRECTORY, *RUNAS, "--profile", "file=/profile"]
    if library().profiles:
        process = jail.start(*options)
        work(jail, is_new=True)
        assert process.wait(TIMEOUT_S) == 0
        return
    done = subprocess.run(
        jail.command(*options),
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1
    assert "has no profiles: leave it out" in done.stderr


def test_states_below_it_are_printed(jail: Jail) -> None:
    (jail.state / "tpm2-00.permall").write_bytes(b"12345")
    done = subprocess.run(
        jail.command(*IN_DIRECTORY, "--print-states"),
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.stdout == '{ "type": "swtpm", "states": [ {"name": "permall", "size": 5} ] }'


@pytest.mark.parametrize(
    ("before", "options"),
    [
        ([], ["--chroot", "/nowhere"]),
        (["setpriv", "--reuid", str(UID), "--clear-groups"], []),
        ([], ["--runas", str(2**32)]),
        ([], ["--print-info", "1"]),
    ],
    ids=["nowhere", "not root", "no user", "info"],
)
def test_what_cannot_be_is_said_in_a_line(
    jail: Jail, before: list[str], options: list[str]
) -> None:
    done = subprocess.run(
        [*before, *jail.command(*IN_DIRECTORY, *options)],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("swtpm: ")
    assert done.stderr.count("\n") == 1
