"""The command line: one command a module, each with ``add_parser()`` and ``run()``.

Start-up time is a feature: a module is imported when its command is asked for, and what a command
only needs later it imports later.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

from vtpmd import __version__
from vtpmd.errors import VtpmdError

# In the order of the help; each is the module of that name here.
COMMANDS = ("run", "migrate", "owner", "pki", "fold", "recover", "rekey")

DESCRIPTION = "A vTPM daemon for QEMU: serves a guest's TPM 2.0 behind -tpmdev emulator."
EPILOG = """\
example:
  vtpmd run /srv/web1-tpm

Each command has its own help: vtpmd COMMAND --help
"""


class Parser(argparse.ArgumentParser):
    """A parser, as those of its commands are, whose help keeps the lines of its texts.

    It is laid out for the terminal. argparse makes a formatter for each option, too, only to check
    that; looking for the terminal's width then would take longer than all of the parsing.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=partial(argparse.HelpFormatter, width=80))

    def format_usage(self) -> str:
        """Return the usage."""
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_usage()

    def format_help(self) -> str:
        """Return the help."""
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_help()


def build_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return the parser of the command line, with the commands of these names."""
    parser = Parser(prog="vtpmd", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"vtpmd {__version__}")
    commands = parser.add_subparsers(prog="vtpmd", metavar="COMMAND", required=True)
    for name in names:
        import_module(f"vtpmd.cli.{name}").add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. Errors are one line on standard error."""
    _open_standard_descriptors()
    given = sys.argv[1:] if arguments is None else arguments
    # What does not begin with a command asks for help, or is wrong: then all are listed.
    names = [name for name in COMMANDS if name in given[:1]]
    options = build_parser(names or COMMANDS).parse_args(given)
    try:
        status: int = options.command(options)
    except VtpmdError as error:
        print(f"vtpmd: {error}", file=sys.stderr)
        status = error.exit_status
    return status


def _open_standard_descriptors() -> None:
    """Open what is closed of 0, 1 and 2: lines for people must not go into a file of the vTPM's."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
