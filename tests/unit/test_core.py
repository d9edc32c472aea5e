"""What Python says of the engine link is what C says."""

import struct
import sys
from enum import IntEnum, IntFlag

import pytest

from vtpmd import core
from vtpmd._core import lib
from vtpmd.core.boot import LinkControl, LinkData, LinkEnd, LinkSharing, LinkStarting
from vtpmd.core.link import (
    LINK_DIGESTS_BYTES,
    LinkAdmit,
    LinkAskedInit,
    LinkCapture,
    LinkCapturing,
    LinkCondition,
    LinkCopy,
    LinkCustody,
    LinkQuestion,
    LinkRecorded,
    LinkShutdown,
    LinkStage,
    TailRefusal,
    link_held,
    link_said,
    pack_link_lineage,
    unpack_link_copy,
    unpack_link_digests,
    unpack_link_lineage,
    unpack_link_recorded,
)
from vtpmd.core.program import LinkInquiry
from vtpmd.store.owner import SECTOR_BYTES
from vtpmd.wire.swtpm_format import BLOB_BYTES_MAX
from vtpmd.wire.tpm import StateType

PREFIXES: dict[str, type[IntEnum] | type[IntFlag]] = {
    "LINK_ADMIT_": LinkAdmit,
    "LINK_STAGE_": LinkStage,
    "LINK_CAPTURE_": LinkCapture,
    "LINK_CAPTURING_": LinkCapturing,
    "LINK_SHARING_": LinkSharing,
    "LINK_STARTING_": LinkStarting,
    "LINK_SHUTDOWN_": LinkShutdown,
    "LINK_CONDITION_": LinkCondition,
    "LINK_ASKED_": LinkAskedInit,
    "LINK_FD_": core.LinkDescriptor,
    "LINK_KEY_": core.LinkKey,
    "LINK_CONTROL_": LinkControl,
    "LINK_DATA_": LinkData,
    "LINK_END_WITH_": LinkEnd,
    "LINK_INQUIRY_": LinkInquiry,
    "LINK_STATE_": StateType,
    "TPM_": LinkCustody,
    "LINK_TAIL_": TailRefusal,
}
QUESTIONS = ("LINK_ASK_", "LINK_TELL_")
LIMITS = ("LINK_PAYLOAD_", "LINK_SECTOR_", "LINK_MESSAGE_TIMEOUT_", "LINK_END_TIMEOUT_")
FIELDS = ("LINK_SAID_", "LINK_BLOB_", "LINK_CUSTODY_", "LINK_SHARED", "LINK_VERSION")
NO_OPERATIONS = (*PREFIXES, *QUESTIONS, *LIMITS, *FIELDS)


