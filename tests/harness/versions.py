"""What the programs beside vtpmd say, where their versions differ: tests look it up here.

A row holds from that version on, until the next. The rows are those of Debian 12, 13 and testing.
"""

import functools
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from vtpmd.testing import guest_image

Version = tuple[int, int]
Row = TypeVar("Row")

_VERSION = re.compile(r"(?:version|\(libvirt\)) (\d+)\.(\d+)")


@dataclass(frozen=True, kw_only=True)
class QemuWords:
    """What QEMU's monitor says of a migration."""

    device: bool  # whether a migration is in "device" before it is "completed"
    failing: bool  # whether it is "failing" before it is "failed"


@dataclass(frozen=True, kw_only=True)
class SwtpmAnswers:
    """What swtpm answers and does; hexadecimal digits as on the control channel."""

    capabilities: str
    lock_storage: str  # while the TPM is stopped or runs
    lock_storage_without_body: str
    unknown_blob: str  # the result of GET_STATEBLOB of an unknown type
    blob_of_version_3: int  # the result of SET_STATEBLOB
    counts_resets: bool  # of a guest; else it says TPM2_Shutdown(STATE) before them
    writes_in_a_locked_directory: bool  # a tpm2-00.permall, where there is none
    migration_option: bool  # --migration, for storage that hosts share


# From this version on libvirt gives swtpm a file or a block device for its state: <source type=…>.
LIBVIRT_WITH_TPM_SOURCE = (10, 10)
# From this version on a guest that did not run until its command's time was over looks once more
# for the answer, and then gives up (tpm_try_transmit() in drivers/char/tpm/tpm-interface.c).
LINUX_THAT_LOOKS_ONCE_MORE = (6, 15)

_QEMU: Mapping[Version, QemuWords] = {
    (7, 2): QemuWords(device=False, failing=False),
    (10, 0): QemuWords(device=True, failing=False),
    (11, 1): QemuWords(device=True, failing=True),
}

_SWTPM: Mapping[Version, SwtpmAnswers] = {
    (0, 7): SwtpmAnswers(
        capabilities="000000000000ffff",
        lock_storage="0000000a",
        lock_storage_without_body="0000000a",
        unknown_blob="00000800",
        blob_of_version_3=0,
        counts_resets=True,
        writes_in_a_locked_directory=False,
        migration_option=False,
    ),
    (0, 10): SwtpmAnswers(
        capabilities="000000000001ffff",
        lock_storage="00000000",
        lock_storage_without_body="00000003",
        unknown_blob="00000009",
        blob_of_version_3=9,
        counts_resets=False,
        writes_in_a_locked_directory=True,
        migration_option=True,
    ),
}


@functools.cache
def qemu() -> QemuWords:
    """Return what the installed QEMU says."""
    return row(_QEMU, _installed("qemu-system-x86_64"))


@functools.cache
def swtpm() -> SwtpmAnswers:
    """Return what the installed swtpm answers."""
    return row(_SWTPM, _installed("swtpm"))


@functools.cache
def libvirt() -> Version:
    """Return which version of libvirt is installed."""
    return _installed("libvirtd")


@functools.cache
def linux_of_guests() -> Version:
    """Return which version of Linux the tests' guests have.

    Its file says it where the header's kernel_version leads to (Documentation/arch/x86/boot.rst).
    """
    image = (guest_image.find() / guest_image.KERNEL).read_bytes()
    assert image[0x202:0x206] == b"HdrS"
    at = int.from_bytes(image[0x20E:0x210], "little") + 0x200
    found = re.match(rb"(\d+)\.(\d+)\.", image[at:])
    assert found is not None
    return int(found[1]), int(found[2])


def row(table: Mapping[Version, Row], version: Version) -> Row:
    """Return the last row that holds for a version; of one before all of them, the first."""
    return table[max((first for first in table if first <= version), default=min(table))]


def _installed(program: str) -> Version:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = _VERSION.search(said)
    assert found is not None, said
    return int(found[1]), int(found[2])
