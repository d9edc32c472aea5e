"""The testbed itself: its link does what it is told, and nothing is left, however a test ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.testbed import Host, Testbed
from tests.harness.wire import DEVICE, Conditions, Side, WireError
from vtpmd.testing import leftovers
from vtpmd.testing.program import Program
from vtpmd.testing.waiting import wait_until

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0
PORT = 5000

COPIED_BYTES = 2_000_000
RECEIVE = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("listening", flush=True)
connection, _ = listener.accept()
while connection.recv(1 << 16):
    pass
connection.sendall(b"done")
"""
# Says how long the connection and the copy took, in seconds.
SEND = """
import socket, sys, time
began = time.monotonic()
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connected = time.monotonic()
connection.sendall(bytes(int(sys.argv[3])))
connection.shutdown(socket.SHUT_WR)
assert connection.recv(4) == b"done"
print(connected - began, time.monotonic() - connected)
"""
DATAGRAMS = """
import socket, sys
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(200):
    sender.sendto(bytes(100), (sys.argv[1], 9))
"""

# A process with a testbed, which it has when it says so, until its input ends.
# A shell has what it starts in the background ignore SIGINT, and so the tests, if they are.
WITH_A_TESTBED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.harness.testbed import Testbed
with Testbed() as testbed:
    print("ready", flush=True)
    assert sys.stdin.read() == ""
"""


def run_in(host: Host, code: str, *arguments: object) -> str:
    """Run Python code in a host; return what it prints."""
    command = ["nsenter", f"--net={host.namespace.path}", sys.executable, "-c", code]
    ended = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    return ended.stdout


def has_carrier(host: Host) -> bool:
    """Whether the kernel of a host sees that its link is there."""
    said = leftovers.ip("-netns", host.namespace.name, "-json", "link", "show", DEVICE)
    return "NO-CARRIER" not in json.loads(said)[0]["flags"]


def test_link_has_the_rate_and_the_delay_that_were_asked_for(testbed: Testbed) -> None:
    """Nothing is faster than the link; a busy machine may well be slower."""
    testbed.wire.set(Conditions(rate_bits_s=50_000_000, delay_us=20_000, jitter_us=1_000))
    host = testbed.b
    receiver = Program(
        "receiver",
        [sys.executable, "-c", RECEIVE, host.address, str(PORT)],
        host.lab.directory,
        host.namespace.path,
    )
    try:
        receiver.wait_for_output("listening")
        said = run_in(testbed.a, SEND, host.address, PORT, COPIED_BYTES)
    finally:
        receiver.kill()
    connect_s, copy_s = map(float, said.split())
    assert connect_s >= 2 * (0.020 - 0.001)
    assert copy_s >= COPIED_BYTES * 8 / 50_000_000
    assert testbed.wire.count()[Side.B].forwarded >= COPIED_BYTES / 1500


def test_link_loses_some_frames(testbed: Testbed) -> None:
    testbed.wire.set(Conditions(loss_ppm=300_000))
    while testbed.wire.count()[Side.B].forwarded == 0:  # until ARP got through, too
        run_in(testbed.a, DATAGRAMS, testbed.b.address)
    run_in(testbed.a, DATAGRAMS, testbed.b.address)
    to_b = testbed.wire.count()[Side.B]
    assert to_b.forwarded > 0
    assert to_b.dropped > 0


def test_link_is_silent_in_one_direction(testbed: Testbed) -> None:
    for host, other in ((testbed.a, testbed.b), (testbed.b, testbed.a)):
        run_in(host, DATAGRAMS, other.address)  # each knows then where the other is
    testbed.wire.drop(Side.B)
    before = testbed.wire.count()
    run_in(testbed.a, DATAGRAMS, testbed.b.address)
    run_in(testbed.b, DATAGRAMS, testbed.a.address)
    # What was sent may still be under way.
    wait_until(lambda: testbed.wire.count()[Side.B].dropped >= before[Side.B].dropped + 200)
    wait_until(lambda: testbed.wire.count()[Side.A].forwarded >= before[Side.A].forwarded + 200)
    assert testbed.wire.count()[Side.B].forwarded == before[Side.B].forwarded
    assert has_carrier(testbed.a)
    testbed.wire.restore()
    run_in(testbed.a, DATAGRAMS, testbed.b.address)
    wait_until(lambda: testbed.wire.count()[Side.B].forwarded >= before[Side.B].forwarded + 200)


def test_link_that_is_cut_has_no_carrier(testbed: Testbed) -> None:
    testbed.wire.cut()
    before = testbed.wire.count()
    run_in(testbed.a, DATAGRAMS, testbed.b.address)
    after = testbed.wire.count()
    for side, host in testbed.hosts.items():
        assert after[side].forwarded == before[side].forwarded
        assert not has_carrier(host)
    testbed.wire.restore()
    assert has_carrier(testbed.a)
    assert has_carrier(testbed.b)


def test_wire_refuses_what_it_does_not_know(testbed: Testbed) -> None:
    with pytest.raises(WireError, match="rate 0"):
        testbed.wire.set(Conditions(rate_bits_s=0))
    with pytest.raises(WireError, match="jitter 2"):
        testbed.wire.set(Conditions(delay_us=1, jitter_us=2))


def left_by(process: int) -> list[str]:
    """Return what a process has left on this machine."""
    prefix = f"vtpmd-{process}-"
    found = [name for name in leftovers.namespaces() if name.startswith(prefix)]
    return found + [path.name for path in leftovers.DIRECTORIES.glob(f"{prefix}*")]


def start_with_a_testbed() -> subprocess.Popen[str]:
    """Start a process that has a testbed."""
    started = subprocess.Popen(
        [sys.executable, "-c", WITH_A_TESTBED],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, "", "fail"])
def test_testbed_leaves_nothing(ending: signal.Signals | str) -> None:
    """Neither after an interrupt, nor in order, nor after a failed assertion."""
    with start_with_a_testbed() as process:
        assert left_by(process.pid) != []
        if isinstance(ending, signal.Signals):
            process.send_signal(ending)
            process.wait(TIMEOUT_S)
        else:
            process.communicate(ending, TIMEOUT_S)
        assert left_by(process.pid) == []
        assert (process.returncode == 0) == (ending == "")


def test_what_a_killed_process_has_left_is_removed_by_the_next() -> None:
    """What lives is not touched."""
    with start_with_a_testbed() as killed, start_with_a_testbed() as living:
        killed.kill()
        killed.wait(TIMEOUT_S)
        before = left_by(living.pid)
        assert left_by(killed.pid) != []
        leftovers.remove()
        assert left_by(killed.pid) == []
        assert left_by(living.pid) == before
        living.communicate("", TIMEOUT_S)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/testbed, which has been set up, to its end."""
    return run(sys.executable, "-m", "scripts.testbed", *arguments)


