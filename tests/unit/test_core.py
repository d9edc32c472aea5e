"""What Python says of the engine link is what C says."""

import sys
from enum import IntEnum, IntFlag

import pytest

from vtpmd import core
from vtpmd._core import lib
from vtpmd.wire.control import BLOB_BYTES_MAX, StateType

PREFIXES: dict[str, type[IntEnum] | type[IntFlag]] = {
    "LINK_INIT_": core.LinkInit,
    "LINK_RETIRE_": core.LinkRetire,
    "LINK_LOCKED_": core.LinkLocked,
    "LINK_FD_": core.LinkDescriptor,
    "LINK_STATE_": StateType,
}
NO_OPERATIONS = (*PREFIXES, "LINK_PAYLOAD_")


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


@pytest.mark.parametrize("length", [16, 32])
def test_keys_are_packed_as_c_declares_them(length: int) -> None:
    """struct link_keys: a length, room for the longest key, the secret."""
    packed = core.pack_link_keys(b"k" * length, b"s" * 32)
    assert packed[:4] == length.to_bytes(4, sys.byteorder)
    assert packed[4:] == (b"k" * length).ljust(32, b"\0") + b"s" * 32


@pytest.mark.parametrize(("key_bytes", "secret_bytes"), [(0, 32), (15, 32), (33, 32), (16, 31)])
def test_what_cannot_be_keys_is_not_packed(key_bytes: int, secret_bytes: int) -> None:
    with pytest.raises(ValueError, match="16 or 32 bytes"):
        core.pack_link_keys(bytes(key_bytes), bytes(secret_bytes))


def test_an_anchor_is_packed_as_c_declares_it() -> None:
    """struct link_anchor."""
    packed = core.pack_link_anchor(b"i" * 16, 3, 7, b"d" * 32)
    numbers = b"".join(number.to_bytes(8, sys.byteorder) for number in (3, 7))
    assert packed == numbers + b"i" * 16 + b"d" * 32
    with pytest.raises(ValueError, match="16 bytes"):
        core.pack_link_anchor(bytes(15), 3, 7, bytes(32))
