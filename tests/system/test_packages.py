"""What is released: an sdist, the wheel that it builds, and the programs that a wheel installs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.lab import Lab
from tests.harness.program import Program
from tests.support.emulator_client import ControlClient
from tests.support.tpm2 import Tpm

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120


def run(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; what it printed is in the report if the test fails."""
    command = [str(word) for word in words]
    ended = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    print(ended.stdout, ended.stderr)
    return ended


def copy_tree(directory: Path) -> None:
    """Copy the files that git does not ignore: a release has nothing that was built before."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of an sdist and of the wheel that was built from it."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("release")
    copy_tree(tree)
    ended = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=tree)
    assert ended.returncode == 0
    return out


def serve_once(program: Path, lab: Lab) -> Path:
    """Serve a new directory with an installed vtpmd until SHUTDOWN; return its engine's file."""
    state = lab.new_path("state")
    vtpmd = Program("vtpmd", [program, "run", state], lab.directory)
    lab.kill_at_end(vtpmd)
    vtpmd.connect(state / "vtpmd.sock").close()
    engine = Path(f"/proc/{vtpmd.pid}/exe").readlink()
    with ControlClient(state / "vtpmd.sock") as control:
        tpm = Tpm(control.attach_data().transact)
        control.init()
        tpm.startup()
        control.shutdown()
    assert vtpmd.wait() == 0
    assert (state / "tpm2-00.permall").exists()
    return engine


def test_the_wheel_that_the_sdist_builds_serves_a_vtpm(
    release: Path, tmp_path: Path, lab: Lab
) -> None:
    """In a new environment, with the engine and the extension that are in the wheel."""
    (wheel,) = release.glob("*.whl")
    installed = tmp_path / "environment"
    assert run("/usr/bin/python3", "-m", "venv", installed, cwd=tmp_path).returncode == 0
    assert run(installed / "bin/pip", "install", wheel, cwd=tmp_path).returncode == 0
    engine = serve_once(installed / "bin/vtpmd", lab)
    assert engine.is_relative_to(installed)
    assert engine.name == "vtpmd-engine"


def test_without_libtpms_the_build_says_what_to_install(release: Path, tmp_path: Path) -> None:
    (sdist,) = release.glob("*.tar.gz")
    build = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", sdist)
    ended = run(*build, cwd=tmp_path, PKG_CONFIG_LIBDIR=str(tmp_path))
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    (line,) = [line.strip() for line in ended.stderr.splitlines() if " error: lib" in line]
    assert line.startswith("error: libtpms's headers are missing")
    assert line.endswith("libtpms-dev")
