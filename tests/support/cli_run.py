"""Runs of vtpmd's commands in this process, as a person and a program meet them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtpmd import cli


class Run:
    """One run of a command."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> None:
        """Run it; `arguments` begin with its name."""
        self.status = cli.main([str(argument) for argument in arguments])
        self.output, self.error = capsys.readouterr()
        self.lines = self.output.splitlines()

    @property
    def outcome(self) -> dict[str, Any]:
        """What it printed with --json."""
        outcome: dict[str, Any] = json.loads(self.output)
        return outcome


Command = Callable[..., Run]  # with the arguments of a command line


class QuietRun(Run):
    """One of a command that says at most one line on standard error."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> None:
        """Run it; see Run."""
        super().__init__(capsys, *arguments)
        assert len(self.error.splitlines()) <= 1
