"""What the shell scripts promise in their heads, tried on a tree in which a step must fail."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
GUEST_IMAGE = "vtpmd/testing/guest_image"


def run(script: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    command = [str(script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["setup", "guest-image"])
def test_failing_step_in_a_function_ends_with_1_and_the_last_line(
    tmp_path: Path, name: str
) -> None:
    """The tree has no setup.py to install and nothing of a guest to compile; nothing is fetched."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    script = Path(shutil.copy(SCRIPTS / name, scripts))
    (scripts / "packages.txt").touch()
    image = tmp_path / GUEST_IMAGE
    image.mkdir(parents=True)
    shutil.copy(SCRIPTS.parent / GUEST_IMAGE / "build-image", image)
    (tmp_path / "build/guest").mkdir(parents=True)
    (tmp_path / "build/guest/vmlinuz").touch()

    failed = run(script, cwd=tmp_path)

    assert failed.returncode == 1
    *reason, last = failed.stderr.splitlines()
    assert last == f"{name}: failed; the reason is above this line"
    assert any("No such file" in line for line in reason)


NAMES = [path.name for path in SCRIPTS.iterdir() if path.is_file() and os.access(path, os.X_OK)]
TREE = ["scripts", "tests", "vtpmd"]
EXAMPLES = {
    "bench": "scripts/bench round-trip --quick",
    "demo": "scripts/demo --json",
    "test": "scripts/test fast",
    "test-on": "scripts/test-on trixie fast",
    "testbed": "scripts/testbed pingpong -n 50",
}


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_tree_that_is_not_set_up(tmp_path: Path, name: str, option: str) -> None:
    """Any script's, called from another directory: it helps, and does nothing else."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for part in TREE:
        (tree / part).symlink_to(SCRIPTS.parent / part)
    command = [str(Path("tree/scripts") / name), option]
    system = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    shown = subprocess.run(
        command, cwd=tmp_path, env=system, capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert EXAMPLES.get(name, f"scripts/{name} ") in shown.stdout
    assert "exit status:" in shown.stdout.lower()
    assert "set -" not in shown.stdout
    assert sorted(path.name for path in tree.iterdir()) == TREE


@pytest.mark.parametrize("name", ["setup", "guest-image"])
def test_wrong_usage_does_nothing(name: str) -> None:
    shown = run(SCRIPTS / name, "--fast", cwd=SCRIPTS.parent)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert f"scripts/{name} " in shown.stderr


@pytest.mark.parametrize("arguments", [[], ["11"], ["12", "slow"], ["12", "fast", "more"]])
def test_wrong_usage_of_another_suite(tmp_path: Path, arguments: list[str]) -> None:
    """It says how it is used, and does nothing."""
    shown = run(SCRIPTS / "test-on", *arguments, cwd=tmp_path)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "scripts/test-on SUITE" in shown.stderr
