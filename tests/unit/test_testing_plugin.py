"""The pytest plugin costs a test session nothing that does not use it, and helps one that fails."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import DOCS, tables
from vtpmd.testing import guest_image, plugin
from vtpmd.testing.faults import MESSAGES, Message, Victim

# What the plugin has brought in that pytest had not.
BROUGHT_IN = """
import sys
import pytest
before = set(sys.modules)
import vtpmd.testing.plugin
print(*sorted(set(sys.modules) - before))
"""
FAILING = """
import pytest
from vtpmd.testing.logged import Logged

class Talker(Logged):
    def logs(self):
        return [("what it said", "the last words")]

@pytest.fixture
def talker():
    return Talker()

def test_that_fails(talker):
    raise AssertionError
"""


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python in a directory, to its end."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_plugin_imports_itself_alone(tmp_path: Path) -> None:
    ended = run("-c", BROUGHT_IN, cwd=tmp_path)
    assert ended.stdout.split() == ["vtpmd", "vtpmd.testing", "vtpmd.testing.plugin"]


def test_session_that_asks_for_nothing_imports_nothing_else(tmp_path: Path) -> None:
    """As its entry point is loaded, and its hooks are called."""
    (tmp_path / "test_other.py").write_text(
        "import sys\n"
        "def test_it(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.has_plugin('vtpmd')\n"
        "    ours = [name for name in sys.modules if name.startswith('vtpmd')]\n"
        "    assert ours == ['vtpmd', 'vtpmd.testing', 'vtpmd.testing.plugin']\n"
    )
    ended = run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout


def test_logs_are_in_the_report_of_a_test_that_failed(tmp_path: Path) -> None:
    (tmp_path / "test_failing.py").write_text(FAILING)
    ended = run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert ended.returncode == 1
    assert "what it said" in ended.stdout
    assert "the last words" in ended.stdout


def test_every_message_can_be_cut_at() -> None:
    assert list(MESSAGES) == list(Message)
    assert len(set(MESSAGES.values())) == len(Message)


def test_document_has_all_fixtures_and_faults() -> None:
    text = (DOCS / "testing.md").read_text()
    shown = [row["fixture"].strip("`") for row in tables(text)["Fixtures"]]
    assert sorted(shown) == sorted(name for name in vars(plugin) if name.startswith("vtpm"))
    for row, names in (("cut_link", Message), ("strike", Victim)):
        (line,) = [line for line in text.splitlines() if f"{row}(" in line and "|" in line]
        assert set(re.findall("`([A-Z]+)`", line)) == {each.name for each in names}


def test_image_that_is_missing_is_said_with_what_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(guest_image.ENVIRONMENT, str(tmp_path))
    with pytest.raises(guest_image.ImageError, match=rf"build-image {tmp_path}$"):
        guest_image.find()


def test_image_that_cannot_be_built_is_said_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(guest_image.ImageError, match="No such file") as raised:
        guest_image.build(tmp_path / "image", kernel=tmp_path / "no-kernel")
    assert str(raised.value).startswith(f"the guest image cannot be built in {tmp_path}")
    assert list((tmp_path / "image").iterdir()) == []
