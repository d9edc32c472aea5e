"""The hand-over files: durable, read back as written, and never taken for what they are not.

Invariant 2: a granted state that is damaged stops the start; it is never another one.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtpmd.core import Image, delta_encode
from vtpmd.errors import VtpmdError
from vtpmd.store import handover, incoming, sealing
from vtpmd.store.directory import StateDirectory, StateDirectoryError, StateKeyError
from vtpmd.store.handover import Handover
from vtpmd.store.keys import Key
from vtpmd.wire import swtpm_format
from vtpmd.wire.control import StateType

SESSION = b"s" * 16
KEY = bytes(range(32))
OLD, NEW, NEWEST = b"old" * 500, b"new" * 500, b"newest" * 500
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


@pytest.fixture
def files(directory: StateDirectory, key: Key | None) -> Handover:
    return Handover(directory, key)


def test_owner_is_this_host_without_a_record(files: Handover) -> None:
    assert files.read_owner() is None
    files.reserve_generations(0)
    assert files.read_owner() is None


def test_hand_over_is_read_back_and_struck_out(files: Handover) -> None:
    """Prepared or not; a long name is cut."""
    for prepared in (True, False):
        if prepared:
            files.reserve_generations(0)
        files.hand_over("host2:7777" + "x" * 1000)
        owner = files.read_owner()
        assert owner is not None
        assert owner.to.startswith("host2:7777")
        files.strike_out()
        assert files.read_owner() is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 2, "handed-over": null, "declined": "", "generation": 1}',
        b'{"version": 1, "declined": "", "generation": 1}',
        b'{"version": 1, "handed-over": null}',
        b'{"version": 1, "handed-over": null, "declined": "", "generation": -1}',
        b'{"version": 1, "handed-over": null, "declined": "", "generation": true}',
        b'{"version": 1, "handed-over": null, "declined": "", "generation": 9223372036854775808}',
        b'{"version": 1, "handed-over": {"to": "x"}, "declined": "", "generation": 1}',
        b'{"version": 1, "handed-over": {"to": "\\n", "at": ""}, "declined": "", "generation": 1}',
        b"[" * 511,
        b" " * 1000,
    ],
)
def test_record_that_cannot_be_read_is_an_error(
    files: Handover, path: Path, content: bytes
) -> None:
    """Whose the vTPM is, is not known: not ours by mistake."""
    (path / handover.OWNER_NAME).write_bytes(content)
    with pytest.raises(VtpmdError, match="whose the vTPM is"):
        files.read_owner()


def test_disk_is_woken_by_what_changes_nothing(files: Handover, path: Path) -> None:
    """Before the hand-over, which comes after it whatever the other thread is at."""
    files.reserve_generations(5)
    files.prepare_to_hand_over()
    before = (path / "tpm2-00.owner").read_bytes()
    files.expect_hand_over("b:1")
    files.strike_out()
    assert (path / "tpm2-00.owner").read_bytes() == before
    for _ in range(100):
        files.expect_hand_over("b:1")
        files.hand_over("b:1")
        owner = files.read_owner()
        assert owner is not None and owner.to == "b:1"
        files.strike_out()
        assert files.read_owner() is None
    files.close()


def test_what_was_prepared_for_one_host_is_not_said_of_another(files: Handover) -> None:
    """A guest that resumed here may be handed over to somebody else later."""
    files.reserve_generations(5)
    files.prepare_to_hand_over()
    files.expect_hand_over("b:1")
    files.hand_over("c:2")
    owner = files.read_owner()
    assert owner is not None and owner.to == "c:2"
    files.close()


def test_failure_to_wake_the_disk_shows_when_it_matters(files: Handover, path: Path) -> None:
    """Somebody has put a directory in the record's place."""
    files.reserve_generations(5)
    files.prepare_to_hand_over()
    (path / "tpm2-00.owner").unlink()
    (path / "tpm2-00.owner").mkdir()
    files.expect_hand_over("b:1")
    with pytest.raises(StateDirectoryError):
        files.hand_over("b:1")
    files.close()


def test_record_is_json_for_people(files: Handover, path: Path) -> None:
    files.hand_over("host2:7777")
    record = json.loads((path / handover.OWNER_NAME).read_text())
    assert record["handed-over"]["to"] == "host2:7777"
    assert (path / handover.OWNER_NAME).stat().st_size == handover.OWNER_BYTES


def test_invariant_10_no_generation_is_handed_out_twice(files: Handover) -> None:
    """Not in another session, not after a hand-over and back, not below another host's."""
    first = files.reserve_generations(7)
    assert first == 7
    second = files.reserve_generations(0)
    assert second >= first + handover.GENERATIONS_RESERVED
    files.hand_over("away")
    files.strike_out()
    third = files.reserve_generations(second + 5)
    assert third >= second + handover.GENERATIONS_RESERVED
    assert files.reserve_generations(1 << 60) == 1 << 60


