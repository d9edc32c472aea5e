"""Compile the C programs of the bench."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.bench.emulators import ROOT, BenchError

OPTIONS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror")
TIMEOUT_S = 60
BUILD = ROOT / "build/bench"


def build(
    name: str, directory: Path, *, core: Sequence[str] = (), libraries: Sequence[str] = ()
) -> Path:
    """Compile tests/bench/NAME.c with files of the C core, and return the program's path.

    BenchError when it does not compile.
    """
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / name
    source = ROOT / f"tests/bench/{name}.c"
    command: list[str | Path] = ["gcc", *OPTIONS, source]
    if core:
        files = [ROOT / "csrc" / file for file in core]
        command += [*files, f"-I{ROOT / 'csrc'}", "-lcrypto"]
    command += [f"-l{library}" for library in libraries]
    _compile(command, source, program)
    return program


def build_preload(name: str, directory: Path) -> Path:
    """Compile tests/bench/NAME.c to be preloaded, and return its path; BenchError as `build`."""
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / f"{name}.so"
    source = ROOT / f"tests/bench/{name}.c"
    _compile(["gcc", *OPTIONS, "-shared", "-fPIC", source], source, library)
    return library


def _compile(command: list[str | Path], source: Path, made: Path) -> None:
    """Make it in one step: another bench may run what is there, or make it, too."""
    new = made.with_name(f"{made.name}.{os.getpid()}")
    if subprocess.run([*command, "-o", new], timeout=TIMEOUT_S, check=False).returncode != 0:
        raise BenchError(f"gcc could not compile {source.relative_to(ROOT)}; see above")
    new.replace(made)
