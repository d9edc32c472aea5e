"""What a start does with a journal that it finds: fold it, or refuse and change nothing.

Invariant 2: what is recovered is the last durable generation; never a fresh TPM, nor an older one.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.file_names import JOURNAL_NAME, PERMANENT_NAME
from tests.unit.test_journal import IDENTITY, IMAGES, build
from vtpmd.core import Image
from vtpmd.core.delta import delta_encode
from vtpmd.store.directory import StateDirectory, StateDirectoryError
from vtpmd.store.incoming import NO_STATE
from vtpmd.store.moving import MovingFiles
from vtpmd.store.start import Start, open_anchor, start
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType, TpmVersion

FIRST, LAST = IMAGES[0], IMAGES[-1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    return path


@pytest.fixture
def opened(path: Path) -> Iterator[StateDirectory]:
    with StateDirectory.open(path) as opened:
        yield opened


def put(path: Path, *, continued: bool = True, identity: bytes = IDENTITY) -> None:
    """Put the state file that the journals here continue."""
    lineage = Lineage(identity, FIRST.generation, continued)
    (path / PERMANENT_NAME).write_bytes(swtpm_format.encode_file(FIRST.data, lineage))


def recover(opened: StateDirectory) -> Start:
    """Do what vtpmd run does before it starts an engine."""
    return start(opened, MovingFiles(opened), None, None)


def content(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def test_a_journal_is_folded_into_the_state_file(path: Path, opened: StateDirectory) -> None:
    """Which swtpm takes then, and which keeps identity and generation."""
    put(path)
    (path / JOURNAL_NAME).write_bytes(build())
    begun = recover(opened)
    states = {StateType.PERMANENT: LAST.data}
    changes = len(IMAGES) - 1
    assert begun == Start(
        *(TpmVersion.TPM_2_0, states, False, False, IDENTITY, True),
        *(LAST.generation, LAST.generation, changes),
    )
    file = swtpm_format.encode_file(LAST.data, Lineage(IDENTITY, LAST.generation))
    assert content(path) == {".lock": b"", PERMANENT_NAME: file}
    assert recover(opened) == begun._replace(changes=0)
    assert content(path) == {".lock": b"", PERMANENT_NAME: file}


def test_a_directory_without_a_journal_stays_as_it_is(path: Path, opened: StateDirectory) -> None:
    """A new one, one of swtpm's, one that was closed in order."""
    new = recover(opened)
    assert (new.states, new.generation, new.changes) == ({}, 0, 0)
    (path / PERMANENT_NAME).write_bytes(swtpm_format.encode_file(b"swtpm's"))
    before = content(path)
    first, second = recover(opened), recover(opened)
    assert first.states == {StateType.PERMANENT: b"swtpm's"}
    assert len({new.identity, first.identity, second.identity}) == 3
    put(path, continued=False)
    closed = recover(opened)
    assert (closed.identity, closed.generation) == (IDENTITY, FIRST.generation)
    assert before.keys() == content(path).keys()


def remove_journal(path: Path) -> None:
    (path / JOURNAL_NAME).unlink()


def remove_state(path: Path) -> None:
    (path / PERMANENT_NAME).unlink()


def alter(path: Path, offset: int) -> None:
    file = bytearray((path / JOURNAL_NAME).read_bytes())
    file[offset] ^= 1
    (path / JOURNAL_NAME).write_bytes(file)


def put_older_state(path: Path) -> None:
    lineage = Lineage(IDENTITY, FIRST.generation - 1, continued=True)
    (path / PERMANENT_NAME).write_bytes(swtpm_format.encode_file(b"older", lineage))


def seal(path: Path) -> None:
    (path / JOURNAL_NAME).write_bytes(build(sealed=True))


@pytest.mark.parametrize(
    ("damage", "letter", "reason"),
    [
        (remove_journal, "C", "tpm2-00.journal is missing"),
        (remove_state, "D", "continues a checkpoint that is missing, tpm2-00.permall"),
        (lambda path: alter(path, 100), "E", "is damaged: the header is altered, at byte 0"),
        (lambda path: put(path, identity=b"j" * 16), "G", "tpm2-00.journal is another vTPM's"),
        (seal, "H", "tpm2-00.journal is sealed: give its key"),
        (lambda path: alter(path, 1024), "K", "is damaged: a sector is altered, at byte 1024"),
        (lambda path: os.truncate(path / JOURNAL_NAME, 4096), "E", "the file's length"),
        (put_older_state, "L", "tpm2-00.permall is older"),
    ],
)
def test_invariant_2_what_is_not_whole_is_refused_and_left(
    path: Path,
    opened: StateDirectory,
    damage: Callable[[Path], None],
    letter: str,
    reason: str,
) -> None:
    put(path)
    (path / JOURNAL_NAME).write_bytes(build())
    damage(path)
    before = content(path)
    with pytest.raises(StateDirectoryError, match=reason) as caught:
        recover(opened)
    assert f"({letter})" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content(path) == before


