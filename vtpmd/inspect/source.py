"""What is at a path, once it has been found: its states, and what is known of them beside that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from vtpmd.errors import VtpmdError
from vtpmd.inspect.records import Written
from vtpmd.store.directory import KEY_REMEDIES, StateDirectoryError, StateKeyError
from vtpmd.store.owner import Record
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType, TpmVersion, epoch_of

NOTHING_KNOWN: Final = "no state of a TPM"
EXIT_DAMAGED: Final = 5
EXIT_NOT_OURS: Final = 9


class NotAState(VtpmdError):
    """What is at a path is no state that can be decoded."""

    exit_status = EXIT_NOT_OURS


class DamagedContainer(StateDirectoryError):
    """What a state is wrapped in is damaged: nothing can be decoded."""

    exit_status = EXIT_DAMAGED


class Source(NamedTuple):
    """What is at a path, of one TPM."""

    path: str
    kind: str  # as docs/inspect.md has it
    states: dict[StateType, bytes]
    tpm: TpmVersion = TpmVersion.TPM_2_0
    is_encrypted: bool = False
    lineage: Lineage | None = None
    generation: int | None = None  # of the permanent state, its journal included
    journal_commits: int | None = None  # None: there is no journal
    record: Record | None = None  # of a directory alone
    is_in_use: bool | None = None
    problems: tuple[str, ...] = ()  # a line each
    snapshot: str | None = None  # of a disk image: which one it is of
    written: Written | None = None  # what vtpmd writes beside a state, alone: then there is none

    @property
    def epoch(self) -> int | None:
        """The restore epoch that it is of; None: no generation is known."""
        return None if self.generation is None else epoch_of(self.generation)

    def check_has_state(self) -> Source:
        """Return this, if there is a state in it. Raises NotAState."""
        if not self.states:
            raise NotAState(
                f"cannot compare or enrol {self.path}: it is a {self.kind.replace('-', ' ')}, "
                "which has no state; give the state directory that it lies in"
            )
        return self

    def __repr__(self) -> str:
        """Leave the states out."""
        return f"Source({self.path}, {self.kind})"


def not_a_state(path: str | Path, what: str) -> NotAState:
    """Return the error for a path that is something else."""
    return NotAState(
        f"cannot inspect {path}: it is {what}; give a state directory, a state file or a state blob"
    )


def opened(place: str, decode: Callable[[], bytes]) -> bytes:
    """Return what is in a container. Raises StateKeyError or DamagedContainer."""
    try:
        return decode()
    except swtpm_format.FormatError as error:
        remedy = KEY_REMEDIES.get(type(error))
        if remedy is None:
            what = f"cannot inspect {place}: {error}; restore it from a backup"
            raise DamagedContainer(what) from error
        raise StateKeyError(f"cannot inspect {place}: {error}; {remedy}") from error


def lineage_of(
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
