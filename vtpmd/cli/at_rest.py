"""What ``vtpmd fold``, ``recover`` and ``rekey`` have in common: a state directory at rest."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vtpmd.store.directory import StateDirectory
    from vtpmd.store.keys import Key

EXIT_IN_USE_AND_KEY: Final = """\
  2  the command line was wrong
  3  the state directory is in use by a vtpmd or swtpm
  4  the state is encrypted and --key is missing or wrong, or it is not encrypted and --key is given
"""


def new_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    epilog: str,
) -> argparse.ArgumentParser:
    """Add a command on a state directory to the command line; return its parser."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="state directory, not in use")
    parser.add_argument(
        "--key", metavar="KEY", help="the key that the state is encrypted with, as for vtpmd run"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    return parser


@contextmanager
def opened(path: Path, *, claims: bool = False) -> Iterator[StateDirectory]:
    """Open and lock a state directory that is there, as StateDirectory.open() does.

    Raises VtpmdError.
    """
    from vtpmd.core import forbid_core_dumps
    from vtpmd.store.directory import StateDirectory

    forbid_core_dumps()
    with StateDirectory.open(path, make=False, claims=claims) as directory:
        yield directory


@contextmanager
def key_of(value: str | None, option: str = "--key") -> Iterator[Key | None]:
    """Read the key that an option's value names; it is overwritten at the end.

    Raises VtpmdError.
    """
    from vtpmd.store.keys import parse_key_source, read_key

    if value is None:
        yield None
        return
    with read_key(parse_key_source(value, option)) as key:
        yield key


def add_anchor(parser: argparse.ArgumentParser) -> None:
    """Add the option that names an anchor."""
    parser.add_argument("--anchor", metavar="PATH", type=Path, help="as for vtpmd run")


def report(outcome: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    """Print what was done or found: for people, or for programs."""
    print(json.dumps(outcome) if as_json else "\n".join(lines))
