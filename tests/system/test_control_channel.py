"""The control channel of a real vtpmd and a real swtpm: the same bytes, compared answer by answer.

Where the two differ, DIFFERENCES has both answers and docs/control-channel.md the reason. Then what
a hostile client sends: vtpmd refuses it, keeps no descriptor of it, and serves the next client.
"""

import random
import socket
import struct
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import pytest

from tests.harness import versions
from tests.harness.lab import Lab
from tests.support.emulator_client import Control, ControlClient
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.wire import swtpm_format

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
BOTH = pytest.mark.parametrize("kind", EmulatorKind)

CLOSED = "closed"
BLOB_BYTES_MAX = 512 * 1024
HASH_DATA_BYTES_MAX = 64 * 1024
HOSTILE_MESSAGES = 1000
STARTUP = bytes.fromhex("80010000000c000001440000")  # TPM2_Startup(TPM_SU_CLEAR)


class State(StrEnum):
    """What the TPM is doing when it is asked."""

    STOPPED = "stopped"
    RUNNING = "running"


STATES = pytest.mark.parametrize("state", State)


def message(number: int, body: str = "") -> bytes:
    """Write a command; its body in hexadecimal digits."""
    return struct.pack(">I", number) + bytes.fromhex(body)


EXCESS_REFUSED = [
    Control.GET_TPMESTABLISHED,
    Control.HASH_START,
    Control.HASH_END,
    Control.CANCEL_TPM_CMD,
    Control.STORE_VOLATILE,
]
WITH_BODY = [
    Control.INIT,
    Control.SET_LOCALITY,
    Control.HASH_DATA,
    Control.RESET_TPMESTABLISHED,
    Control.GET_STATEBLOB,
    Control.SET_STATEBLOB,
    Control.SET_BUFFERSIZE,
    Control.GET_INFO,
    Control.LOCK_STORAGE,
]

# None of them changes the state, so that each finds the one that the test has brought about.
MESSAGES = {
    "capability": message(1),
    "capability and excess": message(1, "00"),
    "init and excess": message(2, "00000000 00"),
    "shutdown and excess": message(3, "00"),
    "established": message(4),
    "locality 0": message(5, "00"),
    "locality 4, as QEMU sends it": message(5, "04000000"),
    "locality 5": message(5, "05"),
    "locality 255 and excess": message(5, "ff 00000000"),
    "hash start": message(6),
    "hash data": message(7, "00000003 616263"),
    "hash data, none": message(7, "00000000"),
    "hash end": message(8),
    "hash end again": message(8),
    "cancel": message(9),
    "store volatile": message(10),
    **{f"reset established, locality {n}": message(11, f"{n:02x}000000") for n in range(6)},
    "permanent": message(12, "00000001 00000001 00000000"),
    "permanent and excess": message(12, "00000001 00000001 00000000 00"),
    "permanent, flags of no meaning": message(12, "ffffffff 00000001 00000000"),
    "permanent from 20": message(12, "00000001 00000001 00000014"),
    "permanent past its end": message(12, "00000001 00000001 7fffffff"),
    "volatile": message(12, "00000001 00000002 00000000"),
    "savestate that is not there": message(12, "00000001 00000003 00000000"),
    "blob of type 0": message(12, "00000001 00000000 00000000"),
    "blob of type 4": message(12, "00000001 00000004 00000000"),
    "set a blob that is none": message(13, "00000000 00000001 00000003 616263"),
    "set a blob of type 9": message(13, "00000000 00000009 00000003 616263"),
    "set an empty volatile": message(13, "00000000 00000002 00000000"),
    "set a blob and excess": message(13, "00000000 00000002 00000000 00"),
    "set a blob with an encrypted flag": message(
        13, "00000002 00000001 00000010 0201000a0004 00000010 0004 00000000"
    ),
    "stop and excess": message(14, "00"),
    "configuration": message(15),
    "configuration and excess": message(15, "00"),
    "data socket, none": message(16),
    "buffer size": message(17, "00000000"),
    "buffer size 1": message(17, "00000001"),
    "buffer size 99999 and excess": message(17, "0001869f 00"),
    "info": message(18, "0000000000000007 00000000 00000000"),
    "info, no flag": message(18, "0000000000000000 00000000 00000000"),
    "info from 10": message(18, "0000000000000007 0000000a 00000000"),
    "info past its end": message(18, "0000000000000007 00000fff 00000000"),
    "info and excess": message(18, "0000000000000007 00000000 00000000 00"),
    "lock storage": message(19, "00000001"),
    "command 0": message(0),
    "command 20 and excess": message(20, "00" * 100),
    "command 0xffffffff": message(0xFFFFFFFF),
    **{f"{command.name} and excess": message(command, "00") for command in EXCESS_REFUSED},
    **{f"{command.name} without its body": message(command) for command in WITH_BODY},
    "half a command": b"\0\0",
}

