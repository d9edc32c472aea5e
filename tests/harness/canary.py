"""Engines that are wrong on purpose: a test that does not catch them proves nothing.

A canary is the engine of this tree, linked with a file of `tests/canary` that takes the place of
some of the C library's functions. What is shipped knows nothing of it.
"""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import vtpmd

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build/canary"
BUILD_TIMEOUT_S = 120
COMPILER = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-pthread", f"-I{ROOT / 'csrc'}"]


def build(name: str, replaced: tuple[str, ...], directory: Path) -> Path:
    """Build the canary `tests/canary/NAME.c`, which has a __wrap_ of each function replaced.

    Returns a directory to put into PYTHONPATH: it has a copy of the package with the canary as its
    engine. CalledProcessError when it cannot be built.
    """
    package = directory / "vtpmd"
    shutil.copytree(Path(vtpmd.__file__).parent, package)
    options = [f"-Wl,--wrap={function}" for function in replaced]
    build_engine(ROOT / f"tests/canary/{name}.c", package / "vtpmd-engine", options)
    return directory


def build_engine(canary: Path, output: Path, options: list[str]) -> None:
    """Link this tree's engine with a file of `tests/canary`.

    CalledProcessError when it cannot be built.
    """
    objects = _compiled()
    command = [*COMPILER, f"-I{OBJECTS}", str(canary), *map(str, objects), *options]
    _run([*command, "-o", str(output), *_libraries()])


def _compiled() -> list[Path]:
    """Return the engine's object files, which all canaries share, and all processes that test."""
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    sources = [ROOT / "csrc" / line for line in lines if line and not line.startswith("#")]
    objects = [OBJECTS / f"{source.stem}.o" for source in sources]
    OBJECTS.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    made = OBJECTS / "made"
    with (OBJECTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists() or made.stat().st_mtime < newest:
            header = str(OBJECTS / "sandbox_filter.h")
            _run([sys.executable, str(ROOT / "csrc/sandbox_build.py"), header, "--", "gcc"])
            _run([*COMPILER, f"-I{OBJECTS}", "-c", *map(str, sources), *_libraries()], OBJECTS)
            made.touch()
    return objects


def _libraries() -> list[str]:
    command = ["pkg-config", "--cflags", "--libs", "libtpms", "libcrypto"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def _run(command: list[str], directory: Path = ROOT) -> None:
    subprocess.run(command, check=True, timeout=BUILD_TIMEOUT_S, cwd=directory)
