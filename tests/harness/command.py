"""vtpmd's commands as a person runs them: what they print, and the status that they end with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT_S = 60.0


class Ended(NamedTuple):
    """A command that has ended."""

    status: int
    output: str
    error: str

    @property
    def outcome(self) -> dict[str, Any]:
        """What it printed with --json."""
        outcome: dict[str, Any] = json.loads(self.output)
        return outcome


def vtpmd(*arguments: str | Path) -> Ended:
    """Run a command of vtpmd to its end; what goes wrong is one line without a traceback."""
    program = Path(sys.executable).with_name("vtpmd")
    command = [program, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if ended.returncode not in (0, 2):
        assert len(ended.stderr.splitlines()) <= 1, ended.stderr
    return Ended(ended.returncode, ended.stdout, ended.stderr)
