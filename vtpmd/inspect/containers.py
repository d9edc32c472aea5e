"""From a path to the states that are there, by what is in it: nothing is locked or written.

A state directory with its journal, a linear file or a device, a state file or a state blob of
swtpm's, a state as libtpms marshals it. Of what is something else it is said what it is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from vtpmd.core.linear import LINEAR_HEADER_BYTES, LinearFault, linear_decode
from vtpmd.errors import VtpmdError
from vtpmd.inspect.decoding import kind_of
from vtpmd.store import recovery
from vtpmd.store.directory import (
    KEY_REMEDIES,
    OpenDirectory,
    StateDirectoryError,
    StateKeyError,
    look_into,
)
from vtpmd.store.keys import Key
from vtpmd.store.libtpms import TAKEN
from vtpmd.store.linear import LinearFile, LinearFileError
from vtpmd.store.owner import Record, look
from vtpmd.store.status import read_together
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import BLOB_BYTES_MAX, FILE_BYTES_MAX, HeaderFlag, Lineage
from vtpmd.wire.tpm import StateType, TpmVersion

HEADER_MARK: Final = slice(2, 4)  # of swtpm's header: its size, 10
HEADER_BYTES: Final = (10).to_bytes(2, "big")
FLAGS: Final = slice(4, 6)
# What something else begins with, and what it is.
HINTS: Final = {
    b"VTPMJRNL": "a journal of vtpmd's: give the state directory that it lies in",
    b"VTPD": "a delta record of vtpmd's: it says only what has changed",
    b"VTPMDIN": "a state that a peer has sent: give the state directory that it lies in",
    b"VTPMANCH": "an anchor: it has no state, only which one is to be expected",
    b'{"': "JSON, as an owner record is: give the state directory that it lies in",
    b"QEVM": "a migration stream of QEMU's, whose vTPM is not taken from it",
    b"QFI\xfb": "a disk image of QEMU's, whose snapshots are not looked into",
    b"\x7fELF": "a program",
    b"-----BEGIN": "a key or a certificate",
}
NOTHING_KNOWN: Final = "no state of a TPM 2.0"
TPM_12: Final = "a TPM 1.2's state, which is not decoded yet"
EXIT_DAMAGED: Final = 5
EXIT_NOT_OURS: Final = 9

_T = TypeVar("_T")


class NotAState(VtpmdError):
    """What is at a path is no state that can be decoded."""

    exit_status = EXIT_NOT_OURS


class DamagedContainer(StateDirectoryError):
    """What a state is wrapped in is damaged: nothing can be decoded."""

    exit_status = EXIT_DAMAGED


class Source(NamedTuple):
    """What is at a path, of one TPM."""

    path: str
    kind: str  # directory, linear-file, file, blob or state
    states: dict[StateType, bytes]
    tpm: TpmVersion = TpmVersion.TPM_2_0
    is_encrypted: bool = False
    lineage: Lineage | None = None
    generation: int | None = None  # of the permanent state, its journal included
    journal_commits: int | None = None  # None: there is no journal
    record: Record | None = None  # of a directory alone
    is_in_use: bool | None = None
    problems: tuple[str, ...] = ()  # a line each

    def check_decodable(self) -> Source:
        """Return this, if its states can be decoded. Raises NotAState."""
        if self.tpm is not TpmVersion.TPM_2_0:
            raise NotAState(f"cannot inspect {self.path}: it is {TPM_12}; see `vtpmd verify`")
        return self

    def __repr__(self) -> str:
        """Leave the states out."""
        return f"Source({self.path}, {self.kind})"


def open_source(path: Path, key: Key | None, migration_key: Key | None = None) -> Source:
    """Return what is at a path.

    What is damaged is told among its problems, as far as there is a state nevertheless. Raises
    NotAState, StateKeyError where a key is missing or wrong, VtpmdError or OSError.
    """
    if path.is_dir():
        with look_into(path) as directory:
            return _directory(directory, key)
    content, n_bytes = _read_file(path)
    if linear_decode(content[:LINEAR_HEADER_BYTES], n_bytes)[0] is not LinearFault.MAGIC:
        return _linear(path, key)
    kind = kind_of(content)
    if content[HEADER_MARK] == HEADER_BYTES and len(content) >= swtpm_format.HEADER.size:
        return _wrapped(path, content, key, migration_key)
    if kind is not None:
        return Source(str(path), "state", {kind: content})
    if key is not None:  # as the first version of swtpm's format has it
        state = _opened(str(path), partial(swtpm_format.decode_file, content, key=key.material))
        return Source(str(path), "file", _only(path, state), is_encrypted=True)
    hints = (hint for mark, hint in HINTS.items() if content.startswith(mark))
    raise _not_a_state(path, next(hints, NOTHING_KNOWN))


def _not_a_state(path: str | Path, what: str) -> NotAState:
    return NotAState(
        f"cannot inspect {path}: it is {what}; give a state directory, a state file or a state blob"
    )


def _read_file(path: Path) -> tuple[bytes, int]:
    """Return what a file begins with, as no state is longer, and how long it is.

    Raises OSError or NotAState.
    """
    # Without O_NONBLOCK a FIFO would be waited for.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise _not_a_state(path, "no file, directory or block device")
        return file.read(BLOB_BYTES_MAX + 1), file.seek(0, os.SEEK_END)


def _opened(place: str, decode: Callable[[], bytes]) -> bytes:
    """Return what is in a container. Raises StateKeyError or DamagedContainer."""
    try:
        return decode()
    except swtpm_format.FormatError as error:
        remedy = KEY_REMEDIES.get(type(error))
        if remedy is None:
            what = f"cannot inspect {place}: {error}; restore it from a backup"
            raise DamagedContainer(what) from error
        raise StateKeyError(f"cannot inspect {place}: {error}; {remedy}") from error


def _only(path: Path, state: bytes) -> dict[StateType, bytes]:
    """Return the one state that a file holds. Raises NotAState."""
    kind = kind_of(state)
    if kind is None:
        # A TPM 1.2's, or another program's: neither has a mark of its own.
        raise _not_a_state(path, f"{NOTHING_KNOWN} that swtpm's format holds")
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
    state = _opened(str(path), decode)
    lineage, problems = _lineage(str(path), content, read_lineage)
    return Source(
        path=str(path),
        kind="blob" if is_blob else "file",
        states=_only(path, state),
        is_encrypted=bool(flags & HeaderFlag.ENCRYPTED),
        lineage=lineage,
        generation=None if lineage is None else lineage.generation,
        problems=problems,
    )


def _lineage(
    place: str, content: bytes, read: Callable[[bytes], Lineage | None]
) -> tuple[Lineage | None, tuple[str, ...]]:
    """Return where a state that is alone stands in its history, and what is wrong with that."""
    try:
        lineage = read(content)
    except swtpm_format.FormatError as error:
        return None, (f"{place}: {error}",)
    if lineage is None or not lineage.continued:
        return lineage, ()
    return lineage, (f"{place}: a journal continues it, which is in its state directory",)


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
            states[kind] = _opened(place, partial(swtpm_format.decode_file, content, key=material))
            if kind is StateType.PERMANENT:
                lineage, problems = _lineage(place, content, swtpm_format.read_lineage)
    if not states or any(kind_of(state) is None for state in states.values()):
        what = "a linear file with no state" if not states else TPM_12
        raise _not_a_state(path, what)
    return Source(
        path=str(path),
        kind="linear-file",
        states=states,
        is_encrypted=key is not None,
        lineage=lineage,
        generation=None if lineage is None else lineage.generation,
        problems=problems,
    )


def _directory(directory: OpenDirectory, key: Key | None) -> Source:
    """Return what a state directory holds, with its journal. Raises as ``open_source`` does."""
    names = directory.names
    problems: list[str] = []

    def told(ask: Callable[[], _T]) -> _T | None:
        try:
            return ask()
        except VtpmdError as error:
            problems.append(str(error))
            return None

    permanent, journal = read_together(directory)
    if permanent is None and journal is None:
        raise NotAState(f"cannot inspect {directory.path}: there is no vTPM in it yet")
    states = _states(directory, permanent, key, problems)
    lineage = told(lambda: None if permanent is None else swtpm_format.read_lineage(permanent))
    secret = None if key is None else key.journal_secret()
    found = recovery.examine_files(names, states, lineage, journal, secret)
    if found.recovery.letter in recovery.KEY_LETTERS:
        raise StateKeyError(f"cannot inspect {directory.path}: {recovery.reason(found)}")
    if not found.recovery.may_start:
        problems.append(f"{directory.path}: {recovery.reason(found)}")
    return Source(
        path=directory.path,
        kind="directory",
        states=found.states_to_start_from(),
        tpm=directory.version,
        is_encrypted=key is not None,
        lineage=lineage,
        generation=None if lineage is None else found.generation,
        journal_commits=found.recovery.applied if found.has_journal else None,
        record=told(lambda: look(directory)),
        is_in_use=told(directory.is_in_use),
        problems=tuple(problems),
    )


def _states(
    directory: OpenDirectory, permanent: bytes | None, key: Key | None, problems: list[str]
) -> dict[StateType, bytes]:
    """Return the states in a directory's files; one but the first that is wrong is a problem."""
    material = None if key is None else key.material
    contents = {
        kind: directory.read(directory.names.state(kind), FILE_BYTES_MAX)
        for kind in TAKEN[directory.version]
    }
    contents[StateType.PERMANENT] = permanent
    states = {}
    for kind, content in contents.items():
        if content is None:
            continue
        place = directory.place(directory.names.state(kind))
        try:
            states[kind] = _opened(place, partial(swtpm_format.decode_file, content, key=material))
        except StateDirectoryError as error:
            if isinstance(error, StateKeyError) and kind is StateType.PERMANENT:
                raise
            problems.append(str(error))
    return states
