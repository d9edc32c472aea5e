"""The floor of a hand-over: two processes that do for QEMU what two emulators do, without a TPM."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests.bench import programs
from tests.harness.lab import Lab
from vtpmd.testing.program import Program

PROGRAM = "floor"
CORE = ("aead.c", "engine/lane.c")
_PORT = "port "


class Floor:
    """One such process (tests/bench/floor.c), which accepts control connections."""

    qmp_path = None  # it follows nobody

    def __init__(self, directory: Path, tail_bytes: int, source: Floor | None = None) -> None:
        """Start it; `directory` is its own, and `source` what it is the destination of.

        It gives QEMU a tail of `tail_bytes`, and then has to have a destination.
        RuntimeError when it ends instead.
        """
        directory.mkdir(exist_ok=True)
        self.control_path = directory / "tpm"
        arguments: list[str | Path] = [_program(), self.control_path, str(tail_bytes)]
        if source is not None:
            arguments.append(str(source.port))
        self.program = Program(PROGRAM, arguments, directory)
        self.program.connect(self.control_path).close()

    @property
    def port(self) -> int:
        """The TCP port on which it waits for its destination; it has said so by now."""
        return int(self.program.output.splitlines()[0].removeprefix(_PORT))

    def kill(self) -> None:
        """End the process; nothing happens if it has ended."""
        self.program.kill()


def floor(lab: Lab, tail_bytes: int, source: Floor | None = None) -> Floor:
    """Start one that ends with the lab."""
    started = Floor(lab.new_path(PROGRAM), tail_bytes, source)
    lab.kill_at_end(started)
    return started


@cache
def _program() -> Path:
    return programs.build(PROGRAM, programs.BUILD, core=CORE)