def run(*command: str, commands: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command of the source tree to its end; it reads `commands`."""
    return subprocess.run(
        command,
        cwd=ROOT,
        input=commands,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_script_moves_a_guest_and_reports() -> None:
    ended = run_script("run", "--delay", "5ms", "--json")
    assert ended.returncode == 0, ended.stderr
    outcome = json.loads(ended.stdout)
    assert outcome["differences"] == []
    assert outcome["session"]["outcome"] == "handed-over"


def test_script_gives_a_person_two_hosts() -> None:
    """What goes wrong there is a line, and the hosts stay."""
    lines = ["status", "a ip -brief address", "drop c", "cut", "restore", "move", "status", "quit"]
    ended = run("bash", "-c", "scripts/testbed shell", commands="\n".join(lines))
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout
    assert "10.114.0.1/24" in said
    assert "that failed: 'c' is not a valid Side" in said
    assert said.index("QEMU: inmigrate") < said.index("its vTPM went with a tail")
    assert "host b: vtpmd runs, QEMU: running" in said


@pytest.mark.parametrize(
    "arguments",
    [["run", "--rate", "fast"], ["run", "--jitter", "1ms"], [], ["pingpong", "-n", "x"]],
)
def test_script_says_what_is_wrong_with_a_command_line(arguments: list[str]) -> None:
    ended = run_script(*arguments)
    assert ended.returncode == 2
    assert "error: " in ended.stderr.splitlines()[-1]


def test_script_needs_root() -> None:
    # As another user once it is loaded: that one need not be able to read the source tree.
    script = "import os, sys; from scripts.testbed import main; os.setuid(65534); sys.exit(main())"
    ended = subprocess.run(
        [sys.executable, "-c", script, "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("testbed: network namespaces need root")
