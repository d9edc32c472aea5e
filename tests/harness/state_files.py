"""What is durable in a state directory, also while a vtpmd writes to it."""

from pathlib import Path

from vtpmd import core
from vtpmd.core import Recovery
from vtpmd.store.directory import JOURNAL_NAME, PERMANENT_NAME
from vtpmd.wire import swtpm_format

TRIES = 100


def _read(path: Path) -> tuple[int, bytes] | None:
    try:
        with path.open("rb") as file:
            return path.stat().st_ino, file.read()
    except FileNotFoundError:
        return None


def look(state: Path) -> Recovery:
    """Return what a start would find: the two files, read again if one was replaced meanwhile."""
    for _ in range(TRIES):
        permanent, journal = _read(state / PERMANENT_NAME), _read(state / JOURNAL_NAME)
        again = _read(state / PERMANENT_NAME), _read(state / JOURNAL_NAME)
        inodes = [None if read is None else read[0] for read in (permanent, journal)]
        if inodes != [None if read is None else read[0] for read in again]:
            continue
        if permanent is None:
            return core.journal_recover(None, None if journal is None else journal[1])
        lineage = swtpm_format.read_lineage(permanent[1])
        return core.journal_recover(
            swtpm_format.decode_file(permanent[1]),
            None if journal is None else journal[1],
            continued=lineage is not None and lineage.continued,
            identity=None if lineage is None else lineage.identity,
        )
    raise TimeoutError(f"the files in {state} are replaced all the time")


def durable_state(state: Path) -> bytes:
    """Return the permanent state that a start would go on from, as libtpms marshalled it."""
    recovery = look(state)
    assert recovery.may_start, recovery
    assert recovery.image is not None
    return recovery.image.data
