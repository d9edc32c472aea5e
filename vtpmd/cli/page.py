"""A page for a browser, as a command line asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vtpmd.cli import new_file

if TYPE_CHECKING:
    import argparse


def add_argument(group: argparse._MutuallyExclusiveGroup) -> None:
    """Add the option to those that say how something is shown."""
    group.add_argument(
        "--html", metavar="FILE", type=Path, help="make a page of it, in one file, for a browser"
    )


def now() -> str:
    """Return the time, as a page says when it was made."""
    from datetime import UTC, datetime

    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def make(path: Path, content: bytes) -> None:
    """Make the file, and say so. Raises CannotWrite, or UsageError if something is there."""
    new_file.make(path, content)
    print(f"{path}: a page of {len(content)} bytes; open it with a browser")
