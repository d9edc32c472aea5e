"""``vtpmd export``: a vTPM's state in one file, whether the vTPM is served or not."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtpmd.cli import at_rest, export_options, new_file
from vtpmd.errors import UsageError

if TYPE_CHECKING:
    from vtpmd.store.export_seal import Header
    from vtpmd.store.exporting import Taken

SEALINGS = {
    "key": "sealed with a key",
    "age": "sealed with age",
    None: "in the clear: keep it secret",
}

EPILOG = """\
example:
  vtpmd export /srv/web1-tpm > web1.vtpm
  vtpmd export /srv/web1-tpm --key file=/etc/vtpmd/web1.key,mode=aes-256-cbc --out web1.vtpm
  vtpmd export --manage /run/web1.manage --recipient "$PUBLIC_KEY" --out web1.vtpm
  vtpmd export --manage /run/web1.manage --volatile --out web1.vtpm
  vtpmd import web1.vtpm /srv/web2-tpm --identity copy

  Exports the vTPM in a state directory, of vtpmd's or swtpm's, or in a linear file: its permanent
  state, of a generation that its guest was or is about to be answered of, and nothing older than
  when the command began. One that is served may be written to meanwhile; nobody waits for it, and
  nothing is locked. With --manage its vtpmd answers the state, and no state directory is needed.
  --volatile adds the volatile state: of one that is stopped, what is stored of it; with --manage,
  of a TPM that runs, all of it and the permanent state of that moment. The guest's commands wait
  for no more than a copy in memory.

  With --key, which the state is encrypted with, the export is sealed with it, too; --seal-key,
  --recipient and --passphrase-file seal it otherwise, the latter two in age's format (Python
  package pyrage). Else it holds the TPM's secrets in the clear. docs/export-format.md has its
  bytes. It is never written to a terminal; with --out the file is made anew, and never replaced.
  What was exported is told on standard output with --out, else on standard error.

exit status:
  0  exported
  1  it cannot be read, the vtpmd that is asked refuses for another reason than those below, or is
     an earlier one and refuses for any, or the export cannot be written
  2  the command line was wrong, or standard output is a terminal
  3  --volatile without --manage: the vTPM is served
  4  the state is encrypted and --key is missing or wrong, or it is not encrypted and --key is given
  5  what is there is damaged: see vtpmd recover
  9  there is no vTPM
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "export",
        help="write a vTPM's state, served or not, into one file",
        description="Write a vTPM's state, served or not, into one file.",
        epilog=EPILOG,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "path", metavar="PATH", nargs="?", type=Path, help="state directory, or linear file"
    )
    what.add_argument(
        "--manage", metavar="PATH", type=Path, help="ask the vtpmd that has this management socket"
    )
    parser.add_argument("--out", metavar="PATH", type=Path, help="make this file of it")
    parser.add_argument("--volatile", action="store_true", help="add the volatile state")
    parser.add_argument(
        "--key", metavar="KEY", help="the key that the state is encrypted with, as for vtpmd run"
    )
    export_options.add_sealing(parser, "seal")
    parser.add_argument("--json", action="store_true", help="tell what was exported as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Export; return the exit status. Raises VtpmdError."""
    from vtpmd.cli import export_served
    from vtpmd.core import forbid_core_dumps
    from vtpmd.store import exporting

    if options.out is None and sys.stdout.isatty():
        raise UsageError("an export is not for a terminal: write it to a file, or give --out PATH")
    if options.out is not None:
        new_file.check_is_new(options.out)
    forbid_core_dumps()
    with ExitStack() as stack:
        key = stack.enter_context(at_rest.key_of(options.key))
        seal = stack.enter_context(export_options.seal_of(options, key))
        if options.manage is not None:
            path, taken = export_served.take(options.manage, key, with_volatile=options.volatile)
        else:
            path = options.path
            taken = exporting.take(path, key, with_volatile=options.volatile)
        header, content = exporting.export(taken, seal)
    if options.out is None:
        _write_out(content)
    else:
        new_file.make(options.out, content)
    _report(options, path, taken, header, len(content))
    return 0


def _write_out(content: bytes) -> None:
    try:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except OSError as error:
        raise new_file.CannotWrite(
            f"cannot write the export: {error.strerror}; try again"
        ) from error


def _report(
    options: argparse.Namespace, path: Path, taken: Taken, header: Header, n_bytes: int
) -> None:
    record = taken.record
    outcome: dict[str, Any] = {
        "path": str(path),
        **export_options.outcome_of(header),
        "bytes": n_bytes,
        "served": taken.is_served,
        "owner": None if record is None else record.whose.value,
    }
    lines = [
        f"{path}: exported generation {header.generation} of the TPM {outcome['tpm']}, "
        f"{', '.join(outcome['states'])}: {n_bytes} bytes, {SEALINGS[header.sealing]}"
    ]
    lines += export_options.warnings(path, taken)
    text = json.dumps(outcome) if options.json else "\n".join(lines)
    print(text, file=sys.stderr if options.out is None else sys.stdout)
