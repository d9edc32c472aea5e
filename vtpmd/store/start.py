"""What happens to a state directory before a vTPM starts from it, in the order that matters.

First the anchor is compared, and nothing is written until that is right; an import that a crash
has stopped is finished; then the anchor hears of a state that a peer has granted, and that is taken
up, as is one that QEMU had just brought; what a crash has left is recovered, the anchor hears of
it, and the journal is folded.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

from vtpmd.core import JOURNAL_IDENTITY_BYTES as IDENTITY_BYTES
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple
from vtpmd.store import backup, recovery
from vtpmd.store.directory import StateDirectory
from vtpmd.store.libtpms import check_level
from vtpmd.store.moving import MovingFiles, take_up
from vtpmd.store.recovery import Examined
from vtpmd.wire.tpm import StateType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vtpmd.store.anchor import Anchor
    from vtpmd.store.keys import Key
    from vtpmd.wire.tpm import TpmVersion


class Start(NamedTuple):
    """What a vTPM starts from."""

    version: TpmVersion
    states: dict[StateType, bytes]
    took_up: bool  # a state that had been granted to this host
    fenced: bool  # it may be another host's, and is not to be served
    identity: bytes  # of the vTPM: 16 bytes, made here if it has none
    is_known: bool  # the state says whose it is, or there is none
    generation: int  # none above it has been used
    loaded: int  # that of the permanent state, as far as it is known
    changes: int  # how many the journal had that the state file did not
    keeps_journal: bool = True  # there is a place for one

    @property
    def is_new(self) -> bool:
        """Whether the TPM is made when it is powered on."""
        return StateType.PERMANENT not in self.states

    def __repr__(self) -> str:
        """Leave the states out."""
        return f"Start(took_up={self.took_up})"


def nothing(version: TpmVersion) -> Start:
    """Return the start of a vTPM whose state is to come, with all that is said of it."""
    return Start(
        version=version,
        states={},
        took_up=False,
        fenced=False,
        identity=os.urandom(IDENTITY_BYTES),
        is_known=False,
        generation=0,
        loaded=0,
        changes=0,
    )


def open_anchor(
    path: Path, directory: StateDirectory, files: MovingFiles, key: Key | None
) -> Anchor:
    """Open the anchor, and check that the directory has not fallen behind it.

    A granted state is right if the anchor has seen it, or what it is to take the place of. Raises
    FallenBehind, StateDirectoryError or UsageError; nothing was written then.
    """
    from pathlib import Path

    from vtpmd.store.anchor import Anchor

    granted = files.granted()
    is_importing = directory.exists(directory.names.importing)
    has_state = granted is not None or directory.exists(directory.names.permanent)
    anchor = Anchor.open(path, Path(directory.path), is_new=not (has_state or is_importing))
    try:
        if is_importing:
            _check_import(anchor, directory, key)
        elif granted is None or not anchor.has_seen(granted.digest()):
            anchor.check(recovery.recover(directory, key).found)
    except BaseException:
        anchor.close()
        raise
    return anchor


def _check_import(anchor: Anchor, directory: StateDirectory, key: Key | None) -> None:
    """Raise FallenBehind where an anchor has not heard of an import that is under way."""
    from hashlib import sha256

    from vtpmd.store import importing
    from vtpmd.store.anchor import FallenBehind

    state = importing.pending(directory, key)
    is_known = anchor.mark is None or (state and anchor.has_seen(sha256(state).digest()))
    if not is_known:
        raise FallenBehind(
            f"an import into {directory.path} was interrupted, and anchor {anchor.path} has not "
            "heard of it",
            f"finish it with `vtpmd fold {directory.path}`, without --anchor, and then see "
            "`vtpmd recover`",
        )


@contextmanager
def anchor_of(
    path: Path | None, directory: StateDirectory, files: MovingFiles, key: Key | None
) -> Iterator[Anchor | None]:
    """Open an anchor as ``open_anchor`` does, if there is one, and close it."""
    if path is None:
        yield None
        return
    with open_anchor(path, directory, files, key) as anchor:
        yield anchor


class Folded(NamedTuple):
    """What a directory was found to hold, before it was folded."""

    took_up: bool  # a state that had been granted to this host
    examined: Examined
    identity: bytes  # of the vTPM: 16 bytes, made here if it has none


def fold(
    directory: StateDirectory,
    files: MovingFiles,
    key: Key | None,
    anchor: Anchor | None,
    check: Callable[[str, TpmVersion, dict[StateType, bytes]], None] = check_level,
) -> Folded:
    """Take up what was granted, fold the journal, and have the anchor hear of both.

    What was recovered is checked before it is written. Raises StateKeyError, RecoveryRefused,
    StateDirectoryError, or what ``check`` raises.
    """
    if directory.exists(directory.names.importing):
        from vtpmd.store import importing

        importing.finish(directory, files, key)
    if anchor is not None and (granted := files.granted()) is not None:
        anchor.expect(granted.lineage, granted.digest())
    took_up = take_up(directory, files, key)
    if directory.exists(directory.names.arrived):
        from vtpmd.store import arrived

        arrived.take_up(directory, key)
    backup.refuse_alone(directory)
    examined = recovery.recover(directory, key)
    check(directory.path, directory.version, examined.states_to_start_from())
    identity = examined.identity
    if identity is None and anchor is not None and anchor.mark is not None:
        identity = anchor.mark.identity
    if identity is None:
        identity = os.urandom(IDENTITY_BYTES)
    if anchor is not None:
        anchor.trust(examined.found, identity)
    recovery.fold(directory, examined, key)
    return Folded(took_up, examined, identity)


def start(
    directory: StateDirectory, files: MovingFiles, key: Key | None, anchor: Anchor | None
) -> Start:
    """Make a directory what a vTPM starts from, and return that. Raises as ``fold`` does."""
    took_up, examined, identity = fold(directory, files, key, anchor)
    generation = max(examined.generation, 0 if anchor is None else anchor.generation)
    record = files.record()
    return Start(
        version=directory.version,
        states=examined.states_to_start_from(),
        took_up=took_up,
        fenced=record is not None and not record.is_ours,
        identity=identity,
        is_known=examined.identity is not None,
        generation=max(generation, 0 if record is None else record.generation),
        loaded=examined.generation,
        changes=examined.recovery.applied,
    )
