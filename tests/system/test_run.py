"""`vtpmd run` as a process: what it prints, how it stops, what it refuses.

Invariant 3: one state directory, one owner, also while an engine outlives its daemon.
"""

import fcntl
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.harness.lab import Lab
from tests.harness.unix import connect
from tests.support.emulator_client import Control, ControlClient
from tests.support.tpm2 import Tpm
from vtpmd.daemon.engine import STOP_TIMEOUT_S
from vtpmd.store.directory import StateDirectory
from vtpmd.testing.emulator import Emulator, EmulatorKind, Peering
from vtpmd.testing.waiting import wait_until
from vtpmd.wire.tpm import StateType

VTPMD = Path(sys.executable).with_name("vtpmd")
EXIT_TIMEOUT_S = 30.0
# What takes its time to be imported, or is for what only some vTPMs have.
NOT_NEEDED = (
    "argparse asyncio concurrent.futures cryptography dataclasses email gettext hashlib hmac"
    " importlib inspect json locale logging pathlib qemu re rich selectors shutil socket ssl"
    " subprocess tempfile threading typing"
    " vtpmd.cli.at_rest vtpmd.cli.migrate vtpmd.cli.owner vtpmd.cli.parser vtpmd.core.delta"
    " vtpmd.core.link vtpmd.migration.states vtpmd.pki vtpmd.store.anchor vtpmd.store.incoming"
    " vtpmd.store.keys vtpmd.store.owner vtpmd.store.sealing"
)


def run_to_its_end(
    *arguments: str | Path, command: str = "run"
) -> subprocess.CompletedProcess[str]:
    words = [VTPMD, command, *arguments]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=EXIT_TIMEOUT_S, check=False
    )


def clock_is_safe_after_restart(lab: Lab, state: Path) -> bool:
    """Start again and ask the TPM whether its last stop was an orderly one."""
    with ControlClient(lab.emulator(EmulatorKind.VTPMD, state).control_path) as control:
        tpm = Tpm(control.attach_data().transact)
        control.init()
        tpm.startup()
        return tpm.clock().safe


def start_tpm(emulator: Emulator) -> None:
    with ControlClient(emulator.control_path) as control:
        tpm = Tpm(control.attach_data().transact)
        control.init()
        tpm.startup()


def test_prints_the_arguments_that_qemu_needs(lab: Lab) -> None:
    """They name the socket that is there."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    emulator.program.wait_for_output("-tpmdev")
    words = shlex.split(emulator.program.output.splitlines()[0])
    assert words[words.index("-chardev") + 1] == f"socket,id=vtpm,path={emulator.control_path}"


def test_engine_waits_for_no_import_that_its_vtpm_does_not_need(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither key, anchor nor peers: the engine is started before Python has read their code."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    emulator = lab.emulator(EmulatorKind.VTPMD)
    emulator.program.wait_for_output("-tpmdev")
    lines = emulator.program.output.partition("-chardev")[0].splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "vtpmd.store.start" in imported
    assert imported & set(NOT_NEEDED.split()) == set()


def test_garbage_is_collected_beside_an_engine(tmp_path: Path) -> None:
    """Only the start does without: what follows lasts for as long as the vTPM."""
    code = (
        "import gc, sys; from vtpmd import cli; from vtpmd.daemon import engine_process, runtime;"
        "engine_process.spawn = lambda *_: not gc.isenabled();"
        "runtime.serve = lambda resources, _: resources.child and gc.isenabled() and 42;"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    options = ["--manage", str(tmp_path / "manage")]
    words = [sys.executable, "-c", code, "run", str(tmp_path / "state"), *options]
    done = subprocess.run(words, timeout=EXIT_TIMEOUT_S, check=False)
    assert done.returncode == 42


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside"])
def test_signal_stops_it_in_order(lab: Lab, number: signal.Signals, is_alone: bool) -> None:
    """Status 0, the socket gone, TPM2_Shutdown sent for the guest, no engine left."""
    emulator = lab.emulator(EmulatorKind.VTPMD) if is_alone else lab.daemon()
    start_tpm(emulator)
    (engine,) = emulator.engines()
    os.kill(emulator.program.pid, number)
    assert emulator.program.wait() == 0
    assert not emulator.control_path.exists()
    assert not Path(f"/proc/{engine}").exists()
    assert clock_is_safe_after_restart(lab, emulator.state)


@contextmanager
def started(lab: Lab, *options: str | Path, wrapper: tuple[str, ...] = ()) -> Iterator[int]:
    """Start a vTPM and wait until it says what QEMU needs; it ends with status 0."""
    words = [*wrapper, VTPMD, "run", lab.directory / "state", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"-chardev ")
            yield process.pid
            assert process.wait(EXIT_TIMEOUT_S) == 0
        finally:
            process.kill()  # if it is still there
        assert not (lab.directory / "state/vtpmd.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside"])
def test_signal_that_comes_while_it_starts_stops_it_in_order(
    lab: Lab, number: signal.Signals, is_alone: bool
) -> None:
    """The line for QEMU is out before the engine, or vtpmd's event loop, is there."""
    options = () if is_alone else ("--manage", lab.new_path("manage"))
    with started(lab, *options) as pid:
        os.kill(pid, number)


