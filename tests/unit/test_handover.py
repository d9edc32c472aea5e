"""The hand-over files: durable, read back as written, and never taken for what they are not.

Invariant 2: a granted state that is damaged stops the start; it is never another one.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtpmd.errors import VtpmdError
from vtpmd.store import handover, sealing
from vtpmd.store.directory import StateDirectory, StateKeyError
from vtpmd.store.handover import Handover
from vtpmd.store.keys import Key
from vtpmd.wire import swtpm_format

SESSION = b"s" * 16
KEY = bytes(range(32))
OLD, NEW, NEWEST = b"old" * 500, b"new" * 500, b"newest" * 500


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
    file = (path / handover.PERMANENT_NAME).read_bytes()
    return swtpm_format.decode_file(file, key=None if key is None else key.material)


def write_permanent(path: Path, key: Key | None, state: bytes) -> None:
    material, iv = (None, b"") if key is None else (key.material, key.new_iv())
    file = swtpm_format.encode_file(state, key=material, iv=iv)
    (path / handover.PERMANENT_NAME).write_bytes(file)


def slot_offset(serial: int) -> int:
    """Return where the slot begins that a serial is in."""
    return handover.SLOTS_OFFSET + serial % handover.SLOTS * handover.SLOT_BYTES


def slots(path: Path) -> list[bytes]:
    """Return both slots, by the parity of the serials in them."""
    content = (path / handover.INCOMING_NAME).read_bytes()
    return [content[slot_offset(n) : slot_offset(n) + handover.SLOT_BYTES] for n in (0, 1)]


def test_granted_state_is_taken_up_after_a_crash(
    files: Handover, path: Path, key: Key | None
) -> None:
    """The one that was staged last, and the vTPM is this host's again."""
    write_permanent(path, key, OLD)
    files.hand_over("away")
    files.prepare_to_take(SESSION)
    files.stage(NEW)
    files.stage(NEWEST)
    files.take()
    assert files.recover()
    assert permanent(path, key) == NEWEST
    assert files.read_owner() is None
    assert not files.recover()


def test_state_that_the_tpm_has_written_since_is_the_newer_one(
    files: Handover, path: Path, key: Key | None
) -> None:
    """A crash between the guest's first NV write and the removal of the granted state."""
    write_permanent(path, key, OLD)
    files.prepare_to_take(SESSION)
    files.stage(NEW)
    files.take()
    write_permanent(path, key, NEWEST)
    assert files.recover()
    assert permanent(path, key) == NEWEST
    assert not (path / handover.INCOMING_NAME).exists()


def test_state_that_was_not_granted_is_forgotten(
    files: Handover, path: Path, key: Key | None
) -> None:
    """The source has it."""
    write_permanent(path, key, OLD)
    files.prepare_to_take(SESSION)
    files.stage(NEW)
    assert not files.has_declined(SESSION)
    assert not files.recover()
    assert files.has_declined(SESSION)
    assert not files.has_declined(b"t" * 16)
    assert permanent(path, key) == OLD
    assert not (path / handover.INCOMING_NAME).exists()


def test_invariant_2_damaged_granted_state_stops_the_start(files: Handover, path: Path) -> None:
    """Also when the round before it is whole: that one is older."""
    files.prepare_to_take(SESSION)
    files.stage(NEW)
    files.stage(NEWEST)
    files.take()
    incoming = path / handover.INCOMING_NAME
    content = bytearray(incoming.read_bytes())
    content[slot_offset(2) + handover.SLOT_HEADER.size + 50] ^= 1
    incoming.write_bytes(content)
    with pytest.raises(VtpmdError, match="the vTPM's only state"):
        files.recover()
    assert incoming.read_bytes() == content


def test_staging_never_writes_to_the_slot_in_use(files: Handover, path: Path) -> None:
    """A crash in the middle of a write leaves the state of the round before."""
    files.prepare_to_take(SESSION)
    for number in range(5):
        before = slots(path)
        files.stage(bytes([number + 1]) * 1000)
        after = slots(path)
        serial = number + 1
        assert after[serial % 2] != before[serial % 2]
        assert after[number % 2] == before[number % 2]


def test_state_that_is_too_large_is_refused(files: Handover) -> None:
    files.prepare_to_take(SESSION)
    with pytest.raises(VtpmdError, match="too large"):
        files.stage(bytes(handover.SLOT_BYTES))


@pytest.fixture
def sealed(directory: StateDirectory) -> Handover:
    """With a key, and a state that was granted."""
    files = Handover(directory, Key(bytearray(KEY)))
    files.prepare_to_take(SESSION)
    files.stage(NEW)
    files.stage(NEWEST)
    files.take()
    return files


@pytest.mark.parametrize("other", [None, bytes(32), bytes(16)])
def test_sealed_states_need_their_key(
    sealed: Handover, directory: StateDirectory, path: Path, other: bytes | None
) -> None:
    content = (path / handover.INCOMING_NAME).read_bytes()
    assert NEW not in content
    assert NEWEST not in content
    files = Handover(directory, None if other is None else Key(bytearray(other)))
    with pytest.raises(StateKeyError, match=r"give its key with --key|does not open with this key"):
        files.recover()
    assert (path / handover.INCOMING_NAME).read_bytes() == content
    assert sealed.recover()


def test_states_in_the_clear_are_not_taken_with_a_key(directory: StateDirectory) -> None:
    """Anybody who can write to the directory could have put them there."""
    files = Handover(directory)
    files.prepare_to_take(SESSION)
    files.stage(NEW)
    files.take()
    with pytest.raises(StateKeyError, match="is not sealed: leave out --key"):
        Handover(directory, Key(bytearray(KEY))).recover()
    assert files.recover()


@pytest.mark.parametrize("offset", [*range(0, 128, 5), 127])
def test_what_a_sealed_file_says_cannot_be_altered(
    sealed: Handover, path: Path, offset: int
) -> None:
    """Such as which slot was granted: another one would be an older state."""
    incoming = path / handover.INCOMING_NAME
    content = bytearray(incoming.read_bytes())
    content[offset] ^= 1
    incoming.write_bytes(content)
    with pytest.raises(StateKeyError):
        sealed.recover()
    assert incoming.read_bytes() == content
    assert not (path / handover.PERMANENT_NAME).exists()


def test_a_sealed_state_opens_in_its_place_only(sealed: Handover, path: Path) -> None:
    """The older one, put in the newer one's place with its serial, is refused."""
    incoming = path / handover.INCOMING_NAME
    content = bytearray(incoming.read_bytes())
    newer, older = slots(path)
    content[slot_offset(2) : slot_offset(2) + len(older)] = newer[:8] + older[8:]
    incoming.write_bytes(content)
    with pytest.raises(VtpmdError, match="the vTPM's only state"):
        sealed.recover()


def test_no_nonce_and_no_salt_comes_twice(directory: StateDirectory, path: Path) -> None:
    """Both are random: so many equal ones would be no accident."""
    nonces, salts = set(), set()
    files = Handover(directory, Key(bytearray(KEY)))
    for _ in range(5):
        files.prepare_to_take(SESSION)
        salts.add((path / handover.INCOMING_NAME).read_bytes()[64:96])
        for serial in range(1, 21):
            files.stage(NEW)
            stored = slots(path)[serial % 2][handover.SLOT_HEADER.size :]
            nonces.add(stored[: sealing.NONCE_BYTES])
    assert len(salts) == 5
    assert len(nonces) == 100
