"""What the engine gives up, seen from outside: /proc of a real one, and the executable."""

import errno
import fcntl
import mmap
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.harness import canary, traced
from tests.harness.lab import Lab
from tests.harness.swtpm_program import Place
from tests.harness.system_calls import numbers_of, polls
from tests.support import tpm2
from tests.support.emulator_client import Control, ControlClient
from vtpmd.core import LinkDescriptor
from vtpmd.core.program import EXECUTABLE
from vtpmd.testing.emulator import ATTACHED, VTPMD, Emulator, EmulatorKind
from vtpmd.testing.program import Program
from vtpmd.testing.waiting import wait_until

# Of which each was seen to be needed. A call that is answered with an error is none of them.
CALLS_MAX = 28
COMMAND_SIZE = 0x142  # TPM_RC_COMMAND_SIZE
WAIT_TIMEOUT_S = 20.0
GET_CAPABILITY = Control.GET_CAPABILITY.to_bytes(4, "big")
FILTER_DELAY_US = 1_000_000  # many times what a client takes to be answered
CALL_NUMBERS = range(1024)  # the highest of Linux 6.18 is 470
UPROBES = {335: -signal.SIGILL, 336: errno.ENXIO}  # Linux lets these pass, for its own code alone
X32 = 0x40000000  # the second set of numbers that x86-64 has
ABORT = -1
ANY = (-1,) * 6  # arguments that no call does anything with, nor waits for
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
READABLE, ANONYMOUS = mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
DIRECTORY = LinkDescriptor.DIRECTORY

# Those that depend on arguments: some that are allowed, and some that differ from them in one.
# Addresses are none, and descriptors not open, so that nothing is done.
ALLOWED: dict[str, tuple[tuple[int, ...], ...]] = {
    "fcntl": ((99, fcntl.F_GETFL), (99, fcntl.F_SETFL, os.O_DIRECT)),
    "mmap": ((0, 4096, READABLE, ANONYMOUS, -1),),
    "openat": ((DIRECTORY, 0, CREATE, 0o600),),
    "unlinkat": ((DIRECTORY, 0, 0), (LinkDescriptor.CONTROL_DIRECTORY, 0, 0)),
    "renameat": ((DIRECTORY, 0, DIRECTORY, 0),),
}
FORBIDDEN: dict[str, tuple[tuple[int, ...], ...]] = {
    "fcntl": ((99, fcntl.F_DUPFD), (99, fcntl.F_SETLK), (99, fcntl.F_SETOWN)),
    "mmap": (
        (0, 4096, READABLE | mmap.PROT_EXEC, ANONYMOUS, -1),
        (0, 4096, READABLE, mmap.MAP_SHARED, LinkDescriptor.STORE),
    ),
    "openat": (
        (-100, 0, CREATE, 0o600),
        (DIRECTORY, 0, os.O_RDONLY),
        (DIRECTORY, 0, CREATE & ~os.O_EXCL, 0o600),
        (DIRECTORY, 0, CREATE & ~os.O_NOFOLLOW, 0o600),
    ),
    # AT_FDCWD; AT_REMOVEDIR
    "unlinkat": (
        (-100, 0, 0),
        (DIRECTORY, 0, 0x200),
        (LinkDescriptor.CONTROL_DIRECTORY, 0, 0x200),
    ),
    "renameat": ((-100, 0, DIRECTORY, 0), (DIRECTORY, 0, -100, 0)),
    "tgkill": ((1, 1, signal.SIGABRT), (1, 1, signal.SIGKILL)),
}


@pytest.fixture
def emulator(lab: Lab) -> Emulator:
    """Give a vtpmd that serves."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    emulator.program.wait_for_output("-tpmdev")
    return emulator


NOT_OF_EVERY_VTPM = {
    LinkDescriptor.ROOT,
    LinkDescriptor.STARTED,
    LinkDescriptor.BOOT,
    LinkDescriptor.ANCHOR,
    LinkDescriptor.DATA,
    LinkDescriptor.DATA_DIRECTORY,
    LinkDescriptor.PID_DIRECTORY,
}


def status_of(process: int) -> dict[str, str]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def descriptors_of(process: int, n_sockets: int) -> dict[int, str]:
    """Return a process' descriptors, once it has so many sockets: the client's is closed soon."""
    directory = Path(f"/proc/{process}/fd")
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while True:
        found: dict[int, str] = {}
        for entry in directory.iterdir():
            with suppress(FileNotFoundError):  # it was closed since
                found[int(entry.name)] = str(entry.readlink())
        if sum(name.startswith("socket:") for name in found.values()) == n_sockets:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def serving_engine(emulator: Emulator) -> int:
    """Return the engine's process number once it has answered, and so has entered its sandbox."""
    with ControlClient(emulator.control_path) as control:
        control.stop()
    (engine,) = emulator.engines()
    return engine


