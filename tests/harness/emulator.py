"""TPM emulators as processes: vtpmd and, to compare and to move to and from, swtpm."""

import contextlib
import os
import select
import signal
import sys
from enum import StrEnum
from pathlib import Path

from tests.harness.program import Program

KILL_TIMEOUT_S = 20.0


class EmulatorKind(StrEnum):
    """The programs that can serve a TPM to QEMU."""

    VTPMD = "vtpmd"
    SWTPM = "swtpm"


def _arguments(kind: EmulatorKind, state: Path, control_path: Path) -> list[str | Path]:
    if kind is EmulatorKind.SWTPM:
        control = f"type=unixio,path={control_path}"
        return ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", control]
    vtpmd = Path(sys.executable).with_name("vtpmd")
    return [vtpmd, "run", state, "--socket", control_path, "--log", "level=debug"]


class Emulator:
    """An emulator that serves one state directory, and accepts control connections."""

    def __init__(self, kind: EmulatorKind, directory: Path, state: Path | None = None) -> None:
        """Start an emulator and wait until it accepts control connections.

        `directory` is the emulator's own, short as socket paths must be; `state` is the state
        directory, by default a new one in there. RuntimeError when the emulator ends instead.
        """
        self.kind = kind
        self.state = state or directory / "state"
        self.control_path = directory / "tpm"
        directory.mkdir(exist_ok=True)
        self.state.mkdir(exist_ok=True)
        self.program = Program(
            kind.value, _arguments(kind, self.state, self.control_path), directory
        )
        self.program.connect(self.control_path).close()

    def stop(self) -> int:
        """Stop cleanly; return the exit code."""
        return self.program.stop()

    def engines(self) -> list[int]:
        """Return the process numbers of vtpmd's engines; swtpm has none."""
        return [] if self.program.exit_code is not None else self.program.children()

    def kill(self) -> None:
        """Kill the emulator and its engines, as a host's failure does; all are gone then."""
        descriptors = [os.pidfd_open(engine) for engine in self.engines()]
        self.program.kill()
        for descriptor in descriptors:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            ended, _, _ = select.select([descriptor], [], [], KILL_TIMEOUT_S)
            os.close(descriptor)
            assert ended, "an engine does not die of SIGKILL"
