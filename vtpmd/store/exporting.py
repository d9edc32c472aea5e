"""What an export has: the states of a vTPM that is stopped, or served meanwhile, at one generation.

Nothing is locked, and who serves the directory is not asked. It is a generation that was
acknowledged, or is about to be, because

- the checkpoint is read whole, as its file is made anew and renamed;
- the journal is written from its start on, and read from its end on: what is read of it is what it
  was at one moment, but for sectors of the record that was written just then. If some of those are
  missing, it is the torn record that recovery drops;
- recovery checks that one continues the other. If a folding came between the two reads, they do
  not go together, and both are read again;
- what was read is synced, before it counts: what a loss of power could take back is in no export.
  Of a checkpoint that a journal continues, that is in the journal, durably.

A stop, a start or a peer's state that comes meanwhile is told by what else lies there: then all is
read again, too. A volatile state goes with one permanent state, so it is read of a vTPM that is
stopped, and only as nothing changes; one that runs is asked (``exporting_live``).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from vtpmd import core
from vtpmd.store import export_seal, libtpms, recovery
from vtpmd.store.directory import (
    KEY_REMEDIES,
    OpenDirectory,
    StateDirectoryError,
    StateDirectoryInUse,
    StateKeyError,
    is_locked,
    look_into,
)
from vtpmd.store.export_seal import Seal
from vtpmd.store.keys import Key
from vtpmd.store.linear import LinearFile
from vtpmd.store.owner import OwnerRecordError, Record, look
from vtpmd.store.recovery import Examined, RecoveryRefused
from vtpmd.wire import export_format, swtpm_format
from vtpmd.wire.export_format import ID_BYTES, Header
from vtpmd.wire.swtpm_format import BARE_MAGIC_AT, BARE_MAGICS, FILE_BYTES_MAX
from vtpmd.wire.tpm import StateType, TpmVersion

_T = TypeVar("_T")

READ_BYTES: Final = 4096  # of a journal, at once
# A folding comes every two thousand changes, a peer's state is taken up in milliseconds.
TRIES_MAX: Final = 100
PAUSE_S: Final = 0.02

VOLATILE: Final = (StateType.VOLATILE, StateType.SAVESTATE)


class NoVtpm(StateDirectoryError):
    """There is nothing to export."""

    exit_status = 9


class NotNow(StateDirectoryError):
    """What is there is being changed: it may be right the next time."""


class Taken(NamedTuple):
    """What was found of a vTPM."""

    version: TpmVersion
    states: dict[StateType, bytes]
    identity: bytes | None  # None: no vtpmd has changed it yet
    generation: int
    is_served: bool
    record: Record | None = None  # None: it cannot be read, or has no place in a linear file

    def __repr__(self) -> str:
        """Leave the states out."""
        return f"Taken({self.version!r}, {self.generation})"


def take(path: Path, key: Key | None, *, with_volatile: bool = False) -> Taken:
    """Return the states of the vTPM in a state directory, or a linear file.

    Raises NoVtpm, StateKeyError, RecoveryRefused for what is damaged, NotNow, or another VtpmdError
    or OSError.
    """
    if not path.is_dir():
        with LinearFile.look_into(str(path)) as file:
            return _again(lambda: _take_linear(file, key, with_volatile=with_volatile))
    with look_into(path) as directory:
        return _again(lambda: _take(directory, key, with_volatile=with_volatile))


def take_from(directory: OpenDirectory, key: Key | None) -> Taken:
    """Return the permanent state of the vTPM in an open state directory. Raises as ``take``."""
    return _again(lambda: _take(directory, key, with_volatile=False))


def export(taken: Taken, seal: Seal) -> tuple[Header, bytes]:
    """Return an export of what was found, and what it says of itself. Raises VtpmdError."""
    header = Header(
        export=os.urandom(ID_BYTES),
        identity=taken.identity,
        generation=taken.generation,
        time_s=int(time.time()),
        version=taken.version,
        kinds=tuple(sorted(taken.states)),
    )
    content = export_seal.sealed(header, taken.states, seal)
    return export_format.decode(content).header, content


def _again(look_once: Callable[[], Taken]) -> Taken:
    """Return what is found once it is of one moment. Raises NotNow, or what ``look_once`` does."""
    for _ in range(TRIES_MAX - 1):
        try:
            return look_once()
        except NotNow:
            time.sleep(PAUSE_S)
    return look_once()


def _take(directory: OpenDirectory, key: Key | None, *, with_volatile: bool) -> Taken:
    """Return what there is in a directory now. Raises as ``take``; NotNow: it is being changed."""
    _check_settled(directory)
    is_served = directory.is_in_use()
    if with_volatile:
        _check_stopped(directory.path, is_served)
    material = None if key is None else key.material
    names = directory.names
    permanent = directory.read(names.permanent, FILE_BYTES_MAX)
    journal = _read_backwards(directory, names.journal, core.JOURNAL_BYTES_MAX)
    if journal is None:
        _sync_state(directory)
    kinds = VOLATILE if with_volatile else ()
    others = {kind: directory.read(names.state(kind), FILE_BYTES_MAX) for kind in kinds}
    stored = {names.state(kind): content for kind, content in others.items()}
    _check_settled(directory)
    if permanent is None and journal is None:
        raise _nothing_there(directory)
    lineage, states = None, {}
    if permanent is not None:
        place = directory.place(names.permanent)
        lineage = _told(place, partial(swtpm_format.read_lineage, permanent))
        decode = partial(swtpm_format.decode_file, permanent, key=material)
        states[StateType.PERMANENT] = _told(place, decode)
    secret = None if key is None else key.journal_secret()
    found = recovery.examine_files(names, states, lineage, journal, secret)
    if not found.recovery.may_start:
        was = {names.permanent: permanent, names.journal: journal}
        is_changing = is_served or directory.is_in_use() or _have_changed(directory, was)
        raise _refusal(directory.path, found, is_changing=is_changing)
    for kind, content in others.items():
        if content is not None:
            decode = partial(swtpm_format.decode_file, content, key=material)
            states[kind] = _told(directory.place(names.state(kind)), decode)
    if with_volatile and (directory.is_in_use() or _have_changed(directory, stored)):
        raise NotNow(f"cannot export {directory.path}: it is being started; ask again")
    return Taken(
        version=directory.version,
        states=states | found.states_to_start_from(),
        identity=found.identity,
        generation=found.generation,
        is_served=is_served,
        record=_record(directory),
    )


def _check_settled(directory: OpenDirectory) -> None:
    """Raise NotNow where another state is about to take the place of the one that is there."""
    names = directory.names
    comes = {
        names.incoming: "a peer has sent",
        names.arrived: "QEMU has brought, or brings,",
        names.importing: "is being imported",
    }
    for name, what in comes.items():
        if directory.exists(name):
            raise NotNow(
                f"cannot export {directory.path}: a state that {what} is about to take the place "
                f"of what is there; ask again, or where no vtpmd runs: vtpmd fold {directory.path}"
            )


def _check_stopped(path: str, is_served: bool) -> None:
    if is_served:
        raise StateDirectoryInUse(
            f"cannot export the volatile state of {path}: the vTPM is served; give --manage, the "
            "management socket of its vtpmd, or stop it, or leave out --volatile"
        )


def _nothing_there(directory: OpenDirectory) -> StateDirectoryError:
    """Return the error for a directory without a permanent state."""
    names, what = directory.names, f"cannot export {directory.path}: "
    if directory.exists(names.backup):
        return NotNow(
            f"{what}{names.permanent} is missing, and {names.backup} is there, which swtpm keeps "
            "as it writes a new one; ask again, or where no swtpm runs: rename it"
        )
    return NoVtpm(f"{what}there is no vTPM in it yet")


def _refusal(path: str, found: Examined, *, is_changing: bool) -> StateDirectoryError:
    """Return the error for files that no vTPM may start from; a folding may have come between."""
    what = f"cannot export {path}: {recovery.reason(found)}"
    if found.recovery.letter in recovery.KEY_LETTERS:
        return StateKeyError(what)
    if is_changing:
        return NotNow(f"{what}; ask again, or see `vtpmd verify {path}`")
    return RecoveryRefused(f"{what}; see `vtpmd recover {path}`")


def _have_changed(directory: OpenDirectory, before: dict[str, bytes | None]) -> bool:
    """Return whether files are not as they were read; none is longer than a journal may be."""
    return any(
        directory.read(name, core.JOURNAL_BYTES_MAX) != content for name, content in before.items()
    )


def _record(directory: OpenDirectory) -> Record | None:
    """Return what the owner record says; None: that cannot be read, and keeps nothing back."""
    try:
        return look(directory)
    except OwnerRecordError:
        return None


def _read_backwards(directory: OpenDirectory, name: str, bytes_max: int) -> bytes | None:
    """Return a file's content, as ``OpenDirectory.read`` does, read from its end on; then sync it.

    Raises StateDirectoryError.
    """
    try:
        with _opened(directory, name) as fd:
            n_bytes = min(os.fstat(fd).st_size, bytes_max + 1)
            offsets = range(0, n_bytes, READ_BYTES)
            pieces = [os.pread(fd, min(READ_BYTES, n_bytes - at), at) for at in reversed(offsets)]
            _sync(os.fdatasync, fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _failed(directory, name, error) from error
    return b"".join(reversed(pieces))


def _sync_state(directory: OpenDirectory) -> None:
    """Make the checkpoint durable, where no journal has said durably what it holds.

    Raises StateDirectoryError.
    """
    name = directory.names.permanent
    try:
        with _opened(directory, name) as fd:
            _sync(os.fsync, fd)
        _sync(os.fsync, directory.directory_fd)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _failed(directory, name, error) from error


@contextmanager
def _opened(directory: OpenDirectory, name: str) -> Iterator[int]:
    """Open a regular file. Raises OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(name, flags, dir_fd=directory.directory_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        yield fd
    finally:
        os.close(fd)


def _failed(directory: OpenDirectory, name: str, error: OSError) -> StateDirectoryError:
    return StateDirectoryError(
        f"cannot read {directory.place(name)}: {error.strerror}; "
        f"{directory.remedy(name, error, 'repair the file system')}"
    )


def _sync(sync: Callable[[int], None], fd: int) -> None:
    """Make durable what was read; where nothing can be written, it is. Raises OSError."""
    try:
        sync(fd)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EINVAL):
            raise


