"""What could be restored of a damaged state directory, and restoring it: only when told to.

Nothing here is ever done by ``vtpmd run``. The originals are kept, in files of other names; an
older permanent state is never resumed with the volatile state of a newer one.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from vtpmd import core
from vtpmd.counted import counted
from vtpmd.store import libtpms, recovery
from vtpmd.store.anchor import Anchor, FallenBehind
from vtpmd.store.directory import (
    STATE_NAMES,
    StateDirectory,
    StateDirectoryError,
    StateKeyError,
)
from vtpmd.store.keys import Key
from vtpmd.store.libtpms import LibtpmsTooOld, check_level
from vtpmd.store.recovery import Examined
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType

LATER_VERSION: Final = "F"  # the row of the table: that version knows what to make of it
LOST_COMMITS_MAX: Final = core.JOURNAL_BYTES_MAX // core.JOURNAL_SECTOR_BYTES
RESET: Final = "the guest begins with a reset of its TPM"
COPIES_MAX: Final = 1000  # of one file's originals: more of them were not made by hand


class Salvage(NamedTuple):
    """What is wrong with a directory, and what could be made of it. Nothing was written."""

    examined: Examined
    problems: list[str]  # a line each
    lost: list[str]  # what a restoration would give up, a line each
    set_aside: list[str]  # files that it would give other names
    image: bytes | None  # the permanent state that it would write

    @property
    def can_restore(self) -> bool:
        """Whether there is a permanent state to restore."""
        return self.image is not None

    def __repr__(self) -> str:
        """Leave the state out."""
        return f"Salvage({self.problems})"


def assess(directory: StateDirectory, key: Key | None) -> Salvage:
    """Find out what is wrong, and what could be restored.

    Raises StateKeyError when the key is missing or wrong, as far as that can be told, and
    LibtpmsTooOld when nothing is wrong but that.
    """
    found = _assess_files(directory, key)
    if found.image is None:
        return found
    try:
        check_level(directory.path, directory.version, {StateType.PERMANENT: found.image})
    except LibtpmsTooOld:
        if not found.problems:
            raise
        return found  # a later libtpms would have to be asked
    return _ask_libtpms(directory, found)


def _ask_libtpms(directory: StateDirectory, found: Salvage) -> Salvage:
    """Return what could be restored of what libtpms takes."""
    states, names = found.examined.states_to_start_from(), directory.names
    kept = {kind: states[kind] for kind in states if names.state(kind) not in found.set_aside}
    refusal = libtpms.ask(directory.version, states=kept).refusal
    if refusal is None or refusal.state is None:
        return found
    name = names.state(refusal.state)
    problems = [*found.problems, f"{name} is damaged: {refusal}"]
    if refusal.state is StateType.PERMANENT:
        return Salvage(found.examined, problems, [], [], None)
    lost = [*found.lost, f"{name}: {RESET}"]
    return Salvage(found.examined, problems, lost, [*found.set_aside, name], found.image)


def _assess_files(directory: StateDirectory, key: Key | None) -> Salvage:
    states: dict[StateType, bytes] = {}
    problems, damaged = [], []
    for kind in STATE_NAMES:
        try:
            state = directory.read_state(kind, key)
        except StateDirectoryError as error:
            if isinstance(error, StateKeyError) and StateType.PERMANENT not in states:
                raise
            problems.append(str(error))
            damaged.append(kind)
            continue
        if state is not None:
            states[kind] = state
    examined = recovery.examine_states(directory, states, key)
    if StateType.PERMANENT in damaged:
        return Salvage(examined, problems, [], [], None)
    if examined.recovery.letter in recovery.KEY_LETTERS:
        raise StateKeyError(f"{directory.path}: {recovery.reason(examined)}")
    names = directory.names
    set_aside = [names.state(kind) for kind in damaged]
    lost = [f"{name}: {RESET}" for name in set_aside]
    if examined.recovery.may_start:
        return Salvage(examined, problems, lost, set_aside, examined.permanent)
    problems.append(f"{directory.path}: {recovery.reason(examined)}")
    if examined.recovery.letter == LATER_VERSION:
        return Salvage(examined, problems, [], [], None)
    for kind in (StateType.VOLATILE, StateType.SAVESTATE):
        if kind in states:
            lost.append(f"{names.state(kind)}: it goes with what is lost")
            set_aside.append(names.state(kind))
    lost[:0] = _lost(examined)
    if examined.has_journal:
        set_aside.append(names.journal)
    return Salvage(examined, problems, lost, set_aside, examined.permanent)


def _lost(examined: Examined) -> list[str]:
    """Say what of the journal is not in the image that was made."""
    found, journal = examined.recovery, examined.names.journal
    if not examined.has_journal:
        return [f"{journal}: all commits since the checkpoint"]
    if found.image is not None:
        return [
            f"{journal}: what follows byte {found.offset}, of {found.used_bytes} bytes that were "
            "written to it"
        ]
    age = recovery.checkpoint_age(examined)
    if age is not None and age > 0:
        return []  # it was folded into a checkpoint before this one was written
    lost = [f"{journal}: all {found.used_bytes} bytes that were written to it"]
    if age is not None:
        lost.insert(0, f"{counted(-age, 'generation')} before {journal}, which neither file has")
    return lost


def restore(directory: StateDirectory, salvage: Salvage, key: Key | None) -> dict[str, str]:
    """Restore what was found; return the names that the originals have now.

    The permanent state is written before its journal is set aside: a crash in between leaves a
    directory that is refused as before. Raises StateDirectoryError.
    """
    if salvage.image is None:
        raise ValueError("there is nothing to restore")
    kept = {}
    if not salvage.examined.recovery.may_start:
        permanent = directory.names.permanent
        original = directory.read(permanent, swtpm_format.FILE_BYTES_MAX)
        if original is not None:
            kept[permanent] = _free_name(directory, permanent)
            directory.replace(kept[permanent], original)
        directory.write_state(StateType.PERMANENT, salvage.image, key, _lineage(salvage))
    for name in salvage.set_aside:
        kept[name] = _free_name(directory, name)
        directory.rename(name, kept[name])
    return kept


def _lineage(salvage: Salvage) -> Lineage | None:
    """Return a lineage past all that may have been lost, so that no generation comes twice."""
    examined = salvage.examined
    if examined.identity is None:
        return None
    return Lineage(examined.identity, examined.generation + LOST_COMMITS_MAX)


def behind(anchor: Anchor, salvage: Salvage) -> str | None:
    """Return how what could be restored has fallen behind an anchor, or None if it has not.

    Raises StateDirectoryError for another vTPM's anchor.
    """
    try:
        anchor.check(salvage.examined.found)
    except FallenBehind as error:
        return error.what
    return None


def _free_name(directory: StateDirectory, name: str) -> str:
    for number in range(1, COPIES_MAX + 1):
        if not directory.exists(candidate := f"{name}.damaged-{number}"):
            return candidate
    raise StateDirectoryError(f"{directory.path} has too many {name}.damaged-N: remove some")
