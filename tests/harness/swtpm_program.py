"""The program that stands in swtpm's place, and swtpm, started by the same command line."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vtpmd.store.directory import names_of
from vtpmd.testing.waiting import wait_until
from vtpmd.wire.tpm import TpmVersion

OURS = Path(sys.executable).with_name("vtpmd-swtpm")
PROGRAMS = {"swtpm": Path("/usr/bin/swtpm"), "vtpmd": OURS}
TIMEOUT_S = 30


class Place:
    """A directory with a state, and what is served from it."""

    def __init__(
        self, program: Path, directory: Path, version: TpmVersion = TpmVersion.TPM_2_0
    ) -> None:
        self.program = program
        self.names = names_of(version)
        self.version_options = ["--tpm2"] if version is TpmVersion.TPM_2_0 else []
        self.directory = directory
        self.state = directory / "state"
        self.state.mkdir(parents=True)
        self.control = directory / "ctrl"
        self.pid_file = directory / "pid"
        self._processes: list[subprocess.Popen[str]] = []

    def options(self, *more: str) -> list[str]:
        """Return a command line that serves, with what comes in addition."""
        return [
            str(self.program),
            "socket",
            *self.version_options,
            *("--ctrl", f"type=unixio,path={self.control}"),
            *("--tpmstate", f"dir={self.state}"),
            *("--pid", f"file={self.pid_file}"),
            *more,
        ]

    def start(self, *more: str, fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
        """Start it, and wait until it can be connected to."""
        return self.start_by(self.options(*more), fds)

    def start_by(self, command: Sequence[str], fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
        """Start it by a command line that has those options, and wait as above."""
        process = subprocess.Popen(
            command,
            cwd=self.directory,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=fds,
        )
        self._processes.append(process)
        wait_until(self.pid_file.exists)
        return process

    def end(self) -> None:
        """Kill what runs still."""
        for process in self._processes:
            process.kill()
            process.communicate()
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int(self.pid_file.read_text()), signal.SIGKILL)