def constants_of_c(prefix: str) -> dict[str, int]:
    return {
        name.removeprefix(prefix): getattr(lib, name)
        for name in dir(lib)
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("prefix", PREFIXES)
def test_enums_have_every_constant_of_c(prefix: str) -> None:
    """No constant is missing, and none has another value."""
    assert {member.name: member.value for member in PREFIXES[prefix]} == constants_of_c(prefix)


def test_every_question_of_c_is_known() -> None:
    """Nor what it asks, and says unasked."""
    questions = {
        name: value
        for name, value in constants_of_c("LINK_").items()
        if f"LINK_{name}".startswith(QUESTIONS)
    }
    assert {member.name: member.value for member in LinkQuestion} == questions


def test_every_operation_of_c_is_known() -> None:
    """A new operation of the engine cannot be forgotten here."""
    operations = {
        name: value
        for name, value in constants_of_c("LINK_").items()
        if not f"LINK_{name}".startswith(NO_OPERATIONS)
    }
    assert {member.name: member.value for member in core.LinkOperation} == operations


def test_a_blob_of_the_control_channel_fits_the_link() -> None:
    """What a client may send, the engine may be sent."""
    assert core.LINK_PAYLOAD_BYTES_MAX >= BLOB_BYTES_MAX
    assert lib.LINK_SECTOR_BYTES == SECTOR_BYTES


def test_header_round_trip() -> None:
    """A header comes back as it was, also with the largest numbers."""
    for header in (
        core.LinkHeader(1),
        core.LinkHeader(1, 2, 3, 4),
        core.LinkHeader(*[2**32 - 1] * 4),
    ):
        assert core.unpack_link_header(core.pack_link_header(header)) == header


def test_headers_that_are_none_are_refused() -> None:
    """A number that is no u32, and bytes of another length."""
    with pytest.raises(OverflowError):
        core.pack_link_header(core.LinkHeader(-1))
    with pytest.raises(OverflowError):
        core.pack_link_header(core.LinkHeader(1, payload_bytes=2**32))
    for length in (0, core.LINK_HEADER_BYTES - 1, core.LINK_HEADER_BYTES + 1):
        with pytest.raises(ValueError, match="link header"):
            core.unpack_link_header(bytes(length))


@pytest.mark.parametrize("said", LinkShutdown)
def test_what_the_guest_said_of_power_is_found_in_an_argument(said: LinkShutdown) -> None:
    """A held start brings what a capture has told, beside the other bits of either."""
    argument = link_held(said)
    assert link_said(argument) is said
    assert argument & 0xFF == LinkStage.HELD


def test_a_kind_of_shutdown_that_the_engine_never_says_is_refused() -> None:
    with pytest.raises(ValueError, match="3"):
        link_said(3 << 8)


def test_digests_of_a_start_are_taken_as_c_declares_them() -> None:
    """struct link_digests."""
    digests = unpack_link_digests(b"p" * 32 + b"v" * 32)
    assert digests == (b"p" * 32, b"v" * 32)
    with pytest.raises(ValueError, match="bytes, not"):
        unpack_link_digests(bytes(LINK_DIGESTS_BYTES - 1))


def test_news_of_the_record_have_one_length() -> None:
    told = LinkRecorded(error=5, took_us=700)
    assert unpack_link_recorded(struct.pack("=II", *told)) == told
    for length in (0, 7, 9):
        with pytest.raises(ValueError, match="TELL_RECORDED"):
            unpack_link_recorded(bytes(length))


@pytest.mark.parametrize("secret", [None, b"s" * 32])
def test_journal_settings_are_packed_as_c_declares_them(secret: bytes | None) -> None:
    """struct link_journal."""
    packed = core.pack_link_journal(b"i" * 16, 7, 5, secret)
    order = sys.byteorder
    assert packed[:8] == (7).to_bytes(8, order)
    assert packed[8:16] == (5).to_bytes(8, order)
    assert packed[16:20] == int(secret is not None).to_bytes(4, order)
    assert packed[20:24] == (1).to_bytes(4, order)
    assert packed[24:72] == b"i" * 16 + (secret or bytes(32))


def test_an_anchor_is_packed_as_c_declares_it() -> None:
    """struct link_anchor."""
    packed = core.pack_link_anchor(b"i" * 16, 3, 7, b"d" * 32)
    numbers = b"".join(number.to_bytes(8, sys.byteorder) for number in (3, 7))
    assert packed == numbers + b"i" * 16 + b"d" * 32


def test_what_has_another_size_is_not_packed() -> None:
    for identity, secret in [(15, 32), (17, 32), (16, 31), (16, 33)]:
        with pytest.raises(ValueError, match="bytes, not"):
            core.pack_link_journal(bytes(identity), 1, 1, bytes(secret))
        with pytest.raises(ValueError, match="bytes, not"):
            core.pack_link_anchor(bytes(identity), 1, 1, bytes(secret))
    for generation in (-1, core.GENERATION_MAX + 1):
        with pytest.raises(ValueError, match="are no generations"):
            core.pack_link_journal(bytes(16), generation)
        with pytest.raises(ValueError, match="is no generation"):
            pack_link_lineage(bytes(16), generation)
    with pytest.raises(ValueError, match="are no generations"):
        core.pack_link_journal(bytes(16), 1, 2)
    with pytest.raises(ValueError, match="bytes, not"):
        pack_link_lineage(bytes(15), 1)
    with pytest.raises(ValueError, match="bytes, not"):
        unpack_link_lineage(bytes(23))


def test_a_copy_of_states_is_as_long_as_it_says() -> None:
    lengths = b"".join(n.to_bytes(4, sys.byteorder) for n in (3, 2, 0, 0))
    packed = pack_link_lineage(b"i" * 16, 7) + lengths + b"perma"
    assert unpack_link_copy(packed) == LinkCopy(b"i" * 16, 7, b"per", b"ma", b"")
    for wrong in (packed[:-1], packed + b"x", packed[:39], b""):
        with pytest.raises(ValueError, match="answer to COPY"):
            unpack_link_copy(wrong)


def test_a_lineage_comes_back_as_it_was_packed() -> None:
    lineage = (b"i" * 16, 7)
    assert unpack_link_lineage(pack_link_lineage(*lineage)) == lineage
