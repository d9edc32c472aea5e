"""The files of a moving vTPM: durable, read back as written, never taken for what they are not.

Invariant 2: a granted state that is damaged stops the start; it is never another one. Invariant 10:
no generation that came with a state is used again.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.file_names import INCOMING_NAME, PERMANENT_NAME
from tests.support.owner import write_offer
from vtpmd.core import Image
from vtpmd.core.delta import delta_encode
from vtpmd.errors import VtpmdError
from vtpmd.store import incoming, sealing
from vtpmd.store.directory import StateDirectory, StateKeyError
from vtpmd.store.keys import Key
from vtpmd.store.moving import Granted, MovingFiles, take_up
from vtpmd.store.owner import Outcome, Whose
from vtpmd.store.start import start
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType

SESSION, AWAY, LINEAGE = b"s" * 16, b"a" * 16, b"l" * 16
SOURCE = "host1.example.org"
KEY = bytes(range(32))
OLD, NEW, NEWEST = b"old" * 500, b"new" * 500, b"newest" * 500
SEALED_BYTES = incoming.HEAD.size + sealing.MAC_BYTES  # of the head
RANDOM = random.Random(1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture(params=[None, KEY], ids=["in the clear", "sealed"])
def key(request: pytest.FixtureRequest) -> Key | None:
    """Every test runs with a key, too."""
    return None if request.param is None else Key(bytearray(request.param))


@pytest.fixture
def directory(path: Path) -> Iterator[StateDirectory]:
    with StateDirectory.open(path) as directory:
        yield directory


class Files(MovingFiles):
    """What a host has of a vTPM that moves, and what it does with it."""

    def expect(self) -> None:
        """A source begins a session."""
        if self.owner.read().find(SESSION.hex()) is None:
            self.owner.expect(SESSION, SOURCE)
        self.incoming.make(SESSION, LINEAGE)

    def move_away(self) -> None:
        """Give the vTPM to another host."""
        self.owner.reserve(AWAY, "away:4433", 0)
        write_offer(self.owner, AWAY)
        self.owner.confirm(AWAY)

    def take_up(self) -> bool:
        """Start after a crash."""
        return take_up(self._directory, self, self._key)

    def outcome(self, session: bytes = SESSION) -> Outcome | None:
        """Return what is remembered of a session."""
        line = self.owner.read().find(session.hex())
        return None if line is None else line.outcome


@pytest.fixture
def files(directory: StateDirectory, key: Key | None) -> Iterator[Files]:
    files = Files(directory, key)
    yield files
    files.close()


def permanent(path: Path, key: Key | None) -> bytes:
    file = (path / PERMANENT_NAME).read_bytes()
    return swtpm_format.decode_file(file, key=None if key is None else key.material)


def write_permanent(path: Path, key: Key | None, state: bytes) -> None:
    material, iv = (None, b"") if key is None else (key.material, key.new_iv())
    file = swtpm_format.encode_file(state, key=material, iv=iv)
    (path / PERMANENT_NAME).write_bytes(file)


class Sender:
    """What stages states as a session does: each by the record that ends at it."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.images = [incoming.NO_STATE]

    def stage(self, state: bytes, back: int = 1) -> Image:
        """Stage a state that continues the last one, or the one before."""
        base = self.images[-back]
        image = Image(StateType.PERMANENT, self.images[-1].generation + 1, state)
        self.files.incoming.append(delta_encode(base, image), lambda: image)
        self.images.append(image)
        return image


def entries(path: Path) -> list[bytes]:
    """Return the entries, whole ones and what follows them: up to 512 bytes of each."""
    content = (path / INCOMING_NAME).read_bytes()[incoming.ENTRIES_OFFSET :]
    return [content[at : at + 512] for at in range(0, len(content), 512)]


def test_volatile_state_of_before_does_not_go_with_a_granted_one(
    files: Files, directory: StateDirectory, key: Key | None
) -> None:
    """STORE_VOLATILE left it here; the vTPM has been elsewhere since."""
    directory.write_state(StateType.PERMANENT, OLD, key)
    directory.write_state(StateType.VOLATILE, b"PCRs of then", key)
    files.expect()
    Sender(files).stage(NEW)
    files.incoming.grant(1)
    begun = start(directory, files, key, None)
    assert begun.took_up
    assert begun.states == {StateType.PERMANENT: NEW}