def test_engine_has_no_descriptor_that_it_does_not_need(lab: Lab) -> None:
    """Those of the link, but for the anchor, and the boot record, which has been read.

    And what its threads wait for, among it the socket of a vtpmd that is attached.
    """
    emulator = lab.daemon()
    engine = serving_engine(emulator)
    emulator.program.wait_for_output(ATTACHED)  # its socket is one of them
    descriptors = descriptors_of(engine, n_sockets=3)
    needed = set(LinkDescriptor) - NOT_OF_EVERY_VTPM
    own = sorted(descriptors.pop(number) for number in set(descriptors) - needed)
    assert own[:3] == ["anon_inode:[eventfd]", "anon_inode:[eventfd]", "anon_inode:[signalfd]"]
    assert [name[:7] for name in own[3:]] == ["socket:"]
    assert set(descriptors) == needed
    assert descriptors[LinkDescriptor.INPUT] == descriptors[LinkDescriptor.LIBRARY_LOG]
    assert descriptors[LinkDescriptor.INPUT] == "/dev/null"
    assert descriptors[LinkDescriptor.SOCKET].startswith("socket:")
    assert Path(descriptors[LinkDescriptor.DIRECTORY]) == emulator.state
    assert Path(descriptors[LinkDescriptor.LOCK]) == emulator.state / ".lock"


def test_engine_gets_no_new_privileges_and_dumps_no_core(emulator: Emulator) -> None:
    """Also not into a core pattern's pipe, as it is not dumpable: /proc belongs to root then."""
    engine = serving_engine(emulator)
    assert status_of(engine)["NoNewPrivs"] == "1"
    limits = Path(f"/proc/{engine}/limits").read_text().splitlines()
    (core,) = (line.split() for line in limits if line.startswith("Max core file size"))
    assert core[4:6] == ["0", "0"]
    environment = Path(f"/proc/{engine}/environ").stat()
    assert (environment.st_uid, environment.st_gid) == (0, 0)


def test_engines_memory_is_locked(emulator: Emulator) -> None:
    """All of it that is in use: root's limit allows that."""
    engine = serving_engine(emulator)
    lines = Path(f"/proc/{engine}/smaps_rollup").read_text().splitlines()
    sizes_kb = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    assert int(sizes_kb["Locked"]) >= int(sizes_kb["Private_Dirty"])
    assert "RLIMIT_MEMLOCK" not in emulator.program.output


