"""The management server on real sockets: commands, events, clients that misbehave or leave.

What is checked after each misuse: another client is served. The commands here are the test's own;
who may connect, and clients that others wrote, are tested in tests/system.
"""

import asyncio
import json
import logging
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from vtpmd.daemon import management
from vtpmd.daemon.listener import listen
from vtpmd.daemon.management import Argument, Arguments, ManagementServer
from vtpmd.errors import VtpmdError
from vtpmd.wire.management import MESSAGE_BYTES_MAX

TIMEOUT_S = 20.0
PADDING_BYTES = 1000
EVENT = {"number": 1, "padding": "x" * PADDING_BYTES}


class Client:
    """A client that sends what it is told and checks nothing."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def receive(self) -> Any:
        """Return the next message, None at the end."""
        line = await self._reader.readline()
        return json.loads(line) if line else None

    async def ask(self, command: str, **arguments: object) -> Any:
        """Return what a command is answered with; events in between are dropped."""
        self.send({"execute": command, "arguments": arguments})
        while "event" in (answer := await self.receive()):
            pass
        return answer

    def send(self, message: object) -> None:
        self.writer.write(json.dumps(message).encode())

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


class Lab:
    """A server with some commands, and its clients."""

    def __init__(self, path: Path, server: ManagementServer) -> None:
        self.path = path
        self.server = server
        self.calls: list[Arguments] = []
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.stop: Callable[[], object]
        self._clients: list[Client] = []
        optional = Argument(int, required=False)
        self.register("note", self._note, to=Argument(str), port=optional)
        self.register("wait", self._wait)

    def register(
        self, name: str, handler: Callable[[Arguments], Awaitable[object]], **arguments: Argument
    ) -> None:
        self.server.register(name, arguments, handler)

    async def _note(self, arguments: Arguments) -> object:
        self.calls.append(arguments)
        return {"number": len(self.calls)}

    async def _wait(self, arguments: Arguments) -> object:
        self.begun.set()
        await self.go_on.wait()
        self.calls.append(arguments)
        return {}

    async def connect(self) -> Client:
        """Return a client that has not read its greeting."""
        client = Client(*await asyncio.open_unix_connection(self.path))
        self._clients.append(client)
        return client

    async def client(self) -> Client:
        """Return a client that has negotiated."""
        client = await self.connect()
        assert "QMP" in await client.receive()
        assert await client.ask("qmp_capabilities") == {"return": {}}
        return client

    async def assert_serves(self) -> None:
        client = await self.client()
        assert "return" in await client.ask("query-version")
        await client.close()

    def close_clients(self) -> None:
        for client in self._clients:
            client.writer.transport.abort()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what has no event; the test's own time limit ends it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(path: Path, on_quit: Callable[[], None] = lambda: None) -> AsyncIterator[Lab]:
    """Serve until the block is left, which must be within TIMEOUT_S."""
    with listen(path) as listening:
        server = ManagementServer(listening, on_quit)
        lab = Lab(path, server)
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
            task = group.create_task(server.serve())
            lab.stop = task.cancel
            yield lab
            lab.close_clients()
            lab.stop()


Test = Callable[[Lab], Awaitable[None]]
Run = Callable[[Test], None]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Run a coroutine with a server; no descriptor is left afterwards."""

    async def serve(test: Test) -> None:
        async with serving(tmp_path / "m") as lab:
            await test(lab)
            await lab.assert_serves()

    def run_test(test: Test) -> None:
        asyncio.run(serve(test))

    before = descriptors()
    yield run_test
    assert descriptors() == before


def descriptors() -> set[str]:
    """Return the numbers of this process's descriptors, and what they are."""
    links = [path for path in Path("/proc/self/fd").iterdir() if path.exists()]
    return {f"{path.name}: {path.readlink()}" for path in links}


def error(description: str, error_class: str = "GenericError") -> dict[str, object]:
    return {"error": {"class": error_class, "desc": description}}


def test_session(run: Run) -> None:
    """Greeting, negotiation, commands in the order in which they came, without waiting."""

    async def test(lab: Lab) -> None:
        client = await lab.connect()
        version = {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "vtpmd"}
        assert await client.receive() == {"QMP": {"version": version, "capabilities": []}}
        not_yet = await client.ask("query-version")
        assert not_yet["error"]["class"] == "CommandNotFound"
        for number in range(3):
            arguments = {"to": "a", "port": number}
            command = "note" if number else "qmp_capabilities"
            client.send(
                {"execute": command, "arguments": arguments if number else {}, "id": number}
            )
        answers = [await client.receive() for _ in range(3)]
        results = [{}, {"number": 1}, {"number": 2}]
        assert answers == [{"return": result, "id": i} for i, result in enumerate(results)]
        assert lab.calls == [{"to": "a", "port": 1}, {"to": "a", "port": 2}]
        assert await client.ask("query-version") == {"return": version}

    run(test)


