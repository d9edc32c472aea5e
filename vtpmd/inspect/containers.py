"""From a path to the states that are there, by what is in it: nothing is locked or written.

A state directory with its journal, a linear file or a device, a state file or a state blob of
swtpm's, a state as libtpms marshals it, an export, a migration stream of QEMU's in a file. Of what
is something else it is said what it is.
"""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path
from typing import Final

from vtpmd.core.linear import LINEAR_HEADER_BYTES, LinearFault, linear_decode
from vtpmd.inspect import qemu_stream
from vtpmd.inspect.decoding import kind_of
from vtpmd.inspect.directories import directory_source
from vtpmd.inspect.exports import export_source
from vtpmd.inspect.source import (
    NOTHING_KNOWN,
    DamagedContainer,
    Source,
    lineage_of,
    not_a_state,
    opened,
)
from vtpmd.store.directory import look_into
from vtpmd.store.keys import Key
from vtpmd.store.linear import LinearFile, LinearFileError
from vtpmd.wire import export_format, swtpm_format
from vtpmd.wire.swtpm_format import BLOB_BYTES_MAX, HeaderFlag, Lineage
from vtpmd.wire.tpm import StateType

HEADER_MARK: Final = slice(2, 4)  # of swtpm's header: its size, 10
HEADER_BYTES: Final = (10).to_bytes(2, "big")
FLAGS: Final = slice(4, 6)
TAIL_MARK: Final = b"VTPMTAIL"
TAIL: Final = "what a vTPM's destination had not yet got, sealed for it alone"
# What something else begins with, and what it is.
HINTS: Final = {
    b"VTPMJRNL": "a journal of vtpmd's: give the state directory that it lies in",
    b"VTPD": "a delta record of vtpmd's: it says only what has changed",
    export_format.MAGIC_PENDING: "an import under way: give the state directory that it lies in",
    b"VTPMDIN": "a state that a peer has sent: give the state directory that it lies in",
    TAIL_MARK: f"a tail: {TAIL}",
    b"VTPMANCH": "an anchor: it has no state, only which one is to be expected",
    b'{"': "JSON, as an owner record is: give the state directory that it lies in",
    b"QFI\xfb": "a disk image of QEMU's, whose snapshots are not looked into",
    b"\x7fELF": "a program",
    b"-----BEGIN": "a key or a certificate",
}
# Neither a TPM 1.2's state nor another program's has a mark of its own.
OTHER_STATE: Final = f"in swtpm's format, and {NOTHING_KNOWN}: a TPM 1.2's is not decoded yet"


def open_source(path: Path, key: Key | None, migration_key: Key | None = None) -> Source:
    """Return what is at a path.

    What is damaged is told among its problems, as far as there is a state nevertheless. Raises
    NotAState, StateKeyError where a key is missing or wrong, VtpmdError or OSError.
    """
    if path.is_dir():
        with look_into(path) as directory:
            return directory_source(directory, key)
    content, n_bytes = _read_file(path)
    if content.startswith(export_format.MAGIC):
        return export_source(path, key)
    if content.startswith(qemu_stream.MARKS):
        return _stream(path, key, migration_key)
    if linear_decode(content[:LINEAR_HEADER_BYTES], n_bytes)[0] is not LinearFault.MAGIC:
        return _linear(path, key)
    kind = kind_of(content)
    if content[HEADER_MARK] == HEADER_BYTES and len(content) >= swtpm_format.HEADER.size:
        return _wrapped(path, content, key, migration_key)
    if kind is not None:
        return Source(str(path), "state", {kind: content})
    if key is not None:  # as the first version of swtpm's format has it
        state = opened(str(path), partial(swtpm_format.decode_file, content, key=key.material))
        return Source(str(path), "file", _only(path, state), is_encrypted=True)
    hints = (hint for mark, hint in HINTS.items() if content.startswith(mark))
    raise not_a_state(path, next(hints, NOTHING_KNOWN))


def _read_file(path: Path) -> tuple[bytes, int]:
    """Return what a file begins with, as no state is longer, and how long it is.

    Raises OSError or NotAState.
    """
    # Without O_NONBLOCK a FIFO would be waited for.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise not_a_state(path, "no file, directory or block device")
        return file.read(BLOB_BYTES_MAX + 1), file.seek(0, os.SEEK_END)