def permanent(path: Path, key: Key | None) -> bytes:
    file = (path / incoming.PERMANENT_NAME).read_bytes()
    return swtpm_format.decode_file(file, key=None if key is None else key.material)


def write_permanent(path: Path, key: Key | None, state: bytes) -> None:
    material, iv = (None, b"") if key is None else (key.material, key.new_iv())
    file = swtpm_format.encode_file(state, key=material, iv=iv)
    (path / incoming.PERMANENT_NAME).write_bytes(file)


class Sender:
    """What stages states as a session does: each by the record that ends at it."""

    def __init__(self, files: Handover) -> None:
        self.files = files
        self.images = [incoming.NO_STATE]

    def stage(self, state: bytes, back: int = 1) -> Image:
        """Stage a state that continues the last one, or the one before."""
        base = self.images[-back]
        image = Image(StateType.PERMANENT, self.images[-1].generation + 1, state)
        self.files.stage(delta_encode(base, image), image)
        self.images.append(image)
        return image


def entries(path: Path) -> list[bytes]:
    """Return the entries, whole ones and what follows them: up to 512 bytes of each."""
    content = (path / incoming.INCOMING_NAME).read_bytes()[incoming.ENTRIES_OFFSET :]
    return [content[at : at + 512] for at in range(0, len(content), 512)]


def test_granted_state_is_taken_up_after_a_crash(
    files: Handover, path: Path, key: Key | None
) -> None:
    """The one that was staged last, and the vTPM is this host's again."""
    write_permanent(path, key, OLD)
    files.hand_over("away")
    files.prepare_to_take(SESSION)
    sender = Sender(files)
    sender.stage(NEW)
    sender.stage(NEWEST)
    files.take()
    assert files.recover()
    assert permanent(path, key) == NEWEST
    assert files.read_owner() is None
    assert not files.recover()


def test_invariant_10_generations_of_a_granted_state_are_not_used_again(files: Handover) -> None:
    """Also when this host dies before it has written that down."""
    files.prepare_to_take(SESSION)
    sender = Sender(files)
    for state in (OLD, NEW, NEWEST):
        last = sender.stage(state)
    files.take()
    assert files.recover()
    assert files.reserve_generations(0) >= last.generation


def test_state_that_the_tpm_has_written_since_is_the_newer_one(
    files: Handover, path: Path, key: Key | None
) -> None:
    """A crash between the guest's first NV write and the removal of the granted state."""
    write_permanent(path, key, OLD)
    files.prepare_to_take(SESSION)
    Sender(files).stage(NEW)
    files.take()
    write_permanent(path, key, NEWEST)
    assert files.recover()
    assert permanent(path, key) == NEWEST
    assert not (path / incoming.INCOMING_NAME).exists()


def test_state_that_was_not_granted_is_forgotten(
    files: Handover, path: Path, key: Key | None
) -> None:
    """The source has it."""
    write_permanent(path, key, OLD)
    files.prepare_to_take(SESSION)
    Sender(files).stage(NEW)
    assert not files.has_declined(SESSION)
    assert not files.recover()
    assert files.has_declined(SESSION)
    assert not files.has_declined(b"t" * 16)
    assert permanent(path, key) == OLD
    assert not (path / incoming.INCOMING_NAME).exists()


@pytest.mark.parametrize("entry", [0, 1], ids=["the base", "the last"])
def test_invariant_2_damaged_granted_state_stops_the_start(
    files: Handover, path: Path, entry: int
) -> None:
    """Also when the round before it is whole: that one is older."""
    files.prepare_to_take(SESSION)
    sender = Sender(files)
    sender.stage(NEW)
    sender.stage(NEWEST)
    files.take()
    file = path / incoming.INCOMING_NAME
    content = bytearray(file.read_bytes())
    content[incoming.ENTRIES_OFFSET + 512 * entry + incoming.ENTRY_HEADER.size + 50] ^= 1
    file.write_bytes(content)
    with pytest.raises(VtpmdError, match="the vTPM's only state"):
        files.recover()
    assert file.read_bytes() == content


@pytest.mark.parametrize("length", [0, 20, incoming.ENTRIES_OFFSET, incoming.ENTRIES_OFFSET + 600])
def test_invariant_2_granted_state_that_was_cut_stops_the_start(
    directory: StateDirectory, path: Path, length: int
) -> None:
    files = Handover(directory)
    files.prepare_to_take(SESSION)
    sender = Sender(files)
    sender.stage(NEW)
    sender.stage(NEWEST)
    files.take()
    file = path / incoming.INCOMING_NAME
    file.write_bytes(file.read_bytes()[:length])
    if length == 0:
        assert not files.recover()  # it says nothing of a Grant
        return
    with pytest.raises(VtpmdError, match="the vTPM's only state"):
        files.recover()


