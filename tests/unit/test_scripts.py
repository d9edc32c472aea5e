"""What the shell scripts promise in their heads, tried on a tree in which a step must fail."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    command = [str(script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["setup", "guest-image"])
def test_failing_step_in_a_function_ends_with_1_and_the_last_line(
    tmp_path: Path, name: str
) -> None:
    """The tree has no setup.py to install and no tests/guest to compile; nothing is fetched."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    script = Path(shutil.copy(SCRIPTS / name, scripts))
    (scripts / "packages.txt").touch()
    (tmp_path / "build/guest").mkdir(parents=True)
    (tmp_path / "build/guest/vmlinuz").touch()

    failed = run(script, cwd=tmp_path)

    assert failed.returncode == 1
    *reason, last = failed.stderr.splitlines()
    assert last == f"{name}: failed; the reason is above this line"
    assert any("No such file" in line for line in reason)


@pytest.mark.parametrize(
    ("name", "example"), [("test", "scripts/test fast"), ("test-on", "scripts/test-on trixie fast")]
)
def test_help_from_another_directory(tmp_path: Path, name: str, example: str) -> None:
    """A script names itself relative to where it was called from, and then goes elsewhere."""
    (tmp_path / "vtpmd").symlink_to(SCRIPTS.parent)
    shown = run(Path("vtpmd/scripts") / name, "--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert example in shown.stdout
    assert shown.stdout.rstrip().splitlines()[-1].endswith(".")
    assert "set -" not in shown.stdout


@pytest.mark.parametrize("arguments", [[], ["11"], ["12", "slow"], ["12", "fast", "more"]])
def test_wrong_usage_of_another_suite(tmp_path: Path, arguments: list[str]) -> None:
    """It says how it is used, and does nothing."""
    shown = run(SCRIPTS / "test-on", *arguments, cwd=tmp_path)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "scripts/test-on SUITE" in shown.stderr
