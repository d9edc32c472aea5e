"""A vTPM that takes the place of another one, by what a person would do."""

from pathlib import Path
from typing import Any

from tests.harness.command import vtpmd
from tests.harness.lab import Lab


def replace(lab: Lab, state: Path, *options: str) -> tuple[Path, dict[str, Any]]:
    """Export and import a vTPM; return the new directory, and what was said."""
    out, into = lab.new_path("export"), lab.new_path("into")
    ended = vtpmd("export", state, "--out", out, *options)
    assert ended.status == 0, ended.error
    ended = vtpmd("import", out, into, "--identity", "replace", "--json", *options)
    assert ended.status == 0, ended.error
    return into, ended.outcome