def test_engine_that_is_alone_has_what_it_was_given(lab: Lab) -> None:
    """No standard input or output, and no vtpmd."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    descriptors = descriptors_of(serving_engine(emulator), n_sockets=2)
    for number in (LinkDescriptor.INPUT, LinkDescriptor.LIBRARY_LOG):
        assert descriptors[number] == "/dev/null"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_that_reaches_the_engine_stops_it_by_way_of_vtpmd(
    lab: Lab, number: signal.Signals
) -> None:
    """A service manager signals all processes at once, or one of them."""
    emulator = lab.daemon()
    os.kill(serving_engine(emulator), number)
    assert emulator.program.wait() == 0


def test_engine_is_sealed_by_one_filter(emulator: Emulator) -> None:
    """In all its threads."""
    assert_is_sealed(serving_engine(emulator))


def assert_is_sealed(engine: int) -> None:
    tasks = [int(task.name) for task in Path(f"/proc/{engine}/task").iterdir()]
    assert len(tasks) > 1
    for task in tasks:
        status = status_of(task)
        assert (status["Seccomp"], status["Seccomp_filters"]) == ("2", "1")


@contextmanager
def traced_start(directory: Path, trace: Sequence[str], *options: str) -> Iterator[Program]:
    """Start a TPM, with a control socket, under strace."""
    state = directory / "state"
    state.mkdir()
    program = Program(
        "strace",
        [
            *("strace", "-f", "-qq", *trace),
            *(VTPMD, "socket", "--tpm2", "--tpmstate", f"dir={state}"),
            *("--ctrl", f"type=unixio,path={directory / 'control'}", *options),
        ],
        directory,
    )
    try:
        yield program
    finally:
        program.kill()


@contextmanager
def answered(program: Program, path: Path, command: bytes) -> Iterator[None]:
    """Be a client that has an answer."""
    with program.connect(path, WAIT_TIMEOUT_S) as client:
        client.settimeout(WAIT_TIMEOUT_S)
        client.sendall(command)
        assert client.recv(1)
        yield


@pytest.mark.parametrize("channel", ["control", "data"])
def test_nothing_is_answered_before_the_filter_is_there(tmp_path: Path, channel: str) -> None:
    """Where that takes its time: what a client sends first is what an attack would begin with."""
    slowly = ("-e", "trace=seccomp", "-e", f"inject=seccomp:delay_enter={FILTER_DELAY_US}")
    server = ("--server", f"type=unixio,path={tmp_path / 'data'}")
    flags = ("--flags", "not-need-init,startup-clear")
    with traced_start(tmp_path, slowly, *server, *flags) as program:
        command = tpm2.get_random(8) if channel == "data" else GET_CAPABILITY
        with answered(program, tmp_path / channel, command):
            (engine,) = program.children()
            assert_is_sealed(engine)


def test_state_is_looked_at_within_the_filter(tmp_path: Path) -> None:
    """Also where it is before any client says so: libtpms reads it, and has it written anew."""
    said = tmp_path / "trace"
    trace = ("-o", str(said), "-e", "trace=seccomp,renameat")
    start = traced_start(tmp_path, trace, "--flags", "startup-clear")
    with start as program, answered(program, tmp_path / "control", GET_CAPABILITY):
        pass
    calls = [line.split()[1].partition("(")[0] for line in said.read_text().splitlines()]
    assert calls.count("seccomp") == 1
    assert calls[0] == "seccomp"
    assert calls[1:]


def wait_until_polling(engine: int) -> None:
    """Wait until a thread of the engine waits for the rest of a command."""
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while not any(poll.has_limit for poll in polls(engine)):
        assert time.monotonic() < deadline, "no thread of the engine waits for it"


def test_engine_that_was_stopped_goes_on(emulator: Emulator) -> None:
    """Linux restarts what waited for a time by a call of its own, which no program makes."""
    engine = serving_engine(emulator)
    with ControlClient(emulator.control_path) as control:
        control.init()
        data = control.attach_data()
        data.send(tpm2.startup()[:4])
        wait_until_polling(engine)
        os.kill(engine, signal.SIGSTOP)
        os.kill(engine, signal.SIGCONT)
        assert tpm2.parse_response(data.receive()).return_code == COMMAND_SIZE
        assert tpm2.parse_response(data.transact(tpm2.startup())).return_code == 0
    assert emulator.engines() == [engine]


def test_engine_whose_tpm_does_what_it_need_not_is_killed(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the daemon says in one line what happened, and what became of the guest."""
    forbidden = canary.build("forbidden", ("TPMLIB_Process",), tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(forbidden))
    emulator = lab.daemon()
    with ControlClient(emulator.control_path) as control:
        control.init()
        data = control.attach_data()
        with pytest.raises((ConnectionError, BrokenPipeError)):
            data.transact(tpm2.startup())
    emulator.program.wait_for_output("SIGSYS")
    (line,) = (line for line in emulator.program.output.splitlines() if "SIGSYS" in line)
    assert "system call that its sandbox forbids" in line
    assert "the guest's TPM answers with errors" in line


class Probe:
    """The filter of this tree, built into a program that makes any call under it."""

    def __init__(self, directory: Path) -> None:
        self.program = directory / "probe"
        options = ["-Wl,--wrap=main"]
        canary.build_engine(canary.ROOT / "tests/canary/probe.c", self.program, options)

    def answers(self, calls: Sequence[tuple[int, ...]]) -> list[int]:
        """Make each call in a process of its own.

        Returns for each the errno, 0 if it has succeeded, or the negated number of the signal
        that has killed the process.
        """
        lines = [" ".join(map(str, (*call, *ANY[: 7 - len(call)]))) for call in calls]
        run = subprocess.run(
            [self.program], input="\n".join(lines), capture_output=True, text=True, check=True
        )
        return [os.waitstatus_to_exitcode(int(line)) for line in run.stdout.split()]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return Probe(tmp_path_factory.mktemp("probe"))


