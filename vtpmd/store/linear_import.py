"""Putting an imported vTPM into a linear file, or a block device, as a whole or not at all.

A file is made anew beside its place, and renamed; what was there has another name by then, if it is
to be kept. In a block device nothing but nothing is written over: first a header with no state in
it is written, which is as good as zeros, then the states, and the header that says where they are,
in one sector, when they are on the device.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from struct import Struct
from typing import Final

from vtpmd.counted import counted
from vtpmd.store import importing
from vtpmd.store.directory import FILE_MODE, sync_directory, write_new
from vtpmd.store.importing import COPIES_MAX, NotEmpty
from vtpmd.store.keys import Key
from vtpmd.store.libtpms import States
from vtpmd.store.linear import LinearFile, LinearFileError
from vtpmd.wire import swtpm_format
from vtpmd.wire.export_format import Header
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType

# magic, version, header's size: docs/state-format.md, "The linear file"
START: Final = Struct("<QBxH")
MAGIC: Final = 0x737774706D6C696E
VERSION: Final = 1
HEADER_BYTES: Final = 192
SLOT: Final = Struct("<III")
SECTOR_BYTES: Final = 512
UNIT_BYTES: Final = 4096
TEMPORARY: Final = ".vtpmd-import"  # what a file's name ends in until it is whole


def prepare(path: Path, source: Header, states: States) -> Header:
    """Return what an import of these of an export's states will be; nothing is written.

    Raises LinearFileError, StateDirectoryError or OSError.
    """
    content = None
    if path.exists():
        with LinearFile.look_into(str(path)) as there:
            extent = there.extents().get(StateType.PERMANENT)
            if extent is not None:
                content = os.pread(there.fd, extent.n_bytes, extent.offset)
    used = importing.generation_of(content, source.identity)
    return importing.begin_epoch(str(path), source, used)._replace(kinds=tuple(sorted(states)))


def put(path: Path, header: Header, states: States, key: Key | None, *, force: bool) -> str | None:
    """Have a path hold what is imported, durably; return the name of what is kept of before.

    Raises NotEmpty, StateDirectoryInUse, LinearFileError or OSError; then it is as it was.
    """
    lineages = {StateType.PERMANENT: importing.lineage_of(header)}
    files = {kind: _encode(states[kind], lineages.get(kind), key) for kind in header.kinds}
    return _put(path, *_layout(files), force=force)


def _encode(state: bytes, lineage: Lineage | None, key: Key | None) -> bytes:
    material, iv = (None, b"") if key is None else (key.material, key.new_iv())
    return swtpm_format.encode_file(state, lineage, key=material, iv=iv)


def _put(path: Path, header: bytes, sections: bytes, *, force: bool) -> str | None:
    if not path.exists():
        _make(path, header + sections, kept=None)
        return None
    with LinearFile.open(str(path)) as there:
        is_empty = not there.extents()
        if stat.S_ISBLK(os.fstat(there.fd).st_mode):
            if not is_empty:
                raise NotEmpty(f"{path} has a vTPM: move that away first, or give another device")
            _fill(there, header, sections)
            return None
        if not (is_empty or force):
            raise NotEmpty(
                f"{path} has a vTPM: give another file, or add --force, which keeps it in a file "
                "of another name"
            )
        kept = None if is_empty else _free_name(path)
        _make(path, header + sections, kept)
        return None if kept is None else str(kept)


def _layout(files: dict[StateType, bytes]) -> tuple[bytes, bytes]:
    """Return the first unit of a linear file, and what follows it."""
    slots = dict.fromkeys(StateType, bytes(SLOT.size))
    sections = b""
    for kind, content in files.items():
        section = content.ljust(-(-len(content) // UNIT_BYTES) * UNIT_BYTES, b"\0")
        slots[kind] = SLOT.pack(UNIT_BYTES + len(sections), len(content), len(section))
        sections += section
    header = START.pack(MAGIC, VERSION, HEADER_BYTES) + b"".join(slots[kind] for kind in StateType)
    return header.ljust(UNIT_BYTES, b"\0"), sections


def _fill(there: LinearFile, header: bytes, sections: bytes) -> None:
    """Write into an empty block device."""
    n_bytes = os.lseek(there.fd, 0, os.SEEK_END)
    if len(header) + len(sections) > n_bytes:
        raise LinearFileError(
            f"cannot use {there.path}: it has {counted(n_bytes, 'byte')}, and the vTPM takes "
            f"{len(header) + len(sections)}; give a larger one"
        )
    nothing = START.pack(MAGIC, VERSION, HEADER_BYTES).ljust(SECTOR_BYTES, b"\0")
    for offset, content in ((0, nothing), (UNIT_BYTES, sections), (0, header[:SECTOR_BYTES])):
        if os.pwrite(there.fd, content, offset) != len(content):
            raise LinearFileError(f"cannot write {there.path}: it took only a part; try again")
        os.fdatasync(there.fd)


def _make(path: Path, content: bytes, kept: Path | None) -> None:
    """Make a file, in place of one that gets the name ``kept``."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    write_new(temporary, content, FILE_MODE)
    if kept is not None:
        os.link(path, kept)
    temporary.rename(path)
    sync_directory(path.parent)


def _free_name(path: Path) -> Path:
    for number in range(1, COPIES_MAX + 1):
        if not os.path.lexists(candidate := path.with_name(f"{path.name}.before-{number}")):
            return candidate
    raise LinearFileError(f"there are too many {path}.before-N: remove some")
