"""The control server on real sockets: descriptors, time limits, failures; each client gets served.

What is checked after each misuse: no descriptor of this process is left, and the next client gets
its answer. The handler here says what it was asked; the real one is tested in tests/system.
"""

import array
import asyncio
import logging
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from vtpmd.daemon import control_server
from vtpmd.daemon.control_server import ControlServer
from vtpmd.errors import VtpmdError
from vtpmd.wire import control
from vtpmd.wire.control import Command
from vtpmd.wire.tpm import Result

TIMEOUT_S = 20.0
BLOB = bytes(control.BLOB_BYTES_MAX - 100)

OK = bytes(4)
BAD_PARAMETER = struct.pack(">I", Result.BAD_PARAMETER)
FAIL = struct.pack(">I", Result.FAIL)


class Recorder:
    """A handler that notes what it is asked, and fails when told to."""

    def __init__(self) -> None:
        self.requests: list[control.Request] = []
        self.descriptors: list[list[int]] = []
        self.error_after: Exception | None = None
        self.error: Exception | None = None
        self.started = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    async def handle(self, request: control.Request, descriptors: list[int]) -> bytes:
        self.requests.append(request)
        self.descriptors.append(list(descriptors))
        self.started.set()
        for descriptor in descriptors:
            os.fstat(descriptor)  # is open
        await asyncio.to_thread(self.go_on.wait, TIMEOUT_S)
        if self.error is not None:
            raise self.error
        if isinstance(request, control.GetStateBlob):
            return control.encode_state_blob(BLOB, request.offset)
        return control.encode_result()

    async def finish(self) -> None:
        if self.error_after is not None:
            raise self.error_after


class Server:
    """A control server in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handler = Recorder()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(8)
        self._thread = threading.Thread(target=asyncio.run, args=[self._serve()])
        self._started = threading.Event()
        self._thread.start()
        assert self._started.wait(TIMEOUT_S)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(
            ControlServer(self._listening, self.handler).serve(), name="server"
        )
        self._started.set()
        await asyncio.gather(self._task, return_exceptions=True)

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(TIMEOUT_S)
        client.connect(str(self.path))
        return client

    def returned(self) -> bool:
        """Wait for the server to end by itself."""
        self._thread.join(TIMEOUT_S)
        return not self._thread.is_alive()

    def close(self) -> None:
        self.handler.go_on.set()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(TIMEOUT_S)
        self._listening.close()
        assert not self._thread.is_alive()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "control")
    yield server
    server.close()


def command(number: int, *fields: int) -> bytes:
    return struct.pack(f">I{len(fields)}I", number, *fields)


def ask(client: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> bytes:
    """Send a command, with descriptors, and return what one read brings; empty when closed."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    client.sendmsg([data], ancillary if descriptors else [])
    return client.recv(65536)


def receive_until_closed(client: socket.socket) -> int:
    """Return how many bytes come before the server closes; a reset is a close."""
    total = 0
    try:
        while piece := client.recv(65536):
            total += len(piece)
    except ConnectionError:
        pass
    return total


