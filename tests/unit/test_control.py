"""The engine's codec of the control channel: requests in pieces and in excess, limits, answers.

What a read may bring is checked against the document's tables in tests/property; here are the cases
that a reader of docs/control-channel.md looks for, with bytes written out.
"""

import struct

import pytest

from tests.support.control_codec import RUNNING, STOPPED, Codec, asked
from vtpmd._core import lib

NEED_DATA: int = lib.CONTROL_NEED_DATA
REQUEST: int = lib.CONTROL_REQUEST
REFUSED: int = lib.CONTROL_REFUSED
CLOSED: int = lib.CONTROL_CLOSED
INIT, HASH_DATA, SET_STATEBLOB, STOP, GET_CONFIG, SET_DATAFD = 2, 7, 13, 14, 15, 16
SUCCESS, BAD_PARAMETER, FAIL, BAD_ORDINAL = 0, 3, 9, 10

# Bytes as QEMU and swtpm_ioctl send them, and what they say beside the command's number.
REQUESTS: dict[str, dict[str, int | bytes]] = {
    "00000001": {},
    "00000002 00000001": {"flags": 1},
    "00000003": {},
    "00000004": {},
    "00000005 03": {"locality": 3},
    "00000005 03000000": {"locality": 3},
    "00000006": {},
    "00000007 00000003 616263": {"data_bytes": 3, "data": b"abc"},
    "00000007 00000000": {},
    "00000008": {},
    "00000009": {},
    "0000000a": {},
    "0000000b 04000000": {"locality": 4},
    "0000000c 00000001 00000002 00000003": {"flags": 1, "type": 2, "offset": 3},
    "0000000d 00000002 00000001 00000003 616263": {
        "flags": 2,
        "type": 1,
        "data_bytes": 3,
        "data": b"abc",
    },
    "0000000d 00000000 00000003 00000000": {"type": 3},
    "0000000e": {},
    "0000000f": {},
    "00000010": {},
    "00000011 00000c00": {"wanted_bytes": 3072},
    "00000012 0000000000000007 0000000a 00000000": {"flags": 7, "offset": 10},
    "00000013 0000012c": {"retries": 300},
}
NUMBERS = sorted({int(sent[:8], 16) for sent in REQUESTS})
WITH_BODY = sorted({int(sent[:8], 16) for sent in REQUESTS if " " in sent})
REFUSE_EXCESS = {2, 3, 4, 6, 7, 8, 9, 10, 13, 14, 15}


def power_for(number: int) -> int:
    """Return a power in which a command is carried out."""
    return STOPPED if number in (SET_STATEBLOB, 17) else RUNNING


def verdict_on(codec: Codec, data: bytes) -> int:
    """Take a read for a TPM that has the power which its command needs."""
    return codec.receive(data, power_for(int.from_bytes(data[:4], "big")))


def assert_says(codec: Codec, verdict: int, sent: str) -> None:
    """Check what has come, whole. SET_DATAFD lacks its descriptor (tests/c/test_control.c)."""
    number = int(sent[:8], 16)
    assert codec.fields() == {"number": number} | REQUESTS[sent]
    assert verdict == (REFUSED if number == SET_DATAFD else REQUEST)


@pytest.mark.parametrize("sent", REQUESTS)
def test_request_is_parsed(sent: str) -> None:
    codec = Codec()
    assert_says(codec, verdict_on(codec, bytes.fromhex(sent)), sent)


def test_every_command_has_a_request() -> None:
    assert list(range(1, lib.CONTROL_N_NUMBERS)) == NUMBERS


@pytest.mark.parametrize("sent", REQUESTS)
def test_request_may_come_byte_by_byte(sent: str) -> None:
    data = bytes.fromhex(sent)
    if "locality" in REQUESTS[sent]:
        data = data[:5]  # what QEMU sends beyond it is excess
    codec, power = Codec(), power_for(int(sent[:8], 16))
    for byte in data[:-1]:
        assert codec.receive(bytes([byte]), power) == NEED_DATA
    assert_says(codec, codec.receive(data[-1:], power), sent)


@pytest.mark.parametrize("number", WITH_BODY)
def test_command_without_its_body_is_not_complete(number: int) -> None:
    assert verdict_on(Codec(), struct.pack(">I", number)) == NEED_DATA


@pytest.mark.parametrize("sent", REQUESTS)
def test_excess_is_refused_or_dropped_as_swtpm_does(sent: str) -> None:
    codec = Codec()
    verdict = verdict_on(codec, bytes.fromhex(sent) + b"\0")
    if int(sent[:8], 16) not in REFUSE_EXCESS:
        assert_says(codec, verdict, sent)
        return
    assert (verdict, codec.result) == (REFUSED, BAD_PARAMETER)
    codec.sent()
    assert codec.receive(struct.pack(">I", STOP)) == REQUEST


