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

from vtpmd.core import JOURNAL_BYTES_MAX
from vtpmd.core.linear import LINEAR_HEADER_BYTES, LinearFault, linear_decode
from vtpmd.inspect import qcow2, qemu_stream
from vtpmd.inspect.decoding import Kind, kind_of
from vtpmd.inspect.directories import History, directory_history
from vtpmd.inspect.exports import export_source
from vtpmd.inspect.history import no_generation, source_at
from vtpmd.inspect.records import find_record, journal
from vtpmd.inspect.source import (
    NOTHING_KNOWN,
    DamagedContainer,
    NotAState,
    Source,
    lineage_of,
    not_a_state,
    opened,
)
from vtpmd.store import chain
from vtpmd.store.directory import ASK_IT, is_socket, look_into
from vtpmd.store.export_seal import Seal
from vtpmd.store.keys import Key
from vtpmd.store.linear import LinearFile, LinearFileError
from vtpmd.wire import export_format, swtpm_format
from vtpmd.wire.swtpm_format import BLOB_BYTES_MAX, HeaderFlag, Lineage
from vtpmd.wire.tpm import StateType, TpmVersion

HEADER_MARK: Final = slice(2, 4)  # of swtpm's header: its size, 10
HEADER_BYTES: Final = (10).to_bytes(2, "big")
FLAGS: Final = slice(4, 6)
TAIL_MARK: Final = b"VTPMTAIL"
TAIL: Final = "what a vTPM's destination had not yet got, sealed for it alone"
# What something else begins with, and what it is.
HINTS: Final = {
    export_format.MAGIC_PENDING: "an import under way: give the state directory that it lies in",
    b"VTPMDIN": "a state that a peer has sent: give the state directory that it lies in",
    b"VTPMANCH": "an anchor: it has no state, only which one is to be expected",
    b'{"': "JSON, and no owner record",
    b"\x7fELF": "a program",
    b"-----BEGIN": "a key or a certificate",
}
OTHER_STATE: Final = f"in swtpm's format, and {NOTHING_KNOWN}"


def open_with_history(
    path: Path,
    key: Key | None,
    migration_key: Key | None = None,
    at: int | None = None,
    snapshot: str | None = None,
    seal: Seal = None,
) -> tuple[Source, History | None]:
    """Return what is at a path, now or as it was at a generation, or in a disk image's snapshot.

    Of a state directory there is its history, too. An export is opened with ``seal``, without one
    with the key. What is damaged is told among the source's problems, as far as there is a state
    nevertheless. Raises NotAState, StateKeyError where a key is missing or wrong, NoGeneration,
    VtpmdError or OSError.
    """
    if path.is_dir():
        history = _history(path, key)
        return (history.source if at is None else source_at(history, at)), history
    source = _file_source(path, key, migration_key, snapshot, seal or key)
    return _checked(path, source, at, snapshot), None


def _checked(path: Path, source: Source, at: int | None, snapshot: str | None) -> Source:
    """Return what is in a file, if it is what was asked for. Raises NotAState or NoGeneration."""
    if snapshot is not None and source.snapshot is None:
        raise not_a_state(path, f"no disk image of QEMU's, and has no snapshot {snapshot!r}")
    if at is not None and at != source.generation:
        has = "of no generation" if source.generation is None else f"of {source.generation} alone"
        raise no_generation(source, at, f"it is {has}")
    return source


def open_history(path: Path, key: Key | None) -> History:
    """Return a state directory's history. Raises as open_with_history."""
    if not path.is_dir():
        raise NotAState(f"cannot tell the history of {path}: it is no state directory; give one")
    return _history(path, key)


def _history(path: Path, key: Key | None) -> History:
    try:
        with look_into(path) as directory:
            return directory_history(directory, key)
    except NotAState:
        if not chain.is_chain(path):
            raise
        what = "a chain of backups: give one of its files, or see `vtpmd verify`"
        raise NotAState(f"cannot inspect {path}: it is {what}") from None


def _file_source(
    path: Path,
    key: Key | None,
    migration_key: Key | None,
    snapshot: str | None,
    seal: Seal,
) -> Source:
    """Return what is in a file."""
    content, n_bytes = _read_file(path)
    if content.startswith(export_format.MAGIC):
        return export_source(path, seal)
    if content.startswith(journal.MAGIC):
        content, n_bytes = _read_file(path, JOURNAL_BYTES_MAX)
    if content.startswith(qemu_stream.MARKS):
        return _stream(path, key, migration_key)
    if content.startswith(qcow2.MAGIC):
        return _disk_image(path, key, migration_key, snapshot)
    if linear_decode(content[:LINEAR_HEADER_BYTES], n_bytes)[0] is not LinearFault.MAGIC:
        return _linear(path, key)
    written = find_record(content, key)
    if written is not None:
        return Source(str(path), written.kind, {}, written=written)
    kind = kind_of(content)
    if content[HEADER_MARK] == HEADER_BYTES and len(content) >= swtpm_format.HEADER.size:
        return _wrapped(path, content, key, migration_key)
    if kind is not None:
        return Source(str(path), "state", {kind.type: content}, kind.tpm)
    if key is not None:  # as the first version of swtpm's format has it
        state = opened(str(path), partial(swtpm_format.decode_file, content, key=key.material))
        tpm, states = _only(path, state)
        return Source(str(path), "file", states, tpm, is_encrypted=True)
    hints = (hint for mark, hint in HINTS.items() if content.startswith(mark))
    raise not_a_state(path, next(hints, NOTHING_KNOWN))


