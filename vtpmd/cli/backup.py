"""``vtpmd backup``: add a vTPM's state, served or not, to a chain of backups."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vtpmd.cli import at_rest, export_options

if TYPE_CHECKING:
    from vtpmd.store.chain_writing import Outcome
    from vtpmd.store.exporting import Taken
    from vtpmd.store.keys import Key

KEEP_DIGITS_MAX: Final = 5

EPILOG: Final = """\
example:
  vtpmd backup /srv/web1-tpm /backup/web1 --keep 30
  vtpmd backup /srv/web1-tpm /backup/web1 --key file=/etc/vtpmd/web1.key,mode=aes-256-cbc
  vtpmd backup --manage /run/web1.manage /backup/web1 --keep 30
  vtpmd verify /backup/web1
  vtpmd import /backup/web1 /srv/web2-tpm --identity copy

  DEST is a directory of its own, which is made if it is not there: the first backup into it is an
  export of the whole permanent state, each later one what has changed since the one before, a file
  each. If nothing has changed, no file is made. The vTPM is exported as vtpmd export does it: one
  that is served may be written to meanwhile, and nobody waits. PATH may be a linear file. The
  volatile state is in no backup. With --manage, PATH is the management socket of the vTPM's vtpmd,
  which answers the state: who backs up needs no state directory, and the same --key. One chain may
  have both.

  --keep N keeps the newest N. Before older ones are removed, the oldest that stays is written
  whole, durably: at no moment, also if power is lost, can fewer be restored. A backup that was
  interrupted has happened or not, and the next one tidies up. All of the chain is read each time,
  and nothing is removed while something is wrong with it.

  A chain is of one vTPM, and of one line of it: after an import, or a snapshot that QEMU has
  loaded, which begin a restore epoch, give another DEST. It is sealed as an export is, and always
  alike. What is sealed with age cannot be opened by who makes it, so there each backup is a whole
  one, and only the vTPM's generation tells whether anything has changed.

exit status:
  0   backed up; or nothing has changed, which is said
  1   it cannot be read, or the vtpmd that is asked refuses for another reason than those below, or
      is an earlier one and refuses for any, or DEST cannot be written
  2   the command line was wrong
  3   another backup into DEST is under way
  4   the state is encrypted and --key is missing or wrong, or it is not encrypted and --key is
      given; or the chain is sealed otherwise
  5   what is there is damaged: see vtpmd recover; or the chain is: see vtpmd verify DEST
  9   there is no vTPM, or the chain is of a later version of vtpmd
  10  DEST has something else in it, or is of another vTPM, or of a copy; nothing was changed
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "backup",
        help="add a vTPM's state, served or not, to a chain of backups",
        description="Add a vTPM's state, served or not, to a chain of backups.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="state directory, or linear file; with --manage, a management socket",
    )
    parser.add_argument("destination", metavar="DEST", type=Path, help="directory of the chain")
    parser.add_argument(
        "--manage", action="store_true", help="PATH is the management socket of a vtpmd: ask that"
    )
    parser.add_argument(
        "--keep", metavar="N", type=_count, help="remove all but the newest N; else all stay"
    )
    parser.add_argument(
        "--key", metavar="KEY", help="the key that the state is encrypted with, as for vtpmd run"
    )
    export_options.add_sealing(parser, "seal")
    parser.add_argument("--json", action="store_true", help="tell what was done as JSON")
    parser.set_defaults(command=run)


def _count(value: str) -> int:
    if value.isascii() and value.isdigit() and len(value) <= KEEP_DIGITS_MAX and int(value) > 0:
        return int(value)
    raise argparse.ArgumentTypeError(f"{value!r} is no number of backups to keep, such as 30")


def run(options: argparse.Namespace) -> int:
    """Back up; return the exit status. Raises VtpmdError."""
    from vtpmd.core import forbid_core_dumps
    from vtpmd.store import chain_writing

    forbid_core_dumps()
    with ExitStack() as stack:
        key = stack.enter_context(at_rest.key_of(options.key))
        seal = stack.enter_context(export_options.seal_of(options, key))
        outcome = chain_writing.back_up(
            options.destination,
            options.path,
            lambda: _take(options, key),
            seal,
            options.keep,
        )
    _report(options, outcome)
    return 0


def _take(options: argparse.Namespace, key: Key | None) -> Taken:
    """Return the state that is to be backed up. Raises VtpmdError."""
    if options.manage:
        from vtpmd.cli import export_served

        return export_served.take(options.path, key)[1]
    from vtpmd.store import exporting

    return exporting.take(options.path, key)


def _report(options: argparse.Namespace, outcome: Outcome) -> None:
    from vtpmd.store.chain import shown

    newest, taken = outcome.newest, outcome.taken
    told: dict[str, Any] = {
        "path": str(options.path),
        "destination": str(options.destination),
        "changed": outcome.is_new,
        "file": newest.name,
        "number": newest.number,
        "whole": not newest.header.is_delta,
        **export_options.outcome_of(newest.header),
        "bytes": newest.n_bytes,
        "backups": outcome.n_points,
        "removed": list(outcome.removed),
        "served": taken.is_served,
        "owner": None if taken.record is None else taken.record.whose.value,
    }
    has = f"{options.destination} has {outcome.n_points} that can be restored"
    file = options.destination / shown(newest.name)
    if outcome.is_new:
        what = "what has changed" if newest.header.is_delta else "the whole state"
        line = f"{file}: {what}, of generation {taken.generation}: {newest.n_bytes} bytes; {has}"
    else:
        line = f"nothing has changed since {file}, of generation {newest.header.generation}; {has}"
    lines = [line, *(f"removed: {shown(name)}" for name in outcome.removed)]
    lines += export_options.warnings(options.path, taken)
    print(json.dumps(told) if options.json else "\n".join(lines))
