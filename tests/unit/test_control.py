"""The control channel's codec: requests in pieces and in excess, limits, errors, responses.

What a read may bring is checked against a model in tests/fuzz/fuzz_control.py; here are the cases
that a reader of docs/control-channel.md looks for, with bytes written out.
"""

import struct

import pytest

from vtpmd.wire import control
from vtpmd.wire.control import NEED_DATA, Command, ProtocolError, Receiver, Request
from vtpmd.wire.tpm import Result

# Bytes as QEMU and swtpm_ioctl send them, and the request that they are.
REQUESTS: dict[str, Request] = {
    "00000001": control.Bare(Command.GET_CAPABILITY),
    "00000002 00000001": control.Init(1),
    "00000003": control.Bare(Command.SHUTDOWN),
    "00000004": control.Bare(Command.GET_TPMESTABLISHED),
    "00000005 03": control.SetLocality(3),
    "00000005 03000000": control.SetLocality(3),
    "00000006": control.Bare(Command.HASH_START),
    "00000007 00000003 616263": control.HashData(b"abc"),
    "00000007 00000000": control.HashData(b""),
    "00000008": control.Bare(Command.HASH_END),
    "00000009": control.Bare(Command.CANCEL_TPM_CMD),
    "0000000a": control.Bare(Command.STORE_VOLATILE),
    "0000000b 04000000": control.ResetEstablished(4),
    "0000000c 00000001 00000002 00000003": control.GetStateBlob(1, 2, 3),
    "0000000d 00000002 00000001 00000003 616263": control.SetStateBlob(2, 1, b"abc"),
    "0000000d 00000000 00000003 00000000": control.SetStateBlob(0, 3, b""),
    "0000000e": control.Bare(Command.STOP),
    "0000000f": control.Bare(Command.GET_CONFIG),
    "00000010": control.Bare(Command.SET_DATAFD),
    "00000011 00000c00": control.SetBufferSize(3072),
    "00000012 0000000000000007 0000000a 00000000": control.GetInfo(7, 10),
    "00000013 0000012c": control.LockStorage(300),
}
INCOMPLETE_AFTER_NUMBER = {
    Command(int(sent[:8], 16)) for sent in REQUESTS if len(bytes.fromhex(sent)) > 4
}
REFUSES_EXCESS = {
    Command.INIT,
    Command.SHUTDOWN,
    Command.GET_TPMESTABLISHED,
    Command.HASH_START,
    Command.HASH_DATA,
    Command.HASH_END,
    Command.CANCEL_TPM_CMD,
    Command.STORE_VOLATILE,
    Command.SET_STATEBLOB,
    Command.STOP,
    Command.GET_CONFIG,
}


def event_of(*reads: bytes) -> object:
    """Return what a fresh receiver makes of some reads; all but the last must leave it waiting."""
    receiver = Receiver()
    for read in reads[:-1]:
        receiver.receive_data(read)
        assert receiver.next_event() is NEED_DATA
    receiver.receive_data(reads[-1])
    return receiver.next_event()


def error_of(data: bytes) -> ProtocolError:
    """Return the error that one read is."""
    event = event_of(data)
    assert isinstance(event, ProtocolError)
    return event


@pytest.mark.parametrize("sent", REQUESTS)
def test_request_is_parsed(sent: str) -> None:
    event = event_of(bytes.fromhex(sent))
    assert event == REQUESTS[sent]
    assert type(event) is type(REQUESTS[sent])


def test_every_command_has_a_request() -> None:
    assert {request.command for request in REQUESTS.values()} == set(Command)


@pytest.mark.parametrize("sent", REQUESTS)
def test_request_may_come_byte_by_byte(sent: str) -> None:
    # A locality is complete after one byte: what QEMU sends beyond it is excess.
    data = bytes.fromhex(sent)[:5] if "03000000" in sent or "04000000" in sent else None
    data = data or bytes.fromhex(sent)
    assert event_of(*(bytes([byte]) for byte in data)) == REQUESTS[sent]


@pytest.mark.parametrize("command", INCOMPLETE_AFTER_NUMBER, ids=lambda command: command.name)
def test_command_without_its_body_is_not_complete(command: Command) -> None:
    assert event_of(struct.pack(">I", command)) is NEED_DATA


@pytest.mark.parametrize("sent", REQUESTS)
def test_excess_is_refused_or_dropped_as_swtpm_does(sent: str) -> None:
    request = REQUESTS[sent]
    event = event_of(bytes.fromhex(sent) + b"\0")
    if request.command in REFUSES_EXCESS:
        assert isinstance(event, ProtocolError)
        assert (event.result, event.close) == (Result.BAD_PARAMETER, False)
    else:
        assert event == request


def test_excess_is_not_the_next_command() -> None:
    receiver = Receiver()
    receiver.receive_data(struct.pack(">II", Command.GET_CAPABILITY, Command.STOP))
    assert receiver.next_event() == control.Bare(Command.GET_CAPABILITY)
    assert receiver.next_event() is NEED_DATA
    receiver.receive_data(struct.pack(">I", Command.GET_CONFIG))
    assert receiver.next_event() == control.Bare(Command.GET_CONFIG)


