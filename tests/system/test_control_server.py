"""The control channel's server: descriptors, time limits, failures; each client gets served.

What is checked after each misuse: no descriptor of the engine is left, and the next client gets its
answer. An engine serves alone, or beside a vtpmd that it asks: a vtpmd that is stopped keeps a
command under way for as long as a test needs.
"""

import array
import fcntl
import os
import re
import resource
import select
import signal
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.harness.lab import Lab
from tests.harness.system_calls import polls
from tests.support import tpm2
from tests.support.emulator_client import Blob, Control, ControlClient
from tests.support.tpm2 import Tpm
from vtpmd.core import LinkDescriptor
from vtpmd.testing.emulator import ATTACHED, EmulatorKind
from vtpmd.wire.swtpm_format import LINEAGE_BYTES

TIMEOUT_S = 30.0
POLL_S = 0.01
READ_BYTES_MAX = 64 * 1024
BLOB_BYTES_MAX = 512 * 1024
EXCESS_BYTES_MAX = 1024 * 1024
SO_SNDBUFFORCE = 32  # socket(7); Python has no name for it
NV_INDEX, NV_BYTES = 0x01500000, 2048

OK = bytes(4)
WAITING = "another client has connected to the control socket"
BAD_PARAMETER = bytes.fromhex("00000003")
FAIL = bytes.fromhex("00000009")
BAD_ORDINAL = bytes.fromhex("0000000a")


def command(number: int, *fields: int) -> bytes:
    return struct.pack(f">I{len(fields)}I", number, *fields)


ASK_FOR_BLOB = command(Control.GET_STATEBLOB, 1, Blob.VOLATILE, 0)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s, f"it never came that {what}"
        time.sleep(POLL_S)