def _only(path: Path, state: bytes) -> dict[StateType, bytes]:
    """Return the one state that a file holds. Raises NotAState."""
    kind = kind_of(state)
    if kind is None:
        raise not_a_state(path, OTHER_STATE)
    return {kind: state}


def _wrapped(path: Path, content: bytes, key: Key | None, migration_key: Key | None) -> Source:
    """Return what a state file or state blob of swtpm's holds."""
    material = None if key is None else key.material
    flags = int.from_bytes(content[FLAGS], "big")
    is_blob = bool(flags & (HeaderFlag.MIGRATION_DATA | HeaderFlag.MIGRATION_ENCRYPTED))
    if is_blob:
        moving = None if migration_key is None else migration_key.material
        decode = partial(swtpm_format.decode_blob, content, key=material, migration_key=moving)
        read_lineage = swtpm_format.read_blob_lineage
    else:
        decode = partial(swtpm_format.decode_file, content, key=material)
        read_lineage = swtpm_format.read_lineage
    state = opened(str(path), decode)
    lineage, problems = lineage_of(str(path), content, read_lineage)
    return Source(
        path=str(path),
        kind="blob" if is_blob else "file",
        states=_only(path, state),
        is_encrypted=bool(flags & HeaderFlag.ENCRYPTED),
        lineage=lineage,
        generation=None if lineage is None else lineage.generation,
        problems=problems,
    )


def _stream(path: Path, key: Key | None, migration_key: Key | None) -> Source:
    """Return what a migration stream of QEMU's holds."""
    blobs = qemu_stream.carried_blobs(path)
    if blobs is None:
        raise not_a_state(path, "a migration stream of QEMU's with no vTPM that is found in it")
    states: dict[StateType, bytes] = {}
    for kind, blob in blobs.items():
        if blob.content.startswith(TAIL_MARK):
            raise not_a_state(path, f"a migration stream of QEMU's, with a tail: {TAIL}")
        decode = partial(
            swtpm_format.decode_blob,
            blob.content,
            encrypted=blob.is_encrypted,
            key=None if key is None else key.material,
            migration_key=None if migration_key is None else migration_key.material,
        )
        state = opened(f"the {kind.name.lower()} state in {path}", decode)
        if state:
            states[kind] = state
    if any(kind_of(state) is not kind for kind, state in states.items()):
        raise not_a_state(path, f"a migration stream of QEMU's, whose vTPM is {OTHER_STATE}")
    permanent = blobs[StateType.PERMANENT]
    lineage, problems = lineage_of(str(path), permanent.content, swtpm_format.read_blob_lineage)
    return Source(
        path=str(path),
        kind="migration-stream",
        states=states,
        is_encrypted=permanent.is_encrypted,
        lineage=lineage,
        generation=None if lineage is None else lineage.generation,
        problems=problems,
    )


def _linear(path: Path, key: Key | None) -> Source:
    """Return what a linear file holds. Raises DamagedContainer, StateKeyError or OSError."""
    states: dict[StateType, bytes] = {}
    lineage: Lineage | None = None
    problems: tuple[str, ...] = ()
    with LinearFile.look_into(str(path)) as linear:
        try:
            extents = linear.extents()
        except LinearFileError as error:
            raise DamagedContainer(str(error)) from error
        for kind, extent in extents.items():
            content = os.pread(linear.fd, extent.n_bytes, extent.offset)
            material = None if key is None else key.material
            place = f"the {kind.name.lower()} state in {path}"
            states[kind] = opened(place, partial(swtpm_format.decode_file, content, key=material))
            if kind is StateType.PERMANENT:
                lineage, problems = lineage_of(place, content, swtpm_format.read_lineage)
    if not states or any(kind_of(state) is not kind for kind, state in states.items()):
        what = OTHER_STATE if states else "a linear file with no state"
        raise not_a_state(path, what)
    return Source(
        path=str(path),
        kind="linear-file",
        states=states,
        is_encrypted=key is not None,
        lineage=lineage,
        generation=None if lineage is None else lineage.generation,
        problems=problems,
    )
