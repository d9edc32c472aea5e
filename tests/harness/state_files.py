"""What is durable in a state directory, also while a vtpmd writes to it."""

from pathlib import Path

from tests.support.file_names import JOURNAL_NAME, PERMANENT_NAME
from vtpmd import core
from vtpmd.core import Recovery
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage

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
        found = swtpm_format.read_lineage(permanent[1])
        return core.journal_recover(
            swtpm_format.decode_file(permanent[1]),
            None if journal is None else journal[1],
            continued=found is not None and found.continued,
            identity=None if found is None else found.identity,
        )
    raise TimeoutError(f"the files in {state} are replaced all the time")


def lineage(state: Path) -> Lineage:
    """Return of which vTPM the file in a state directory says that it is."""
    found = swtpm_format.read_lineage((state / PERMANENT_NAME).read_bytes())
    assert found is not None
    return found


def durable_state(state: Path) -> bytes:
    """Return the permanent state that a start would go on from, as libtpms marshalled it."""
    recovery = look(state)
    assert recovery.may_start, recovery
    assert recovery.image is not None
    return recovery.image.data
