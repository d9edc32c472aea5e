"""The states in a state directory, with its journal on top, whether it is served or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple, TypeVar

from vtpmd.core import Step, journal_recover
from vtpmd.errors import VtpmdError
from vtpmd.inspect.source import NotAState, Source, opened
from vtpmd.store import recovery
from vtpmd.store.directory import OpenDirectory, StateDirectoryError, StateKeyError
from vtpmd.store.keys import Key
from vtpmd.store.libtpms import TAKEN
from vtpmd.store.owner import look
from vtpmd.store.recovery import Examined
from vtpmd.store.status import read_together, unsettled
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import FILE_BYTES_MAX
from vtpmd.wire.tpm import StateType

NO_CHECKPOINT: Final = "D"  # of the table in csrc/journal_recover.c

_T = TypeVar("_T")


class History(NamedTuple):
    """What a state directory holds, and what led there, as far as its journal goes back."""

    source: Source  # as the newest generation has it
    checkpoint: bytes | None  # the permanent state that the state file holds
    checkpoint_generation: int | None
    steps: list[Step]  # the journal's records: also those that the checkpoint has

    def images(self) -> Iterator[tuple[int | None, bytes]]:
        """Yield the checkpoint, and what each commit after it has made, with its generation."""
        if self.checkpoint is None:
            return
        image = self.checkpoint
        yield self.checkpoint_generation, image
        for step in self.steps:
            if step.is_applied:
                image = step.make(image)
                yield step.to_generation, image

    def __repr__(self) -> str:
        """Leave the state out."""
        return f"History({self.source!r}, {len(self.steps)} records)"


def directory_history(directory: OpenDirectory, key: Key | None) -> History:
    """Return what a state directory holds, with its journal, and what led there.

    One state that cannot be read is a problem. Raises NotAState, StateKeyError or VtpmdError.
    """
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
    steps: list[Step] = []
    found = recovery.examine_files(names, states, lineage, journal, secret, steps)
    if found.recovery.letter == NO_CHECKPOINT:  # its records are right or wrong all the same
        journal_recover(b"", journal, secret=secret, steps=steps)
    if found.recovery.letter in recovery.KEY_LETTERS:
        raise StateKeyError(f"cannot inspect {directory.path}: {recovery.reason(found)}")
    if not found.recovery.may_start:
        problems.append(f"{directory.path}: {recovery.reason(found)}")
    is_in_use = told(directory.is_in_use)
    problems += unsettled(directory, is_served=is_in_use is True)
    source = Source(
        path=directory.path,
        kind="directory",
        states=found.states_to_start_from(),
        tpm=directory.version,
        is_encrypted=key is not None,
        lineage=lineage,
        generation=None if lineage is None else found.generation,
        journal_commits=found.recovery.applied if found.has_journal else None,
        record=told(lambda: look(directory)),
        is_in_use=is_in_use,
        problems=tuple(problems),
    )
    checkpoint = states.get(StateType.PERMANENT)
    return History(source, checkpoint, _checkpoint_generation(found, steps), steps)


def _checkpoint_generation(found: Examined, steps: list[Step]) -> int | None:
    """Return the checkpoint's generation: the journal's word, or its own."""
    applied = [step for step in steps if step.is_applied]
    if applied:
        return applied[0].from_generation
    if found.has_journal and found.recovery.image is not None:
        return found.recovery.image.generation
    return None if found.lineage is None else found.lineage.generation


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
            states[kind] = opened(place, partial(swtpm_format.decode_file, content, key=material))
        except StateDirectoryError as error:
            if isinstance(error, StateKeyError) and kind is StateType.PERMANENT:
                raise
            problems.append(str(error))
    return states
