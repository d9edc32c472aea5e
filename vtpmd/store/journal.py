"""What a start finds after the last run: the states, and a journal if that run ended in a crash.

The journal is folded into the permanent state's file and removed before the engine starts, which
makes another. ``docs/journal-format.md`` has the table of what is found and what is done.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from vtpmd import core
from vtpmd.core import JournalFault, Recovery
from vtpmd.store.directory import (
    JOURNAL_NAME,
    PERMANENT_NAME,
    StateDirectory,
    StateDirectoryError,
    read_regular_file,
)
from vtpmd.wire import swtpm_format
from vtpmd.wire.control import StateType
from vtpmd.wire.swtpm_format import Lineage

# The rows in which a vTPM does not start, and what is wrong.
REFUSALS: Final = {
    "C": f"{PERMANENT_NAME} is continued by a journal, and {JOURNAL_NAME} is missing",
    "D": f"{JOURNAL_NAME} is there, and {PERMANENT_NAME}, which it continues, is missing",
    "E": f"{JOURNAL_NAME} is damaged at byte {{offset}}: {{fault}}",
    "F": f"{JOURNAL_NAME} is of a later version: {{fault}}",
    "G": f"{JOURNAL_NAME} is another vTPM's",
    "H": f"{JOURNAL_NAME} is sealed, and there is no key",
    "I": f"{JOURNAL_NAME} is not sealed, and there is a key",
    "J": f"{JOURNAL_NAME} is sealed with another key",
    "K": f"{JOURNAL_NAME} is damaged at byte {{offset}}: {{fault}}",
    "L": f"{PERMANENT_NAME} is older than {JOURNAL_NAME}, or another vTPM's",
    "M": f"{JOURNAL_NAME} is damaged: what it makes is not what it says",
}

# As docs/journal-format.md has them.
FAULTS: Final = {
    JournalFault.NONE: "nothing",
    JournalFault.LENGTH: "the file's length is not what its header says, or past a limit",
    JournalFault.MAGIC: "it is no journal",
    JournalFault.CHECKSUM: "the header is altered",
    JournalFault.VERSION: "the version is unknown",
    JournalFault.FLAG: "an incompatible flag is unknown",
    JournalFault.HEADER: "a number in the header is past a limit",
    JournalFault.SECTOR: "a sector is altered",
    JournalFault.ORDER: "records are missing or moved",
    JournalFault.GAP: "a sector is empty, and written ones follow",
    JournalFault.RECORD: "a record's length is not that of its sectors, or no zeros are behind it",
    JournalFault.LINK: "a record is altered, or does not continue the one before",
    JournalFault.DELTA: "the delta record is invalid",
    JournalFault.OTHER_BASE: "the delta record is for another image",
}


class JournalRefused(StateDirectoryError):
    """The vTPM must not start from what there is; ``recovery`` says what that is."""

    def __init__(self, directory: StateDirectory, recovery: Recovery) -> None:
        what = REFUSALS[recovery.letter].format(
            offset=recovery.offset, fault=FAULTS[recovery.fault]
        )
        super().__init__(
            f"the state in {directory.path} is not whole: {what}; nothing was changed: put back "
            f"what is missing, or see with `vtpmd recover {directory.path}` what there is"
        )
        self.recovery = recovery


class Start(NamedTuple):
    """What a vTPM starts from."""

    states: dict[StateType, bytes]
    identity: bytes
    generation: int  # of the permanent state; 0 if that is not known
    changes: int  # how many of them the journal had that the state file did not


def look(directory: StateDirectory, secret: bytes | None = None) -> Recovery:
    """Decide what the permanent state's two files are together, and change nothing.

    ``secret`` is that of the journals, or None if they are not sealed. Raises StateDirectoryError
    for a file that cannot be read.
    """
    lineage = directory.read_lineage()
    return core.journal_recover(
        directory.read_states().get(StateType.PERMANENT),
        _read_journal(directory),
        continued=lineage is not None and lineage.continued,
        identity=None if lineage is None else lineage.identity,
        secret=secret,
    )


def recover(directory: StateDirectory, secret: bytes | None = None) -> Start:
    """Return what the vTPM starts from; a journal is folded into the state file and removed.

    Raises JournalRefused, with nothing changed, or StateDirectoryError.
    """
    recovery = look(directory, secret)
    if not recovery.may_start:
        raise JournalRefused(directory, recovery)
    lineage = directory.read_lineage()
    states = directory.read_states()
    identity = os.urandom(core.JOURNAL_IDENTITY_BYTES) if lineage is None else lineage.identity
    generation = 0 if lineage is None else lineage.generation
    if recovery.letter in "NO" and recovery.image is not None:
        generation = recovery.image.generation
        fold(directory, recovery, identity)
        states[StateType.PERMANENT] = recovery.image.data
    return Start(states, identity, generation, recovery.applied)


def fold(directory: StateDirectory, recovery: Recovery, identity: bytes) -> None:
    """Put what was recovered into the state file, durably, and remove the journal.

    A crash in between leaves the two, which are then the same. Raises StateDirectoryError.
    """
    if recovery.image is None:
        raise ValueError("there is nothing to fold")
    lineage = Lineage(identity, recovery.image.generation)
    content = swtpm_format.encode_file(recovery.image.data, lineage)
    directory.replace(PERMANENT_NAME, content)
    directory.remove(JOURNAL_NAME)


def _read_journal(directory: StateDirectory) -> bytes | None:
    try:
        return read_regular_file(directory.directory_fd, JOURNAL_NAME, core.JOURNAL_BYTES_MAX)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateDirectoryError(
            f"cannot read {directory.path / JOURNAL_NAME}: {error.strerror}; restore the directory "
            "from a backup, or give another one"
        ) from error
