"""What tests leave on a machine has the number of their process in its name.

A process that ends by itself removes its own; what one leaves that was killed, the next removes.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

DIRECTORIES = Path("/tmp")  # noqa: S108 - what is made there is private (mkdtemp)
COMMAND_TIMEOUT_S = 20
_NAME = re.compile(r"vtpmd-(\d+)-")


def own_name(purpose: str) -> str:
    """Return a name for something of this process's."""
    return f"vtpmd-{os.getpid()}-{purpose}"


def new_directory() -> Path:
    """Make a directory with a short path, as those of UNIX sockets must be."""
    return Path(tempfile.mkdtemp(prefix=own_name(""), dir=DIRECTORIES))


def ip(*arguments: str, commands: str = "") -> str:
    """Run iproute2's ip, as root, with a batch of commands if there is one; return what it says."""
    ended = subprocess.run(
        ["ip", *arguments],
        input=commands,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    if ended.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {ended.stderr.strip()}")
    return ended.stdout


def namespaces() -> list[str]:
    """Return the names of the network namespaces that there are."""
    said = ip("-json", "netns", "list")
    return [each["name"] for each in json.loads(said or "[]")]


def remove_namespace(name: str) -> None:
    """Kill what is left in a network namespace, and remove it with its devices."""
    for process in ip("netns", "pids", name).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    ip("netns", "delete", name)


def remove() -> None:
    """Remove what processes that are gone have left."""
    for name in _of_the_dead(namespaces()):
        # Another process that tidies up may have been faster.
        with contextlib.suppress(OSError):
            remove_namespace(name)
    for name in _of_the_dead(path.name for path in DIRECTORIES.glob("vtpmd-*")):
        shutil.rmtree(DIRECTORIES / name, ignore_errors=True)


def _of_the_dead(names: Iterator[str] | list[str]) -> Iterator[str]:
    for name in names:
        found = _NAME.match(name)
        if found is not None and not Path(f"/proc/{found[1]}").exists():
            yield name
