"""Say what the figures were measured on."""

import os
import platform
import subprocess
from pathlib import Path

from tests.bench.emulators import ROOT


def _first_line(*command: str) -> str:
    """Return the first line that a program writes; empty when there is no such program."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.partition("\n")[0].strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def facts() -> dict[str, object]:
    """Return cores, kernel, versions, the revision measured, and the load at the time."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "qemu": _first_line("qemu-system-x86_64", "--version"),
        "swtpm": _first_line("swtpm", "--version"),
        "libtpms": _first_line("pkg-config", "--modversion", "libtpms"),
        "revision": _first_line("git", "describe", "--always", "--dirty"),
    }
