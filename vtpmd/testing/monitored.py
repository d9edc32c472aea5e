"""A QEMU process and the connection to its monitor."""

import contextlib
from pathlib import Path
from typing import Any

from vtpmd.closing import Closing
from vtpmd.testing.monitor import Monitor
from vtpmd.testing.program import Program

QMP_TIMEOUT_S = 30.0


class Monitored(Closing):
    """A QEMU that is driven over QMP; `monitor` is qemu.qmp's blocking client, which `qmp` uses."""

    def __init__(self, program: Program, path: Path) -> None:
        """Connect to the monitor at `path` as soon as QEMU serves it; raises as Program does."""
        self.program = program
        program.connect(path).close()
        self.monitor = Monitor(str(path))
        self.monitor.settimeout(QMP_TIMEOUT_S)
        self.monitor.connect()

    def close(self) -> None:
        """End QEMU, if it still runs, and the connection to it."""
        self.program.kill()
        with contextlib.suppress(EOFError, ConnectionError):
            self.monitor.close()  # says so when the other side has gone, but has closed then

    def qmp(self, command: str, **arguments: object) -> Any:
        """Run a QMP command and return its result; ExecuteError when QEMU answers an error."""
        return self.monitor.cmd(command, **arguments)

    def human_monitor(self, command_line: str) -> str:
        """Run a command of the human monitor; return what it says."""
        return str(self.qmp("human-monitor-command", **{"command-line": command_line}))

    @property
    def status(self) -> str:
        """The machine's run state, as query-status names it."""
        return str(self.qmp("query-status")["status"])
