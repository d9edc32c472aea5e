"""What the engine gives up, seen from outside: /proc of a real one, and the executable."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.harness.emulator import Emulator, EmulatorKind
from tests.harness.lab import Lab
from tests.support.emulator_client import ControlClient
from vtpmd.core import LinkDescriptor
from vtpmd.daemon.engine_process import EXECUTABLE


@pytest.fixture
def emulator(lab: Lab) -> Emulator:
    """Give a vtpmd that serves."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    emulator.program.wait_for_output("-tpmdev")
    return emulator


def status_of(process: int) -> dict[str, str]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def descriptors_of(process: int) -> dict[int, str]:
    directory = Path(f"/proc/{process}/fd")
    return {int(entry.name): str(entry.readlink()) for entry in directory.iterdir()}


def serving_engine(emulator: Emulator) -> int:
    """Return the engine's process number once it has answered, and so has entered its sandbox."""
    with ControlClient(emulator.control_path) as control:
        control.stop()
    (engine,) = emulator.engines()
    return engine


def test_engine_has_no_descriptor_that_it_does_not_need(emulator: Emulator) -> None:
    """Seven: null twice, standard error, the link, the directory, the lock, the store.

    There is no anchor, and the boot record has been read.
    """
    descriptors = descriptors_of(serving_engine(emulator))
    assert set(descriptors) == set(LinkDescriptor) - {LinkDescriptor.BOOT, LinkDescriptor.ANCHOR}
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


def test_signals_of_a_terminal_reach_the_engine_by_way_of_vtpmd(emulator: Emulator) -> None:
    """A service manager signals all processes at once; the guest is served until vtpmd stops."""
    engine = serving_engine(emulator)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(engine, number)
    assert serving_engine(emulator) == engine
    assert emulator.stop() == 0


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