OK, BAD_PARAMETER, BAD_ORDINAL, KEY_NOT_FOUND = "00000000", "00000003", "0000000a", "0000000d"

OF_A_BLOB = [name for name, sent in MESSAGES.items() if sent[:4] == message(12) != sent]

ANSWERED = versions.swtpm()
# swtpm's answer, and vtpmd's. An error of vtpmd's to GET_TPMESTABLISHED or GET_STATEBLOB is as long
# as QEMU reads.
DIFFERENCES: dict[State | None, dict[str, tuple[str, ...]]] = {
    None: {
        "capability": (ANSWERED.capabilities, "000000000001ffff"),
        "capability and excess": (ANSWERED.capabilities, "000000000001ffff"),
        "lock storage": (ANSWERED.lock_storage, OK),
        "LOCK_STORAGE without its body": (ANSWERED.lock_storage_without_body, CLOSED),
        "SET_BUFFERSIZE without its body": (BAD_PARAMETER, CLOSED),
        "GET_INFO without its body": (BAD_PARAMETER, CLOSED),
    },
    State.STOPPED: {
        **dict.fromkeys(OF_A_BLOB, (BAD_ORDINAL, BAD_ORDINAL + "00" * 12)),
        "established": (BAD_ORDINAL, BAD_ORDINAL + "00" * 4),
        **{f"{c.name} and excess": (BAD_ORDINAL, BAD_PARAMETER) for c in EXCESS_REFUSED},
        "GET_TPMESTABLISHED and excess": (BAD_ORDINAL, BAD_PARAMETER + "00" * 4),
    },
    State.RUNNING: {
        "blob of type 0": (ANSWERED.unknown_blob + "00" * 12, BAD_PARAMETER + "00" * 12),
        "blob of type 4": (ANSWERED.unknown_blob + "00" * 12, BAD_PARAMETER + "00" * 12),
        "set a blob and excess": (BAD_ORDINAL, BAD_PARAMETER),
        "GET_TPMESTABLISHED and excess": (BAD_PARAMETER, BAD_PARAMETER + "00" * 4),
    },
}


def exchange(client: ControlClient, data: bytes, descriptors: Sequence[int] = ()) -> str:
    """Send bytes; return the answer in hexadecimal digits, or CLOSED."""
    socket.send_fds(client.socket, [data], descriptors)
    try:
        return client.socket.recv(1 << 20).hex() or CLOSED
    except ConnectionError:
        return CLOSED


def assert_serves(emulator: Emulator) -> None:
    """Check that the next client gets its answer."""
    with ControlClient(emulator.control_path) as client:
        assert client.get_config() == 0


def bring_about(emulator: Emulator, state: State) -> None:
    """Power the TPM on or off."""
    with ControlClient(emulator.control_path) as client:
        client.stop()
        if state is State.RUNNING:
            client.init()


def answers(emulator: Emulator) -> dict[str, str]:
    """Send every message; return the answers. After one that closes a new client goes on."""
    found = {}
    client = ControlClient(emulator.control_path)
    for name, data in MESSAGES.items():
        found[name] = exchange(client, data)
        if found[name] == CLOSED:
            client.close()
            client = ControlClient(emulator.control_path)
    client.close()
    return found


def without_content(name: str, answer: str) -> str:
    """Leave out what is each TPM's own: the content of a blob, behind its 16-byte header."""
    return answer[:32] if name.startswith(("permanent", "volatile")) else answer


