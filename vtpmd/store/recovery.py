"""What a state directory holds after a crash, and making it a plain one again.

The permanent state is the checkpoint, ``tpm2-00.permall``, and what ``tpm2-00.journal`` has added.
What the two make is decided in C (``csrc/journal_recover.c`` has the table); this reads the files,
says in words what was decided, and folds: the checkpoint is written anew, then the journal removed.
A crash in between leaves a checkpoint in the journal's chain, which the next start finds.
"""

from __future__ import annotations

from vtpmd import core
from vtpmd.core import JournalFault, Recovery, Step
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple
from vtpmd.store.directory import (
    FileNames,
    StateDirectory,
    StateDirectoryError,
    StateKeyError,
)
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType

if TYPE_CHECKING:
    from typing import Final

    from vtpmd.store.anchor import Found
    from vtpmd.store.keys import Key

# What is wrong in the rows of the table that are refused, after the journal's name.
REASONS: Final = {
    "C": "is missing: the checkpoint says that it continues there",
    "D": "continues a checkpoint that is missing, {permanent}",
    "E": "is damaged",
    "F": "is of a later version: update vtpmd",
    "G": "is another vTPM's",
    "H": "is sealed: give its key with --key",
    "I": "is not sealed, but a key was given: leave out --key",
    "J": "does not open with this key: the key is another one, or it was altered",
    "K": "is damaged",
    "L": "does not continue the checkpoint: that is older than the journal, or another vTPM's",
    "M": "makes another state than it says",
}
KEY_LETTERS: Final = "HIJ"
APART: Final = "L"
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


class RecoveryRefused(StateDirectoryError):
    """What a directory holds is damaged: no vTPM may start from it."""

    exit_status = 5


class Examined(NamedTuple):
    """What the files of a directory hold. Nothing was written."""

    names: FileNames
    states: dict[StateType, bytes]  # of the state files
    lineage: Lineage | None  # of the permanent one
    recovery: Recovery
    has_journal: bool
    # The generation of the checkpoint that the journal continues, as its header says.
    base: int | None = None

    @property
    def permanent(self) -> bytes | None:
        """The permanent state that could be made of them."""
        if self.recovery.image is not None:
            return self.recovery.image.data
        return self.states.get(StateType.PERMANENT)

    def states_to_start_from(self) -> dict[StateType, bytes]:
        """Return what a vTPM's state files hold once this has been folded."""
        permanent = self.permanent
        return self.states | ({} if permanent is None else {StateType.PERMANENT: permanent})

    @property
    def identity(self) -> bytes | None:
        """The vTPM's, which all of its journals have; None before its first."""
        return None if self.lineage is None else self.lineage.identity

    @property
    def generation(self) -> int:
        """None above it has been used, as far as the files say."""
        known = 0 if self.lineage is None else self.lineage.generation
        return known if self.recovery.image is None else max(known, self.recovery.image.generation)

    @property
    def found(self) -> Found:
        """What an anchor is compared with."""
        from hashlib import sha256

        from vtpmd.store.anchor import Found

        permanent, image = self.permanent, self.recovery.image
        # Only a journal says which generation it is.
        generation = image.generation if image is not None and self.has_journal else None
        digest = None if permanent is None else sha256(permanent).digest()
        return Found(self.identity, digest, generation)

    def __repr__(self) -> str:
        """Leave the state out."""
        return f"Examined({self.recovery!r})"


def examine(directory: StateDirectory, key: Key | None) -> Examined:
    """Read a directory, and work out what it holds. Nothing is written.

    Raises StateKeyError or StateDirectoryError for a state file that cannot be read.
    """
    return examine_states(directory, directory.read_states(key), key)


def examine_states(
    directory: StateDirectory,
    states: dict[StateType, bytes],
    key: Key | None,
) -> Examined:
    """Work out what the states in a directory's files and its journal make, as ``examine``."""
    journal = directory.read(directory.names.journal, core.JOURNAL_BYTES_MAX)
    lineage = directory.read_lineage() if StateType.PERMANENT in states else None
    secret = None if key is None else key.journal_secret()
    return examine_files(directory.names, states, lineage, journal, secret)


def examine_files(
    names: FileNames,
    states: dict[StateType, bytes],
    lineage: Lineage | None,
    journal: bytes | None,
    secret: bytes | None = None,
    steps: list[Step] | None = None,
) -> Examined:
    """Work out what files that were read make; the journal is sealed with a ``secret``, or not.

    Its records are appended to ``steps``, if that is given.
    """
    recovery = core.journal_recover(
        states.get(StateType.PERMANENT),
        journal,
        continued=lineage is not None and lineage.continued,
        identity=None if lineage is None else lineage.identity,
        secret=secret,
        steps=steps,
    )
    base = None if journal is None else core.journal_base(journal)
    return Examined(names, states, lineage, recovery, journal is not None, base)


def reason(examined: Examined) -> str:
    """Say why a directory is refused, and where: without an end, as more may follow."""
    recovery = examined.recovery
    what = REASONS[recovery.letter].format(permanent=examined.names.permanent)
    text = f"{examined.names.journal} {_apart(examined) or what}"
    if recovery.fault is not JournalFault.NONE:
        text += f": {FAULTS[recovery.fault]}, at byte {recovery.offset}"
    return f"{text} ({recovery.letter})"


def checkpoint_age(examined: Examined) -> int | None:
    """Return how many generations lie between checkpoint and journal of one vTPM that are apart.

    Less than 0 where the checkpoint is older than what the journal continues; None where they are
    not apart, or that cannot be told.
    """
    lineage, base = examined.lineage, examined.base
    if examined.recovery.letter != APART or lineage is None or base is None:
        return None
    return lineage.generation - base or None


def _apart(examined: Examined) -> str | None:
    """Return how checkpoint and journal of one vTPM do not go together, if that can be told."""
    age, lineage = checkpoint_age(examined), examined.lineage
    if age is None or lineage is None:
        return None
    return (
        f"continues generation {examined.base}, and {examined.names.permanent} is "
        f"{'newer' if age > 0 else 'older'}, of generation {lineage.generation}: as in a copy that "
        "was made while the vTPM was served"
    )


def recover(directory: StateDirectory, key: Key | None) -> Examined:
    """Return what a vTPM starts from.

    Raises StateKeyError, or RecoveryRefused when anything that was once whole is now wrong; every
    file is as it was then.
    """
    examined = examine(directory, key)
    recovery = examined.recovery
    if recovery.may_start:
        return examined
    kind = StateKeyError if recovery.letter in KEY_LETTERS else RecoveryRefused
    raise kind(
        f"cannot use state directory {directory.path}: {reason(examined)}; restore it from a "
        f"backup, or see `vtpmd recover {directory.path}`"
    )


def fold(directory: StateDirectory, examined: Examined, key: Key | None) -> None:
    """Write what was recovered as the checkpoint, and remove the journal: durably, in this order.

    Raises StateDirectoryError; then the directory can still be recovered.
    """
    if not examined.has_journal:
        return
    if examined.permanent is not None:
        identity, generation = examined.identity, examined.generation
        lineage = None if identity is None else Lineage(identity, generation)
        directory.write_state(StateType.PERMANENT, examined.permanent, key, lineage)
    directory.remove(directory.names.journal)
