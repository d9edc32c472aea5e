"""The tree's own rules: lengths, import arrows, the list of C sources, and what files may not say.

A rule about text is a function from a file's text to what is wrong in it. Each rule is tried on an
example just inside it and on one just outside before the tree is held to it.
"""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE_WIDTH_MAX = 100
PYTHON_FUNCTION_LINES_MAX = 50
C_FUNCTION_LINES_MAX = 70

# What reaches outside the process, or makes a result depend on when it was computed.
IO_MODULE_NAMES = (
    "asyncio concurrent datetime fcntl glob http io logging mmap multiprocessing os pathlib qemu"
    " random secrets select selectors shutil signal socket socketserver ssl subprocess sys tempfile"
    " threading time urllib"
)
IO_MODULES = set(IO_MODULE_NAMES.split())
PURE_PACKAGES = ("vtpmd.wire", "vtpmd.migration")
CORE = "vtpmd._core"
CORE_IMPORTER = "vtpmd.core"

# A sanitizer does this itself: what takes its place by its name has it know of no lock.
THREAD_FUNCTION = re.compile(r"^\w[\w *]*\bpthread_\w+\([^;]*$")

# With clang-format, only a function's braces stand alone in the first column.
C_FUNCTION = re.compile(r"^\w[^;{}#]*\n\{\n.*?^\}$", re.MULTILINE | re.DOTALL)
UNFINISHED = re.compile(r"\b(?:TODO|FIXME)\b(?!: \S+ \S+ \S+)")
MACHINE_PATH = re.compile(r"(?<![\w.}/-])/(?:work|root|tmp/v)(?![\w-])")
REGISTRY_HOST = re.compile(
    r"\b(?:pypi|pythonhosted|crates|npmjs|docker|ghcr|quay|deb\.debian|golang)\.(?:org|io|com)\b"
)


def tracked_files() -> list[Path]:
    """Return the files that are committed or would be, relative to the root.

    git refuses another user's clone unless told otherwise, and in a container it often is one.
    """
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = sorted(Path(name) for name in listed.stdout.split("\0") if name)
    return [path for path in paths if (ROOT / path).is_file()]


def read(path: Path) -> str:
    """Return a file's text; what is not UTF-8, as in a fuzz corpus, is replaced."""
    return (ROOT / path).read_text(errors="replace")


def is_script(path: Path) -> bool:
    """Whether a file names its interpreter in its first line."""
    return (ROOT / path).read_bytes().startswith(b"#!")


FILES = tracked_files()
THIS_FILE = Path(__file__).resolve().relative_to(ROOT)
WITHOUT_EXAMPLES = [path for path in FILES if path != THIS_FILE]
PYTHON_FILES = [path for path in FILES if path.suffix == ".py"]
C_FILES = [path for path in FILES if path.suffix in (".c", ".h")]
C_SOURCES = [path for path in C_FILES if path.parts[0] == "csrc" and path.suffix == ".c"]
CODE_FILES = [path for path in FILES if path.suffix in (".py", ".c", ".h") or is_script(path)]


def wide_lines(text: str) -> list[str]:
    """Find lines wider than LINE_WIDTH_MAX columns."""
    widths = [len(line) for line in text.splitlines()]
    return [f"{width} columns" for width in widths if width > LINE_WIDTH_MAX]


def long_python_functions(text: str) -> list[str]:
    """Find Python functions longer than PYTHON_FUNCTION_LINES_MAX, docstring included."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > PYTHON_FUNCTION_LINES_MAX:
                found.append(f"{node.name}: {lines} lines")
    return found


def long_c_functions(text: str) -> list[str]:
    """Find C functions longer than C_FUNCTION_LINES_MAX, signature included."""
    functions = [match[0].splitlines() for match in C_FUNCTION.finditer(text)]
    return [f"{f[0]}: {len(f)} lines" for f in functions if len(f) > C_FUNCTION_LINES_MAX]


def matches(pattern: re.Pattern[str]) -> Callable[[str], list[str]]:
    """Make a rule that finds the lines in which a pattern occurs."""
    return lambda text: [line.strip() for line in text.splitlines() if pattern.search(line)]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule, the files that it holds for, and an example on either side of it."""

    name: str
    find: Callable[[str], list[str]]
    files: list[Path] = field(repr=False)
    right: str = field(repr=False)
    wrong: str = field(repr=False)


def python_function(lines: int) -> str:
    """Return a Python function of so many lines."""
    return "async def f() -> None:\n" + "    g()\n" * (lines - 1)


def c_function(lines: int) -> str:
    """Return a C file with one function of so many lines."""
    return "int x[] = {\n    1,\n};\n\nint f(int a,\n      int b)\n{\n" + "\n" * (lines - 4) + "}\n"


