"""What a state that is looked at is given by: a path, whatever lies there, and keys."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from vtpmd.cli import at_rest

if TYPE_CHECKING:
    import argparse

    from vtpmd.inspect.source import Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to a command."""
    parser.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="state directory, state file, blob, device or stream",
    )
    add_keys(parser)


def add_keys(parser: argparse.ArgumentParser) -> None:
    """Add what a state, wherever it lies, may be encrypted with."""
    parser.add_argument(
        "--key", metavar="KEY", help="the key that the state is encrypted with, as for vtpmd run"
    )
    parser.add_argument(
        "--migration-key", metavar="KEY", help="swtpm's migration key, of a blob that has one"
    )


def opened(path: Path, options: argparse.Namespace) -> Source:
    """Return the state at a path; no core dump has its secrets. Raises VtpmdError."""
    from vtpmd.core import forbid_core_dumps
    from vtpmd.inspect.containers import open_source

    forbid_core_dumps()
    with ExitStack() as stack:
        key = stack.enter_context(at_rest.key_of(options.key))
        migration_key = stack.enter_context(at_rest.key_of(options.migration_key))
        return open_source(path, key, migration_key)
