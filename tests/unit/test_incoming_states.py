"""What a session has made durable can be read again, whatever records it consists of."""

from pathlib import Path

import pytest

from vtpmd.core import Image
from vtpmd.core.delta import delta_encode
from vtpmd.store import incoming
from vtpmd.store.directory import StateDirectory
from vtpmd.store.incoming import ENTRIES_OFFSET, NO_STATE
from vtpmd.store.moving import MovingFiles
from vtpmd.wire.tpm import StateType

SESSION = b"session of tests"
LINEAGE = bytes(range(16, 32))
STATE_BYTES = 1000
ROOM_BYTES = 4096  # for two such states


def image(generation: int) -> Image:
    """Return the state of a generation; states of different ones have nothing in common."""
    data = bytes((generation * 31 + i * i) % 251 for i in range(STATE_BYTES))
    return Image(StateType.PERMANENT, generation, data)


def granted(path: Path) -> bytes | None:
    """Return the state that a start would find granted."""
    with StateDirectory.open(path) as directory:
        found = MovingFiles(directory).granted()
        return None if found is None else found.state


def test_record_that_skips_one_is_written_whole(tmp_path: Path) -> None:
    """A round with two records of a kind: what it begins at is not in the file."""
    with StateDirectory.open(tmp_path) as directory:
        states = MovingFiles(directory).incoming
        states.make(SESSION, LINEAGE)
        states.append(delta_encode(NO_STATE, image(1)), lambda: image(1))
        states.append(delta_encode(image(2), image(3)), lambda: image(3))
        states.grant(0)
    assert granted(tmp_path) == image(3).data


def test_tail_that_continues_the_round_before_a_file_was_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no room for the last round, and the source has not heard that it came."""
    monkeypatch.setattr(incoming, "INCOMING_BYTES", ENTRIES_OFFSET + ROOM_BYTES)
    with StateDirectory.open(tmp_path) as directory:
        states = MovingFiles(directory).incoming
        states.make(SESSION, LINEAGE)
        states.append(delta_encode(NO_STATE, image(1)), lambda: image(1))
        states.append(delta_encode(image(1), image(2)), lambda: image(2))
        states.append(delta_encode(image(2), image(3)), lambda: image(3))  # whole, in a new file
        states.append(delta_encode(image(2), image(4)), lambda: image(4))
        states.grant(0)
    assert granted(tmp_path) == image(4).data
