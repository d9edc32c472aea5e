"""Bringing an exported vTPM back into a state directory, as a whole or not at all.

    tpm2-00.import     an import that is under way: all that it brings, and what is to be set aside

With that file's rename into its place the import has happened. What it says is then done, step by
step, each of which may be done again: by this process, or after a crash by the next one that makes
the directory what a vTPM starts from (``store/start.py``). Before the rename nothing has changed.

    1  the permanent state that is there is copied, to a name of its own
    2  its journal, and the states that go with it, get names of their own
    3  the owner record says that it was imported or replaced, and that it is this host's
    4  the permanent state is written, then the others
    5  tpm2-00.import is removed

At no step a program that knows nothing of that file finds a directory without a permanent state,
and makes a new TPM.
"""

from __future__ import annotations

import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Final

from vtpmd.errors import VtpmdError
from vtpmd.store import export_seal, libtpms, recovery
from vtpmd.store.directory import StateDirectory, StateDirectoryError, StateKeyError
from vtpmd.store.export_seal import Seal
from vtpmd.store.keys import Key
from vtpmd.store.libtpms import States
from vtpmd.store.moving import MovingFiles
from vtpmd.store.recovery import RecoveryRefused
from vtpmd.wire import export_format, swtpm_format
from vtpmd.wire.export_format import (
    EXPORT_BYTES_MAX,
    ID_BYTES,
    MAGIC_PENDING,
    Export,
    ExportError,
    Header,
)
from vtpmd.wire.swtpm_format import FILE_BYTES_MAX, Lineage
from vtpmd.wire.tpm import StateType, next_epoch

STANDARD_INPUT: Final = Path("-")
FIRST_GENERATION: Final = 1  # of a vTPM
COPIES_MAX: Final = 1000  # of one directory's files: more imports than that were not made by hand


class NotEmpty(StateDirectoryError):
    """There is a vTPM in the directory, which nobody has said may be set aside."""

    exit_status = 10


def read(path: Path) -> Export:
    """Return the export in a file, or on standard input. Raises ExportError or OSError."""
    if path == STANDARD_INPUT:
        return export_format.decode(sys.stdin.buffer.read(EXPORT_BYTES_MAX + 1))
    with path.open("rb") as file:
        return export_format.decode(file.read(EXPORT_BYTES_MAX + 1))


def open_file(
    path: Path, seal: Seal, *, with_volatile: bool, at: int | None = None
) -> tuple[Header, States]:
    """Return what an export in a file, or on standard input, says of itself, and its states.

    A directory is a chain of backups: then it is the newest, or that ``at`` a generation. The
    permanent state alone, unless it is to be ``with_volatile`` ones; libtpms takes them. Raises
    StateKeyError, ExportError, LibtpmsTooOld, RecoveryRefused, another VtpmdError or OSError.
    """
    place = f"cannot import {path}"
    try:
        header, states = find(path, seal, at)
    except StateKeyError as error:
        raise StateKeyError(f"{place}: {error}") from error
    except ExportError as error:
        error.args = (f"{place}: {error}",)
        raise
    if not with_volatile:
        states = {StateType.PERMANENT: states[StateType.PERMANENT]}
    libtpms.check_level(str(path), header.version, states)
    refusal = libtpms.ask(header.version, states=states).refusal
    if refusal is not None:
        raise RecoveryRefused(f"{place}: {refusal}; take another export")
    return header._replace(is_new=False), states


def of_a_new_tpm(source: Header) -> Header:
    """Return an export's header, as one of a vTPM that has no history."""
    return source._replace(identity=os.urandom(ID_BYTES), is_new=True)


def find(path: Path, seal: Seal, at: int | None = None) -> tuple[Header, States]:
    """Return what an export, or a backup in a chain, says of itself, and its states.

    Raises NoSuchLink, ChainDamaged, StateKeyError, ExportError, another VtpmdError or OSError.
    """
    from vtpmd.store import chain

    if path != STANDARD_INPUT and path.is_dir():
        return chain.restore(path, seal, at=at)
    export = read(path)
    header = export.header._replace(link=None)
    if at not in (None, header.generation):
        raise chain.NoSuchLink(
            f"{path} has generation {header.generation}, and not {at}; give the chain of backups "
            "that has it, or leave out --at"
        )
    if not header.is_delta:
        return header, export_seal.opened(export, seal)
    if path == STANDARD_INPUT:
        raise ExportError("it is a delta of a chain of backups: give the file in its directory")
    return chain.restore(path.parent, seal, name=path.name)


def prepare(
    directory: StateDirectory,
    files: MovingFiles,
    source: Header,
    states: States,
    key: Key | None,
    *,
    force: bool,
) -> Header:
    """Return what an import of these of an export's states will be; nothing is written.

    With the ``key`` it is known how far a sealed journal has come.

    Raises NotEmpty, StateDirectoryError or OwnerRecordError.
    """
    names = directory.names
    there = [name for name in names if directory.exists(name)]
    if there and not force:
        raise NotEmpty(
            f"{directory.path} is not empty: it has {there[0]}; give another directory, or add "
            "--force, which keeps what is there in files of other names"
        )
    if directory.exists(names.incoming):
        raise StateDirectoryError(
            f"{directory.path} has a state that a peer has sent: do `vtpmd fold {directory.path}` "
            "first, with its --anchor if there is one"
        )
    if not source.is_new:
        files.owner.check_restore()
    used = max(files.owner.read().generation, _used_there(directory, source.identity, key))
    begun = begin_epoch(directory.path, source, used)
    set_aside = [name in there and name not in (names.owner, names.importing) for name in names]
    return begun._replace(
        kinds=tuple(sorted(states)),
        aside=sum(1 << bit for bit, is_set in enumerate(set_aside) if is_set),
        aside_number=_free_number(directory),
    )


