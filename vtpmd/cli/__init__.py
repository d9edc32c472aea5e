"""The command line: one command a module, each with ``add_parser()`` and ``run()``.

Start-up time is a feature: a module is imported when its command is asked for, and what a command
only needs later it imports later.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vtpmd import __version__
from vtpmd.cli import fold, migrate, owner, pki, recover, rekey, run
from vtpmd.errors import VtpmdError

DESCRIPTION = "A vTPM daemon for QEMU: serves a guest's TPM 2.0 behind -tpmdev emulator."
EPILOG = """\
example:
  vtpmd run /srv/web1-tpm

Each command has its own help: vtpmd COMMAND --help
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="vtpmd",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vtpmd {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run.add_parser(commands)
    migrate.add_parser(commands)
    owner.add_parser(commands)
    pki.add_parser(commands)
    fold.add_parser(commands)
    recover.add_parser(commands)
    rekey.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. Errors are one line on standard error."""
    options = build_parser().parse_args(arguments)
    try:
        status: int = options.command(options)
    except VtpmdError as error:
        print(f"vtpmd: {error}", file=sys.stderr)
        status = error.exit_status
    return status