def test_excess_is_not_the_next_command() -> None:
    codec = asked(struct.pack(">II", 1, STOP))
    codec.answer("capability", True)
    assert codec.receive(b"") == NEED_DATA
    assert codec.receive(struct.pack(">I", GET_CONFIG)) == REQUEST
    assert codec.fields() == {"number": GET_CONFIG}


@pytest.mark.parametrize("number", [0, 20, 0x61616161, 0xFFFFFFFF])
def test_unknown_command_is_refused_and_the_next_understood(number: int) -> None:
    codec = Codec()
    assert codec.receive(struct.pack(">I", number) + bytes(100)) == REFUSED
    assert codec.result == BAD_ORDINAL
    assert codec.sent() == bytes.fromhex("0000000a")
    assert codec.receive(struct.pack(">I", STOP)) == REQUEST


@pytest.mark.parametrize(
    ("prefix", "limit"),
    [
        (struct.pack(">I", HASH_DATA), 64 * 1024),
        (struct.pack(">III", SET_STATEBLOB, 0, 1), 512 * 1024),
    ],
    ids=["HASH_DATA", "SET_STATEBLOB"],
)
def test_announced_length_may_reach_its_limit_and_no_further(prefix: bytes, limit: int) -> None:
    codec, power = Codec(), power_for(int.from_bytes(prefix[:4], "big"))
    assert codec.receive(prefix + struct.pack(">I", limit), power) == NEED_DATA
    assert codec.receive(bytes(limit - 1), power) == NEED_DATA
    assert codec.receive(b"x", power) == REQUEST
    assert codec.fields()["data"] == bytes(limit - 1) + b"x"
    for length in (limit + 1, 0xFFFFFFFF):
        codec = Codec()
        assert codec.receive(prefix + struct.pack(">I", length), power) == REFUSED
        assert codec.sent() == bytes.fromhex("00000003")
        assert codec.receive(struct.pack(">I", STOP)) == CLOSED
        assert codec.receive(b"") == CLOSED


@pytest.mark.parametrize(
    ("sent", "power", "name", "values", "answer"),
    [
        ("00000001", STOPPED, "capability", [True], "00000000 0001ffff"),
        ("00000001", STOPPED, "capability", [False], "00000000 00017fff"),
        ("00000004", RUNNING, "established", [True], "00000000 01000000"),
        ("00000004", RUNNING, "established", [False], "00000000 00000000"),
        ("0000000e", RUNNING, "result", [SUCCESS], "00000000"),
        ("0000000f", STOPPED, "config", [2], "00000000 00000002"),
        (
            *("00000011 00000bb8", STOPPED, "buffer_size", [3000, 2808, 4096]),
            "00000000 00000bb8 00000af8 00001000",
        ),
    ],
)
def test_response(sent: str, power: int, name: str, values: list[int], answer: str) -> None:
    codec = asked(bytes.fromhex(sent), power)
    assert codec.answer(name, *values) == bytes.fromhex(answer)


@pytest.mark.parametrize("sent", REQUESTS)
def test_error_is_as_long_as_clients_read(sent: str) -> None:
    # QEMU 7.2 reads these two whole, and the others' result first or alone.
    sizes = {4: 8, 12: 16}
    codec, number = Codec(), int(sent[:8], 16)
    if verdict_on(codec, bytes.fromhex(sent)) == REQUEST:
        assert codec.answer("result", FAIL) == b"\0\0\0\x09" + bytes(sizes.get(number, 4) - 4)
    else:
        assert (number, codec.sent()) == (SET_DATAFD, b"\0\0\0\x03")


def test_state_blob_is_given_from_its_offset_to_its_end() -> None:
    header = "00000000 00000000 {0:08x} {0:08x}"

    def given_from(offset: int) -> bytes:
        return asked(struct.pack(">IIII", 12, 1, 1, offset), RUNNING).answer_state_blob(b"abcd")

    assert given_from(0) == bytes.fromhex(header.format(4)) + b"abcd"
    assert given_from(3) == bytes.fromhex(header.format(1)) + b"d"
    for offset in (4, 5, 0xFFFFFFFF):
        assert given_from(offset) == bytes.fromhex(header.format(0))


def test_info_is_given_in_pieces_with_a_nul_at_its_end() -> None:
    text = bytes(range(1, 101)) * 40

    def given_from(offset: int) -> bytes:
        return asked(struct.pack(">IQII", 18, 7, offset, 0)).answer_info(text)

    first, second = given_from(0), given_from(3072)
    assert first[:12] == bytes.fromhex("00000000 00000fa1 00000c00")
    assert second[:12] == bytes.fromhex("00000000 00000fa1 000003a1")
    assert first[12:] + second[12:] == text + b"\0"
    for offset in (4000, 4001, 0xFFFFFFFF):
        assert given_from(offset) == b"\0\0\0\x03"
