"""What unit tests share."""

import pytest

from tests.support.cli_run import Command, Run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run any of vtpmd's commands."""
    return lambda *arguments: Run(capsys, *arguments)
