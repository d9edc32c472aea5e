"""The command line as argparse reads it, with its help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vtpmd import __version__

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

# In the order of the help; each is the module of that name here, but for the MODULES below.
COMMANDS = (
    *(
        "run",
        "attach",
        "status",
        "inspect",
        "verify",
        "diff",
        "log",
        "identity",
        "migrate",
        "owner",
        "pki",
    ),
    *("export", "backup", "import"),
    *("fold", "recover", "rekey"),
)
MODULES = {"import": "importing"}  # where Python has the name for itself

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
        # An abbreviation in a script would become ambiguous, or another option, with the next one.
        super().__init__(
            **options,
            allow_abbrev=False,
            formatter_class=partial(argparse.HelpFormatter, width=80),
        )

    def format_usage(self) -> str:
        """Return the usage."""
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_usage()

    def format_help(self) -> str:
        """Return the help."""
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_help()

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help. Raises OSError, which argparse keeps to itself from Python 3.12 on."""
        print(self.format_help(), end="", file=file)


class _Version(argparse.Action):
    """Print which vtpmd this is, and over which libtpms: it has to be asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from vtpmd.store.libtpms import library

        print(f"vtpmd {__version__}, {library()}")
        parser.exit()


def build_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return the parser of the command line, with the commands of these names."""
    parser = Parser(prog="vtpmd", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        dest=argparse.SUPPRESS,
        help="print the versions of vtpmd and libtpms",
    )
    commands = parser.add_subparsers(prog="vtpmd", metavar="COMMAND", required=True)
    for name in names:
        import_module(f"vtpmd.cli.{MODULES.get(name, name)}").add_parser(commands)
    return parser


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Return what a command line says. Ends the program for one that is wrong, and for help."""
    # What does not begin with a command asks for help, or is wrong: then all are listed.
    names = [name for name in COMMANDS if name in given[:1]]
    return build_parser(names or COMMANDS).parse_args(given)
