"""Make the engine's system call filter from the comments beside what needs the calls.

Usage: sandbox_build.py OUTPUT [--sanitizers] -- COMPILER [OPTION...]

A comment that has `sandbox:` in it lists, from there to its end, what its place needs:

    close poll|ppoll        may be made; of alternatives, the first that the architecture has
    time?                   there are architectures without it
    fcntl(arg1 == F_GETFL or F_SETFL)
    mmap(arg2 lacks PROT_EXEC, arg4 == -1)
                            only with such arguments; what is compared is C, evaluated when the
                            filter is installed, and the lower 32 bits of the argument
    lseek=ESPIPE            is not made, but answered with this error; 0 for success

A call that several places need may be made as any of them says. `sandbox(sanitizers):` counts only
in builds with sanitizers. The compiler says which number a call has on its architecture.

The filter is a binary search over the numbers. Linux remembers, for each number, that it is allowed
whatever the arguments are, so what each command of a guest needs should have no conditions.

Exit status: 0 the header is there, 1 a comment is wrong (one line says where), 2 wrong usage.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parent
COMMENT = re.compile(r"\bsandbox(?P<sanitizers>\(sanitizers\))?:(?P<calls>[^;{}]*?)\*/")
ENTRY = re.compile(
    r"(?P<names>\w+(?:\|\w+)*)(?P<optional>\?)?"
    r"(?:\((?P<conditions>(?:[^()]|\([^()]*\))*)\))?(?:=(?P<error>\w+))?(?:\s+|$)"
)
CONDITION = re.compile(r"arg(?P<index>[0-5])\s+(?P<test>==|lacks)\s+(?P<values>.+)")
JUMP_MAX = 255


class CommentError(Exception):
    """A comment that says nothing, or not what it seems to say."""


@dataclass(frozen=True)
class Condition:
    """What an argument has to be: one of some values, or without any of some bits."""

    index: int
    test: str
    values: tuple[str, ...]


@dataclass
class Call:
    """What is answered to one system call."""

    name: str
    number: int
    error: str | None
    ways: list[tuple[Condition, ...]] = field(default_factory=list)


def condition(text: str) -> Condition:
    """Read one condition."""
    match = CONDITION.fullmatch(text.strip())
    if not match:
        raise CommentError(f"`{text.strip()}` is no condition")
    values = tuple(value.strip() for value in match["values"].split(" or "))
    return Condition(int(match["index"]), match["test"], values)


def entries(text: str) -> list[re.Match[str]]:
    """Split what follows `sandbox:` into its entries."""
    text = re.sub(r"\n\s*\*\s", " ", text).strip()
    found, position = [], 0
    while position < len(text):
        match = ENTRY.match(text, position)
        if not match:
            raise CommentError(f"`{text[position:]}` is no system call")
        found.append(match)
        position = match.end()
    return found


def read_comments(sanitizers: bool) -> dict[Path, list[re.Match[str]]]:
    """Return the entries of each of the engine's files."""
    lines = (CSRC / "sources.txt").read_text().splitlines()
    sources = [CSRC / line for line in lines if line and not line.startswith("#")]
    found = {}
    for path in [*sources, *sorted(CSRC.rglob("*.h"))]:
        comments = COMMENT.finditer(path.read_text())
        wanted = [match for match in comments if sanitizers or not match["sanitizers"]]
        try:
            found[path] = [entry for match in wanted for entry in entries(match["calls"])]
        except CommentError as error:
            raise CommentError(f"{path}: {error}") from None
    return found


