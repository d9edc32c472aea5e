"""Write vtpmd's man pages and shell completions, all of them made from its command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from textwrap import dedent

import shtab
from build_manpages.manpage import Manpage

from vtpmd import __version__
from vtpmd.cli.parser import build_parser
from vtpmd.front.prints import HELP as SWTPM_HELP

EPILOG = """\
example:
  python3 -m scripts.manual build/manual

  It makes, in that directory, man/vtpmd.1, a page for each command, and vtpmd-swtpm.1; and
  completion/vtpmd for bash and completion/_vtpmd for zsh. Needs argparse-manpage and shtab.

exit status:
  0  written
  1  a file could not be written
  2  the command line was wrong
"""

SHELLS = {"bash": "vtpmd", "zsh": "_vtpmd"}
# What a value is, by the name that the help has for it.
COMPLETED = {"DIR": shtab.DIRECTORY, "PATH": shtab.FILE}
LINE_WIDTH = 10_000  # no line is broken here: man does that
# The help's sections begin with such a line, and the man page's with the heading.
HEADING = re.compile(r"^([a-z ]+):\n", re.MULTILINE)
# An exit status, and what it says.
ENTRY = re.compile(r"(\d+) +(.*)")
COMMAND_LINE = ("vtpmd ", "swtpm ")


def escaped(text: str) -> str:
    """Return text as roff prints it: no dash becomes a hyphen, and no line a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


def verbatim(text: str) -> str:
    """Return a paragraph whose lines stay as they are."""
    return f".PP\n.nf\n{escaped(text)}\n.fi\n"


def paragraph(text: str) -> str:
    """Return a paragraph of the help as roff: command lines, a list with numbers, or prose."""
    if text.startswith(COMMAND_LINE):
        return verbatim(text)
    if not ENTRY.match(text):
        return f".PP\n{escaped(dedent(text))}\n"
    lines: list[str] = []
    for line in text.splitlines():
        entry = ENTRY.match(line)
        lines += [".TP", entry[1], escaped(entry[2])] if entry else [escaped(line.strip())]
    return "\n".join(lines) + "\n"


def sections(epilog: str) -> Iterator[str]:
    """Yield the sections of a help's epilog, as roff."""
    _, *pieces = HEADING.split(epilog)
    for heading, body in zip(pieces[::2], pieces[1::2], strict=True):
        paragraphs = re.split(r"\n{2,}", dedent(body).strip("\n"))
        yield f".SH {heading.upper()}\n" + "".join(map(paragraph, paragraphs))


def commands_of(
    parser: argparse.ArgumentParser,
) -> argparse._SubParsersAction[argparse.ArgumentParser] | None:
    """Return what has the commands below this one, if there are any."""
    actions = parser._actions
    return next((a for a in actions if isinstance(a, argparse._SubParsersAction)), None)


def pages(parser: argparse.ArgumentParser, summary: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of a command's page, and of those of the commands below it."""
    name, commands = parser.prog.replace(" ", "-"), commands_of(parser)
    epilog, parser.epilog = parser.epilog or "", None
    parser.man_short_description = summary  # type: ignore[attr-defined]
    parser.formatter_class = partial(argparse.HelpFormatter, width=LINE_WIDTH)
    page = Manpage(parser)
    page.prog, page.source, page.manual = name, f"vtpmd {__version__}", "vtpmd"
    page.synopsis = parser.format_usage().partition(":")[2].split()  # that has colons of its own
    below = ""
    if commands is not None:
        commands.help = argparse.SUPPRESS  # each has a page
        below = ".SH COMMANDS\n"
        for each in commands._choices_actions:
            below += f".TP\n.BR {escaped(f'{name}-{each.dest}')} (1)\n{escaped(each.help or '')}\n"
            yield from pages(commands.choices[each.dest], each.help or "")
    yield name, f"{page}{below}{''.join(sections(epilog))}"


def page_of_swtpm() -> str:
    """Return the page of the program with swtpm's command line, which argparse does not read."""
    usage, description, options = SWTPM_HELP.partition("\n\nexample:")[0].split("\n\n", 2)
    return (
        f'.TH VTPMD\\-SWTPM 1 "" "vtpmd {__version__}" vtpmd\n'
        ".SH NAME\nvtpmd\\-swtpm \\- serve one vTPM, by the command line of swtpm\n"
        f".SH SYNOPSIS\n{escaped(usage.removeprefix('Usage: '))}\n"
        f".SH DESCRIPTION\n{escaped(description)}\n{verbatim(options)}"
        f"{''.join(sections(SWTPM_HELP))}"
        ".SH SEE ALSO\n.BR vtpmd (1),\n.BR vtpmd\\-run (1)\n"
    )


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Tell shtab which values are files, for a command and those below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                add_completion(each)
        elif action.metavar in COMPLETED:
            action.complete = COMPLETED[action.metavar]  # type: ignore[attr-defined]


def write(directory: Path) -> None:
    """Write all files. Raises OSError."""
    for name in ("man", "completion"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    parser = build_parser()
    add_completion(parser)
    for shell, name in SHELLS.items():
        (directory / "completion" / name).write_text(shtab.complete(parser, shell) + "\n")
    made = dict(pages(build_parser(), "a vTPM daemon for QEMU that moves with its guest"))
    for name, text in (made | {"vtpmd-swtpm": page_of_swtpm()}).items():
        (directory / "man" / f"{name}.1").write_text(text)


def main() -> int:
    """Write what there is into the directory that is named, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 -m scripts.manual",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to; made if new")
    directory: Path = parser.parse_args().directory
    try:
        write(directory)
    except OSError as error:
        print(f"manual: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