def commit(directory: StateDirectory, header: Header, states: States, key: Key | None) -> None:
    """Have an import happen: durably, once this returns. Raises StateDirectoryError."""
    content = export_seal.sealed(header, states, key, MAGIC_PENDING)
    directory.replace(directory.names.importing, content)


def pending(directory: StateDirectory, key: Key | None) -> bytes | None:
    """Return the permanent state of an import that is under way; None: there is none.

    Raises StateKeyError or RecoveryRefused.
    """
    found = _find(directory, key)
    return None if found is None else found[1][StateType.PERMANENT]


def finish(directory: StateDirectory, files: MovingFiles, key: Key | None) -> dict[str, str]:
    """Do what an import that is under way says; return the names of what was set aside.

    Raises StateKeyError, RecoveryRefused, StateDirectoryError or OwnerRecordError; what is not done
    then is to be done again.
    """
    found = _find(directory, key)
    if found is None:
        return {}
    header, states = found
    kept = _set_aside(directory, header)
    if header.is_new:
        files.owner.replace(header.becomes)
    else:
        name = f"export {header.export.hex()}, of generation {header.generation}"
        files.owner.restore(header.export, name, header.becomes)
    for kind in header.kinds:
        its = lineage_of(header) if kind is StateType.PERMANENT else None
        directory.write_state(kind, states[kind], key, its)
    directory.remove(directory.names.importing)
    return kept


def digest(states: States) -> bytes:
    """Return what an anchor knows a permanent state by."""
    return sha256(states[StateType.PERMANENT]).digest()


def _find(directory: StateDirectory, key: Key | None) -> tuple[Header, States] | None:
    name = directory.names.importing
    content = directory.read(name, EXPORT_BYTES_MAX)
    if content is None:
        return None
    place = directory.place(name)
    try:
        export = export_format.decode(content, MAGIC_PENDING)
        return export.header, export_seal.opened(export, key)
    except StateKeyError as error:
        raise StateKeyError(f"cannot finish the import of {place}: {error}") from error
    except VtpmdError as error:
        raise RecoveryRefused(
            f"cannot finish the import of {place}: {error}; import again, with --force"
        ) from error


def _set_aside(directory: StateDirectory, header: Header) -> dict[str, str]:
    """Give what was there names of its own, each once; return them."""
    kept = {}
    for bit, name in enumerate(directory.names):
        if not header.aside & 1 << bit:
            continue
        kept[name] = _aside(name, header.aside_number)
        if directory.exists(kept[name]):
            continue
        if name != directory.names.permanent:
            directory.rename(name, kept[name])
        elif (original := directory.read(name, FILE_BYTES_MAX)) is not None:
            directory.replace(kept[name], original)
    return kept


def _aside(name: str, number: int) -> str:
    return f"{name}.before-{number}"


def _free_number(directory: StateDirectory) -> int:
    for number in range(1, COPIES_MAX + 1):
        if not any(directory.exists(_aside(name, number)) for name in directory.names):
            return number
    raise StateDirectoryError(f"{directory.path} has too many files of before-N: remove some")


def begin_epoch(path: str, source: Header, used: int) -> Header:
    """Return an export's header, as one that begins the epoch after all generations that are used.

    One of a new TPM begins the first epoch. Raises StateDirectoryError.
    """
    if source.is_new:
        return source._replace(becomes=FIRST_GENERATION)
    becomes = next_epoch(max(source.generation, used))
    if becomes is None:
        raise StateDirectoryError(
            f"cannot import into {path}: the vTPM's generation numbers are used up"
        )
    return source._replace(identity=source.identity or os.urandom(ID_BYTES), becomes=becomes)


def _used_there(directory: StateDirectory, identity: bytes | None, key: Key | None) -> int:
    """Return how far a vTPM has come in a directory, as far as that can be read.

    A snapshot that was loaded has begun an epoch that only the journal tells of.
    """
    used = generation_of(directory.read(directory.names.permanent, FILE_BYTES_MAX), identity)
    try:
        found = recovery.examine(directory, key)
    except VtpmdError:
        return used  # it is damaged, or sealed with another key, and set aside
    return max(used, found.generation) if found.identity == identity else used


def generation_of(file: bytes | None, identity: bytes | None) -> int:
    """Return how far a state's file says that a vTPM has come, if it is of this identity."""
    try:
        lineage = None if file is None else swtpm_format.read_lineage(file)
    except swtpm_format.FormatError:
        return 0  # it is damaged, and set aside
    return lineage.generation if lineage is not None and lineage.identity == identity else 0


def lineage_of(header: Header) -> Lineage:
    """Return the lineage that an import gives to the permanent state."""
    return Lineage(header.identity or export_format.NO_IDENTITY, header.becomes)
