"""What all tests share: a lab for real programs."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.harness.lab import Lab

ROOT = Path(__file__).resolve().parent.parent

# How long an example takes says how busy the machine is, not whether the property holds.
settings.register_profile("vtpmd", deadline=None)
settings.load_profile("vtpmd")


# Objects that come, and stay, before the youngest are looked at: simulator and model make millions.
GC_THRESHOLD = 20_000

# An installation has its modules compiled; without that, a start of vtpmd takes thrice as long.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_configure() -> None:
    """Refuse to test a native build that is older than its sources."""
    # Programs inherit what is ignored, as under nohup or in a shell's background, and keep it so.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stamp = ROOT / "build/stamps/native"
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.[ch]")]
    newest = max(sources, key=lambda source: source.stat().st_mtime)
    if not stamp.exists() or stamp.stat().st_mtime < newest.stat().st_mtime:
        pytest.exit(f"{newest.relative_to(ROOT)} is newer than the build; run scripts/setup", 2)


def pytest_collection_finish() -> None:
    """Have no collection look at what is there for good: modules, and thousands of tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Give a test its emulators and guests; they end with the test."""
    with Lab() as lab:
        yield lab
