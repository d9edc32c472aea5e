"""The shell commands that documents show: lines of the indented blocks that are commands.

A block is a drawing, a dump, Python or what a table of the caller's names; all other lines are
commands, so that none is overlooked. A comment after a command is for people.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

INDENT = "    "
DRAWN = re.compile("[─-╿▲▼◄►]")
DUMP = re.compile(r"[0-9a-f]{4}(  | [0-9a-f]{2}\b)")
PYTHON = re.compile(r"(import|from|def|class|@)\b")
COMMENT = re.compile(r"\s+#.*")
PROMPT = "$ "  # of a shell, where what a command prints is shown, too
INPUT = "(QEMU) "  # of qmp-shell: what a person types there


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command as it is written, and what is shown with it."""

    section: str  # the document, and the heading that the command is under
    text: str
    typed: tuple[str, ...] = field(default=())  # into it
    printed: tuple[str, ...] = field(default=())  # by it


def commands(path: Path, others: Iterable[str]) -> list[Command]:
    """Return a document's commands; a block that begins with one of `others` has none."""
    return [
        command
        for section, block in _blocks(path)
        if not _is_none(block, tuple(others))
        for command in _of(section, block)
    ]


def _blocks(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the section and the lines of each indented block; an empty line does not end one."""
    heading, block = "", list[str]()
    for line in [*path.read_text().splitlines(), "end"]:
        if line.startswith(INDENT) or (block and not line.strip()):
            block.append(line.removeprefix(INDENT))
            continue
        if block:
            yield f"{path.name}: {heading}", [each for each in block if each.strip()]
            block = []
        if line.startswith("#"):
            heading = line.strip("# ")


def _is_none(block: list[str], others: tuple[str, ...]) -> bool:
    return (
        any(DRAWN.search(line) for line in block)
        or DUMP.match(block[0]) is not None
        or PYTHON.match(block[0]) is not None
        or block[0].startswith(others)
    )


def _of(section: str, block: list[str]) -> Iterator[Command]:
    """Yield a block's commands; with prompts, lines without one are what was printed."""
    is_session = any(line.startswith((PROMPT, INPUT)) for line in block)
    found: list[tuple[str, list[str], list[str]]] = []
    for line in block:
        if line.startswith(INPUT):
            found[-1][1].append(line.removeprefix(INPUT))
        elif is_session and found and not line.startswith(PROMPT):
            found[-1][2].append(line)
        else:
            found.append((COMMENT.sub("", line.removeprefix(PROMPT)).rstrip(), [], []))
    for text, typed, printed in found:
        yield Command(section=section, text=text, typed=tuple(typed), printed=tuple(printed))