def without_lineage(name: str, answer: str) -> str:
    """Leave out of the lengths of a permanent blob what says which vTPM's it is."""
    if not name.startswith("permanent") or answer == CLOSED:
        return answer
    result, flags, *lengths = struct.unpack(">4I", bytes.fromhex(answer)[:16])
    if result or not any(lengths):
        return answer
    fields = (result, flags, *(length - swtpm_format.LINEAGE_BYTES for length in lengths))
    return struct.pack(">4I", *fields).hex() + answer[32:]


def different(pairs: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Leave out where both answer the same."""
    return {name: pair for name, pair in pairs.items() if len(set(pair)) > 1}


@STATES
def test_same_answers_as_swtpm(lab: Lab, state: State) -> None:
    found = {}
    for kind in (SWTPM, VTPMD):
        emulator = lab.emulator(kind)
        bring_about(emulator, state)
        found[kind] = answers(emulator)
    found[VTPMD] = {name: without_lineage(name, found[VTPMD][name]) for name in MESSAGES}
    pairs = {
        name: tuple(without_content(name, found[kind][name]) for kind in (SWTPM, VTPMD))
        for name in MESSAGES
    }
    expected = DIFFERENCES[None] | DIFFERENCES[state]
    assert different(pairs) == different(expected)  # some are as vtpmd's in a later swtpm


IN_PIECES = {
    "init": (State.STOPPED, [message(2), b"\0\0", b"\0\0"]),
    "number": (State.RUNNING, [b"\0", b"\0\0", b"\x0f"]),
    "hash data": (State.RUNNING, [message(7), message(10000), bytes(100), bytes(9900)]),
    "get a blob": (State.RUNNING, [message(12, "00000001"), message(3), message(0)]),
    "set a blob, as QEMU sends it": (
        State.STOPPED,
        [message(13, "00000000 00000002 0000000a"), bytes.fromhex("0201000a00040000000a")],
    ),
}


@pytest.mark.parametrize("name", IN_PIECES)
def test_a_message_in_pieces_is_answered_as_swtpm_answers(lab: Lab, name: str) -> None:
    state, pieces = IN_PIECES[name]
    found = []
    for kind in (SWTPM, VTPMD):
        emulator = lab.emulator(kind)
        bring_about(emulator, state)
        with ControlClient(emulator.control_path) as client:
            for piece in pieces[:-1]:
                client.socket.send(piece)
                time.sleep(0.02)  # so that it is read on its own
            found.append(exchange(client, pieces[-1]))
            assert client.get_config() == 0
    assert found[0] == found[1] != CLOSED


@BOTH
def test_the_next_client_is_served_after_a_body_that_never_came(
    lab: Lab, kind: EmulatorKind
) -> None:
    emulator = lab.emulator(kind)
    with (
        ControlClient(emulator.control_path) as client,
        ControlClient(emulator.control_path) as next,
    ):
        assert exchange(client, message(13, "00000000 00000001 00000064") + b"half") == CLOSED
        assert next.get_config() == 0


@STATES
@pytest.mark.parametrize(
    ("head", "limit", "at_limit"),
    [
        (message(7), HASH_DATA_BYTES_MAX, {State.STOPPED: BAD_ORDINAL, State.RUNNING: OK}),
        (
            message(13, "00000000 00000001"),
            BLOB_BYTES_MAX,
            {State.STOPPED: BAD_PARAMETER, State.RUNNING: BAD_ORDINAL},  # zeros are no blob
        ),
    ],
    ids=["HASH_DATA", "SET_STATEBLOB"],
)
def test_a_length_past_its_limit_is_refused_and_closes(
    lab: Lab, state: State, head: bytes, limit: int, at_limit: dict[State, str]
) -> None:
    vtpmd = lab.emulator(VTPMD)
    bring_about(vtpmd, state)
    with ControlClient(vtpmd.control_path) as client:
        client.socket.sendall(head + struct.pack(">I", limit) + bytes(limit))
        assert client.socket.recv(100).hex() == at_limit[state]
        assert client.get_config() == 0
    for length in (limit + 1, 0xFFFFFFFF):
        with ControlClient(vtpmd.control_path) as client:
            assert exchange(client, head + struct.pack(">I", length)) == BAD_PARAMETER
            assert client.socket.recv(1) == b""
    assert_serves(vtpmd)


def test_hash_data_and_excess_is_refused(lab: Lab) -> None:
    # swtpm 0.7.1 reads on for ever there.
    vtpmd = lab.emulator(VTPMD)
    for state in State:
        bring_about(vtpmd, state)
        with ControlClient(vtpmd.control_path) as client:
            assert exchange(client, message(7, "00000001 6162")) == BAD_PARAMETER
            assert client.get_config() == 0


@pytest.mark.parametrize(("kind", "answer"), [(SWTPM, OK), (VTPMD, "00000009")])
def test_a_guest_whose_blob_was_refused_starts_after_a_stop(
    lab: Lab, kind: EmulatorKind, answer: str
) -> None:
    emulator = lab.emulator(kind)
    incoming = message(2, "00000001")
    with ControlClient(emulator.control_path) as client:
        assert exchange(client, message(13, "00000000 00000001 00000003 616263")) == BAD_PARAMETER
        assert exchange(client, incoming) == answer
        client.stop()
        assert exchange(client, incoming) == OK


@BOTH
def test_a_second_data_socket_is_refused_while_the_first_is_open(
    lab: Lab, kind: EmulatorKind
) -> None:
    emulator = lab.emulator(kind)
    ours, theirs = socket.socketpair()
    with ControlClient(emulator.control_path) as client, ours, theirs:
        data = client.attach_data()
        assert exchange(client, message(16), [theirs.fileno()]) == "0000001f"
        # The first one is served all the same: before INIT with this error.
        assert data.transact(STARTUP)[6:] == b"\0\0\x01\x01"


def descriptors(emulator: Emulator) -> int:
    """Count the descriptors of the engine while it serves a client.

    An engine closes a data socket that hung up when it comes to read from it; here it has done so.
    """
    with ControlClient(emulator.control_path) as client:
        data = client.attach_data()
        assert len(data.transact(STARTUP)) == 10
        (engine,) = emulator.engines()
        return len(list(Path(f"/proc/{engine}/fd").iterdir()))


def hostile_message(random: random.Random) -> bytes:
    """Make a message up: known and unknown commands, bodies too short, too long, of any content."""
    number = random.choice([*Control, 0, 20, random.getrandbits(32)])
    body = random.randbytes(random.choice([0, 1, 3, 4, 5, 12, 13, 100]))
    if random.random() < 0.5:  # small numbers reach further
        body = bytes(byte & 1 for byte in body)
    if number == Control.SHUTDOWN:
        body += b"excess"
    return struct.pack(">I", number)[: random.choice([2, 4, 4, 4, 4])] + body


def send_hostile(emulator: Emulator, random: random.Random) -> None:
    """Be a client that sends a few messages with descriptors, reads or not, and leaves."""
    pair = socket.socketpair()
    with ControlClient(emulator.control_path) as client, pair[0], pair[1]:
        for _ in range(random.randint(1, 3)):
            fds = [pair[0].fileno(), pair[1].fileno()][: random.choice([0, 1, 1, 2])]
            try:
                socket.send_fds(
                    client.socket, [hostile_message(random)], fds * random.choice([1, 9])
                )
                if random.random() < 0.5:
                    client.socket.settimeout(0.02)
                    client.socket.recv(1 << 20)
            except (TimeoutError, ConnectionError):
                return


def test_a_thousand_hostile_messages_leave_nothing_behind(lab: Lab) -> None:
    vtpmd = lab.emulator(VTPMD)
    before_any = descriptors(vtpmd)
    chance = random.Random(1)
    for _ in range(HOSTILE_MESSAGES):
        send_hostile(vtpmd, chance)
    assert descriptors(vtpmd) == before_any
    with ControlClient(vtpmd.control_path) as client:
        data = client.attach_data()
        client.init()
        assert data.transact(STARTUP)[6:] == bytes(4)
    assert vtpmd.stop() == 0