@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside"])
def test_signals_without_end_stop_it_in_order(lab: Lab, is_alone: bool) -> None:
    """As from who is impatient, or from a service manager and a terminal at once."""
    options = () if is_alone else ("--manage", lab.new_path("manage"))
    with started(lab, *options) as pid:
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside"])
def test_end_of_a_terminal_that_is_ignored_stops_nothing(lab: Lab, is_alone: bool) -> None:
    """nohup(1) has it ignored."""
    options = () if is_alone else ("--manage", lab.new_path("manage"))
    with started(lab, *options, wrapper=("nohup",)) as pid:
        os.kill(pid, signal.SIGHUP)
        with ControlClient(lab.directory / "state/vtpmd.sock") as control:
            control.get_config()
        os.kill(pid, signal.SIGHUP)
        with ControlClient(lab.directory / "state/vtpmd.sock") as control:
            control.get_config()
            os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("options", ["", "--manage $1/m"], ids=["alone", "beside"])
def test_standard_descriptors_that_are_closed_are_nothing_of_the_vtpms(
    lab: Lab, options: str
) -> None:
    """Lines for people would be written there."""
    command = f"exec {VTPMD} run $1/state {options} <&- >&- 2>&-"
    with subprocess.Popen(["sh", "-c", command, "sh", lab.directory]) as process:
        with ControlClient(lab.directory / "state/vtpmd.sock") as control:
            control.get_config()
            task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            descriptors = [
                Path(f"/proc/{pid}/fd/{number}").readlink()
                for pid in (process.pid, *task.read_text().split())
                for number in range(3)
            ]
        process.terminate()
    assert set(descriptors) == {Path("/dev/null")}
    assert process.returncode == 0


@pytest.mark.parametrize("options", ["", "--manage $1/m"], ids=["alone", "beside"])
def test_too_few_descriptors_are_told_of_in_one_line(lab: Lab, options: str) -> None:
    command = f"ulimit -n 16; exec {VTPMD} run $1/state {options}"
    done = subprocess.run(
        ["sh", "-c", command, "sh", lab.directory],
        capture_output=True,
        text=True,
        timeout=EXIT_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "too many open files; allow this process more" in line
    assert not (lab.directory / "state/vtpmd.sock").exists()


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("--tls-creds $1/none --listen [::1]:0 --allow x", 1, "cannot read $1/none/ca-cert.pem"),
        ("--manage $1/none/m", 1, "give another path with --manage"),
        ("--manage $1/m --anchor $1/none", 1, "there is no anchor $1/none"),
        ("--socket $1/none/tpm", 1, "give another path with --socket"),
        ("--manage $1/m", 3, "is looked after by process"),
    ],
)
def test_what_is_wrong_is_told_in_place_of_qemus_arguments(
    lab: Lab, options: str, status: int, words: str
) -> None:
    """One line, and none after it: not when QEMU has been started with them, or a guest moves."""
    directory = str(lab.directory)
    state = lab.directory / "state"
    with StateDirectory.open(state) as made:
        made.write_state(StateType.PERMANENT, b"state", None)
    with look_after_elsewhere(state if status == 3 else lab.directory):
        done = run_to_its_end(state, *options.replace("$1", directory).split())
    assert (done.returncode, done.stdout) == (status, "")
    (line,) = done.stderr.splitlines()
    assert words.replace("$1", directory) in line
    assert not (state / "vtpmd.sock").exists()


