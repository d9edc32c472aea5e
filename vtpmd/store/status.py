"""What a state directory says of its vTPM to who has neither its lock nor its key.

Nothing is written, and nobody who serves the directory is kept waiting. What cannot be read, or is
damaged, is a problem, a line each; all else is told nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

from vtpmd import core
from vtpmd.errors import VtpmdError
from vtpmd.store import recovery
from vtpmd.store.directory import (
    LOCK_BYTES_MAX,
    LOCK_NAME,
    OpenDirectory,
    StateDirectoryError,
)
from vtpmd.store.holder import Found, describe, find
from vtpmd.store.holders import Holder, holders
from vtpmd.store.owner import Record, look
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType, TpmVersion, epoch_of

INTERRUPTED: Final = "{path}: an import was interrupted: `vtpmd fold {path}` finishes it"
ARRIVED: Final = (
    "{path}: a state that QEMU has brought lies beside the vTPM's, and may be later: "
    "`vtpmd fold {path}` settles that"
)
LOOKS_MAX: Final = 100  # a guest may write to its TPM's memory, some of the time

_T = TypeVar("_T")


class StateStatus(NamedTuple):
    """What the files of the permanent state say."""

    is_there: bool = False
    is_encrypted: bool = False
    identity: bytes | None = None  # None: no vtpmd has changed the vTPM yet
    generation: int | None = None
    # The journal has more, which only the key tells of, or what is damaged.
    may_be_newer: bool = False
    has_journal: bool = False
    problem: str | None = None

    @property
    def epoch(self) -> int:
        """The restore epoch of what is known of the vTPM; 0: no older state was put back."""
        return epoch_of(self.generation or 0)


class Status(NamedTuple):
    """What a state directory says of its vTPM."""

    version: TpmVersion | None  # None: there is none yet
    record: Record | None  # None: it cannot be read
    state: StateStatus | None  # None: its files cannot be read
    is_served: bool | None  # None: the lock cannot be read
    holders: list[Holder]  # who serves it, as far as this process can tell
    held_by: str | None  # another host that has it, by the record in .lock
    has_incoming: bool  # what a peer has sent is there
    problems: list[str]


def epoch_text(generation: int) -> str:
    """Return of which restore epoch a generation is, for people, and why; "" in the first one."""
    epoch = epoch_of(generation)
    if epoch == 0:
        return ""
    return f"{epoch}: an older state was put back, by an import or by a snapshot that QEMU loaded"


def status_of(directory: OpenDirectory) -> Status:
    """Return what there is to be told of a state directory."""
    problems: list[str] = []

    def told(ask: Callable[[OpenDirectory], _T]) -> _T | None:
        try:
            return ask(directory)
        except VtpmdError as error:
            problems.append(str(error))
            return None

    record, state = told(look), told(state_of)
    if state is not None and state.problem is not None:
        problems.append(state.problem)
    is_served = told(OpenDirectory.is_in_use)
    problems += unsettled(directory, is_served=is_served is True)
    found = holders(directory) if is_served else []
    held_by = None if is_served is None else told(_other_host)
    has_incoming = directory.exists(directory.names.incoming)
    version = directory.version if any(map(directory.exists, directory.names)) else None
    return Status(version, record, state, is_served, found, held_by, has_incoming, problems)


def unsettled(directory: OpenDirectory, *, is_served: bool) -> list[str]:
    """Return what a crash has left, from which the next start makes another state than is shown."""
    names, path = directory.names, directory.path
    found = []
    if directory.exists(names.importing):
        found.append(INTERRUPTED.format(path=path))
    if directory.exists(names.arrived) and not is_served:
        found.append(ARRIVED.format(path=path))
    return found


def _other_host(directory: OpenDirectory) -> str | None:
    """Return which host has the directory, on storage that hosts share. Raises VtpmdError."""
    content = directory.read(LOCK_NAME, LOCK_BYTES_MAX)
    found, holder = find(content or b"")
    if found is Found.DAMAGED:
        raise StateDirectoryError(
            f"{directory.place(LOCK_NAME)} is no record of who has the directory; if nobody has: "
            f"vtpmd owner {directory.path} --claim"
        )
    return None if holder is None or found is not Found.ELSEWHERE else describe(holder)


def state_of(directory: OpenDirectory) -> StateStatus:
    """Return what the files of the permanent state say. Raises StateDirectoryError."""
    permanent, journal = read_together(directory)
    lineage, states = None, {}
    if permanent is not None:
        try:
            lineage = swtpm_format.read_lineage(permanent)
            states[StateType.PERMANENT] = swtpm_format.decode_file(permanent)
        except swtpm_format.KeyNeeded:
            return _of_lineage(lineage, journal)._replace(is_encrypted=True)
        except swtpm_format.FormatError as error:
            problem = f"{directory.place(directory.names.permanent)}: {error}; {_remedy(directory)}"
            return _of_lineage(lineage, journal)._replace(problem=problem)
    found = recovery.examine_files(directory.names, states, lineage, journal)
    if not found.recovery.may_start:
        problem = f"{directory.path}: {recovery.reason(found)}; {_remedy(directory)}"
        told = _of_lineage(lineage, journal)
        return told._replace(is_there=permanent is not None, problem=problem)
    generation = None if lineage is None else found.generation
    return StateStatus(
        is_there=permanent is not None,
        identity=found.identity,
        generation=generation,
        has_journal=found.has_journal,
    )


def _remedy(directory: OpenDirectory) -> str:
    return f"see `vtpmd recover {directory.path}`"


def _of_lineage(lineage: Lineage | None, journal: bytes | None) -> StateStatus:
    """Return what the checkpoint says of itself, beside the state."""
    has_journal = journal is not None
    found = StateStatus(is_there=True, may_be_newer=has_journal, has_journal=has_journal)
    if lineage is None:
        return found
    return found._replace(identity=lineage.identity, generation=lineage.generation)


def read_together(directory: OpenDirectory) -> tuple[bytes | None, bytes | None]:
    """Return checkpoint and journal as they were together. Raises StateDirectoryError.

    Who serves the directory may write to either, and puts others in their place, between two reads
    and in the middle of one: what is read twice alike was so.
    """
    names, before = directory.names, None
    for _ in range(LOOKS_MAX):
        found = (
            directory.read(names.permanent, swtpm_format.FILE_BYTES_MAX),
            directory.read(names.journal, core.JOURNAL_BYTES_MAX),
        )
        if found == before:
            return found
        before = found
    raise StateDirectoryError(
        f"{directory.place(names.journal)} is written all the time: ask again"
    )