def test_a_link_or_a_fifo_is_no_journal(path: Path, opened: StateDirectory) -> None:
    put(path)
    (path / JOURNAL_NAME).symlink_to("/dev/zero")
    with pytest.raises(StateDirectoryError, match=f"cannot read {path / JOURNAL_NAME}"):
        recover(opened)
    (path / JOURNAL_NAME).unlink()
    os.mkfifo(path / JOURNAL_NAME)
    with pytest.raises(StateDirectoryError, match="it is not a regular file"):
        recover(opened)


def test_a_journal_that_was_being_made_is_removed(path: Path) -> None:
    (path / "TMP2-00.journal").write_bytes(b"half")
    StateDirectory.open(path).close()
    assert content(path) == {".lock": b""}


def test_invariant_10_numbers_go_on_from_the_file_and_the_record(
    path: Path, opened: StateDirectory
) -> None:
    put(path, continued=False)
    assert recover(opened).generation == FIRST.generation
    files = MovingFiles(opened)
    assert files.owner.reserve(bytes(16), "b:1", 7) == 7
    files.close()
    used = recover(opened).generation
    assert used == MovingFiles(opened).owner.read().generation > 7
    lineage = Lineage(IDENTITY, 1 << 60)
    (path / PERMANENT_NAME).write_bytes(swtpm_format.encode_file(FIRST.data, lineage))
    assert recover(opened).generation == 1 << 60


def granted(
    opened: StateDirectory, state: bytes, lineage: bytes = IDENTITY, generation: int = 1
) -> MovingFiles:
    """Have a peer send a state, and grant it."""
    files = MovingFiles(opened)
    files.owner.expect(bytes(16), "a")
    files.incoming.make(bytes(16), lineage)
    image = Image(1, generation, state)
    files.incoming.append(delta_encode(NO_STATE, image), lambda: image)
    files.incoming.grant(0)
    return files


def test_a_granted_state_takes_the_place_of_what_was_there_before(
    path: Path, opened: StateDirectory
) -> None:
    """Of the journal, too, which a vTPM leaves that has come back to where it was."""
    put(path)
    (path / JOURNAL_NAME).write_bytes(build())
    granted(opened, b"granted").close()
    begun = recover(opened)
    assert (begun.states[StateType.PERMANENT], begun.took_up) == (b"granted", True)
    assert not opened.exists(JOURNAL_NAME)


OTHER = b"another vTPM's.."


def test_invariant_13_a_granted_state_brings_its_lineage(
    path: Path, opened: StateDirectory
) -> None:
    put(path, continued=False)
    granted(opened, b"granted", OTHER, 77).close()
    begun = recover(opened)
    assert (begun.identity, begun.loaded) == (OTHER, 77)
    assert begun.generation > 77
    assert opened.read_lineage() == Lineage(OTHER, 77)


@pytest.mark.parametrize("had_a_state", [False, True])
@pytest.mark.parametrize("step", ["write_state", "take", "remove", "trust"])
def test_invariant_13_an_anchored_start_survives_a_crash_at_each_step(
    path: Path,
    opened: StateDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    *,
    had_a_state: bool,
) -> None:
    """While a granted state is taken up, which comes before the step or after it."""
    where = tmp_path / "anchor"
    if had_a_state:
        put(path, continued=False)
        where.touch()
    files = MovingFiles(opened)
    with open_anchor(where, opened, files, None) as anchor:
        start(opened, files, None, anchor)
    files = granted(opened, b"granted", OTHER, 77)
    with open_anchor(where, opened, files, None) as anchor:
        owners: dict[str, object] = {
            "write_state": opened,
            "take": files.owner,
            "remove": files.incoming,
            "trust": anchor,
        }

        def crash(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owners[step], step, crash)
            start(opened, files, None, anchor)
    files = MovingFiles(opened)
    with open_anchor(where, opened, files, None) as anchor:
        begun = start(opened, files, None, anchor)
        assert anchor.mark is not None
        assert anchor.mark.identity == begun.identity == OTHER
    assert begun.states[StateType.PERMANENT] == b"granted"


def test_a_granted_state_counts_only_if_no_journal_was_begun(
    path: Path, opened: StateDirectory
) -> None:
    """The engine writes the file before it makes a journal: then what was granted is older."""
    put(path, continued=False)
    granted(opened, b"granted").close()
    put(path)
    (path / JOURNAL_NAME).write_bytes(build())
    begun = recover(opened)
    assert (begun.states[StateType.PERMANENT], begun.took_up) == (LAST.data, True)
