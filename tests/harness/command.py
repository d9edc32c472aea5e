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


def vtpmd(*arguments: str | Path, hidden: Path | None = None) -> Ended:
    """Run a command of vtpmd to its end; what goes wrong is one line without a traceback.

    It is run in a mount namespace in which nothing is in the directory that is ``hidden``.
    """
    program = Path(sys.executable).with_name("vtpmd")
    hides = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
    before = [] if hidden is None else ["unshare", "--mount", "sh", "-c", hides, str(hidden)]
    command = [*before, program, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if ended.returncode not in (0, 2):
        assert len(ended.stderr.splitlines()) <= 1, ended.stderr
    return Ended(ended.returncode, ended.stdout, ended.stderr)
