"""Start, look at and stop the emulators that are compared."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv/bin/python"
START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 30
CONNECT_INTERVAL_S = (
    0.0001  # between attempts: short beside swtpm's start, long beside a system call
)


class BenchError(Exception):
    """A measurement failed; the message is one line for the person who runs the bench."""


@dataclass(frozen=True, kw_only=True)
class Emulator:
    """A program to measure: its name, and its command line for a state directory and a socket."""

    name: str
    command: Callable[[Path, Path], list[str]]


def _swtpm_command(state: Path, control: Path) -> list[str]:
    options = ["--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"]
    return ["swtpm", "socket", *options]


def _vtpmd_command(state: Path, control: Path) -> list[str]:
    return [str(ROOT / ".venv/bin/vtpmd"), "run", str(state), "--socket", str(control)]


SWTPM = Emulator(name="swtpm", command=_swtpm_command)
VTPMD = Emulator(name="vtpmd", command=_vtpmd_command)
EMULATORS = (SWTPM, VTPMD)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A started emulator; `started_ns` is the monotonic time just before it was started."""

    emulator: Emulator
    process: subprocess.Popen[bytes]
    control: Path
    log: Path
    started_ns: int

    def elapsed_ms(self) -> float:
        """Return how long ago the emulator was started."""
        return (time.monotonic_ns() - self.started_ns) / 1e6

    def check_alive(self) -> None:
        """Raise BenchError with the last line that the emulator wrote when it has ended."""
        status = self.process.poll()
        if status is not None:
            raise BenchError(f"{self.emulator.name} ended with status {status}: {self.last_line()}")

    def last_line(self) -> str:
        """Return the last line that the emulator wrote."""
        lines = self.log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it wrote nothing"

    def connect(self) -> socket.socket:
        """Connect to the control socket as soon as that is possible; BenchError when it is not."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(self.control))
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                self.check_alive()
                time.sleep(CONNECT_INTERVAL_S)
            else:
                sock.settimeout(START_TIMEOUT_S)
                return sock
        raise BenchError(f"{self.emulator.name} did not listen within {START_TIMEOUT_S} s")


def _stop(running: Running) -> None:
    running.check_alive()
    process = running.process
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise BenchError(f"{running.emulator.name} did not stop on SIGTERM") from None


@contextmanager
def running(
    emulator: Emulator, directory: Path, *, prefix: tuple[str, ...] = (), core: int | None = None
) -> Iterator[Running]:
    """Run an emulator on the state in `directory`, which is made when it does not exist.

    `prefix` goes in front of its command line; with `core` the emulator and its children stay on
    that core. The emulator has stopped when the block is left; BenchError when it does not stop, or
    has ended before.
    """
    state = directory / "state"
    state.mkdir(parents=True, exist_ok=True)
    control = directory / "control.sock"
    log = directory / "log"
    pin = ["taskset", "--cpu-list", str(core)] if core is not None else []
    command = [*pin, *prefix, *emulator.command(state, control)]
    with log.open("wb") as output:
        started_ns = time.monotonic_ns()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_as_installed(),
        )
    started = Running(
        emulator=emulator, process=process, control=control, log=log, started_ns=started_ns
    )
    try:
        yield started
    finally:
        _stop(started)


def _as_installed() -> dict[str, str]:
    """Return the environment, without what keeps Python from using what it has compiled."""
    kept_out = "PYTHONDONTWRITEBYTECODE"
    return {name: value for name, value in os.environ.items() if name != kept_out}


def child_processes(pid: int) -> list[int]:
    """Return the process ids of a process's children (proc(5), task/TID/children)."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for file in tasks.glob("*/children") for child in file.read_text().split()]


def memory_kib(pid: int) -> dict[str, int]:
    """Return a process's Rss, Pss, Private_Dirty and so on in KiB (proc(5), smaps_rollup).

    BenchError when the kernel does not let this user look at the process.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except PermissionError:
        raise BenchError(f"no right to read the memory of process {pid}: run as root") from None
    return {name.rstrip(":"): int(value) for name, value, _unit in map(str.split, lines)}


def cores() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))