def open_descriptors() -> dict[str, str]:
    """Return this process's descriptors, and what each of them is."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except FileNotFoundError:
            continue  # the one that reads the directory
    return found


def assert_serves(server: Server) -> None:
    with server.connect() as client:
        assert ask(client, command(Command.STOP)) == OK


def test_one_connection_carries_many_commands(server: Server) -> None:
    with server.connect() as client:
        for _ in range(3):
            assert ask(client, command(Command.INIT, 1)) == OK
            assert ask(client, command(99)) == struct.pack(">I", Result.BAD_ORDINAL)
    assert server.handler.requests == [control.Init(1)] * 3


def test_a_command_may_come_in_pieces(server: Server) -> None:
    with server.connect() as client:
        for byte in command(Command.SET_BUFFERSIZE, 3000)[:-1]:
            client.send(bytes([byte]))
        assert ask(client, command(3000)[-1:]) == OK
        assert ask(client, command(Command.SET_STATEBLOB, 0, 1, 2)[:10]) == b""
    assert server.handler.requests == [control.SetBufferSize(3000)]


def test_a_blob_of_the_largest_size_passes_both_ways(server: Server) -> None:
    blob = os.urandom(control.BLOB_BYTES_MAX)
    with server.connect() as client:
        client.sendall(command(Command.SET_STATEBLOB, 0, 1, len(blob)) + blob)
        assert client.recv(100) == OK
        client.sendall(command(Command.GET_STATEBLOB, 1, 1, 0))
        received = bytearray()
        while len(received) < 16 + len(BLOB):
            received += client.recv(65536)
    assert received == control.encode_state_blob(BLOB, 0)
    assert server.handler.requests[0] == control.SetStateBlob(0, 1, blob)


def test_others_wait_while_one_is_served(server: Server) -> None:
    with server.connect() as first, server.connect() as second:
        assert ask(first, command(Command.STOP)) == OK
        second.send(command(Command.INIT, 0))
        assert ask(first, command(Command.STOP)) == OK
        assert len(server.handler.requests) == 2
        first.close()
        assert second.recv(100) == OK


def test_a_data_socket_is_handed_on_and_closed(server: Server) -> None:
    ours, theirs = socket.socketpair()
    with server.connect() as client, ours:
        with theirs:
            assert ask(client, command(Command.SET_DATAFD), [theirs.fileno()]) == OK
        assert [len(each) for each in server.handler.descriptors] == [1]
        assert ours.recv(1) == b"", "no copy of the other end is left"


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
    with server.connect() as client:
        assert ask(client, command(Command.STOP)) == OK
        before = open_descriptors()
        for name, descriptors in wrong_descriptors():
            answer = ask(client, command(Command.SET_DATAFD), descriptors)
            assert answer == BAD_PARAMETER, name
        assert open_descriptors().keys() == before.keys()
        assert server.handler.requests == [control.Bare(Command.STOP)]


def test_descriptors_with_other_commands_and_in_pieces_are_closed(server: Server) -> None:
    one, other = socket.socketpair()
    pair = [one.fileno(), other.fileno()]
    with server.connect() as client, one, other:
        assert ask(client, command(Command.STOP), pair) == OK
        before = open_descriptors()
        for _ in range(10):
            assert ask(client, command(Command.STOP), pair) == OK
            assert ask(client, command(99), pair)[3] == Result.BAD_ORDINAL
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", pair))]
            for byte in command(Command.SET_DATAFD)[:-1]:
                client.sendmsg([bytes([byte])], ancillary)
            assert ask(client, command(Command.SET_DATAFD)[-1:], pair) == BAD_PARAMETER
        assert open_descriptors().keys() == before.keys()
    assert not any(server.handler.descriptors)


def test_descriptors_of_a_client_that_leaves_are_closed(server: Server) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    with ours:
        with server.connect() as client, theirs:
            socket.send_fds(client, [command(Command.SET_DATAFD)[:3]], [theirs.fileno()])
        assert ours.recv(1) == b""
    assert_serves(server)


def test_excess_that_comes_before_the_answer_is_dropped(server: Server) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    server.handler.go_on.clear()
    with server.connect() as client, ours:
        client.send(command(Command.INIT, 0))
        assert server.handler.started.wait(TIMEOUT_S)
        with theirs:
            socket.send_fds(client, [command(Command.STOP) * 100], [theirs.fileno()])
        server.handler.go_on.set()
        assert client.recv(100) == OK
        assert ours.recv(1) == b""
        assert ask(client, command(Command.GET_CONFIG)) == OK
    assert server.handler.requests == [control.Init(0), control.Bare(Command.GET_CONFIG)]


def test_excess_without_end_closes_the_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "EXCESS_BYTES_MAX", 70_000)
    server.handler.go_on.clear()
    with server.connect() as client:
        client.send(command(Command.INIT, 0))
        assert server.handler.started.wait(TIMEOUT_S)
        client.send(bytes(150_000))
        server.handler.go_on.set()
        assert receive_until_closed(client) == 0
    assert_serves(server)


@pytest.mark.parametrize(
    "sent", [b"\0", command(Command.INIT), command(Command.SET_STATEBLOB, 0, 1, 5) + b"abcd"]
)
def test_a_body_that_never_comes_closes_the_connection(server: Server, sent: bytes) -> None:
    with server.connect() as client:
        assert ask(client, sent) == b""
    assert_serves(server)
    assert len(server.handler.requests) == 1


def test_a_length_past_its_limit_is_answered_and_closes_the_connection(server: Server) -> None:
    with server.connect() as client:
        client.send(command(Command.SET_STATEBLOB, 0, 1, control.BLOB_BYTES_MAX + 1))
        assert client.recv(100) == BAD_PARAMETER
        assert client.recv(100) == b""
    assert_serves(server)


def test_a_client_that_never_reads_is_left(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "ANSWER_TIMEOUT_S", 0.2)
    with server.connect() as client:
        client.send(command(Command.GET_STATEBLOB, 1, 1, 0))
        assert_serves(server)
        assert 0 < receive_until_closed(client) < 16 + len(BLOB)


def test_a_client_that_leaves_before_its_answer_is_nothing_special(server: Server) -> None:
    for sent in (command(Command.GET_STATEBLOB, 1, 1, 0), command(Command.INIT, 0), b"\0\0", b""):
        with server.connect() as client:
            client.sendall(sent)
    assert_serves(server)


def test_a_client_that_only_shuts_its_sending_side_gets_its_answer(server: Server) -> None:
    with server.connect() as client:
        client.send(command(Command.INIT, 0))
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == OK
        assert client.recv(100) == b""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("secret"), "INIT failed: ValueError; answered TPM_FAIL"),
        (VtpmdError("the disk is full"), "INIT failed: the disk is full; answered TPM_FAIL"),
    ],
)
def test_a_handler_that_fails_is_answered_for(
    server: Server, caplog: pytest.LogCaptureFixture, error: Exception, said: str
) -> None:
    server.handler.error = error
    with caplog.at_level(logging.INFO), server.connect() as client:
        assert ask(client, command(Command.INIT, 0)) == FAIL
        assert ask(client, command(Command.GET_STATEBLOB, 0, 1, 0)) == FAIL + bytes(12)
        server.handler.error = None
        assert ask(client, command(Command.INIT, 0)) == OK
    assert caplog.messages[0] == said
    assert "secret" not in caplog.text


def test_what_fails_after_an_answer_keeps_nobody_from_the_next(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as the death of the engine."""
    for error, said in [
        (ValueError("secret"), "what follows an answer failed: ValueError"),
        (VtpmdError("the engine is gone"), "what follows an answer failed: the engine is gone"),
    ]:
        caplog.clear()
        server.handler.error_after = error
        with caplog.at_level(logging.INFO), server.connect() as client:
            for _ in range(2):
                assert ask(client, command(Command.INIT, 0)) == OK
        assert_serves(server)
        assert caplog.messages[0] == said
        assert "secret" not in caplog.text