def numbers(names: set[str], compiler: list[str]) -> dict[str, int]:
    """Ask the compiler for the numbers of those calls that its architecture has."""
    lines = ["#include <sys/syscall.h>", *(f"call {name} __NR_{name}" for name in sorted(names))]
    done = subprocess.run(
        [*compiler, "-E", "-P", "-x", "c", "-"],
        input="\n".join(lines) + "\n",
        check=True,
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^call (\w+) (\d+)$", done.stdout, re.MULTILINE)
    return {name: int(number) for name, number in found}


def merge(comments: dict[Path, list[re.Match[str]]], known: dict[str, int]) -> list[Call]:
    """Bring what all comments say together: one answer for each call, sorted by number."""
    calls: dict[int, Call] = {}
    for path, found in comments.items():
        for entry in found:
            name = next((name for name in entry["names"].split("|") if name in known), None)
            if name is None:
                if entry["optional"]:
                    continue
                raise CommentError(f"{path}: there is no system call `{entry['names']}`")
            call = calls.setdefault(known[name], Call(name, known[name], entry["error"]))
            if call.error != entry["error"]:
                raise CommentError(f"{path}: `{name}` is answered in another way elsewhere")
            call.ways.append(
                tuple(map(condition, (entry["conditions"] or "").split(",")))
                if entry["conditions"]
                else ()
            )
    return [calls[number] for number in sorted(calls)]


class Program:
    """Instructions whose jumps name what they lead to; by `KILL` and `ALLOW` it ends."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str, str]] = []
        self.labels: dict[str, int] = {}

    def label(self, name: str) -> str:
        """Give the next instruction a name."""
        self.labels[name] = len(self.lines)
        return name

    def load(self, what: str) -> None:
        """Load a field of struct seccomp_data."""
        self.lines.append(
            ("BPF_LD | BPF_W | BPF_ABS", f"offsetof(struct seccomp_data, {what})", "", "")
        )

    def jump(self, test: str, value: str, yes: str, no: str) -> None:
        """Compare what was loaded; an empty label is the next instruction."""
        self.lines.append((f"BPF_JMP | {test} | BPF_K", value, yes, no))

    def answer(self, name: str, what: str) -> None:
        """End with an answer."""
        self.label(name)
        self.lines.append(("BPF_RET | BPF_K", what, "", ""))

    def distance(self, at: int, label: str) -> int:
        """Return how many instructions a jump skips."""
        skipped = self.labels[label] - at - 1 if label else 0
        if not 0 <= skipped <= JUMP_MAX:
            raise CommentError(f"{len(self.lines)} instructions are more than a jump can skip")
        return skipped

    def text(self) -> str:
        """Return the initialiser of an array of struct sock_filter."""
        return " \\\n".join(
            f"    BPF_JUMP({code}, ({value}), {self.distance(at, yes)}, {self.distance(at, no)}),"
            for at, (code, value, yes, no) in enumerate(self.lines)
        )


def search(program: Program, calls: list[Call]) -> None:
    """Find a number among some: by halves, down to the one that it must be."""
    if len(calls) == 1:
        call = calls[0]
        found = "ALLOW" if call.error is None and () in call.ways else f"call {call.number}"
        program.jump("BPF_JEQ", f"__NR_{call.name}", found, "KILL")
        return
    lower, upper = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    program.jump("BPF_JGE", f"__NR_{upper[0].name}", f"from {upper[0].number}", "")
    search(program, lower)
    program.label(f"from {upper[0].number}")
    search(program, upper)


def try_way(program: Program, way: tuple[Condition, ...], otherwise: str) -> None:
    """Allow a call whose arguments fulfil all conditions."""
    for one in way:
        program.load(f"args[{one.index}]")
        if one.test == "lacks":
            for bits in one.values:
                program.jump("BPF_JSET", bits, otherwise, "")
            continue
        right = f"after {len(program.lines)}"
        for value in one.values[:-1]:
            program.jump("BPF_JEQ", value, right, "")
        program.jump("BPF_JEQ", one.values[-1], "", otherwise)
        program.label(right)
    program.lines.append(("BPF_RET | BPF_K", "SECCOMP_RET_ALLOW", "", ""))


def answer(program: Program, call: Call) -> None:
    """Answer a call that is not just allowed."""
    program.label(f"call {call.number}")
    if call.error is not None:
        value = f"SECCOMP_RET_ERRNO | {call.error}"
        program.lines.append(("BPF_RET | BPF_K", value, "", ""))
        return
    ways = list(dict.fromkeys(call.ways))
    for i, way in enumerate(ways, 1):
        otherwise = f"call {call.number} way {i}"
        try_way(program, way, otherwise if i < len(ways) else "KILL")
        program.label(otherwise)


def filter_of(calls: list[Call]) -> str:
    """Return the filter as an initialiser."""
    program = Program()
    program.load("arch")
    program.jump("BPF_JEQ", "SANDBOX_ARCHITECTURE", "", "KILL")
    program.load("nr")
    search(program, calls)
    for call in calls:
        if call.error is not None or () not in call.ways:
            answer(program, call)
    program.answer("ALLOW", "SECCOMP_RET_ALLOW")
    program.answer("KILL", "SECCOMP_RET_KILL_PROCESS")
    return program.text()


def header(calls: list[Call]) -> str:
    """Return the header, which refuses to be compiled for another architecture."""
    same = " && ".join(f"__NR_{call.name} == {call.number}" for call in calls)
    return (
        "/* Made by sandbox_build.py from the comments that say `sandbox:`. */\n"
        f'_Static_assert({same}, "made for another architecture");\n'
        f"#define SANDBOX_FILTER \\\n{filter_of(calls)}\n"
    )


def main(arguments: list[str]) -> int:
    """Write the header, if it is not there as it should be: a build then has less to do."""
    if "--" not in arguments[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    options, compiler = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    output = Path(options[0])
    try:
        comments = read_comments("--sanitizers" in options)
        names = {
            name for found in comments.values() for e in found for name in e["names"].split("|")
        }
        text = header(merge(comments, numbers(names, compiler)))
    except CommentError as error:
        print(f"sandbox_build.py: {error}; mend the comment", file=sys.stderr)
        return 1
    if not output.is_file() or output.read_text() != text:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
