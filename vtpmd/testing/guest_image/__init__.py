"""The image of the self-checking guest: a kernel, and an initramfs with its TPM workload.

The workload's sources and the script that builds the image are beside this file.
"""

import os
import subprocess
import sys
from pathlib import Path

KERNEL = "vmlinuz"
INITRAMFS = "initramfs.cpio.gz"
ENVIRONMENT = "VTPMD_GUEST_IMAGE"
BUILD_TIMEOUT_S = 300  # most of it is the download of the kernel's package
_HERE = Path(__file__).parent


class ImageError(Exception):
    """There is no image, or it cannot be built."""


def directory() -> Path:
    """Return where the image is to be: as VTPMD_GUEST_IMAGE says, else below the user's cache.

    In a source tree it is build/guest, where scripts/setup builds it.
    """
    if said := os.environ.get(ENVIRONMENT):
        return Path(said).absolute()
    tree = _HERE.parents[2]
    if (tree / "scripts/guest-image").exists():
        return tree / "build/guest"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vtpmd" / "guest"


def find() -> Path:
    """Return the directory that has the image. ImageError when it has not been built."""
    found = directory()
    if not (found / INITRAMFS).exists():
        raise ImageError(f"there is no guest image in {found}; build it: {_command(found)}")
    return found


def build(into: Path, kernel: Path | None = None) -> None:
    """Build what is missing, or older than what it is built of; say what is done on stderr.

    `kernel` is taken as the guest's; else it is Debian's, which apt-get downloads. It needs a TPM
    TIS driver and serial ports built in. ImageError when a step fails, TimeoutExpired when it is
    late.
    """
    options = [] if kernel is None else ["--kernel", str(kernel)]
    command = ["bash", str(_HERE / "build-image"), *options, str(into)]
    ended = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, timeout=BUILD_TIMEOUT_S, check=False
    )
    sys.stderr.write(ended.stderr)
    if ended.returncode != 0:
        raise ImageError(f"the guest image cannot be built in {into}:\n{ended.stderr.strip()}")


def _command(into: Path) -> str:
    return f"bash {_HERE / 'build-image'} {into}"