def test_granted_state_is_taken_up_after_a_crash(files: Files, path: Path, key: Key | None) -> None:
    """The one that was staged last, and the vTPM is this host's again."""
    write_permanent(path, key, OLD)
    files.move_away()
    files.expect()
    sender = Sender(files)
    sender.stage(NEW)
    sender.stage(NEWEST)
    files.incoming.grant(0)
    assert files.take_up()
    assert permanent(path, key) == NEWEST
    assert files.owner.read().whose is Whose.OURS
    assert files.outcome() is Outcome.TAKEN
    assert not files.take_up()
    assert permanent(path, key) == NEWEST


def test_invariant_10_generations_of_a_granted_state_are_not_used_again(files: Files) -> None:
    """Also when this host dies before it has written that down."""
    files.expect()
    last = Image(StateType.PERMANENT, 1 << 60, NEW)
    files.incoming.append(delta_encode(incoming.NO_STATE, last), lambda: last)
    files.incoming.grant(0)
    assert files.take_up()
    assert files.owner.read().generation >= last.generation
    assert files.owner.reserve(AWAY, "away:4433", 0) >= last.generation


def test_invariant_10_also_when_the_tpm_has_written_its_own_file_since(
    files: Files, path: Path, key: Key | None
) -> None:
    """The crash came before the record had heard of it."""
    files.expect()
    last = Image(StateType.PERMANENT, 1 << 60, NEW)
    files.incoming.append(delta_encode(incoming.NO_STATE, last), lambda: last)
    files.incoming.grant(0)
    write_permanent(path, key, NEW)
    assert files.take_up()
    assert files.owner.read().generation >= last.generation


def test_granted_state_that_is_damaged_and_of_no_use_stops_no_start(
    files: Files, path: Path, key: Key | None
) -> None:
    """The TPM has written its own file since."""
    files.expect()
    Sender(files).stage(NEW)
    files.incoming.grant(0)
    write_permanent(path, key, NEWEST)
    file = path / INCOMING_NAME
    content = bytearray(file.read_bytes())
    content[incoming.ENTRIES_OFFSET + incoming.ENTRY_HEADER.size + 50] ^= 1
    file.write_bytes(content)
    assert files.take_up()
    assert permanent(path, key) == NEWEST


def test_state_that_the_tpm_has_written_since_is_the_newer_one(
    files: Files, path: Path, key: Key | None
) -> None:
    """A crash between the guest's first NV write and the removal of the granted state."""
    write_permanent(path, key, OLD)
    files.expect()
    Sender(files).stage(NEW)
    files.incoming.grant(0)
    write_permanent(path, key, NEWEST)
    assert files.take_up()
    assert permanent(path, key) == NEWEST
    assert not (path / INCOMING_NAME).exists()


def test_state_that_was_not_granted_is_forgotten(files: Files, path: Path, key: Key | None) -> None:
    """The source has it."""
    write_permanent(path, key, OLD)
    files.expect()
    Sender(files).stage(NEW)
    assert files.outcome() is Outcome.OPEN
    assert not files.take_up()
    assert files.outcome() is Outcome.DECLINED
    assert permanent(path, key) == OLD
    assert not (path / INCOMING_NAME).exists()


def test_state_is_taken_up_without_a_line_in_the_record(
    files: Files, path: Path, key: Key | None
) -> None:
    """Somebody has removed the record, or it was forgotten."""
    files.incoming.make(SESSION, LINEAGE)
    Sender(files).stage(NEW)
    files.incoming.grant(0)
    assert files.take_up()
    assert permanent(path, key) == NEW
    assert files.outcome() is Outcome.TAKEN


@pytest.mark.parametrize("outcome", [Outcome.DECLINED, Outcome.RELEASED, Outcome.TAKEN])
def test_invariant_3_the_record_wins_over_a_file_that_says_granted(
    files: Files, path: Path, key: Key | None, outcome: Outcome
) -> None:
    """A crash after the session's end was remembered, before the file was removed.

    The source has been told that it may run, or the vTPM is in its own file and has moved on.
    """
    write_permanent(path, key, OLD)
    files.expect()
    Sender(files).stage(NEW)
    files.incoming.grant(0)
    if outcome is Outcome.DECLINED:
        files.owner.decline(SESSION)
    elif outcome is Outcome.RELEASED:
        files.owner.give_back(SESSION)
    else:
        files.owner.take(SESSION, 0)
        files.move_away()
    before = files.owner.read()
    assert files.granted() is None
    assert not files.take_up()
    assert files.owner.read() == before
    assert permanent(path, key) == OLD
    assert not (path / INCOMING_NAME).exists()