@pytest.mark.parametrize("number", [0, 20, 0x61616161, 0xFFFFFFFF])
def test_unknown_command_is_refused_and_the_next_understood(number: int) -> None:
    receiver = Receiver()
    receiver.receive_data(struct.pack(">I", number) + bytes(100))
    error = receiver.next_event()
    assert isinstance(error, ProtocolError)
    assert (error.number, error.result, error.close) == (number, Result.BAD_ORDINAL, False)
    receiver.receive_data(struct.pack(">I", Command.STOP))
    assert receiver.next_event() == control.Bare(Command.STOP)


@pytest.mark.parametrize(
    ("prefix", "limit"),
    [
        (struct.pack(">I", Command.HASH_DATA), control.HASH_DATA_BYTES_MAX),
        (struct.pack(">III", Command.SET_STATEBLOB, 0, 1), control.BLOB_BYTES_MAX),
    ],
    ids=["HASH_DATA", "SET_STATEBLOB"],
)
def test_announced_length_may_reach_its_limit_and_no_further(prefix: bytes, limit: int) -> None:
    event = event_of(prefix + struct.pack(">I", limit), bytes(limit - 1), b"x")
    assert isinstance(event, control.HashData | control.SetStateBlob)
    assert (event.data if isinstance(event, control.HashData) else event.blob)[-2:] == b"\0x"
    for length in (limit + 1, 0xFFFFFFFF):
        error = error_of(prefix + struct.pack(">I", length))
        assert (error.result, error.close) == (Result.BAD_PARAMETER, True)


def test_after_a_length_past_the_limit_nothing_is_understood() -> None:
    receiver = Receiver()
    receiver.receive_data(struct.pack(">II", Command.HASH_DATA, 0xFFFFFFFF))
    error = receiver.next_event()
    receiver.receive_data(struct.pack(">I", Command.STOP))
    assert receiver.next_event() is error
    assert receiver.buffered_bytes == 0


def test_requests_of_different_commands_differ() -> None:
    assert len(set(REQUESTS.values())) == len(REQUESTS) - 1  # a locality in one byte and in four
    same_fields: list[Request] = [control.Init(0), control.SetBufferSize(0)]
    assert same_fields[0] != same_fields[1]


def test_a_blob_does_not_show_in_the_request_that_carries_it() -> None:
    request = control.SetStateBlob(0, 1, b"secret")
    assert "secret" not in f"{request} {request!r}"


def test_responses() -> None:
    assert control.encode_result() == bytes(4)
    assert control.encode_capability(0x1FFFF) == bytes.fromhex("00000000 0001ffff")
    assert control.encode_established(True) == bytes.fromhex("00000000 01000000")
    assert control.encode_config(2) == bytes.fromhex("00000000 00000002")
    assert control.encode_buffer_size(3000, 2808, 4096) == bytes.fromhex(
        "00000000 00000bb8 00000af8 00001000"
    )


@pytest.mark.parametrize("command", Command, ids=lambda command: command.name)
def test_error_is_as_long_as_clients_read(command: Command) -> None:
    # QEMU 7.2 reads these two whole, and the others' result first or alone.
    sizes = {Command.GET_TPMESTABLISHED: 8, Command.GET_STATEBLOB: 16}
    error = control.encode_error(command, Result.FAIL)
    assert error == b"\0\0\0\x09" + bytes(sizes.get(command, 4) - 4)


def test_error_for_an_unknown_command() -> None:
    assert control.encode_error(20, Result.BAD_ORDINAL) == b"\0\0\0\x0a"


def test_state_blob_is_given_from_its_offset_to_its_end() -> None:
    header = "00000000 00000000 {0:08x} {0:08x}"
    assert control.encode_state_blob(b"abcd", 0) == bytes.fromhex(header.format(4)) + b"abcd"
    assert control.encode_state_blob(b"abcd", 3) == bytes.fromhex(header.format(1)) + b"d"
    for offset in (4, 5, 0xFFFFFFFF):
        assert control.encode_state_blob(b"abcd", offset) == bytes.fromhex(header.format(0))


def test_info_is_given_in_pieces_with_a_nul_at_its_end() -> None:
    text = bytes(range(1, 101)) * 40
    first = control.encode_info(text, 0)
    assert first[:12] == struct.pack(">III", 0, 4001, control.INFO_BYTES_MAX)
    second = control.encode_info(text, control.INFO_BYTES_MAX)
    assert second[:12] == struct.pack(">III", 0, 4001, 4001 - control.INFO_BYTES_MAX)
    assert first[12:] + second[12:] == text + b"\0"
    for offset in (4000, 4001, 0xFFFFFFFF):
        assert control.encode_info(text, offset) == b"\0\0\0\x03"
