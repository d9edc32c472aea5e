"""What the start of vtpmd is spent on, as far as that shows from outside."""

import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.bench.emulators import (
    PYTHON,
    ROOT,
    START_TIMEOUT_S,
    VTPMD,
    BenchError,
    Running,
    child_processes,
    running,
)
from tests.support.emulator_client import ControlClient

ENGINE = ROOT / "vtpmd/vtpmd-engine"
POLL_INTERVAL_S = 0.0005


class Import(NamedTuple):
    """A line of `-X importtime`: a module, its own time, and how deep its import was nested."""

    module: str
    self_us: int
    depth: int


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """The parts of a start: medians in milliseconds.

    `interpreter_ms`, `imports_ms` and `rest_ms` add up to `answered_ms`, the first answer.
    `engine_started_ms` is a moment, counted from the start of the daemon.
    """

    answered_ms: float
    interpreter_ms: float
    imports_ms: float
    rest_ms: float
    engine_started_ms: float
    engine_load_ms: float
    imports_by_package_ms: dict[str, float]


def parse_import_time(text: str) -> list[Import]:
    """Return the imports that Python's `-X importtime` reports, other lines left out.

    A line is `import time: SELF | CUMULATIVE | NAME`, in microseconds; two blanks before the name
    for each level of nesting (Python's documentation, "Command line and environment").
    """
    imports = []
    for line in text.splitlines():
        prefix, _, rest = line.partition("import time:")
        columns = rest.split("|")
        if prefix or len(columns) != 3 or not columns[0].strip().isdigit():
            continue
        name = columns[2].removeprefix(" ")
        module = name.lstrip(" ")
        depth = (len(name) - len(module)) // 2
        imports.append(Import(module=module, self_us=int(columns[0]), depth=depth))
    return imports


def by_package(imports: list[Import]) -> dict[str, float]:
    """Return the milliseconds of each top-level package, the most expensive first."""
    totals: dict[str, float] = {}
    for each in imports:
        package = each.module.partition(".")[0]
        totals[package] = totals.get(package, 0.0) + each.self_us / 1000
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def median_by_package(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each package of the first run over all runs, the largest first."""
    medians = {name: statistics.median(run.get(name, 0.0) for run in runs) for name in runs[0]}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def _run_ms(*command: str | Path) -> float:
    """Return how long a program runs, whatever its exit status."""
    start_ns = time.monotonic_ns()
    subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=START_TIMEOUT_S, check=False
    )
    return (time.monotonic_ns() - start_ns) / 1e6


def _imports_of_empty_interpreter() -> set[str]:
    command = [str(PYTHON), "-X", "importtime", "-c", "pass"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=True
    )
    return {each.module for each in parse_import_time(done.stderr)}


def _imports_of_vtpmd(directory: Path) -> list[Import]:
    """Return what a daemon imports until its first answer, beyond an empty interpreter."""
    prefix = (str(PYTHON), "-X", "importtime")
    with running(VTPMD, directory, prefix=prefix) as started:
        _wait_for_answer(started)
        text = started.log.read_text()
    empty = _imports_of_empty_interpreter()
    return [each for each in parse_import_time(text) if each.module not in empty]


def _answered_ms(directory: Path) -> float:
    """Return the time until the daemon's first answer."""
    with running(VTPMD, directory) as started:
        _wait_for_answer(started)
        return started.elapsed_ms()


def _engine_started_ms(directory: Path) -> float:
    """Return when it, or a child of it, runs the engine's program, seen from its start."""
    with running(VTPMD, directory) as started:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            pid = started.process.pid
            if any(_program(each) == ENGINE for each in (pid, *child_processes(pid))):
                seen_ms = started.elapsed_ms()
                _wait_for_answer(started)
                return seen_ms
            started.check_alive()
            time.sleep(POLL_INTERVAL_S)
    raise BenchError(f"vtpmd started no engine within {START_TIMEOUT_S} s")


def _wait_for_answer(started: Running) -> None:
    """Return when the daemon serves: one that is stopped before leaves its socket behind."""
    started.connect().close()
    with ControlClient(started.control) as control:
        control.get_capability()


def _program(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/exe").readlink()
    except FileNotFoundError:
        return None


def measure_breakdown(directory: Path, count: int) -> Breakdown:
    """Take the start on existing state apart; each part is the median of `count` runs in turn.

    The imports' own time is that of an interpreter that imports the same modules, less that of an
    empty one.
    """
    imports = _imports_of_vtpmd(directory)
    leave = "; import os; os._exit(0)"  # without taking everything down, which is not of the start
    statement = "import " + ", ".join(each.module for each in imports if each.depth == 0) + leave
    answered, empty, importing, started, load = [], [], [], [], []
    packages = [by_package(imports)]
    for _ in range(count):
        answered.append(_answered_ms(directory))
        empty.append(_run_ms(PYTHON, "-c", "pass" + leave))
        importing.append(_run_ms(PYTHON, "-c", statement))
        packages.append(by_package(_imports_of_vtpmd(directory)))
        started.append(_engine_started_ms(directory))
        load.append(_run_ms(ENGINE))
    answered_ms = statistics.median(answered)
    interpreter_ms = statistics.median(empty)
    imports_ms = statistics.median(importing) - interpreter_ms
    return Breakdown(
        answered_ms=answered_ms,
        interpreter_ms=interpreter_ms,
        imports_ms=imports_ms,
        rest_ms=answered_ms - interpreter_ms - imports_ms,
        engine_started_ms=statistics.median(started),
        engine_load_ms=statistics.median(load),
        imports_by_package_ms=median_by_package(packages),
    )
