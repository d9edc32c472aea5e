"""A vTPM's history: what each commit has changed since the checkpoint, in the TPM's terms.

A commit is a record of the journal. When it was is by the host's clock, which may be set back: the
order is the journal's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from vtpmd.core import Step
from vtpmd.counted import counted
from vtpmd.errors import VtpmdError
from vtpmd.inspect.difference import Change, Seen, compare, see
from vtpmd.inspect.directories import History
from vtpmd.inspect.overview import inspect
from vtpmd.inspect.secrets import Secrets
from vtpmd.inspect.source import Source
from vtpmd.moment import MS_PER_S, at_millisecond, at_second
from vtpmd.store.status import epoch_text
from vtpmd.wire.tpm import StateType, epoch_of

EXIT_NO_GENERATION: Final = 12
NOTHING_TOLD: Final = "nothing that is told: only what the TPM counts for itself"
FOLDED: Final = "not told: the checkpoint that it follows is not there any more"


class NoGeneration(VtpmdError):
    """A source does not have the generation that was asked for."""

    exit_status = EXIT_NO_GENERATION


class Commit(NamedTuple):
    """A generation, and how it came about."""

    generation: int | None
    time_ms: int | None  # since 1970 (UTC); None: not known
    is_checkpoint: bool
    offset: int | None  # of its record in the journal
    journal_bytes: int  # that it takes there
    state_bytes: int  # of the permanent state that it has made
    changes: list[Change] | None  # None: of the checkpoint, or of what it has already

    @property
    def epoch(self) -> int | None:
        """The restore epoch that it is of; None: it has no generation."""
        return None if self.generation is None else epoch_of(self.generation)

    @property
    def when(self) -> str:
        """The time for a person, to the second."""
        return "-" if self.time_ms is None else at_second(self.time_ms // MS_PER_S)

    def lines(self) -> list[str]:
        """Return what it changed, in words for a person."""
        if self.is_checkpoint:
            return [f"the checkpoint: a state of {counted(self.state_bytes, 'byte')}"]
        if self.changes is None:
            return [FOLDED]
        return [change.text for change in self.changes] or [NOTHING_TOLD]

    def json(self) -> dict[str, Any]:
        """Return what programs get: docs/inspect.md has the keys."""
        changes = self.changes
        return {
            "generation": self.generation,
            "restore-epoch": self.epoch,
            "time": None if self.time_ms is None else at_millisecond(self.time_ms),
            "checkpoint": self.is_checkpoint,
            "offset": self.offset,
            "journal-bytes": self.journal_bytes,
            "state-bytes": self.state_bytes,
            "changes": None if changes is None else [change._asdict() for change in changes],
        }


def with_epochs(told: Iterable[Commit]) -> Iterator[tuple[Commit, str]]:
    """Yield commits, each with a line where it is the first one of a restore epoch from 1 on."""
    epoch: int | None = 0
    for commit in told:
        is_first = commit.epoch and commit.epoch != epoch
        yield commit, f"restore epoch {epoch_text(commit.generation or 0)}" if is_first else ""
        epoch = commit.epoch


def commits(history: History, last: int | None = None) -> Iterator[Commit]:
    """Yield the generations in their order, or the last ones alone, with what each has changed."""
    n_generations = len(history.steps) + (history.checkpoint is not None)
    skipped = 0 if last is None else max(n_generations - last, 0)
    for number, commit in enumerate(_all(history, skipped)):
        if number >= skipped:
            yield commit


def _all(history: History, skipped: int) -> Iterator[Commit]:
    """Yield all generations; what the first ones have changed is not worked out."""
    folded = [step for step in history.steps if not step.is_applied]
    for step in folded:
        yield _commit(step, None)
    applied = iter([step for step in history.steps if step.is_applied])
    before: Seen | None = None
    secrets: Secrets | None = None
    for number, (generation, image) in enumerate(history.images(), start=len(folded)):
        # What the first one that is told has changed is told from the one before it.
        now = None
        if number + 1 >= skipped:
            found = inspect(history.source._replace(states={StateType.PERMANENT: image}))
            secrets = secrets or Secrets(found.states.values())
            now = see(found, secrets)
        if number == len(folded):
            yield Commit(generation, None, True, None, 0, len(image), None)
        else:
            changes = None if before is None or now is None else compare(before, now)
            yield _commit(next(applied), changes)
        before = now


def _commit(step: Step, changes: list[Change] | None) -> Commit:
    size = (step.offset, step.n_bytes, step.result_bytes)
    return Commit(step.to_generation, step.time_ms, False, *size, changes)


def source_at(history: History, generation: int) -> Source:
    """Return what a directory held at a generation: its permanent state. Raises NoGeneration."""
    source = history.source
    for number, (each, image) in enumerate(history.images()):
        if each == generation:
            return source._replace(
                states={StateType.PERMANENT: image},
                generation=generation,
                journal_commits=None if source.journal_commits is None else number,
            )
    raise no_generation(source, generation, _range(history))


def no_generation(source: Source, generation: int, has: str) -> NoGeneration:
    """Return the error for a generation that a source does not have."""
    return NoGeneration(
        f"cannot inspect {source.path} at generation {generation}: {has}; see `vtpmd log`"
    )


def _range(history: History) -> str:
    known = [generation for generation, _ in history.images() if generation is not None]
    if not known:
        return "no generation of it is known"
    return f"it has {known[0]} to {known[-1]}"
