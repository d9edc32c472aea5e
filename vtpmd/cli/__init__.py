"""The command line: one command a module, each with ``add_parser()`` and ``run()``.

Start-up time is a feature: a module is imported when its command is asked for, and what a command
only needs later it imports later. So is argparse, which a start does without.
"""

from __future__ import annotations

import os
import sys

from vtpmd.errors import VtpmdError
from vtpmd.front.standard_descriptors import open_standard_descriptors
from vtpmd.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from types import SimpleNamespace

OUTPUT_FD = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. Errors are one line on standard error."""
    open_standard_descriptors()
    given = sys.argv[1:] if arguments is None else arguments
    if "socket" in given[:1]:
        from vtpmd.front.swtpm import main as serve_as_swtpm

        return serve_as_swtpm(given)
    options: argparse.Namespace | SimpleNamespace | None = None
    try:
        try:
            options = _plain_run(given) or _parsed(given)
            status: int = options.command(options)
        finally:
            _flush()  # for what finds no room, this is the last moment to say so
    except VtpmdError as error:
        print(f"vtpmd: {error}", file=sys.stderr)
        status = error.exit_status
    except OSError as error:
        status = _explain(error, given[0], is_debugging=getattr(options, "log", None) == "debug")
    return status


def _explain(error: OSError, command: str, *, is_debugging: bool) -> int:
    """Say in one line what no command has foreseen, as a disk that fails; return the status.

    Who has seen enough of what is printed, as a pager, or head(1), knows why that ends.
    """
    if is_debugging:
        import traceback

        traceback.print_exception(error)
    place = "" if error.filename is None else f" on {os.fsdecode(error.filename)}"
    reason = error.strerror or error
    if not (isinstance(error, BrokenPipeError) and _is_unread()):
        line = f"vtpmd: {command} failed{place}: {reason}; see to that and try again"
        print(line, file=sys.stderr)
    try:
        _flush()
    except OSError:
        # It would be tried once more, and complained of, when the interpreter ends.
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    return VtpmdError.exit_status


def _flush() -> None:
    """Write what was printed. Raises OSError."""
    if sys.stdout is not None:  # as where it was closed
        sys.stdout.flush()


def _is_unread() -> bool:
    """Return whether what is printed goes into a pipe, or a socket, that nobody reads."""
    import select

    poll = select.poll()
    poll.register(OUTPUT_FD, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _plain_run(given: Sequence[str]) -> SimpleNamespace | None:
    """Return what the command line of a start says, if that is plain."""
    if "run" not in given[:1]:
        return None
    from vtpmd.cli.arguments import read_plain
    from vtpmd.cli.run import ARGUMENTS, run

    options = read_plain(given[1:], ARGUMENTS)
    if options is not None:
        options.command = run
    return options


def _parsed(given: Sequence[str]) -> argparse.Namespace:
    from vtpmd.cli.parser import parse

    return parse(given)