@contextmanager
def look_after_elsewhere(path: Path) -> Iterator[None]:
    """Have another process look after a state directory, as a vtpmd does."""
    code = (
        "import os, sys; from vtpmd.store.daemon_lock import look_after;"
        "lock = look_after(os.open(sys.argv[1], os.O_RDONLY), ''); lock.__enter__();"
        "print(flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.stdin.close()


def test_credentials_that_may_be_mended_by_the_time_of_a_move_are_told_of(lab: Lab) -> None:
    """Its guest must start all the same."""
    nowhere = lab.directory / "nowhere"
    source = lab.peer(Peering(credentials=nowhere, listens=False))
    (line,) = [line for line in source.program.output.splitlines() if str(nowhere) in line]
    assert line.startswith(f"vtpmd: no peer can be spoken with yet: cannot read {nowhere}/ca-cert")
    start_tpm(source)


@pytest.mark.parametrize("length", [40, 120])
def test_socket_under_a_long_path(lab: Lab, length: int) -> None:
    """What is printed is what QEMU can connect to; where that is relative, a line says so."""
    directory = lab.directory / ("x" * length)
    directory.mkdir()
    with started_in(directory) as output:
        argument, *lines = output
        assert "path=" in argument
        path = argument.partition("path=")[2].partition(" ")[0]
        if length == 40:
            assert (Path(path), lines) == (directory / "t/vtpmd.sock", [])
        else:
            assert path == "t/vtpmd.sock"
            (line,) = lines
            assert line.endswith("it would be too long: start QEMU there")
            assert str(directory) in line


@contextmanager
def started_in(directory: Path) -> Iterator[list[str]]:
    """Serve t, in a directory, and give the lines that were written until it is served."""
    words = [str(VTPMD), "run", "t"]
    with (
        (directory / "output").open("w") as output,
        subprocess.Popen(words, cwd=directory, stdout=output, stderr=output) as process,
    ):
        try:
            program = Path(f"/proc/{process.pid}/comm")
            wait_until(lambda: program.read_text() == "vtpmd-engine\n")
            yield (directory / "output").read_text().splitlines()
        finally:
            process.terminate()
    assert process.returncode == 0


def test_current_directory_that_is_gone_is_not_needed(lab: Lab) -> None:
    gone = 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"'
    with started(lab, wrapper=("sh", "-c", gone, str(lab.new_path("gone")))) as pid:
        os.kill(pid, signal.SIGTERM)


def test_shutdown_on_the_control_channel_stops_it_in_order(lab: Lab) -> None:
    """As QEMU does when it ends."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    start_tpm(emulator)
    with ControlClient(emulator.control_path) as control:
        control.shutdown()
    assert emulator.program.wait() == 0
    assert clock_is_safe_after_restart(lab, emulator.state)


def test_invariant_3_second_daemon_on_a_directory_is_refused(lab: Lab) -> None:
    """One line, status 3, and the first goes on."""
    first = lab.emulator(EmulatorKind.VTPMD)
    second = run_to_its_end(first.state, "--socket", lab.directory / "second")
    assert second.returncode == 3
    assert second.stderr.count("\n") == 1
    assert f"state directory {first.state} is in use" in second.stderr
    start_tpm(first)


def test_invariant_3_directory_is_refused_while_an_engine_lives(lab: Lab) -> None:
    """The daemon is killed; its engine serves on, and a line says what to do."""
    first = lab.daemon()
    start_tpm(first)
    first.program.kill()
    second = run_to_its_end(first.state, "--socket", lab.directory / "second")
    assert second.returncode == 3
    assert f"vtpmd attach {first.state}" in second.stderr
    assert second.stderr.count("\n") == 1
    with ControlClient(first.control_path) as control:
        control.get_established()


def test_killed_daemon_leaves_nothing_in_the_way(lab: Lab) -> None:
    """The next one replaces its socket, and recovers what was acknowledged."""
    first = lab.emulator(EmulatorKind.VTPMD)
    with ControlClient(first.control_path) as control:
        tpm = Tpm(control.attach_data().transact)
        control.init()
        tpm.startup()
        tpm.nv_define(0x01500001, 4)
        tpm.nv_write(0x01500001, b"kept")
        first.kill()
    assert first.control_path.exists()
    (first.state / "TMP2-00.permall").write_bytes(b"half a write")
    second = Emulator(EmulatorKind.VTPMD, first.control_path.parent, first.state)
    try:
        with ControlClient(second.control_path) as control:
            tpm = Tpm(control.attach_data().transact)
            control.init()
            tpm.startup()
            assert tpm.nv_read(0x01500001, 4) == b"kept"
        assert not (first.state / "TMP2-00.permall").exists()
    finally:
        second.kill()


def test_dead_engine_is_told_of_and_ends_in_status_1(lab: Lab) -> None:
    """Nobody waits for an answer that will not come, and vtpmd stops in order."""
    emulator = lab.daemon()
    start_tpm(emulator)
    with ControlClient(emulator.control_path) as control:
        (engine,) = emulator.engines()
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(ConnectionError):
            control.request(Control.STOP)
    emulator.program.wait_for_output("was killed by SIGKILL")
    with pytest.raises(ConnectionRefusedError):
        connect(emulator.control_path)
    assert emulator.stop() == 1
    assert emulator.program.output.count("was killed by SIGKILL") == 1
    assert not emulator.control_path.exists()


def test_engine_that_does_not_stop_is_told_of(lab: Lab) -> None:
    """It may not have folded, nor sent TPM2_Shutdown: that is no clean stop."""
    emulator = lab.daemon()
    start_tpm(emulator)
    (engine,) = emulator.engines()
    os.kill(engine, signal.SIGSTOP)
    os.kill(emulator.program.pid, signal.SIGTERM)
    assert emulator.program.wait(STOP_TIMEOUT_S + EXIT_TIMEOUT_S) == 1
    assert emulator.program.output.count("was killed by SIGKILL") == 1


def test_becomes_the_engine_where_nothing_else_is_needed(lab: Lab) -> None:
    """The same process, with a lock that it was given, and nothing of the environment."""
    lock = lab.directory / "lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.set_inheritable(file.fileno(), True)
        done = subprocess.Popen(
            [VTPMD, "run", lab.directory / "state"],
            stdout=subprocess.PIPE,
            env=os.environ | {"SECRET": "1", "LD_BIND_NOW": "1", "LC_ALL": "C"},
            close_fds=False,
        )
    with done, lock.open() as again, ExitStack() as stack:
        stack.callback(done.kill)  # else a failure is waited on
        assert done.stdout is not None
        assert done.stdout.readline().startswith(b"-chardev ")
        assert done.stdout.read() == b""  # nobody who reads it waits for the end of the vTPM
        with ControlClient(lab.directory / "state/vtpmd.sock") as control:
            control.get_config()
        assert Path(f"/proc/{done.pid}/comm").read_text() == "vtpmd-engine\n"
        environment = Path(f"/proc/{done.pid}/environ").read_bytes().split(b"\0")
        assert b"LC_ALL=C" in environment
        assert not any(each.startswith((b"SECRET", b"LD_")) for each in environment)
        with pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        done.terminate()
        assert done.wait() == 0
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_stop_that_cannot_fold_says_so(lab: Lab) -> None:
    """A status of its own: the state is safe, but swtpm cannot take the directory."""
    for emulator in (lab.emulator(EmulatorKind.VTPMD), lab.daemon()):
        start_tpm(emulator)
        with ControlClient(emulator.control_path) as control:
            tpm = Tpm(control.attach_data().transact)
            for index in range(0x01500001, 0x01500006):  # a state of more than the limit
                tpm.nv_define(index, 1024)
                tpm.nv_write(index, bytes(1024))
        (engine,) = emulator.engines()
        resource.prlimit(engine, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        assert emulator.stop() == 7
        assert "cannot fold tpm2-00.journal" in emulator.program.output
        assert (emulator.state / "tpm2-00.journal").exists()
        assert run_to_its_end(emulator.state, command="fold").returncode == 0


def test_state_file_that_cannot_be_read_stops_the_start(lab: Lab) -> None:
    """Status 1, one line that names the file, and the file as it was."""
    state = lab.directory / "state"
    state.mkdir()
    file = state / "tpm2-00.permall"
    file.symlink_to("/etc/hostname")
    done = run_to_its_end(state)
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert done.stderr.count("\n") == 1
    assert file.is_symlink()