def _read_file(path: Path, bytes_max: int = BLOB_BYTES_MAX) -> tuple[bytes, int]:
    """Return what a file begins with, as no state is longer, and how long it is.

    Raises OSError or NotAState.
    """
    if is_socket(path):
        raise not_a_state(path, f"a socket: {ASK_IT}")
    # Without O_NONBLOCK a FIFO would be waited for.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise not_a_state(path, "no file, directory or block device")
        return file.read(bytes_max + 1), file.seek(0, os.SEEK_END)


def _only(path: Path, state: bytes) -> tuple[TpmVersion, dict[StateType, bytes]]:
    """Return of which TPM the one state is that a file holds, and that. Raises NotAState."""
    kind = kind_of(state)
    if kind is None:
        raise not_a_state(path, OTHER_STATE)
    return kind.tpm, {kind.type: state}


def _tpm_of(states: dict[StateType, bytes]) -> TpmVersion | None:
    """Return of which TPM states are, each in its place; None if they are not of one.

    A saved state that is damaged is not known as one, but by its place.
    """
    kinds = {type_: kind_of(state) for type_, state in states.items()}
    tpms = {kind.tpm for kind in kinds.values() if kind is not None}
    if len(tpms) != 1:
        return None
    (tpm,) = tpms
    if tpm is TpmVersion.TPM_1_2 and kinds.get(StateType.SAVESTATE, ...) is None:
        del kinds[StateType.SAVESTATE]
    return tpm if all(kind == Kind(tpm, type_) for type_, kind in kinds.items()) else None


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
    tpm, states = _only(path, state)
    return Source(
        path=str(path),
        kind="blob" if is_blob else "file",
        states=states,
        tpm=tpm,
        is_encrypted=bool(flags & HeaderFlag.ENCRYPTED),
        lineage=lineage,
        generation=None if lineage is None else lineage.generation,
        problems=problems,
    )


def _stream(path: Path, key: Key | None, migration_key: Key | None) -> Source:
    """Return what a migration stream of QEMU's holds."""
    what = "a migration stream of QEMU's"
    blobs = qemu_stream.carried_blobs(path)
    if blobs is None:
        raise not_a_state(path, f"{what} with no vTPM that is found in it")
    return _carried(path, what, blobs, key, migration_key)


def _disk_image(
    path: Path, key: Key | None, migration_key: Key | None, snapshot: str | None
) -> Source:
    """Return what a snapshot in a disk image holds: the last one that has a vTPM, or the named."""
    try:
        with path.open("rb") as file:
            image = qcow2.Image(file.fileno())
            for each in reversed(image.snapshots()):
                if snapshot is not None and snapshot != each.name:
                    continue
                blobs = qemu_stream.blobs_in(image.end_of_state(each))
                if blobs is not None:
                    what = f"a snapshot of QEMU's, {each.name}"
                    source = _carried(path, what, blobs, key, migration_key)
                    return source._replace(kind="snapshot", snapshot=each.name)
    except qcow2.Qcow2Error as error:
        what = f"cannot inspect {path}: {error}; restore it from a backup, or see `qemu-img check`"
        raise DamagedContainer(what) from error
    named = "" if snapshot is None else f" that is called {snapshot!r} and"
    raise not_a_state(path, f"a disk image of QEMU's with no snapshot{named} that has a vTPM")


def _carried(
    path: Path,
    what: str,
    blobs: dict[StateType, qemu_stream.CarriedBlob],
    key: Key | None,
    migration_key: Key | None,
) -> Source:
    """Return what a migration stream's blobs hold."""
    states: dict[StateType, bytes] = {}
    for kind, blob in blobs.items():
        if blob.content.startswith(TAIL_MARK):
            raise not_a_state(path, f"{what}, with a tail: {TAIL}")
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
    tpm = _tpm_of(states)
    if tpm is None:
        raise not_a_state(path, f"{what}, whose vTPM is {OTHER_STATE}")
    permanent = blobs[StateType.PERMANENT]
    lineage, problems = lineage_of(str(path), permanent.content, swtpm_format.read_blob_lineage)
    return Source(
        path=str(path),
        kind="migration-stream",
        states=states,
        tpm=tpm,
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
    tpm = _tpm_of(states)
    if tpm is None:
        what = OTHER_STATE if states else "a linear file with no state"
        raise not_a_state(path, what)
    return Source(
        path=str(path),
        kind="linear-file",
        states=states,
        tpm=tpm,
        is_encrypted=key is not None,
        lineage=lineage,
        generation=None if lineage is None else lineage.generation,
        problems=problems,
    )