def commented_calls() -> tuple[set[str], set[str], dict[str, int]]:
    """Return the calls that the comments allow, those that need arguments, and errors by call.

    Reads the comments in another way than sandbox_build.py does.
    """
    plain, conditional, errors = set(), set(), {}
    text = "".join(path.read_text() for path in (canary.ROOT / "csrc").rglob("*.[ch]"))
    for comment in re.findall(r"sandbox: ((?:(?!\*/).)*)\*/", text, re.DOTALL):
        words = comment.replace("getpid()", "PID").replace("\n *", " ")
        for name, arguments, error in re.findall(r"([\w|?]+)(\(.*?\))?(?:=(\w+))?(?=\s)", words):
            first = name.partition("|")[0].rstrip("?")
            if error:
                errors[first] = 0 if error == "0" else getattr(errno, error)
            elif arguments:
                conditional.add(first)
            else:
                plain.add(first)
    return plain, conditional, errors


def test_filter_is_what_the_comments_say_and_nothing_else(probe: Probe) -> None:
    """Every number is tried: all but those of the comments kill."""
    plain, conditional, errors = commented_calls()
    numbers = numbers_of(plain | conditional | set(errors))
    assert set(numbers) >= plain | conditional
    plain_numbers = {numbers[name] for name in plain}
    error_numbers = {numbers[name]: error for name, error in errors.items() if name in numbers}
    calls = [(number, *ANY) for number in CALL_NUMBERS]
    answers = dict(zip(CALL_NUMBERS, probe.answers(calls), strict=True))
    survived = {number for number, answer in answers.items() if answer != -signal.SIGSYS}
    survived -= {number for number, answer in UPROBES.items() if answers[number] == answer}
    depends = {numbers[name] for name in conditional}
    assert survived - depends == plain_numbers | set(error_numbers)
    assert {number: answers[number] for number in error_numbers} == error_numbers
    assert all(answers[number] != errno.ENOSYS for number in plain_numbers - {numbers["futex"]})
    assert len(plain | conditional) <= CALLS_MAX


def test_arguments_are_looked_at(probe: Probe) -> None:
    _, conditional, _ = commented_calls()
    assert conditional == set(FORBIDDEN)
    numbers = numbers_of(conditional)
    allowed = [(numbers[name], *way) for name, ways in ALLOWED.items() for way in ways]
    assert [
        call for call, answer in zip(allowed, probe.answers(allowed), strict=True) if answer < 0
    ] == []
    forbidden = [(numbers[name], *way) for name, ways in FORBIDDEN.items() for way in ways]
    assert set(probe.answers(forbidden)) == {-signal.SIGSYS}


def test_numbers_of_another_architecture_are_none(probe: Probe) -> None:
    assert set(probe.answers([(X32 | number, *ANY) for number in CALL_NUMBERS])) == {-signal.SIGSYS}


def test_a_program_that_finds_its_own_error_can_say_so(probe: Probe) -> None:
    """abort() is no forbidden call: who reads SIGABRT looks for another fault."""
    assert probe.answers([(ABORT, *ANY)]) == [-signal.SIGABRT]


def test_engine_started_by_hand_says_so() -> None:
    """One line, and status 2."""
    done = subprocess.run([EXECUTABLE], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert done.stderr == ("vtpmd-engine: this is a part of vtpmd; run `vtpmd run DIR` instead\n")


def test_executable_is_hardened() -> None:
    """Position-independent, full RELRO, no executable stack, stack protector, fortified calls."""

    def readelf(option: str) -> str:
        command = ["readelf", "--wide", option, str(EXECUTABLE)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "DYN (Position-Independent Executable file)" in readelf("--file-header")
    segments = readelf("--program-headers")
    assert "GNU_RELRO" in segments
    (stack,) = (line for line in segments.splitlines() if "GNU_STACK" in line)
    assert "RWE" not in stack
    assert "BIND_NOW" in readelf("--dynamic")
    symbols = readelf("--dyn-syms")
    assert "__stack_chk_fail" in symbols
    assert "_chk@" in symbols.replace("__stack_chk_fail@", "")


def test_thread_has_its_name_without_a_file_of_proc(ours: Place) -> None:
    """A profile of AppArmor forbids to write there, and a kernel logs each try."""
    log = ours.directory / "trace"
    process = ours.start_by([str(word) for word in traced.command(log, *ours.options())])
    threads = Path(f"/proc/{int(ours.pid_file.read_text())}/task")
    wait_until(lambda: "recorder\n" in [each.read_text() for each in threads.glob("*/comm")])
    with ControlClient(ours.control) as control:
        control.shutdown()
    assert process.wait(WAIT_TIMEOUT_S) == 0
    _, begun, calls = log.read_text().partition(f'execve("{EXECUTABLE}"')
    assert begun
    assert not re.findall(r'"[^"]*/proc/[^"]*"', calls)
