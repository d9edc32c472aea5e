"""``vtpmd verify``: whether a vTPM's state is right, without a start."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from vtpmd.cli import at_rest, export_options, state_at
from vtpmd.errors import UsageError

if TYPE_CHECKING:
    from vtpmd.inspect.verification import Check

EXIT_STATUS: Final = {"fine": 0, "damaged": 5, "newer": 8}
WORDS: Final = {
    "fine": "nothing is wrong",
    "damaged": "it is damaged",
    "newer": "nothing is wrong, but this host's libtpms is too old for it",
}

EPILOG: Final = """\
example:
  vtpmd verify /srv/web1-tpm

  Checks what a state is in (headers, checksums, the chain of a journal's records), its structure
  byte by byte, and asks this host's libtpms whether it takes it. PATH is as for vtpmd inspect: a
  state directory, served or not, a state file or blob, a migration stream, an export; or the
  directory of a chain that vtpmd backup has written: then all of it is read, and each of its states
  restored and checked. Nothing is locked or written.

exit status:
  0   nothing is wrong
  1   it cannot be read
  2   the command line was wrong
  4   the state is encrypted and --key is missing or wrong, or --key is given and it is not; or
      what an export is sealed with
  5   something is damaged
  8   nothing is wrong, but this host's libtpms is too old for it
  9   it is no state of a TPM
  12  it has no such generation as --at names
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "verify",
        help="check that a vTPM's state is right",
        description="Check that a vTPM's state is right.",
        epilog=EPILOG,
    )
    state_at.add_arguments(parser)
    export_options.add_sealing(parser, "open")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Check; return the exit status. Raises VtpmdError."""
    from vtpmd.core import forbid_core_dumps
    from vtpmd.inspect.verification import verdict, verify
    from vtpmd.store.chain import is_chain

    if options.path.is_dir() and is_chain(options.path):
        forbid_core_dumps()
        return _run_on_chain(options)
    with ExitStack() as stack:
        seal = stack.enter_context(export_options.seal_of(options, None))
        source = state_at.opened(options.path, options, options.at, seal)
    checks = verify(source)
    about = {"path": source.path, "kind": source.kind, "tpm": source.tpm.facts.word}
    return _report(options, about, checks, verdict(checks).value)


def _run_on_chain(options: argparse.Namespace) -> int:
    """Check a chain of backups. Raises VtpmdError."""
    from vtpmd.inspect.chains import verify_chain
    from vtpmd.inspect.verification import Finding

    if options.at is not None:
        raise UsageError("all of a chain is verified: leave out --at, or give one of its files")
    with ExitStack() as stack:
        key = stack.enter_context(at_rest.key_of(options.key))
        seal = stack.enter_context(export_options.seal_of(options, key))
        chain, checks = verify_chain(options.path, seal)
    points = chain.points()
    findings = {check.finding for check in checks}
    worst = "newer" if Finding.NEWER in findings else "fine"
    about = {
        "path": str(options.path),
        "kind": "chain",
        "tpm": points[0].header.version.facts.word if points else None,
        "backups": [
            {
                "file": each.name,
                "number": each.number,
                "whole": not each.header.is_delta,
                "bytes": each.n_bytes,
                **export_options.outcome_of(each.header),
            }
            for each in points
        ],
    }
    return _report(options, about, checks, "damaged" if Finding.FAILED in findings else worst)


def _report(
    options: argparse.Namespace, about: dict[str, Any], checks: list[Check], found: str
) -> int:
    outcome = {
        **about,
        "verdict": found,
        "checks": [
            {"name": check.name, "finding": check.finding.value, "what": check.what}
            for check in checks
        ],
    }
    lines = [f"{check.name}: {check.finding.value}: {check.what}" for check in checks]
    at_rest.report(outcome, [*lines, f"{about['path']}: {WORDS[found]}"], as_json=options.json)
    return EXIT_STATUS[found]