def test_commands_are_listed(run: Run) -> None:
    async def test(lab: Lab) -> None:
        listed = await (await lab.client()).ask("query-commands")
        names = ["note", "qmp_capabilities", "query-commands", "query-version", "quit", "wait"]
        assert listed == {"return": [{"name": name} for name in names]}

    run(test)


@pytest.mark.parametrize(
    ("command", "arguments", "answer"),
    [
        ("note", {}, error("note needs the argument 'to'")),
        ("note", {"to": 1}, error("the argument 'to' of note must be a string")),
        ("note", {"to": None}, error("the argument 'to' of note must be a string")),
        (
            "note",
            {"to": "a", "port": True},
            error("the argument 'port' of note must be an integer"),
        ),
        ("note", {"to": "a", "b\n": 1}, error("note has no argument 'b?'; it takes to, port")),
        ("quit", {"now": True}, error("quit has no argument 'now'; it takes none")),
        (
            "notes",
            {"to": "a"},
            error("there is no command 'notes'; query-commands lists them", "CommandNotFound"),
        ),
    ],
)
def test_unfit_command(
    run: Run, command: str, arguments: dict[str, object], answer: dict[str, object]
) -> None:
    async def test(lab: Lab) -> None:
        client = await lab.client()
        assert await client.ask(command, **arguments) == answer
        assert lab.calls == []
        assert await client.ask("note", to="a") == {"return": {"number": 1}}

    run(test)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("quit", {}), ("qmp_capabilities", {}), ("new", {"a": Argument(float)})],
)
def test_command_that_cannot_be_registered(
    run: Run, name: str, arguments: dict[str, Argument]
) -> None:
    async def test(lab: Lab) -> None:
        with pytest.raises(ValueError, match=name):
            lab.register(name, lab._note, **arguments)

    run(test)


@pytest.mark.parametrize("failure", [VtpmdError("no peer: start one"), KeyError("secret"), {1, 2}])
def test_command_that_fails(run: Run, failure: object, caplog: pytest.LogCaptureFixture) -> None:
    """Only our own errors are shown; a result that JSON cannot say is an error of the same kind."""

    async def fail(_: Arguments) -> object:
        if isinstance(failure, Exception):
            raise failure
        return failure

    async def test(lab: Lab) -> None:
        lab.register("fail", fail)
        answer = await (await lab.client()).ask("fail")
        if isinstance(failure, VtpmdError):
            assert answer == error("no peer: start one")
        else:
            assert answer == error("internal error; vtpmd's log says more")
            assert "the command fail failed: " in caplog.text
            assert "secret" not in caplog.text

    with caplog.at_level(logging.INFO):
        run(test)


def test_clients_do_not_wait_for_each_other(run: Run) -> None:
    async def test(lab: Lab) -> None:
        waiting, other = await lab.client(), await lab.client()
        waiting.send({"execute": "wait"})
        await lab.begun.wait()
        assert await other.ask("note", to="a") == {"return": {"number": 1}}
        lab.go_on.set()
        assert await waiting.receive() == {"return": {}}

    run(test)


def test_command_is_carried_out_though_its_client_left(run: Run) -> None:
    async def test(lab: Lab) -> None:
        client = await lab.client()
        client.send({"execute": "wait"})
        await lab.begun.wait()
        await client.close()
        await lab.assert_serves()
        lab.go_on.set()
        await until(lambda: bool(lab.calls))

    run(test)


def test_client_that_sends_no_more_gets_its_answers(run: Run) -> None:
    async def test(lab: Lab) -> None:
        client = await lab.client()
        client.send({"execute": "note", "arguments": {"to": "a"}})
        client.send({"execute": "note", "arguments": {"to": "b"}})
        client.writer.write_eof()
        assert [await client.receive() for _ in range(3)] == [
            {"return": {"number": 1}},
            {"return": {"number": 2}},
            None,
        ]

    run(test)


def test_events_go_to_every_client_that_negotiated(run: Run) -> None:
    async def test(lab: Lab) -> None:
        clients = [await lab.client(), await lab.client()]
        early = await lab.connect()
        assert "QMP" in await early.receive()
        lab.server.broadcast("ROUND", {"number": 1})
        for client in clients:
            event = await client.receive()
            assert (event["event"], event["data"]) == ("ROUND", {"number": 1})
            assert event["timestamp"].keys() == {"seconds", "microseconds"}
        assert await early.ask("qmp_capabilities") == {"return": {}}

    run(test)


