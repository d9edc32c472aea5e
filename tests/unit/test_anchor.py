"""The anchor: what a start must not fall behind, written so that a cut write loses nothing.

The rows of the table in ``vtpmd/store/anchor.py`` are walked here, all combinations of them.
"""

import itertools
import os
import re
from pathlib import Path

import pytest

from tests.support.documents import fields
from tests.unit.test_control_docs import FORMAT_TABLES
from tests.unit.test_delta import crc32c
from vtpmd.errors import UsageError, VtpmdError
from vtpmd.store import anchor
from vtpmd.store.anchor import NO_DIGEST, Anchor, FallenBehind, Found, Mark
from vtpmd.store.directory import StateDirectoryError, StateDirectoryInUse

OURS, OTHER = b"o" * 16, b"x" * 16
SEEN, ELSE = b"\x11" * 32, b"\x22" * 32
MARK = Mark(OURS, 7, SEEN)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A state directory."""
    path = tmp_path / "state"
    path.mkdir()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where an anchor is to be."""
    return tmp_path / "anchor"


def marks(path: Path, directory: Path, *written: Mark) -> Mark | None:
    """Open an anchor, write it, and return what it says when it is opened the next time."""
    with Anchor.open(path, directory, is_new=True) as file:
        for mark in written:
            file.write(mark)
            assert file.mark == mark
    with Anchor.open(path, directory, is_new=False) as file:
        return file.mark


def test_it_says_what_was_written_last(path: Path, directory: Path) -> None:
    assert marks(path, directory) is None
    assert marks(path, directory, MARK) == MARK
    for generation in range(8, 13):
        mark = MARK._replace(generation=generation, digest=bytes([generation]) * 32)
        assert marks(path, directory, mark) == mark
    assert path.stat().st_size <= anchor.ANCHOR_BYTES


def test_slots_are_laid_out_as_documented(path: Path, directory: Path) -> None:
    """In docs/state-format.md, and in csrc/anchor.h for the engine, which writes them too."""
    marks(path, directory, MARK)
    content = path.read_bytes()
    assert content[:4096] == bytes(4096)
    slot = content[4096 : 4096 + 512]
    rows = FORMAT_TABLES["Slot of an anchor"]
    assert fields(rows, slot) == {
        "magic": int.from_bytes(b"VTPMANCH", "big"),
        "version": 1,
        "incompatible flags": 0,
        "zeros": 0,
        "identity": int.from_bytes(OURS, "big"),
        "serial": 1,
        "generation": 7,
        "SHA-256": int.from_bytes(SEEN, "big"),
        "expected": 0,
        "checksum": crc32c(slot[:508]),
    }
    assert content[4096 + 512 :] == bytes(4096 - 512)
    header = (Path(__file__).resolve().parents[2] / "csrc/anchor.h").read_text()
    in_c = re.findall(r"^ \*  +(\d+) +(\d+) ", header, re.MULTILINE)
    assert in_c == [(row["Offset"], row["Size"]) for row in rows]


def test_a_cut_write_leaves_what_was_said_before(path: Path, directory: Path) -> None:
    """At every byte; the slot that is written has what was there before, or nothing."""
    older = MARK._replace(generation=6)
    marks(path, directory, older, MARK)
    before = path.read_bytes()
    newest = MARK._replace(generation=8, digest=ELSE)
    marks(path, directory, newest)
    after = path.read_bytes()
    for cut in range(0, 512, 7):
        path.write_bytes(after[:cut] + before[cut:])
        with Anchor.open(path, directory, is_new=False) as file:
            assert file.mark in ((MARK, newest) if cut > 504 else (MARK,))


def test_a_damaged_anchor_is_refused(path: Path, directory: Path) -> None:
    """It does not become one that has not begun."""
    marks(path, directory, MARK, MARK._replace(generation=8))
    content = bytearray(path.read_bytes())
    for slot in range(anchor.SLOTS):
        content[slot * anchor.SLOT_STRIDE + 50] ^= 1
    for damaged in (bytes(content), b"x", b"\n", os.urandom(anchor.ANCHOR_BYTES)):
        path.write_bytes(damaged)
        with pytest.raises(StateDirectoryError, match="is damaged"):
            Anchor.open(path, directory, is_new=False)
        assert path.read_bytes() == damaged


