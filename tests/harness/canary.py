"""Engines that are wrong on purpose: a test that does not catch them proves nothing.

A canary is the engine of this tree, linked with a file of `tests/canary` that takes the place of
some of the C library's functions. What is shipped knows nothing of it.
"""

import shutil
import subprocess
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
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    sources = [ROOT / "csrc" / line for line in lines if line and not line.startswith("#")]
    libraries = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "libtpms", "libcrypto"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-pthread", f"-I{ROOT / 'csrc'}"]
    command += [*map(str, sources), str(ROOT / f"tests/canary/{name}.c")]
    command += [f"-Wl,--wrap={function}" for function in replaced]
    command += ["-o", str(package / "vtpmd-engine"), *libraries]
    subprocess.run(command, check=True, timeout=BUILD_TIMEOUT_S)
    return directory