class Server:
    """A vtpmd that serves the control channel."""

    def __init__(self, lab: Lab, *, is_alone: bool) -> None:
        options = [] if is_alone else ["--manage", str(lab.new_path("manage"))]
        emulator = lab.emulator(EmulatorKind.VTPMD, options=options)
        self.program = emulator.program
        self._path = emulator.control_path
        self.assert_serves()  # it is what it becomes
        (self.engine,) = emulator.engines()
        assert (self.engine == self.program.pid) == is_alone
        if not is_alone:
            wait_until(lambda: ATTACHED in self.program.output, "its vtpmd is attached")
        n_sockets = 2 if is_alone else 3  # those that listen, and vtpmd's
        wait_until(lambda: len(self.sockets()) == n_sockets, "it has no client any more")

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(TIMEOUT_S)
        client.connect(str(self._path))
        return client

    def client(self) -> ControlClient:
        return ControlClient(self._path, TIMEOUT_S)

    def assert_serves(self) -> None:
        with self.connect() as client:
            assert ask(client, command(Control.STOP)) == OK

    def descriptors(self) -> dict[str, str]:
        """Return the engine's descriptors, and what each of them is."""
        found = {}
        for entry in Path(f"/proc/{self.engine}/fd").iterdir():
            with suppress(FileNotFoundError):  # a client's, which was closed just now
                found[entry.name] = str(entry.readlink())
        return found

    def sockets(self) -> set[str]:
        return {what for what in self.descriptors().values() if what.startswith("socket:")}

    def waits_with_a_limit(self) -> bool:
        """Whether it waits for more of a command, or for a client to read, or for descriptors."""
        return any(poll.n_descriptors == 3 and poll.has_limit for poll in polls(self.engine))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the vtpmd beside the engine from answering what it is asked."""
        os.kill(self.program.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.program.pid, signal.SIGCONT)


@pytest.fixture(params=[True, False], ids=["alone", "beside"])
def server(lab: Lab, request: pytest.FixtureRequest) -> Server:
    return Server(lab, is_alone=request.param)


@pytest.fixture
def alone(lab: Lab) -> Server:
    return Server(lab, is_alone=True)


@pytest.fixture
def beside(lab: Lab) -> Server:
    return Server(lab, is_alone=False)


def send(client: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send bytes with one call, and descriptors with them: any number."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    client.sendmsg([data], ancillary if descriptors else [])


def ask(client: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> bytes:
    """Send a command; return what one read brings, empty when closed."""
    send(client, data, descriptors)
    return client.recv(READ_BYTES_MAX)


def receive_until_closed(client: socket.socket) -> bytes:
    """Return what comes before the server closes; a reset is a close."""
    received = bytearray()
    try:
        while piece := client.recv(READ_BYTES_MAX):
            received += piece
    except ConnectionError:
        pass
    return bytes(received)


def number_of_bytes(client: socket.socket, which: int) -> int:
    return int.from_bytes(fcntl.ioctl(client, which, bytes(4)), "little")


def is_read(client: socket.socket) -> bool:
    """Whether the server has read all that a client has sent."""
    return number_of_bytes(client, termios.TIOCOUTQ) == 0


def is_closed(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(0))


def ask_without_reading(server: Server, client: socket.socket) -> int:
    """Ask until an answer finds no room; return how long all answers are together."""
    assert ask(client, command(Control.INIT, 0)) == OK
    answer_bytes, asked_bytes = len(ask(client, ASK_FOR_BLOB)), 0

    def finds_no_room() -> bool:
        nonlocal asked_bytes
        if number_of_bytes(client, termios.FIONREAD) == asked_bytes:
            send(client, ASK_FOR_BLOB)
            asked_bytes += answer_bytes
        return server.waits_with_a_limit() or is_closed(client)

    wait_until(finds_no_room, "an answer finds no room")
    return asked_bytes


# -- commands


def test_one_connection_carries_many_commands(server: Server) -> None:
    with server.connect() as client:
        for _ in range(3):
            assert ask(client, command(Control.INIT, 0)) == OK
            assert ask(client, command(99)) == BAD_ORDINAL
            assert ask(client, command(Control.GET_TPMESTABLISHED)) == OK + bytes(4)


def test_a_command_may_come_in_pieces(server: Server) -> None:
    whole = command(Control.SET_BUFFERSIZE, 3000)
    with server.connect() as client:
        for byte in whole[:-1]:
            send(client, bytes([byte]))
            wait_until(lambda: is_read(client), "a byte is read")
        assert ask(client, whole[-1:])[:8] == OK + whole[4:]
        assert ask(client, command(Control.SET_STATEBLOB, 0, 1, 2)[:10]) == b""


def test_a_blob_of_several_reads_passes_both_ways(server: Server) -> None:
    with server.client() as client:
        tpm = Tpm(client.attach_data().transact)
        client.init()
        tpm.startup()
        for index in range(NV_INDEX, NV_INDEX + 2 * READ_BYTES_MAX // NV_BYTES):
            tpm.nv_define(index, NV_BYTES)
        tpm.nv_write(NV_INDEX, b"kept")
        blob = client.get_state_blob(Blob.PERMANENT)
        assert len(blob) > 2 * READ_BYTES_MAX
        tpm.nv_write(NV_INDEX, b"lost")
        client.stop()
        client.set_state_blob(Blob.PERMANENT, blob)
        client.init()
        again = client.get_state_blob(Blob.PERMANENT)
        assert again[:-LINEAGE_BYTES] == blob[:-LINEAGE_BYTES]
        tpm.startup()
        assert tpm.nv_read(NV_INDEX, 4) == b"kept"


def test_others_wait_while_one_is_served(server: Server) -> None:
    with server.connect() as first, server.connect() as second:
        assert ask(first, command(Control.STOP)) == OK
        send(second, command(Control.INIT, 0))
        assert ask(first, command(Control.STOP)) == OK
        assert ask(first, command(Control.HASH_START)) == BAD_ORDINAL, "INIT is not carried out"
        assert not is_read(second)
        first.close()
        assert second.recv(100) == OK


def test_a_second_client_is_told_of_once(server: Server) -> None:
    """A second QEMU on one vTPM waits for ever, and nobody would know why."""
    with server.connect() as first:
        assert ask(first, command(Control.STOP)) == OK
        before = server.program.output.count(WAITING)
        with server.connect(), server.connect():
            is_told = lambda: server.program.output.count(WAITING) > before  # noqa: E731
            wait_until(is_told, "it is told of")
            assert ask(first, command(Control.STOP)) == OK
            assert server.program.output.count(WAITING) == before + 1


def test_a_client_that_is_there_before_vtpmd_is_served(lab: Lab) -> None:
    """What the engine asks then is answered when there is somebody who can."""
    options = ["--manage", str(lab.new_path("manage"))]
    emulator = lab.emulator(EmulatorKind.VTPMD, options=options)
    with ControlClient(emulator.control_path, TIMEOUT_S) as client:
        client.init()
        assert not client.get_established()


# -- descriptors


def test_a_data_socket_is_kept_until_it_hangs_up(server: Server) -> None:
    with server.client() as client:
        client.init()
        before = server.sockets()
        data = client.attach_data()
        assert len(data.transact(tpm2.startup())) == 10
        (kept,) = server.sockets() - before
        data.close()
        wait_until(lambda: kept not in server.sockets(), "the data socket is closed")
        assert server.sockets() == before


def wrong_descriptors() -> Iterator[tuple[str, list[int]]]:
    stream = [s.detach() for s in socket.socketpair()]
    datagram = [s.detach() for s in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)]
    pipe = list(os.pipe())
    yield "none", []
    yield "two", stream
    yield "more than there is room for", [*stream, *datagram, *pipe] * 10
    yield "a datagram socket", datagram[:1]
    yield "a pipe", pipe[:1]
    for descriptor in [*stream, *datagram, *pipe]:
        os.close(descriptor)


def test_set_datafd_refuses_everything_but_one_stream_socket(server: Server) -> None:
    with server.client() as client:
        client.stop()
        before = server.descriptors()
        for name, descriptors in wrong_descriptors():
            answer = ask(client.socket, command(Control.SET_DATAFD), descriptors)
            assert answer == BAD_PARAMETER, name
            assert server.descriptors() == before, name
        client.attach_data()


def test_a_data_socket_that_is_refused_is_closed(server: Server) -> None:
    with server.client() as client:
        client.attach_data()
        before = server.descriptors()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                answer = ask(client.socket, command(Control.SET_DATAFD), [theirs.fileno()])
            assert answer == bytes.fromhex("0000001f")
            ours.settimeout(TIMEOUT_S)
            assert ours.recv(1) == b""
        assert server.descriptors() == before


@pytest.mark.parametrize("number_of_pairs", [1, 20])
def test_descriptors_with_other_commands_and_in_pieces_are_closed(
    server: Server, number_of_pairs: int
) -> None:
    one, other = socket.socketpair()
    given = [one.fileno(), other.fileno()] * number_of_pairs
    with server.connect() as client, one, other:
        assert ask(client, command(Control.STOP), given) == OK
        before = server.descriptors()
        for _ in range(10):
            assert ask(client, command(Control.STOP), given) == OK
            assert ask(client, command(99), given) == BAD_ORDINAL
            for byte in command(Control.SET_DATAFD)[:-1]:
                send(client, bytes([byte]), given)
            assert ask(client, command(Control.SET_DATAFD)[-1:], given) == BAD_PARAMETER
        assert server.descriptors() == before


def test_descriptors_of_a_client_that_leaves_are_closed(server: Server) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    with ours:
        with server.connect() as client, theirs:
            send(client, command(Control.SET_DATAFD)[:3], [theirs.fileno()])
        assert ours.recv(1) == b""
    server.assert_serves()


# -- excess


def test_excess_that_comes_before_the_answer_is_dropped(beside: Server) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    with beside.connect() as client, ours:
        with beside.held():
            send(client, command(Control.INIT, 0))
            wait_until(lambda: is_read(client), "the command is read")
            with theirs:
                send(client, command(Control.STOP) * 100, [theirs.fileno()])
        assert client.recv(100) == OK
        assert ours.recv(1) == b""
        assert ask(client, command(Control.GET_TPMESTABLISHED)) == OK + bytes(4)


def test_excess_without_end_closes_the_connection(beside: Server) -> None:
    """What is past the limit is not even read: who goes on sending would be read for ever."""
    with beside.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 * EXCESS_BYTES_MAX)
        with beside.held():
            send(client, command(Control.INIT, 0))
            wait_until(lambda: is_read(client), "the command is read")
            client.sendall(bytes(3 * EXCESS_BYTES_MAX))
        with pytest.raises(ConnectionResetError):  # as Linux has it for what was not read
            client.recv(100)
    beside.assert_serves()


# -- time limits


@pytest.mark.parametrize(
    "sent", [b"\0", command(Control.INIT), command(Control.SET_STATEBLOB, 0, 1, 5) + b"abcd"]
)
def test_a_body_that_never_comes_closes_the_connection(server: Server, sent: bytes) -> None:
    with server.connect() as client:
        assert ask(client, sent) == b""
    server.assert_serves()


def test_a_body_that_comes_byte_by_byte_closes_the_connection(server: Server) -> None:
    """The limit is that of the command, and no byte renews it."""
    with server.connect() as client, server.connect() as next_client:
        send(client, command(Control.SET_STATEBLOB, 0, 1, BLOB_BYTES_MAX))
        send(next_client, command(Control.STOP))

        def is_left() -> bool:
            if not is_closed(client):
                send(client, b"\0")
            return is_read(next_client)

        wait_until(is_left, "the next client is served")
        assert receive_until_closed(client) == b""
        assert next_client.recv(100) == OK


def test_a_client_that_never_reads_is_left(server: Server) -> None:
    with server.connect() as client:
        asked_bytes = ask_without_reading(server, client)
        server.assert_serves()
        assert len(receive_until_closed(client)) < asked_bytes
    assert re.search(
        r"GET_STATEBLOB: result 0x0, \d+ bytes, \d+ µs, not sent", server.program.output
    )


def test_a_command_after_a_slow_one_has_a_time_of_its_own(server: Server) -> None:
    """Of a client that takes 400 ms for each command of three."""
    first, second = command(Control.SET_BUFFERSIZE, 0)[:4], command(Control.SET_BUFFERSIZE, 0)[4:]
    with server.connect() as client:
        for _ in range(3):
            send(client, first)
            time.sleep(0.4)
            assert ask(client, second)[:4] == OK


# -- clients that leave


def test_a_client_that_leaves_before_its_answer_is_nothing_special(server: Server) -> None:
    for sent in (ASK_FOR_BLOB, command(Control.INIT, 0), b"\0\0", b""):
        with server.connect() as client:
            client.sendall(sent)
    server.assert_serves()


def test_a_client_that_leaves_while_it_is_answered_is_nothing_special(server: Server) -> None:
    with server.connect() as client:
        ask_without_reading(server, client)
    server.assert_serves()


def test_a_client_that_leaves_while_vtpmd_is_asked_is_nothing_special(beside: Server) -> None:
    with beside.held(), beside.connect() as client:
        send(client, command(Control.INIT, 0))
        wait_until(lambda: is_read(client), "the command is read")
    with beside.connect() as client:
        assert ask(client, command(Control.GET_TPMESTABLISHED)) == OK + bytes(4)


def test_a_client_that_only_shuts_its_sending_side_gets_its_answer(server: Server) -> None:
    with server.connect() as client:
        send(client, command(Control.INIT, 0))
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == OK
        assert client.recv(100) == b""


# -- failures


@pytest.mark.parametrize(
    "sent", [command(Control.INIT, 0), command(Control.SHUTDOWN), ASK_FOR_BLOB]
)
def test_invariant_11_a_command_whose_vtpmd_dies_is_carried_out(
    beside: Server, sent: bytes
) -> None:
    with beside.connect() as client:
        assert ask(client, command(Control.INIT, 0)) == OK
        os.kill(beside.program.pid, signal.SIGSTOP)
        send(client, sent)
        wait_until(lambda: is_read(client), "the command is read")
        beside.program.kill()
        answer = client.recv(1 << 16)
        assert answer[:4] == OK
        assert (len(answer) > 1000) == (sent is ASK_FOR_BLOB)


def test_descriptors_that_run_out_are_waited_for(server: Server) -> None:
    """A person is told once each time; who waits is served when there are some again."""
    said = "cannot take QEMU's connection yet: Too many open files"
    first_free = LinkDescriptor.BOOT  # when it has booted
    limits = resource.prlimit(server.engine, resource.RLIMIT_NOFILE)

    def times_told() -> int:
        return server.program.output.count(said)

    for n_times in range(2):
        resource.prlimit(server.engine, resource.RLIMIT_NOFILE, (first_free, limits[1]))
        with server.connect() as client:
            send(client, command(Control.STOP))
            wait_until(server.waits_with_a_limit, "it waits before it tries again")
            resource.prlimit(server.engine, resource.RLIMIT_NOFILE, limits)
            assert client.recv(100) == OK
        assert times_told() == n_times + 1
    # Two tries without success, and more on a slow machine.
    resource.prlimit(server.engine, resource.RLIMIT_NOFILE, (first_free, limits[1]))
    with server.connect():
        time.sleep(1.5)
    resource.prlimit(server.engine, resource.RLIMIT_NOFILE, limits)
    server.assert_serves()
    assert times_told() == 3


def test_a_command_is_logged_in_one_line_without_its_content(server: Server) -> None:
    with server.connect() as client:
        assert ask(client, command(Control.SET_STATEBLOB, 0, 1, 6) + b"secret") == BAD_PARAMETER
        assert ask(client, command(Control.STOP, 0)) == BAD_PARAMETER
        assert ask(client, struct.pack(">IQII", Control.GET_INFO, 1, 0xFFFFFFFF, 0)) == (
            BAD_PARAMETER
        )
        assert ask(client, command(Control.STOP)) == OK  # the lines before are written by now
    lines = [line for line in server.program.output.splitlines() if line.endswith(" µs")]
    _, blob, excess, info, *_ = lines
    assert blob.startswith("vtpmd: SET_STATEBLOB: result 0x3, 4 bytes, ")
    assert excess.startswith(
        "vtpmd: command 0xe refused (it has bytes in excess): result 0x3, 4 bytes, "
    )
    assert info.startswith("vtpmd: GET_INFO: result 0x3, 4 bytes, ")
    assert "secret" not in server.program.output


# -- the end


@pytest.mark.parametrize("waits", [True, False], ids=["and waits", "and leaves"])
def test_shutdown_ends_the_server(server: Server, waits: bool) -> None:
    with server.connect() as client:
        send(client, command(Control.SHUTDOWN))
        if waits:
            assert client.recv(100) == OK
            assert client.recv(100) == b""
    assert server.program.wait() == 0


@pytest.mark.parametrize("sent", [b"", b"\0", command(Control.INIT)], ids=["idle", "byte", "half"])
def test_a_stop_closes_everything(server: Server, sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    with server.connect() as client, server.connect() as next_client, ours:
        assert ask(client, command(Control.STOP)) == OK
        with theirs:
            if sent:
                send(client, sent, [theirs.fileno()])
        os.kill(server.program.pid, signal.SIGTERM)
        assert receive_until_closed(client) == b""
        assert receive_until_closed(next_client) == b""
        assert ours.recv(1) == b""
    assert server.program.wait() == 0


def test_a_command_that_is_carried_out_is_answered_before_a_stop(server: Server) -> None:
    """It waits for the guest's own command, which takes some time."""
    with server.client() as client:
        data = client.attach_data()
        client.init()
        assert len(data.transact(tpm2.startup())) == 10
        data.send(tpm2.create_primary(tpm2.rsa_signing_template()))
        send(client.socket, command(Control.STORE_VOLATILE))
        wait_until(lambda: is_read(client.socket), "the command is read")
        os.kill(server.program.pid, signal.SIGTERM)
        assert receive_until_closed(client.socket) == OK
    assert server.program.wait() == 0


def test_a_stop_does_not_wait_for_who_does_not_read(alone: Server) -> None:
    """Who reads after it gets no more than what had found room before."""
    with alone.connect() as client:
        asked_bytes = ask_without_reading(alone, client)
        os.kill(alone.program.pid, signal.SIGTERM)
        assert alone.program.wait() == 0
        assert len(receive_until_closed(client)) < asked_bytes


def test_a_stop_of_vtpmd_does_not_wait_for_who_does_not_read(beside: Server) -> None:
    with beside.connect() as client:
        asked_bytes = ask_without_reading(beside, client)
        assert beside.program.stop() == 0
        assert len(receive_until_closed(client)) < asked_bytes
