"""What a state that is looked at is given by: a path, whatever lies there, and keys."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtpmd.cli import at_rest

if TYPE_CHECKING:
    import argparse

    from vtpmd.inspect.directories import History
    from vtpmd.inspect.source import Source
    from vtpmd.store.export_seal import Seal

GENERATION_DIGITS_MAX: Final = 19  # of the largest, 63 bits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to a command."""
    parser.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="state directory, state file, blob, device, stream or disk image",
    )
    add_keys(parser)
    add_generation(parser, "--at", "at", "as it was at this generation: see vtpmd log")
    parser.add_argument(
        "--snapshot", metavar="NAME", help="of a disk image of QEMU's: this one, not the last"
    )


def add_generation(parser: argparse.ArgumentParser, name: str, dest: str, what: str) -> None:
    """Add an option that names a generation."""
    parser.add_argument(name, metavar="GENERATION", dest=dest, type=_generation, help=what)


def _generation(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= GENERATION_DIGITS_MAX):
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{value!r} is no generation, such as 1207")
    return int(value)


def add_keys(parser: argparse.ArgumentParser) -> None:
    """Add what a state, wherever it lies, may be encrypted with."""
    parser.add_argument(
        "--key", metavar="KEY", help="the key that the state is encrypted with, as for vtpmd run"
    )
    parser.add_argument(
        "--migration-key", metavar="KEY", help="swtpm's migration key, of a blob that has one"
    )


def opened(
    path: Path, options: argparse.Namespace, at: int | None = None, seal: Seal = None
) -> Source:
    """Return the state at a path, now or at a generation; no core dump has its secrets.

    An export is opened with ``seal``, or else with the key.

    Raises VtpmdError.
    """
    return opened_with_history(path, options, at, seal)[0]


def opened_with_history(
    path: Path, options: argparse.Namespace, at: int | None = None, seal: Seal = None
) -> tuple[Source, History | None]:
    """Return the state at a path, as ``opened``, and of a directory what led there."""
    from vtpmd.core import forbid_core_dumps
    from vtpmd.inspect.containers import open_with_history

    forbid_core_dumps()
    with ExitStack() as stack:
        key = stack.enter_context(at_rest.key_of(options.key))
        migration_key = stack.enter_context(
            at_rest.key_of(options.migration_key, "--migration-key")
        )
        snapshot = getattr(options, "snapshot", None)  # of vtpmd diff it is the last
        return open_with_history(path, key, migration_key, at, snapshot, seal)
