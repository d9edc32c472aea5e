"""The hand-over files: durable, read back as written, and never taken for what they are not.

Invariant 2: a granted state that is damaged stops the start; it is never another one.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtpmd.errors import VtpmdError
from vtpmd.store import directory, handover
from vtpmd.store.directory import StateDirectory
from vtpmd.store.handover import Handover
from vtpmd.wire import swtpm_format

SESSION = b"s" * 16
OLD, NEW, NEWEST = b"old" * 500, b"new" * 500, b"newest" * 500


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def files(path: Path) -> Iterator[Handover]:
    with StateDirectory.open(path) as opened:
        yield Handover(opened)


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


def permanent(path: Path) -> bytes:
    return swtpm_format.decode_file((path / directory.PERMANENT_NAME).read_bytes())


def test_granted_state_is_taken_up_after_a_crash(files: Handover, path: Path) -> None:
    """The one that was staged last, and the vTPM is this host's again."""
    (path / directory.PERMANENT_NAME).write_bytes(swtpm_format.encode_file(OLD))
    files.hand_over("away")
    files.prepare_to_take(SESSION)
    files.stage(NEW)
    files.stage(NEWEST)
    files.take()
    assert files.recover()
    assert permanent(path) == NEWEST
    assert files.read_owner() is None
    assert not files.recover()


def test_state_that_the_tpm_has_written_since_is_the_newer_one(files: Handover, path: Path) -> None:
    """A crash between the guest's first NV write and the removal of the granted state."""
    (path / directory.PERMANENT_NAME).write_bytes(swtpm_format.encode_file(OLD))
    files.prepare_to_take(SESSION)
    files.stage(NEW)
    files.take()
    (path / directory.PERMANENT_NAME).write_bytes(swtpm_format.encode_file(NEWEST))
    assert files.recover()
    assert permanent(path) == NEWEST
    assert not (path / handover.INCOMING_NAME).exists()


def test_state_that_was_not_granted_is_forgotten(files: Handover, path: Path) -> None:
    """The source has it."""
    (path / directory.PERMANENT_NAME).write_bytes(swtpm_format.encode_file(OLD))
    files.prepare_to_take(SESSION)
    files.stage(NEW)
    assert not files.has_declined(SESSION)
    assert not files.recover()
    assert files.has_declined(SESSION)
    assert not files.has_declined(b"t" * 16)
    assert permanent(path) == OLD
    assert not (path / handover.INCOMING_NAME).exists()


def test_invariant_2_damaged_granted_state_stops_the_start(files: Handover, path: Path) -> None:
    """Also when the round before it is whole: that one is older."""
    files.prepare_to_take(SESSION)
    files.stage(NEW)
    files.stage(NEWEST)
    files.take()
    incoming = path / handover.INCOMING_NAME
    content = bytearray(incoming.read_bytes())
    content[content.index(NEWEST) + 7] ^= 1
    incoming.write_bytes(content)
    with pytest.raises(VtpmdError, match="the vTPM's only state"):
        files.recover()
    assert incoming.read_bytes() == content


def test_staging_never_writes_to_the_slot_in_use(files: Handover, path: Path) -> None:
    """A crash in the middle of a write leaves the state of the round before."""
    files.prepare_to_take(SESSION)
    for number in range(5):
        before = (path / handover.INCOMING_NAME).read_bytes()
        state = bytes([number + 1]) * 1000
        files.stage(state)
        after = (path / handover.INCOMING_NAME).read_bytes()
        if number:
            assert bytes([number]) * 1000 in before
            assert bytes([number]) * 1000 in after
        assert state in after


def test_state_that_is_too_large_is_refused(files: Handover) -> None:
    files.prepare_to_take(SESSION)
    with pytest.raises(VtpmdError, match="too large"):
        files.stage(bytes(handover.SLOT_BYTES))