def test_granted_is_what_would_be_taken_up(files: Files, path: Path, key: Key | None) -> None:
    """And looking changes nothing."""
    assert files.granted() is None
    write_permanent(path, key, OLD)
    files.expect()
    Sender(files).stage(NEW)
    assert files.granted() is None
    files.incoming.grant(0)
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    assert files.granted() == Granted(LINEAGE, NEW)
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before
    assert files.take_up()


@pytest.mark.parametrize("step", ["write_state", "take", "remove"])
def test_a_crash_while_a_state_is_taken_up_is_made_good_by_the_next_start(
    directory: StateDirectory,
    path: Path,
    key: Key | None,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever step it comes before."""
    files = Files(directory, key)
    write_permanent(path, key, OLD)
    files.move_away()
    files.expect()
    Sender(files).stage(NEW)
    files.incoming.grant(0)
    owners: dict[str, object] = {
        "write_state": directory,
        "take": files.owner,
        "remove": files.incoming,
    }

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owners[step], step, crash)
        files.take_up()
    files.close()
    files = Files(directory, key)
    files.take_up()
    assert permanent(path, key) == NEW
    assert files.owner.read().whose is Whose.OURS
    assert files.outcome() is Outcome.TAKEN
    assert not (path / INCOMING_NAME).exists()
    files.close()


def test_a_session_without_a_file_has_nothing_to_take_from(files: Files) -> None:
    with pytest.raises(ValueError, match="no session"):
        files.incoming.append(b"", lambda: incoming.NO_STATE)
    with pytest.raises(ValueError, match="no session"):
        files.incoming.grant(0)
    files.incoming.remove()


@pytest.mark.parametrize("entry", [0, 1], ids=["the base", "the last"])
def test_invariant_2_damaged_granted_state_stops_the_start(
    files: Files, path: Path, entry: int
) -> None:
    """Also when the round before it is whole: that one is older."""
    files.expect()
    sender = Sender(files)
    sender.stage(NEW)
    sender.stage(NEWEST)
    files.incoming.grant(0)
    file = path / INCOMING_NAME
    content = bytearray(file.read_bytes())
    content[incoming.ENTRIES_OFFSET + 512 * entry + incoming.ENTRY_HEADER.size + 50] ^= 1
    file.write_bytes(content)
    with pytest.raises(VtpmdError, match="the vTPM's only state"):
        files.take_up()
    assert file.read_bytes() == content


@pytest.mark.parametrize("length", [0, 20, incoming.ENTRIES_OFFSET, incoming.ENTRIES_OFFSET + 600])
def test_invariant_2_granted_state_that_was_cut_stops_the_start(
    directory: StateDirectory, path: Path, length: int
) -> None:
    files = Files(directory)
    files.expect()
    sender = Sender(files)
    sender.stage(NEW)
    sender.stage(NEWEST)
    files.incoming.grant(0)
    file = path / INCOMING_NAME
    file.write_bytes(file.read_bytes()[:length])
    if length == 0:
        assert not files.take_up()  # it says nothing of a Grant
        return
    with pytest.raises(VtpmdError, match="the vTPM's only state"):
        files.take_up()


def test_state_may_continue_the_last_but_one(files: Files, path: Path, key: Key | None) -> None:
    """The source has not heard that the last one had arrived."""
    files.expect()
    sender = Sender(files)
    sender.stage(OLD)
    sender.stage(NEW)
    sender.stage(NEWEST, back=2)
    files.incoming.grant(0)
    assert files.take_up()
    assert permanent(path, key) == NEWEST


def test_staging_never_writes_to_what_was_staged(files: Files, path: Path) -> None:
    """A crash in the middle of a write leaves the state of the round before."""
    files.expect()
    sender = Sender(files)
    for number in range(1, 5):
        before = entries(path)
        sender.stage(RANDOM.randbytes(100))
        after = entries(path)
        assert after[: number - 1] == before[: number - 1]
        assert after[number - 1] != before[number - 1] == bytes(512)


def test_a_file_that_is_full_is_made_anew(files: Files, path: Path, key: Key | None) -> None:
    """From the whole state; none that was staged is lost on the way."""
    files.expect()
    sender = Sender(files)
    rounds = incoming.ENTRIES_BYTES // (200 * 1024) + 2
    for _ in range(rounds):
        last = sender.stage(RANDOM.randbytes(200 * 1024))
    files.incoming.grant(0)
    assert (path / INCOMING_NAME).stat().st_size == incoming.INCOMING_BYTES
    assert files.take_up()
    assert permanent(path, key) == last.data


@pytest.fixture
def sealed(directory: StateDirectory) -> Files:
    """With a key, and a state that was granted."""
    files = Files(directory, Key(bytearray(KEY)))
    files.expect()
    sender = Sender(files)
    sender.stage(NEW)
    sender.stage(NEWEST)
    files.incoming.grant(0)
    return files


@pytest.mark.parametrize("other", [None, bytes(32), bytes(16)])
def test_sealed_states_need_their_key(
    sealed: Files, directory: StateDirectory, path: Path, other: bytes | None
) -> None:
    content = (path / INCOMING_NAME).read_bytes()
    assert NEW not in content
    assert NEWEST not in content
    files = Files(directory, None if other is None else Key(bytearray(other)))
    with pytest.raises(StateKeyError, match=r"give its key with --key|does not open with this key"):
        files.take_up()
    assert (path / INCOMING_NAME).read_bytes() == content
    assert sealed.take_up()


def test_invariant_10_a_start_knows_the_highest_generation_of_any_state(
    directory: StateDirectory,
) -> None:
    """The volatile one's is higher, as a rule, and is not in the file's entries."""
    used = 1 << 40
    files = Files(directory)
    files.expect()
    Sender(files).stage(NEW)
    files.incoming.grant(used)
    again = Files(directory)
    assert again.take_up()
    assert again.owner.read().generation > used


def test_states_in_the_clear_are_not_taken_with_a_key(directory: StateDirectory) -> None:
    """Anybody who can write to the directory could have put them there."""
    files = Files(directory)
    files.expect()
    Sender(files).stage(NEW)
    files.incoming.grant(0)
    with pytest.raises(StateKeyError, match="is not sealed: leave out --key"):
        Files(directory, Key(bytearray(KEY))).take_up()
    assert files.take_up()


@pytest.mark.parametrize("offset", [*range(0, SEALED_BYTES, 5), SEALED_BYTES - 1])
def test_what_a_sealed_file_says_cannot_be_altered(sealed: Files, path: Path, offset: int) -> None:
    """Such as which state was granted: another one would be an older state."""
    file = path / INCOMING_NAME
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)
    with pytest.raises(StateKeyError):
        sealed.take_up()
    assert file.read_bytes() == content
    assert not (path / PERMANENT_NAME).exists()


def test_a_sealed_state_opens_in_its_place_only(sealed: Files, path: Path) -> None:
    """The older one, put in the newer one's place with its serial, is refused."""
    file = path / INCOMING_NAME
    content = bytearray(file.read_bytes())
    older, newer = entries(path)[:2]
    at = incoming.ENTRIES_OFFSET + 512
    content[at : at + 512] = newer[:8] + older[8:]
    file.write_bytes(content)
    with pytest.raises(VtpmdError, match="the vTPM's only state"):
        sealed.take_up()


def test_no_nonce_and_no_salt_comes_twice(directory: StateDirectory, path: Path) -> None:
    """Both are random: so many equal ones would be no accident."""
    nonces, salts = set(), set()
    files = Files(directory, Key(bytearray(KEY)))
    for _ in range(5):
        files.expect()
        salts.add((path / INCOMING_NAME).read_bytes()[64:96])
        sender = Sender(files)
        for number in range(20):
            sender.stage(RANDOM.randbytes(50))
            entry = entries(path)[number][incoming.ENTRY_HEADER.size :]
            nonces.add(entry[: sealing.NONCE_BYTES])
    assert len(salts) == 5
    assert len(nonces) == 100