def _told(place: str, decode: Callable[[], _T]) -> _T:
    """Return what a file holds. Raises StateKeyError or RecoveryRefused."""
    try:
        return decode()
    except swtpm_format.FormatError as error:
        remedy = KEY_REMEDIES.get(type(error))
        if remedy is None:
            what = f"cannot export {place}: {error}; restore it from a backup"
            raise RecoveryRefused(what) from error
        raise StateKeyError(f"cannot export {place}: {error}; {remedy}") from error


def _take_linear(file: LinearFile, key: Key | None, *, with_volatile: bool) -> Taken:
    """Return what there is in a linear file now. Raises as ``take``."""
    is_served = is_locked(file.fd)
    if with_volatile:
        _check_stopped(file.path, is_served)
    contents = _read_linear(file)
    if _read_linear(file) != contents:
        raise NotNow(f"cannot export {file.path}: it is written all the time; ask again")
    _sync(os.fsync, file.fd)
    if StateType.PERMANENT not in contents:
        raise NoVtpm(f"cannot export {file.path}: there is no vTPM in it yet")
    kinds = [StateType.PERMANENT, *(VOLATILE if with_volatile else ())]
    material = None if key is None else key.material
    states = {
        kind: _told(file.path, partial(swtpm_format.decode_file, contents[kind], key=material))
        for kind in kinds
        if kind in contents
    }
    lineage = _told(file.path, partial(swtpm_format.read_lineage, contents[StateType.PERMANENT]))
    if with_volatile and is_locked(file.fd):
        raise NotNow(f"cannot export {file.path}: it is being started; ask again")
    return Taken(
        version=_version_of(file.path, states),
        states=states,
        identity=None if lineage is None else lineage.identity,
        generation=0 if lineage is None else lineage.generation,
        is_served=is_served,
    )


def _read_linear(file: LinearFile) -> dict[StateType, bytes]:
    """Return the state files in a linear file. Raises LinearFileError or OSError."""
    extents = file.extents()
    return {kind: os.pread(file.fd, each.n_bytes, each.offset) for kind, each in extents.items()}


def _version_of(path: str, states: dict[StateType, bytes]) -> TpmVersion:
    """Return of which version the TPM is that states are of; a linear file does not say it.

    Raises NoVtpm where libtpms does not know it.
    """
    permanent = states[StateType.PERMANENT]
    if permanent[BARE_MAGIC_AT:].startswith(BARE_MAGICS[0]):
        return TpmVersion.TPM_2_0
    refusal = libtpms.ask(TpmVersion.TPM_1_2, states=states).refusal
    if refusal is not None:
        raise NoVtpm(f"cannot export {path}: there is no vTPM in it that is known: {refusal}")
    return TpmVersion.TPM_1_2
