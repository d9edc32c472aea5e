"""``vtpmd verify``: whether a vTPM's state is right, without a start."""

from __future__ import annotations

import argparse
from typing import Final

from vtpmd.cli import at_rest, state_at

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
  state directory, served or not, a state file or blob, a migration stream. Nothing is locked or
  written.

exit status:
  0   nothing is wrong
  1   it cannot be read
  2   the command line was wrong
  4   the state is encrypted and --key is missing or wrong, or --key is given and it is not
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
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Check; return the exit status. Raises VtpmdError."""
    from vtpmd.inspect.verification import verdict, verify

    source = state_at.opened(options.path, options, options.at)
    checks = verify(source)
    found = verdict(checks).value
    outcome = {
        "path": source.path,
        "kind": source.kind,
        "tpm": source.tpm.facts.word,
        "verdict": found,
        "checks": [
            {"name": check.name, "finding": check.finding.value, "what": check.what}
            for check in checks
        ],
    }
    lines = [f"{check.name}: {check.finding.value}: {check.what}" for check in checks]
    at_rest.report(outcome, [*lines, f"{source.path}: {WORDS[found]}"], as_json=options.json)
    return EXIT_STATUS[found]
