"""Engines that are wrong on purpose: a test that does not catch them proves nothing.

A canary is the engine of this tree, linked with a file of `tests/canary` that takes the place of
some of the C library's functions. What is shipped knows nothing of it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import vtpmd

ROOT = Path(__file__).resolve().parents[2]
BUILD_TIMEOUT_S = 120


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
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    sources = [ROOT / "csrc" / line for line in lines if line and not line.startswith("#")]
    made = output.parent / "sandbox_filter.h"
    make_filter = [sys.executable, str(ROOT / "csrc/sandbox_build.py"), str(made), "--", "gcc"]
    subprocess.run(make_filter, check=True, timeout=BUILD_TIMEOUT_S)
    libraries = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "libtpms", "libcrypto"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-pthread", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{made.parent}", *map(str, sources), str(canary), *options]
    command += ["-o", str(output), *libraries]
    subprocess.run(command, check=True, timeout=BUILD_TIMEOUT_S)