STATES = {
    "not begun": None,
    "empty": Mark(OURS, 7, NO_DIGEST, SEEN),
    "seen": MARK,
    "expecting": Mark(OURS, 7, ELSE, SEEN),
}


def expected_row(mark: Mark | None, found: Found) -> int:
    """Return the first row that fits, as the table has it."""
    if mark is None:
        return 1
    if found.digest is None:
        return 2 if mark.digest == NO_DIGEST else 3
    if found.digest == mark.digest:
        return 4
    if found.digest == mark.expected:
        return 5
    if found.identity == OTHER:
        return 6
    return 7 if found.generation is not None and found.generation > mark.generation else 8


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("identity", "digest", "generation"),
    [*itertools.product([None, OURS, OTHER], [None, SEEN, ELSE, b"\x33" * 32], [None, 6, 7, 8])],
)
def test_all_combinations(
    path: Path,
    directory: Path,
    state: str,
    identity: bytes | None,
    digest: bytes | None,
    generation: int | None,
) -> None:
    """The first row that fits decides."""
    mark, found = STATES[state], Found(identity, digest, generation)
    marks(path, directory, *([] if mark is None else [mark]))
    with Anchor.open(path, directory, is_new=False) as file:
        match expected_row(mark, found):
            case 1 | 2 | 4 | 5 | 7:
                file.check(found)
            case 6:
                with pytest.raises(StateDirectoryError, match="another vTPM's") as caught:
                    file.check(found)
                assert caught.value.exit_status == 1
            case row:
                holds = "holds nothing" if row == 3 else "an older or another state"
                with pytest.raises(FallenBehind, match=f"{holds}.*has seen generation 7") as behind:
                    file.check(found)
                assert behind.value.exit_status == 6


def test_trusting_writes_what_is_there_once(path: Path, directory: Path) -> None:
    """With a generation that only grows."""
    with Anchor.open(path, directory, is_new=True) as file:
        file.trust(Found(None, None, None), OURS)
        assert file.mark == Mark(OURS, 1, NO_DIGEST)
        file.trust(Found(OURS, SEEN, 40), OURS)
        assert file.mark == Mark(OURS, 40, SEEN)
        serial = file.serial
        file.trust(Found(OURS, SEEN, None), OURS)
        assert file.serial == serial
        file.trust(Found(OURS, ELSE, 3), OURS)
        assert file.mark == Mark(OURS, 41, ELSE)
        file.write(Mark(OURS, 41, ELSE, SEEN))
        file.trust(Found(OURS, SEEN, None), OURS)
        assert file.mark == Mark(OURS, 42, SEEN)


def test_one_that_is_not_there_is_made_for_a_new_directory_only(
    path: Path, directory: Path
) -> None:
    """What should hold it may not be mounted."""
    with pytest.raises(StateDirectoryError, match="mount what holds it, or make an empty file"):
        Anchor.open(path, directory, is_new=False)
    assert not path.exists()
    path.touch()
    with Anchor.open(path, directory, is_new=False) as file:
        assert file.mark is None
    path.unlink()
    with Anchor.open(path, directory, is_new=True) as file:
        assert file.mark is None
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_an_anchor_is_refused(path: Path, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is in the state directory"):
        Anchor.open(directory / "anchor", directory, is_new=True)
    os.mkfifo(path)
    with pytest.raises(VtpmdError, match="it is not a regular file"):
        Anchor.open(path, directory, is_new=False)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VtpmdError, match="cannot use anchor"):
        Anchor.open(link, directory, is_new=True)
    with pytest.raises(VtpmdError, match="cannot use anchor"):
        Anchor.open(tmp_path, directory, is_new=False)


def test_it_is_locked(path: Path, directory: Path) -> None:
    with (
        Anchor.open(path, directory, is_new=True),
        pytest.raises(StateDirectoryInUse, match=f"anchor {path} is in use"),
    ):
        Anchor.open(path, directory, is_new=True)


def test_a_full_disk_is_said() -> None:
    """/dev/full is no regular file, so its seam is the descriptor."""
    fd = os.open("/dev/full", os.O_RDWR)
    with (
        Anchor(Path("/dev/full"), fd, b"") as file,
        pytest.raises(StateDirectoryError, match="No space left on device"),
    ):
        file.write(MARK)