def test_event_comes_while_a_command_is_carried_out(run: Run) -> None:
    async def test(lab: Lab) -> None:
        client = await lab.client()
        client.send({"execute": "wait"})
        await lab.begun.wait()
        lab.server.broadcast("ROUND", {"number": 1})
        assert "event" in await client.receive()
        lab.go_on.set()
        assert "return" in await client.receive()

    run(test)


def test_client_that_does_not_read_is_disconnected(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon never waits for it, and another client misses nothing."""

    async def test(lab: Lab) -> None:
        slow, other = await lab.client(), await lab.client()
        slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
        # What it may leave unread, as much again for the socket's buffers, and some more.
        for _ in range(2 * management.UNREAD_BYTES_MAX // PADDING_BYTES):
            lab.server.broadcast("ROUND", EVENT)
            assert (await other.receive())["data"] == EVENT
            if "does not read" in caplog.text:
                break
        assert "does not read; disconnected" in caplog.text

    run(test)


def test_client_that_does_not_read_its_answer_is_disconnected(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def long(_: Arguments) -> object:
        return "x" * (management.UNREAD_BYTES_MAX // 2)

    async def test(lab: Lab) -> None:
        lab.register("long", long)
        client = await lab.client()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send({"execute": "long"})
        monkeypatch.setattr(management, "ANSWER_TIMEOUT_S", 0.1)
        await until(lambda: not lab.server._clients)

    run(test)


@pytest.mark.parametrize("sent", [b"hello\n", b"[]", b"\xff\n", b'{"execute": 1}'])
def test_what_is_no_command_is_answered(run: Run, sent: bytes) -> None:
    async def test(lab: Lab) -> None:
        client = await lab.client()
        client.writer.write(sent)
        assert (await client.receive())["error"]["class"] == "GenericError"
        assert "return" in await client.ask("query-version")

    run(test)


def test_message_without_an_end_is_answered_and_the_connection_closed(run: Run) -> None:
    async def test(lab: Lab) -> None:
        client = await lab.client()
        client.writer.write(b'{"' + bytes(MESSAGE_BYTES_MAX).replace(b"\0", b"a"))
        assert (await client.receive())["error"]["class"] == "GenericError"
        assert await client.receive() is None

    run(test)


def test_new_client_takes_the_place_of_the_most_idle(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """First of one that gets no events, then of the one whose last command is longest ago."""

    async def test(lab: Lab) -> None:
        listener, *others = [await lab.client() for _ in range(management.CLIENTS_MAX - 1)]
        silent = await lab.connect()
        assert "QMP" in await silent.receive()
        assert "return" in await listener.ask("query-version")

        late = [await lab.client()]
        assert await silent.receive() is None
        late.append(await lab.client())
        assert await others[0].receive() is None
        lab.server.broadcast("ROUND", {"number": 1})
        for client in (listener, *others[1:], *late):
            assert (await client.receive())["event"] == "ROUND"
        assert caplog.text.count("disconnected to let another in") == 2

    run(test)


def test_client_that_waits_for_an_answer_is_not_disconnected(run: Run) -> None:
    """Whoever comes, and however often; when all are waiting the next is refused."""

    async def test(lab: Lab) -> None:
        waiting = [await lab.client() for _ in range(management.CLIENTS_MAX)]
        for client in waiting[:-1]:
            lab.begun.clear()
            client.send({"execute": "wait"})
            await lab.begun.wait()
        last = await lab.client()
        assert await waiting.pop().receive() is None
        lab.begun.clear()
        last.send({"execute": "wait"})
        await lab.begun.wait()
        refused = await lab.connect()
        assert await refused.receive() == error(
            "8 clients wait for an answer already: end one of them"
        )
        assert await refused.receive() is None
        lab.go_on.set()
        for client in (*waiting, last):
            assert await client.receive() == {"return": {}}

    run(test)


def test_quit_is_answered_and_passed_on(tmp_path: Path) -> None:
    async def test() -> None:
        quits: list[str] = []
        async with serving(tmp_path / "m", on_quit=lambda: quits.append("quit")) as lab:
            client = await lab.client()
            assert await client.ask("quit") == {"return": {}}
            assert quits == ["quit"]

    asyncio.run(test())


def test_cancelled_server_closes_everything(tmp_path: Path) -> None:
    """Also the connection of a command that is being carried out, which is cancelled."""

    async def test() -> None:
        async with serving(tmp_path / "m") as lab:
            idle, busy = await lab.client(), await lab.client()
            busy.send({"execute": "wait"})
            await lab.begun.wait()
            lab.stop()
            assert await idle.receive() is None
            assert await busy.receive() is None
            assert lab.calls == []

    asyncio.run(test())
