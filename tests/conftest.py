"""What all tests share: a lab for real programs, and its logs in the report of a failed test."""

from collections.abc import Generator, Iterator

import pytest

from tests.harness.lab import Lab


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
    lab = getattr(item, "funcargs", {}).get("lab")
    if report.failed and report.when == "call" and isinstance(lab, Lab):
        report.sections += lab.logs()
    return report
