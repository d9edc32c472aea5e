"""``vtpmd log``: what has happened to a vTPM since its checkpoint, as its journal has it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtpmd.cli import at_rest

if TYPE_CHECKING:
    from vtpmd.inspect.directories import History

EXIT_SHOWN: Final = 0
EXIT_DAMAGED: Final = 5
COMMITS_MAX: Final = 1_000_000  # more than any journal has

EPILOG: Final = """\
example:
  vtpmd log /srv/web1-tpm
  vtpmd log /srv/web1-tpm --last 20 --json
  vtpmd inspect /srv/web1-tpm --at 1207

  Prints each generation of the permanent state that is still known: the checkpoint, and each commit
  in the journal after it, with its time, the bytes that it takes there, and what it has changed, as
  vtpmd diff says it. A vTPM that was stopped has no journal, and so no history. The time is the
  host's, in UTC; the order is the journal's, whatever the host's clock was set to. The directory
  may be in use: nothing is locked or written, and no secret is shown.

exit status:
  0  it was printed
  1  it cannot be read
  2  the command line was wrong
  4  the state is encrypted and --key is missing or wrong, or it is not encrypted and --key is given
  5  something is damaged; what is right was printed, then what is wrong
  9  it is no state directory, or there is no vTPM in it
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "log",
        help="show what has changed in a vTPM, commit by commit",
        description="Show what has changed in a vTPM, commit by commit.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="state directory, in use or not"
    )
    parser.add_argument(
        "--key", metavar="KEY", help="the key that the state is encrypted with, as for vtpmd run"
    )
    parser.add_argument(
        "--last", metavar="N", type=_count, help="print the last N generations alone"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(command=run)


def _count(value: str) -> int:
    if not (value.isascii() and value.isdigit() and 0 < int(value) <= COMMITS_MAX):
        raise argparse.ArgumentTypeError(f"{value!r} is no number from 1 on")
    return int(value)


def run(options: argparse.Namespace) -> int:
    """Print; return the exit status. Raises VtpmdError."""
    from vtpmd.core import forbid_core_dumps
    from vtpmd.inspect.containers import open_history

    forbid_core_dumps()
    with at_rest.key_of(options.key) as key:
        history = open_history(options.directory, key)
    if options.json:
        _print_json(history, options.last)
    else:
        _print_lines(history, options.last)
    return EXIT_DAMAGED if history.source.problems else EXIT_SHOWN


def _print_json(history: History, last: int | None) -> None:
    from vtpmd.inspect.history import commits

    source = history.source
    outcome = {
        "path": source.path,
        "tpm": source.tpm.facts.word,
        "identity": None if source.lineage is None else source.lineage.identity.hex(),
        "in-use": source.is_in_use,
        "problems": list(source.problems),
        "commits": [commit.json() for commit in commits(history, last)],
    }
    print(json.dumps(outcome))


def _print_lines(history: History, last: int | None) -> None:
    """Print as it is worked out: a journal may have some thousand commits."""
    from vtpmd.inspect.history import commits, with_epochs

    last_number = history.steps[-1].to_generation if history.steps else 0
    width = max(len("generation"), len(str(last_number)))
    print(f"{'generation':>{width}}  {'time':<20}  bytes  what")
    for commit, epoch in with_epochs(commits(history, last)):
        if epoch:
            print(epoch)
        generation = "-" if commit.generation is None else commit.generation
        first, *more = commit.lines()
        print(f"{generation:>{width}}  {commit.when:<20}  {commit.journal_bytes:>5}  {first}")
        for line in more:
            print(f"{'':>{width}}  {'':<20}  {'':>5}  {line}")
    for problem in history.source.problems:
        print(problem)