RULES = [
    Rule(
        name="line width",
        find=wide_lines,
        files=CODE_FILES,
        right="x" * LINE_WIDTH_MAX,
        wrong="x\n" + "x" * (LINE_WIDTH_MAX + 1),
    ),
    Rule(
        name="length of Python functions",
        find=long_python_functions,
        files=PYTHON_FILES,
        right=python_function(PYTHON_FUNCTION_LINES_MAX),
        wrong=python_function(PYTHON_FUNCTION_LINES_MAX + 1),
    ),
    Rule(
        name="length of C functions",
        find=long_c_functions,
        files=C_FILES,
        right=c_function(C_FUNCTION_LINES_MAX),
        wrong=c_function(C_FUNCTION_LINES_MAX + 1),
    ),
    Rule(
        name="functions of threads are replaced by the linker",
        find=matches(THREAD_FUNCTION),
        files=C_FILES,
        right="int __wrap_pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)",
        wrong="int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)",
    ),
    Rule(
        name="unfinished work has a reason",
        find=matches(UNFINISHED),
        files=WITHOUT_EXAMPLES,
        right="# TODO: wait for libtpms 0.10",
        wrong="# TODO: later",
    ),
    Rule(
        name="no path of one machine",
        find=matches(MACHINE_PATH),
        files=WITHOUT_EXAMPLES,
        right='"$scratch/root" ./root',
        wrong="cd /root/vtpmd",
    ),
    Rule(
        name="no registry's host",
        find=matches(REGISTRY_HOST),
        files=WITHOUT_EXAMPLES,
        right="https://packages.example.org",
        wrong="https://pypi.org/simple",
    ),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule_finds_what_breaks_it_and_nothing_else(rule: Rule) -> None:
    assert rule.find(rule.right) == []
    assert len(rule.find(rule.wrong)) == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_tree_keeps_the_rule(rule: Rule) -> None:
    assert rule.files
    found = [f"{path}: {what}" for path in rule.files for what in rule.find(read(path))]
    assert not found, "\n".join(found)


def module_name(path: Path) -> str:
    """Return the dotted name of the module in a file."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(text: str, path: Path) -> Iterator[str]:
    """Yield every module that a file may import, and its packages, which are imported with it.

    `from a import b` may import a.b.
    """
    package = path.parts[:-1]
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


MODULES = {module_name(path): path for path in PYTHON_FILES}


def io_imports(module: str) -> dict[str, set[str]]:
    """Return the I/O modules that a module brings in, by the module of ours that imports them."""
    found: dict[str, set[str]] = {}
    waiting, seen = [module], {module}
    while waiting:
        current = waiting.pop()
        imported = set(imports(read(MODULES[current]), MODULES[current]))
        if imported & IO_MODULES:
            found[current] = imported & IO_MODULES
        waiting += [name for name in imported - seen if name in MODULES]
        seen |= imported
    return found


def test_imports_are_found_in_every_form() -> None:
    text = "import os.path\nfrom . import _core\nfrom ..a import b\nfrom socket import socket\n"
    found = set(imports(text, Path("vtpmd/wire/tpm.py")))
    assert {"os", "os.path", "vtpmd.wire._core", "vtpmd.a.b", "socket"} <= found


def test_wire_and_migration_import_no_io() -> None:
    pure = [
        name for name in MODULES if f"{name}.".startswith(tuple(f"{p}." for p in PURE_PACKAGES))
    ]
    assert pure
    assert {name: io for name in pure if (io := io_imports(name))} == {}


def test_io_imports_are_found_through_our_own_modules() -> None:
    assert (
        "subprocess"
        in io_imports(module_name(Path("tests/unit/test_style.py")))["tests.unit.test_style"]
    )


def test_only_the_core_package_imports_the_extension() -> None:
    """In the package, that is: the test of the core compares it with the extension."""
    ours = {name: path for name, path in MODULES.items() if path.parts[0] == "vtpmd"}
    importers = [name for name, path in ours.items() if CORE in imports(read(path), path)]
    assert importers
    assert [name for name in importers if not name.startswith(f"{CORE_IMPORTER}.")] == []


def test_sources_txt_lists_every_c_file_once() -> None:
    lines = read(Path("csrc/sources.txt")).splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    present = [str(path.relative_to("csrc")) for path in C_SOURCES]
    assert sorted(listed) == sorted(present)


def test_files_are_executable_exactly_when_they_are_scripts() -> None:
    executable = [path for path in FILES if (ROOT / path).stat().st_mode & 0o111]
    assert executable == [path for path in FILES if is_script(path)]


# docs/ARCHITECTURE.md draws these arrows. What all may import is left out.
ARROWS = {
    "cli": {"core", "daemon", "front", "inspect", "pki", "store"},
    "core": {"_core"},
    "daemon": {"core", "migration", "store", "wire"},
    "front": {"core", "daemon", "store"},
    "inspect": {"core", "store", "wire"},
    "migration": {"wire"},
    "pki": {"daemon"},
    "store": {"core", "wire"},
    "testing": {"core", "daemon", "pki", "store", "wire"},
    "wire": set(),
    "__main__": {"cli"},
}
FOR_ALL = {
    "",
    "closing",
    "config",
    "counted",
    "errors",
    "light_typing",
    "moment",
    "__version__",
}


def part_of_package(module: str) -> str:
    """Return the first name below vtpmd: what an arrow begins or ends at."""
    return module.partition(".")[2].partition(".")[0]


def test_imports_follow_the_arrows() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in MODULES.items()
        if name.startswith("vtpmd.") and part_of_package(name) not in FOR_ALL
        for target in imports(read(path), path)
        if target.startswith("vtpmd.")
        and part_of_package(target)
        not in ARROWS[part_of_package(name)] | FOR_ALL | {part_of_package(name)}
    ]
    assert not wrong, "\n".join(wrong)