def test_a_command_is_logged_in_one_line_without_its_content(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), server.connect() as client:
        assert ask(client, command(Command.SET_STATEBLOB, 0, 1, 6) + b"secret") == OK
        assert ask(client, command(Command.STOP, 0)) == BAD_PARAMETER
        assert ask(client, command(Command.STOP)) == OK  # the lines before are written by now
    lines = [message for message in caplog.messages if "µs" in message]
    assert lines[0].startswith("SET_STATEBLOB: result 0x0, 4 bytes, ")
    assert lines[1].startswith("command 0xe refused (4 bytes in excess): result 0x3, 4 bytes, ")
    assert "secret" not in caplog.text


@pytest.mark.parametrize("waits", [True, False], ids=["and waits", "and leaves"])
def test_shutdown_ends_the_server(server: Server, waits: bool) -> None:
    with server.connect() as client:
        client.send(command(Command.SHUTDOWN))
        if waits:
            assert client.recv(100) == OK
            assert client.recv(100) == b""
    assert server.returned()


def test_shutdown_that_the_handler_refuses_ends_the_server_too(server: Server) -> None:
    server.handler.error = RuntimeError()
    with server.connect() as client:
        assert ask(client, command(Command.SHUTDOWN)) == FAIL
    assert server.returned()


def test_shutdown_with_excess_is_refused(server: Server) -> None:
    with server.connect() as client:
        assert ask(client, command(Command.SHUTDOWN, 0)) == BAD_PARAMETER
    assert_serves(server)


@pytest.mark.parametrize(
    "sent", [b"", b"\0", command(Command.INIT, 0)], ids=["idle", "half", "busy"]
)
def test_a_cancelled_server_closes_everything(server: Server, sent: bytes) -> None:
    server.handler.go_on.clear()
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    with server.connect() as client, ours:
        with theirs:
            socket.send_fds(client, [sent or b"\0"], [theirs.fileno()])
        server.close()
        assert receive_until_closed(client) == 0
        assert ours.recv(1) == b""
