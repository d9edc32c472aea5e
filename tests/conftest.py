"""What all tests share: a lab for real programs, and its logs in the report of a failed test."""

import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.harness.lab import Lab
from tests.harness.testbed import Testbed

ROOT = Path(__file__).resolve().parent.parent

# How long an example takes says how busy the machine is, not whether the property holds.
settings.register_profile("vtpmd", deadline=None)
settings.load_profile("vtpmd")


def pytest_configure() -> None:
    """Refuse to test a native build that is older than its sources."""
    # Programs inherit what is ignored, as under nohup, and keep it so.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stamp = ROOT / "build/stamps/native"
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.[ch]")]
    newest = max(sources, key=lambda source: source.stat().st_mtime)
    if not stamp.exists() or stamp.stat().st_mtime < newest.stat().st_mtime:
        pytest.exit(f"{newest.relative_to(ROOT)} is newer than the build; run scripts/setup", 2)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Give a test its emulators and guests; they end with the test."""
    with Lab() as lab:
        yield lab


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what emulators, QEMU and guests said to the report of a test that failed."""
    report = yield
    if report.failed and report.when == "call":
        for resource in getattr(item, "funcargs", {}).values():
            if isinstance(resource, Lab | Testbed):
                report.sections += resource.logs()
    return report
