"""A signal ends `vtpmd run` and `vtpmd attach` whatever they wait for, and leaves nothing running.

Each test has them wait for what does not come.
"""

import fcntl
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.handover import make_pair
from tests.harness.lab import Lab
from tests.support.emulator_client import ControlClient
from vtpmd.core.link import LINK_SHARED
from vtpmd.daemon.attachment import READ_BYTES_MAX
from vtpmd.daemon.engine import GONE_TIMEOUT_S, STOP_TIMEOUT_S
from vtpmd.daemon.runtime import SETTLE_TIMEOUT_S
from vtpmd.store.daemon_lock import DAEMON_NAME
from vtpmd.store.directory import LINK_NAME
from vtpmd.testing.emulator import ATTACHED, VTPMD, Emulator, EmulatorKind
from vtpmd.testing.program import Program
from vtpmd.testing.waiting import wait_until

PIPE_BYTES = 4096
CONNECTED = "03"  # of a socket, in /proc/net/unix
SLACK_S = 5.0  # of a machine with other work


@contextmanager
def full_pipe(path: Path) -> Iterator[int]:
    """Have a pipe that nothing can be written into until it was read."""
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.write(fd, bytes(PIPE_BYTES))
        yield fd
    finally:
        os.close(fd)


def attaching(lab: Lab, emulator: Emulator, *options: str) -> Program:
    program = Program("attach", [VTPMD, "attach", emulator.state, *options], lab.directory)
    lab.kill_at_end(program)
    return program


def ended_in(program: Program, limit_s: float) -> int:
    """Send SIGTERM; return the status, which has to come in time."""
    began_s = time.monotonic()
    os.kill(program.pid, signal.SIGTERM)
    status = program.wait(limit_s + SLACK_S)
    assert time.monotonic() - began_s < limit_s + SLACK_S
    return status


def assert_serves(emulator: Emulator) -> None:
    """A guest can be started."""
    with ControlClient(emulator.control_path) as control:
        control.init()


@contextmanager
def stopped(emulator: Emulator) -> Iterator[None]:
    """Have an engine do nothing, as one whose storage stands still."""
    emulator.signal_engine(signal.SIGSTOP)
    try:
        yield
    finally:
        emulator.signal_engine(signal.SIGCONT)


def test_directory_is_removed_before_the_engine_is_attached_to(lab: Lab) -> None:
    """vtpmd says what it prints when all is there that the engine needs, and starts it then."""
    state, manage, pipe = (lab.directory / name for name in ("state", "manage", "pipe"))
    with full_pipe(pipe) as fd:
        command = f'exec "$@" >{pipe}'
        run = ("sh", "-c", command, "sh", VTPMD, "run", state, "--manage", manage)
        program = Program("vtpmd", run, lab.directory)
        lab.kill_at_end(program)
        wait_until((state / DAEMON_NAME).exists)  # all is opened
        shutil.rmtree(state)
        os.read(fd, PIPE_BYTES)
        program.wait_for_output("its state directory was removed")
    (engine,) = program.children()
    assert ended_in(program, 0) == 0  # nothing was stored
    assert not Path(f"/proc/{engine}").exists()
    assert program.output.count("serves on alone") == 1


def test_engine_does_not_greet(lab: Lab) -> None:
    emulator = lab.emulator(EmulatorKind.VTPMD)
    assert_serves(emulator)
    with stopped(emulator):
        program = attaching(lab, emulator)
        wait_until((emulator.state / DAEMON_NAME).exists)
        wait_until(lambda: is_connected(program))
        assert ended_in(program, 0) == 0
    assert_serves(emulator)


def is_connected(program: Program) -> bool:
    """Return whether a vtpmd has connected to the engine: nothing else of it is a socket."""
    sockets = Path(f"/proc/{program.pid}/fd").iterdir()
    inodes = {str(each.readlink()) for each in sockets}
    connected = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(f"socket:[{line[6]}]" in inodes and line[5] == CONNECTED for line in connected)


def test_engine_greets_and_says_no_more(lab: Lab) -> None:
    """What a vtpmd that attaches is about to settle, the next one finds."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    link, elsewhere = emulator.state / LINK_NAME, emulator.state / "elsewhere"
    link.rename(elsewhere)
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as engine:
        listening.bind(str(link))
        listening.listen()
        program = attaching(lab, emulator)
        attached = program.accept(listening)
        engine.connect(str(elsewhere))
        greeting, descriptors, _, _ = socket.recv_fds(engine, READ_BYTES_MAX, LINK_SHARED)
        with attached:
            socket.send_fds(attached, [greeting], descriptors)
            assert attached.recv(1)  # the first request
            assert ended_in(program, SETTLE_TIMEOUT_S + GONE_TIMEOUT_S) == 0
        for fd in descriptors:
            os.close(fd)
    elsewhere.rename(link)
    assert ATTACHED not in program.output
    emulator.attach()
    assert emulator.stop() == 0


def test_engine_stalls_with_a_session_to_end(lab: Lab) -> None:
    """It is waited for, as a disk that is slow, but not for ever; and it is not killed."""
    pair = make_pair(lab)
    vtpmd = pair.source.vtpmd
    vtpmd.program.kill()
    vtpmd.attach()
    assert lab.management(vtpmd).arm(pair.link.address)["event"] == "VTPM_ARMED"
    with stopped(vtpmd):
        assert ended_in(vtpmd.program, STOP_TIMEOUT_S + GONE_TIMEOUT_S) == 0
    assert vtpmd.engines()
    vtpmd.attach()
    assert vtpmd.stop() == 0


def test_key_does_not_come(lab: Lab) -> None:
    """There is nothing to put in order yet."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    pipe = lab.directory / "key"
    os.mkfifo(pipe)
    program = attaching(lab, emulator, "--key", f"file={pipe}")
    with pipe.open("wb"):  # it has begun to read
        assert ended_in(program, 0) == -signal.SIGTERM
    assert_serves(emulator)
