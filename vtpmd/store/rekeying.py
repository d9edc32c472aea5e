"""Giving a state directory at rest another key, the first one, or none."""

from __future__ import annotations

from pathlib import Path

from vtpmd.store.directory import STATE_NAMES, StateDirectory, StateKeyError
from vtpmd.store.keys import Key
from vtpmd.store.moving import MovingFiles
from vtpmd.store.start import anchor_of, fold
from vtpmd.wire.tpm import StateType


def rekey(
    directory: StateDirectory, old: Key | None, new: Key | None, anchor_path: Path | None
) -> list[str]:
    """Give every state file the new key; return the names of those that had the old one.

    Raises StateKeyError for a file with neither key, RecoveryRefused, StateDirectoryError, or what
    ``open_anchor`` raises.
    """
    has_new = {kind for kind in STATE_NAMES if _has_key(directory, kind, new)}
    if not has_new:  # else it was folded before it was interrupted
        files = MovingFiles(directory, old)
        with anchor_of(anchor_path, directory, files, old) as anchor:
            fold(directory, files, old, anchor)
    # All are read before one is written: what neither key opens leaves everything as it is.
    states = {kind: directory.read_state(kind, old) for kind in STATE_NAMES if kind not in has_new}
    present = {kind: state for kind, state in states.items() if state is not None}
    for kind, state in present.items():
        directory.write_state(kind, state, new)
    return [directory.names.state(kind) for kind in present]


def _has_key(directory: StateDirectory, kind: StateType, key: Key | None) -> bool:
    try:
        return directory.read_state(kind, key) is not None
    except StateKeyError:
        return False
