"""The link between the two hosts of the testbed: wire.c, which copies frames between them."""

import subprocess
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vtpmd.closing import Closing
from vtpmd.testing.program import Program

ROOT = Path(__file__).parents[2]
DEVICE = "link0"
COMPILE_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 10.0
OPTIONS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a link does to what goes over it, either way. There and back takes twice the delay."""

    rate_bits_s: int = 1_000_000_000
    delay_us: int = 0
    jitter_us: int = 0  # at most the delay
    loss_ppm: int = 0  # frames in a million


class Side(StrEnum):
    """The two hosts, by the names that the wire has for them."""

    A = "a"
    B = "b"


@dataclass(frozen=True, kw_only=True)
class Count:
    """Frames on their way to one host."""

    forwarded: int
    dropped: int


class WireError(Exception):
    """The wire could not be built, or refuses a command."""


class Wire(Closing):
    """A TAP device in each of two network namespaces, and the program between them.

    What a method returned from is in force. A link is silent when packets are lost and nobody is
    told; a link that is cut has no carrier, which the hosts see.
    """

    def __init__(self, directory: Path, a: Path, b: Path, seed: int = 0) -> None:
        """Connect two namespaces; `directory` is its own. RuntimeError when that fails."""
        control = directory / "control"
        arguments: list[str | Path] = [_build(), control, a, b, DEVICE, str(seed)]
        self.program = Program("wire", arguments, directory)
        self._socket = self.program.connect(control)
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        self._answers = self._socket.makefile("r")

    def close(self) -> None:
        """End the program, and with it the devices."""
        self._answers.close()
        self._socket.close()
        self.program.kill()

    def set(self, conditions: Conditions) -> None:
        """Change what the link does."""
        self._command("jitter 0")  # may not be longer than the delay, before or after
        self._command(f"rate {conditions.rate_bits_s}")
        self._command(f"delay {conditions.delay_us}")
        self._command(f"jitter {conditions.jitter_us}")
        self._command(f"loss {conditions.loss_ppm}")

    def cut(self) -> None:
        """Take the carrier away; what is on its way is lost."""
        self._command("cut")

    def drop(self, to: Side) -> None:
        """Lose all that goes to one side; what comes from there still gets through."""
        self._command(f"drop {to}")

    def restore(self) -> None:
        """Let everything through again."""
        self._command("restore")

    def count(self) -> dict[Side, Count]:
        """Return what went to each side since the beginning."""
        numbers = list(map(int, self._command("count").split()))
        return {
            Side.A: Count(forwarded=numbers[0], dropped=numbers[1]),
            Side.B: Count(forwarded=numbers[2], dropped=numbers[3]),
        }

    def _command(self, line: str) -> str:
        self._socket.sendall(line.encode() + b"\n")
        answer = self._answers.readline()
        if not answer.startswith("ok"):
            self.program.raise_if_ended()
            raise WireError(f"the wire answers {answer.strip() or 'nothing'} to: {line}")
        return answer.removeprefix("ok").strip()


def _build() -> Path:
    """Compile the program unless it is newer than its source; return its path."""
    source, program = Path(__file__).with_suffix(".c"), ROOT / "build/testbed/wire"
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    # Two tests may do this at a time: each gets a whole program.
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        built = Path(scratch) / program.name
        command: list[str | Path] = ["gcc", *OPTIONS, f"-I{ROOT / 'csrc'}", "-o", built, source]
        if subprocess.run(command, timeout=COMPILE_TIMEOUT_S, check=False).returncode != 0:
            raise WireError(f"gcc could not compile {source.relative_to(ROOT)}; see above")
        built.rename(program)
    return program