def test_state_may_continue_the_last_but_one(files: Handover, path: Path, key: Key | None) -> None:
    """The source has not heard that the last one had arrived."""
    files.prepare_to_take(SESSION)
    sender = Sender(files)
    sender.stage(OLD)
    sender.stage(NEW)
    sender.stage(NEWEST, back=2)
    files.take()
    assert files.recover()
    assert permanent(path, key) == NEWEST


def test_staging_never_writes_to_what_was_staged(files: Handover, path: Path) -> None:
    """A crash in the middle of a write leaves the state of the round before."""
    files.prepare_to_take(SESSION)
    sender = Sender(files)
    for number in range(1, 5):
        before = entries(path)
        sender.stage(RANDOM.randbytes(100))
        after = entries(path)
        assert after[: number - 1] == before[: number - 1]
        assert after[number - 1] != before[number - 1] == bytes(512)


def test_a_file_that_is_full_is_made_anew(files: Handover, path: Path, key: Key | None) -> None:
    """From the whole state; none that was staged is lost on the way."""
    files.prepare_to_take(SESSION)
    sender = Sender(files)
    rounds = incoming.ENTRIES_BYTES // (200 * 1024) + 2
    for _ in range(rounds):
        last = sender.stage(RANDOM.randbytes(200 * 1024))
    files.take()
    assert (path / incoming.INCOMING_NAME).stat().st_size == incoming.INCOMING_BYTES
    assert files.recover()
    assert permanent(path, key) == last.data


@pytest.fixture
def sealed(directory: StateDirectory) -> Handover:
    """With a key, and a state that was granted."""
    files = Handover(directory, Key(bytearray(KEY)))
    files.prepare_to_take(SESSION)
    sender = Sender(files)
    sender.stage(NEW)
    sender.stage(NEWEST)
    files.take()
    return files


@pytest.mark.parametrize("other", [None, bytes(32), bytes(16)])
def test_sealed_states_need_their_key(
    sealed: Handover, directory: StateDirectory, path: Path, other: bytes | None
) -> None:
    content = (path / incoming.INCOMING_NAME).read_bytes()
    assert NEW not in content
    assert NEWEST not in content
    files = Handover(directory, None if other is None else Key(bytearray(other)))
    with pytest.raises(StateKeyError, match=r"give its key with --key|does not open with this key"):
        files.recover()
    assert (path / incoming.INCOMING_NAME).read_bytes() == content
    assert sealed.recover()


def test_states_in_the_clear_are_not_taken_with_a_key(directory: StateDirectory) -> None:
    """Anybody who can write to the directory could have put them there."""
    files = Handover(directory)
    files.prepare_to_take(SESSION)
    Sender(files).stage(NEW)
    files.take()
    with pytest.raises(StateKeyError, match="is not sealed: leave out --key"):
        Handover(directory, Key(bytearray(KEY))).recover()
    assert files.recover()


@pytest.mark.parametrize("offset", [*range(0, 128, 5), 127])
def test_what_a_sealed_file_says_cannot_be_altered(
    sealed: Handover, path: Path, offset: int
) -> None:
    """Such as which state was granted: another one would be an older state."""
    file = path / incoming.INCOMING_NAME
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)
    with pytest.raises(StateKeyError):
        sealed.recover()
    assert file.read_bytes() == content
    assert not (path / incoming.PERMANENT_NAME).exists()


def test_a_sealed_state_opens_in_its_place_only(sealed: Handover, path: Path) -> None:
    """The older one, put in the newer one's place with its serial, is refused."""
    file = path / incoming.INCOMING_NAME
    content = bytearray(file.read_bytes())
    older, newer = entries(path)[:2]
    at = incoming.ENTRIES_OFFSET + 512
    content[at : at + 512] = newer[:8] + older[8:]
    file.write_bytes(content)
    with pytest.raises(VtpmdError, match="the vTPM's only state"):
        sealed.recover()


def test_no_nonce_and_no_salt_comes_twice(directory: StateDirectory, path: Path) -> None:
    """Both are random: so many equal ones would be no accident."""
    nonces, salts = set(), set()
    files = Handover(directory, Key(bytearray(KEY)))
    for _ in range(5):
        files.prepare_to_take(SESSION)
        salts.add((path / incoming.INCOMING_NAME).read_bytes()[64:96])
        sender = Sender(files)
        for number in range(20):
            sender.stage(RANDOM.randbytes(50))
            entry = entries(path)[number][incoming.ENTRY_HEADER.size :]
            nonces.add(entry[: sealing.NONCE_BYTES])
    assert len(salts) == 5
    assert len(nonces) == 100
