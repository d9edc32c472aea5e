"""What a start makes of a state that QEMU had brought, as a crash has left it.

Invariant 2: it is the vTPM's if it is later than what the directory has, and of the same vTPM, or
if the directory has nothing; else nothing is changed. It is taken wholly, or not.
"""

import random
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.support.file_names import JOURNAL_NAME, NAMES
from tests.support.states import STATES
from vtpmd import cli
from vtpmd.store import exporting
from vtpmd.store.arrived import FILE_OFFSET, HEAD, MAGIC, take_up
from vtpmd.store.directory import StateDirectory, StateDirectoryError, StateKeyError
from vtpmd.store.keys import Key
from vtpmd.store.moving import MovingFiles
from vtpmd.store.start import start
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType

OURS, ANOTHERS = b"o" * 16, b"a" * 16
HAD, CAME = b"had" * 500, b"came" * 500
KEY = bytes(range(32))
RANDOM = random.Random(1)
ROUNDS = 300


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StateDirectory]:
    with StateDirectory.open(tmp_path / "state") as directory:
        yield directory


def arrived(lineage: Lineage | None, key: Key | None = None, state: bytes = CAME) -> bytes:
    """Return the file that a state is in which has come."""
    material, iv = (None, b"") if key is None else (key.material, key.new_iv())
    file = swtpm_format.encode_file(state, lineage, key=material, iv=iv)
    head = HEAD.pack(MAGIC, len(file), sha256(file).digest())
    return head.ljust(FILE_OFFSET, b"\0") + file + bytes(1000)


def put(directory: StateDirectory, content: bytes) -> None:
    Path(directory.place(NAMES.arrived)).write_bytes(content)


@pytest.mark.parametrize(
    "had,came,is_taken",
    [
        (None, Lineage(OURS, 7), True),
        (Lineage(OURS, 6), Lineage(OURS, 7), True),
        (Lineage(OURS, 7), Lineage(OURS, 7), False),  # it has its own file, or another took it
        (Lineage(OURS, 8), Lineage(OURS, 7), False),
        (Lineage(ANOTHERS, 6), Lineage(OURS, 7), False),
        (Lineage(OURS, 6), None, False),
        (None, None, False),
    ],
)
def test_invariant_2_the_latest_state_of_the_vtpm_is_taken_up(
    directory: StateDirectory, had: Lineage | None, came: Lineage | None, is_taken: bool
) -> None:
    if had is not None:
        directory.write_state(StateType.PERMANENT, HAD, None, had)
    put(directory, arrived(came))
    assert take_up(directory, None) is is_taken
    before = None if had is None else HAD
    assert directory.read_state(StateType.PERMANENT) == (CAME if is_taken else before)
    assert directory.read_lineage() == (came if is_taken else had)
    assert not directory.exists(NAMES.arrived)


def test_state_that_says_no_lineage_is_kept(directory: StateDirectory) -> None:
    """It may be any vTPM's: swtpm wrote it."""
    Path(directory.place(NAMES.permanent)).write_bytes(swtpm_format.encode_file(HAD))
    put(directory, arrived(Lineage(OURS, 7)))
    assert not take_up(directory, None)
    assert directory.read_state(StateType.PERMANENT) == HAD


def test_what_went_with_the_state_before_is_removed(directory: StateDirectory) -> None:
    directory.write_state(StateType.PERMANENT, HAD, None, Lineage(OURS, 6))
    directory.write_state(StateType.VOLATILE, HAD, None)
    put(directory, arrived(Lineage(OURS, 7)))
    assert take_up(directory, None)
    assert not directory.exists(NAMES.volatile)


