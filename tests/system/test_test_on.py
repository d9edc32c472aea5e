"""scripts/test-on that is ended while it makes a system leaves no process, mount or directory."""

import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/test-on"
TIMEOUT_S = 20
POLL_S = 0.05
INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
# Stands for debootstrap: mounts something on the root, as that does, and takes for ever.
DEBOOTSTRAP = """#!/bin/sh
mkdir "$4" && mount -t tmpfs tmpfs "$4" && touch "$HOME/began"
sleep 1000 & sleep 1000
"""
APT_GET = "#!/bin/sh\necho http://mirror.example.org/debian/\n"


def stand_in(directory: Path, name: str, script: str) -> None:
    """Write a program that is found before the one of that name."""
    path = directory / name
    path.write_text(script)
    path.chmod(0o755)


def wait_for_lock(path: Path) -> None:
    """Wait until no process has the lock that all which the script started have from it."""
    deadline = time.monotonic() + TIMEOUT_S
    with path.open() as lock:
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "a process lives on"
                time.sleep(POLL_S)


@pytest.mark.parametrize("number", [*INTERRUPTED, signal.SIGKILL])
def test_nothing_is_left_when_it_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    """When it is killed it cannot remove the root: the next run does."""
    stand_in(tmp_path, "debootstrap", DEBOOTSTRAP)
    stand_in(tmp_path, "apt-get", APT_GET)
    cache = tmp_path / "cache/vtpmd"
    environment = os.environ | {
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    with subprocess.Popen(
        [SCRIPT, "trixie"], env=environment, stderr=subprocess.PIPE, text=True
    ) as script:
        deadline = time.monotonic() + TIMEOUT_S
        while not (tmp_path / "began").exists():
            assert script.poll() is None and time.monotonic() < deadline
            time.sleep(POLL_S)
        script.send_signal(number)
        assert script.wait(TIMEOUT_S) == INTERRUPTED.get(number, -number)
    wait_for_lock(cache / "trixie.lock")
    assert str(cache) not in Path("/proc/self/mountinfo").read_text()
    if number is not signal.SIGKILL:
        assert not (cache / "trixie.root").exists()
