"""Freed memory: overwritten, whoever frees it, and not made for that.

Invariant 7: no secret stays where nobody knows of it.
"""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wno-use-after-free")
# Multiples of 16; the last is what libtpms marshals its state into.
SMALL, PAGES, STATE = 208, 20_000, 277_184
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("wipe") / "probe"
    files = ("tests/c/wipe_probe.c", "csrc/engine/wipe.c", "csrc/engine/written.c")
    sources = [ROOT / file for file in files]
    command: list[str | Path] = ["gcc", *OPTIONS, f"-I{ROOT / 'csrc'}", "-o", program, *sources]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    return program


def ask(probe: Path, what: str, n_bytes: int) -> int:
    command: list[str | Path] = [probe, what, str(n_bytes)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    return int(done.stdout)


@pytest.mark.parametrize("n_bytes", [SMALL, PAGES, STATE])
@pytest.mark.parametrize("what", ["free", "shrink", "grow", "noted"])
def test_what_is_freed_is_overwritten(probe: Path, what: str, n_bytes: int) -> None:
    assert ask(probe, what, n_bytes) == 0


def test_pages_that_were_never_written_are_not_made(probe: Path) -> None:
    """But for those at both ends, which are shared, and what counting needs."""
    assert ask(probe, "untouched", STATE) <= STATE / 4096 / 4