@pytest.mark.parametrize("lost", [NAMES.volatile, JOURNAL_NAME, NAMES.permanent, NAMES.arrived])
def test_a_crash_while_it_is_taken_up_is_gone_on_from(
    directory: StateDirectory, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its steps; the journal of the state before is gone when its file says that."""
    had = Lineage(OURS, 6, continued=True)
    directory.write_state(StateType.PERMANENT, HAD, None, had)
    Path(directory.place(JOURNAL_NAME)).write_bytes(b"")
    put(directory, arrived(Lineage(OURS, 7)))
    remove, replace = StateDirectory.remove, StateDirectory.replace

    class Crash(Exception):
        pass

    def crash(name: str) -> None:
        if name == lost:
            raise Crash

    def removing(self: StateDirectory, name: str) -> None:
        remove(self, name)
        crash(name)

    def replacing(self: StateDirectory, name: str, content: bytes) -> None:
        replace(self, name, content)
        crash(name)

    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "remove", removing)
        patch.setattr(StateDirectory, "replace", replacing)
        with pytest.raises(Crash):
            take_up(directory, None)
    started = start(directory, MovingFiles(directory), None, None)
    assert started.states[StateType.PERMANENT] == CAME
    assert started.identity == OURS
    assert not directory.exists(NAMES.arrived)


def test_room_that_nothing_came_into_is_removed(directory: StateDirectory) -> None:
    put(directory, MAGIC + bytes(FILE_OFFSET))
    assert start(directory, MovingFiles(directory), None, None).is_new
    assert not directory.exists(NAMES.arrived)


def test_an_altered_one_is_taken_for_none(directory: StateDirectory) -> None:
    """Or it was altered where nothing is: behind it, and between the two."""
    whole = arrived(Lineage(OURS, 7))
    length = FILE_OFFSET + HEAD.unpack_from(whole)[1]
    covered = [*range(HEAD.size), *range(FILE_OFFSET, length)]
    for _ in range(ROUNDS):
        at = RANDOM.choice(covered)
        altered = bytearray(whole)
        altered[at] ^= RANDOM.randrange(1, 256)
        put(directory, bytes(altered))
        assert not take_up(directory, None)
        put(directory, whole[: RANDOM.randrange(length)])
        assert not take_up(directory, None)
    assert not directory.exists(NAMES.permanent)


def test_with_a_key_it_is_encrypted(directory: StateDirectory) -> None:
    """Whatever does not go with the key stays as it is."""
    key, other = Key(bytearray(KEY)), Key(bytearray(32))
    for content, wrong in (
        (arrived(Lineage(OURS, 7), key), None),
        (arrived(Lineage(OURS, 7), key), other),
        (arrived(Lineage(OURS, 7)), key),
    ):
        put(directory, content)
        with pytest.raises(StateKeyError, match=NAMES.arrived):
            take_up(directory, wrong)
        assert Path(directory.place(NAMES.arrived)).read_bytes() == content
        assert not directory.exists(NAMES.permanent)
    put(directory, arrived(Lineage(OURS, 7), key))
    assert take_up(directory, key)
    assert directory.read_state(StateType.PERMANENT, key) == CAME


def test_what_a_crash_has_left_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what would show, or take out, the state that was there before; `vtpmd fold` settles it."""
    state = next(state for state, kind in STATES.values() if kind is StateType.PERMANENT)
    path = str(tmp_path / "left")
    with StateDirectory.open(path) as directory:
        directory.write_state(StateType.PERMANENT, state, None, Lineage(OURS, 6))
        put(directory, arrived(Lineage(OURS, 7), state=state))
    monkeypatch.setattr(exporting, "PAUSE_S", 0)
    for command, status in (("recover", 1), ("status", 5), ("inspect", 5), ("export", 1)):
        out = ["--out", f"{path}.export"] if command == "export" else []
        assert cli.main([command, path, *out]) == status
        said = capsys.readouterr()
        assert "QEMU has brought" in said.out + said.err
    assert cli.main(["fold", path]) == 0
    with StateDirectory.open(path) as folded:
        assert folded.read_lineage() == Lineage(OURS, 7)


def test_what_is_no_state_file_is_refused(directory: StateDirectory) -> None:
    """Though its checksum is right, its content is empty."""
    file = swtpm_format.encode_file(b"", Lineage(OURS, 7))
    head = HEAD.pack(MAGIC, len(file), sha256(file).digest())
    put(directory, head.ljust(FILE_OFFSET, b"\0") + file)
    with pytest.raises(StateDirectoryError, match=f"{NAMES.arrived}: it is empty"):
        take_up(directory, None)
