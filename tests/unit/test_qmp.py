"""The follower and a QEMU that says what no QEMU should: nothing of it gets through or gets stuck.

The part of QEMU is played by our own management server, which speaks QMP, and, where it should not
even do that, by a socket that sends bytes. The real QEMU is in tests/system/test_qmp.py.
"""

import asyncio
import gc
import logging
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from qemu.qmp import Message

from vtpmd.daemon import qmp
from vtpmd.daemon.listener import listen
from vtpmd.daemon.management import Argument, Arguments, ManagementServer
from vtpmd.daemon.qemu_events import (
    Capabilities,
    GuestResumed,
    GuestStopped,
    MigrationState,
    MigrationStatus,
    QemuConnected,
    QemuDisconnected,
    QemuEvent,
    QemuShutdown,
)
from vtpmd.daemon.qmp import (
    FollowerState,
    Migration,
    QemuCommandFailed,
    QemuFollower,
    QemuNotConnected,
    QmpError,
)
from vtpmd.errors import VtpmdError

TIMEOUT_S = 20.0
UUID = "8f2c0d6e-5a5b-4c1e-9d1a-3f0c7d1f2b11"
CAPABILITY = {"capability": "events", "state": True}
EVENTS_ON = Capabilities(events=True, colo=False)
EVENTS_OFF = Capabilities(events=False, colo=False)
ANSWERS: dict[str, object] = {
    "migrate-set-capabilities": {},
    "query-migrate-capabilities": [],
    "query-uuid": {"UUID": UUID},
    "query-migrate": {},
    "query-status": {"running": True, "status": "running"},
}
CONNECTED = QemuConnected(
    uuid=UUID,
    running=True,
    status="running",
    migration_status=MigrationState.NONE,
    capabilities=EVENTS_ON,
)


class Follower(QemuFollower):
    """A follower whose events are noted, and can be waited for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, self._note)
        self.events: list[QemuEvent] = []
        self._noted = asyncio.Event()

    def _note(self, event: QemuEvent) -> None:
        self.events.append(event)
        self._noted.set()

    async def noted(self, count: int) -> list[QemuEvent]:
        """Wait until there are so many events, and return them."""
        while len(self.events) < count:
            self._noted.clear()
            await self._noted.wait()
        return self.events


@asynccontextmanager
async def following(path: Path) -> AsyncIterator[Follower]:
    """Follow until the block is left, which must be within TIMEOUT_S."""
    follower = Follower(path)
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        task = group.create_task(follower.run())
        yield follower
        task.cancel()
    assert follower.state is FollowerState.IDLE


class Qemu:
    """A QEMU that answers what the test wants; its answers are looked up when it is asked."""

    def __init__(self, server: ManagementServer) -> None:
        self.server = server
        self.answers = dict(ANSWERS)
        self.asked: list[tuple[str, Arguments]] = []
        for name in ("query-fail", "query-nothing", *ANSWERS):
            capabilities = {"capabilities": Argument(list)} if "set" in name else {}
            server.register(name, capabilities, self._answerer(name))

    def _answerer(self, name: str) -> Callable[[Arguments], Awaitable[object]]:
        async def answer(arguments: Arguments) -> object:
            self.asked.append((name, arguments))
            if name == "query-fail":
                raise VtpmdError("no,\n\x1b[31m" + "x" * 1000)
            if name == "query-nothing":
                await asyncio.Event().wait()
            value = self.answers[name]
            if isinstance(value, Exception):
                raise value
            return value() if callable(value) else value

        return answer

    def tell(self, *names: str, **data: object) -> None:
        for name in names:
            self.server.broadcast(name, data)


@asynccontextmanager
async def qemu_on(path: Path) -> AsyncIterator[Qemu]:
    """Be QEMU on a socket until the block is left."""
    with listen(path) as listening:
        server = ManagementServer(listening, on_quit=lambda: None)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(server.serve())
            try:
                yield Qemu(server)
            finally:
                task.cancel()


Test = Callable[[Qemu, Follower], Awaitable[None]]


def run(path: Path, test: Test, **answers: object) -> None:
    """Run a test with a QEMU and its follower; ``answers`` have ``_`` for ``-``."""

    async def run_test() -> None:
        async with qemu_on(path) as qemu, following(path) as follower:
            qemu.answers |= {name.replace("_", "-"): answer for name, answer in answers.items()}
            await test(qemu, follower)

    asyncio.run(run_test())


@pytest.fixture(autouse=True)
def poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests not wait for the next attempt."""
    monkeypatch.setattr(qmp, "POLL_INTERVAL_S", 0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


def stamped(name: str, data: object = None, **timestamp: object) -> Message:
    return Message({"event": name, "data": data, "timestamp": timestamp})


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (stamped("STOP", seconds=2, microseconds=3), GuestStopped(2_000_003)),
        (stamped("RESUME", seconds=2, microseconds=3), GuestResumed(2_000_003)),
        (stamped("STOP", seconds=-1, microseconds=-1), GuestStopped(None)),
        (stamped("STOP", seconds="2", microseconds=3), GuestStopped(None)),
        (stamped("STOP", seconds=2), GuestStopped(None)),
        (Message({"event": "STOP", "timestamp": 5}), GuestStopped(None)),
        (Message({"event": "STOP"}), GuestStopped(None)),
        (stamped("SHUTDOWN", {"guest": False}), QemuShutdown()),
        (stamped("MIGRATION", {"status": "active"}), MigrationStatus(MigrationState.ACTIVE)),
        (stamped("MIGRATION", {"status": "new-in-qemu"}), MigrationStatus(MigrationState.OTHER)),
        (stamped("MIGRATION", {"status": "Active!"}), None),
        (stamped("MIGRATION", {"status": "a" * 1000}), None),
        (stamped("MIGRATION", {"status": ["active"]}), None),
        (stamped("MIGRATION", {}), None),
        (stamped("MIGRATION", "active"), None),
        (stamped("MIGRATION_PASS", {"pass": 3}), None),
        (stamped("RTC_CHANGE", {"offset": 1}), None),
        (Message({"event": 5}), None),
        (Message({"event": None}), None),
    ],
)
def test_event_is_parsed_or_ignored(message: Message, event: QemuEvent | None) -> None:
    parsed = qmp._event(message)
    assert parsed == event
    assert type(parsed) is type(event)


def test_events_differ() -> None:
    assert len({GuestStopped(), GuestResumed(), QemuShutdown(), QemuDisconnected()}) == 4


def test_state_is_asked_and_events_are_enabled(path: Path) -> None:
    async def test(qemu: Qemu, follower: Follower) -> None:
        assert await follower.noted(1) == [CONNECTED]
        assert follower.state is FollowerState.FOLLOWING
        assert qemu.asked[1] == ("migrate-set-capabilities", {"capabilities": [CAPABILITY]})

    run(path, test)


def test_unknown_and_malformed_events_are_ignored(path: Path) -> None:
    async def test(qemu: Qemu, follower: Follower) -> None:
        await follower.noted(1)
        qemu.tell("RTC_CHANGE", "MIGRATION", "MIGRATION_PASS", "SHUTDOWN")
        assert await follower.noted(2) == [CONNECTED, QemuShutdown()]

    run(path, test)


def test_events_that_come_before_the_state_is_known_follow_it(path: Path) -> None:
    async def test(qemu: Qemu, follower: Follower) -> None:
        def status() -> object:
            qemu.tell("MIGRATION", status="setup")
            qemu.tell("SHUTDOWN")
            return ANSWERS["query-status"]

        qemu.answers["query-status"] = status
        setup = MigrationStatus(MigrationState.SETUP)
        assert await follower.noted(3) == [CONNECTED, setup, QemuShutdown()]

    run(path, test)


def test_flood_before_the_state_is_known_ends_the_connection(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(qemu: Qemu, follower: Follower) -> None:
        def flood() -> object:
            qemu.tell(*["SHUTDOWN"] * (qmp.EARLY_EVENTS_MAX + 1))
            qemu.answers["query-status"] = ANSWERS["query-status"]
            return ANSWERS["query-status"]

        qemu.answers["query-status"] = flood
        assert await follower.noted(1) == [CONNECTED]
        assert "more than 1000 events before QEMU's state is known" in caplog.text

    run(path, test)


def test_library_keeps_no_event(path: Path) -> None:
    """It would keep them all, for ever."""

    async def test(qemu: Qemu, follower: Follower) -> None:
        await follower.noted(1)
        qemu.tell(*["SHUTDOWN", "RTC_CHANGE"] * 50)
        await follower.noted(51)
        assert follower._client is not None
        assert follower._client.events.history == ()
        assert follower._client.events.empty()

    run(path, test)


def test_consumer_that_fails_gets_the_next_event(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        delivered: list[QemuEvent] = []
        connected, done = asyncio.Event(), asyncio.Event()

        def deliver(event: QemuEvent) -> None:
            delivered.append(event)
            (connected if event == CONNECTED else done).set()
            raise RuntimeError

        async with asyncio.timeout(TIMEOUT_S), qemu_on(path) as qemu, asyncio.TaskGroup() as group:
            follower = QemuFollower(path, deliver)
            task = group.create_task(follower.run())
            await connected.wait()
            qemu.tell("SHUTDOWN")
            await done.wait()
            task.cancel()
        assert delivered == [CONNECTED, QemuShutdown(), QemuDisconnected()]
        assert "was not handled" in caplog.text

    asyncio.run(test())


@pytest.mark.parametrize(
    ("capabilities", "enabled"),
    [([CAPABILITY], True), ([CAPABILITY | {"state": False}], False), ([], False), ({}, False)],
)
def test_capability_that_cannot_be_set(path: Path, capabilities: object, enabled: bool) -> None:
    """As while a migration runs: then it is of use if somebody has set it before."""

    async def test(_: Qemu, follower: Follower) -> None:
        (connected,) = await follower.noted(1)
        assert isinstance(connected, QemuConnected)
        assert connected.capabilities.events is enabled

    answers = {
        "migrate_set_capabilities": REFUSED,
        "query_migrate_capabilities": capabilities,
    }
    run(path, test, **answers)


REFUSED = VtpmdError("There's a migration process in progress")
COLO = {"capability": "x-colo", "state": True}


def asked(qemu: Qemu, name: str) -> int:
    """Return how often QEMU was asked."""
    return sum(each == name for each, _ in qemu.asked)


def test_events_that_are_switched_off_are_switched_on_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "WATCH_INTERVAL_S", 0.01)

    async def test(qemu: Qemu, follower: Follower) -> None:
        assert await follower.noted(1) == [CONNECTED]
        before = asked(qemu, "query-migrate-capabilities")
        qemu.answers["query-migrate-capabilities"] = [CAPABILITY]
        while asked(qemu, "query-migrate-capabilities") < before + 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        sets = asked(qemu, "migrate-set-capabilities")
        qemu.answers["query-migrate-capabilities"] = []
        while asked(qemu, "migrate-set-capabilities") == sets:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert follower.events == [CONNECTED]

    run(path, test)


def test_qemu_is_asked_while_it_tells_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a connection in the middle of a migration; events are on as soon as it allows."""
    monkeypatch.setattr(qmp, "WATCH_INTERVAL_S", 0.01)

    async def test(qemu: Qemu, follower: Follower) -> None:
        active = MigrationStatus(MigrationState.ACTIVE)
        assert (await follower.noted(1))[0] != CONNECTED
        qemu.answers["query-migrate"] = {"status": "active"}
        assert (await follower.noted(2))[1:] == [active]
        qemu.answers["query-migrate"] = {"status": "completed"}
        completed = MigrationStatus(MigrationState.COMPLETED)
        assert (await follower.noted(3))[2:] == [completed]
        qemu.answers["migrate-set-capabilities"] = {}
        assert (await follower.noted(4))[3:] == [EVENTS_ON]
        assert caplog.text.count("gives no migration events, it is asked every") == 1

    run(path, test, migrate_set_capabilities=REFUSED)


def test_migration_that_ended_before_events_were_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is why they could be switched on, and nobody else will tell of it."""
    monkeypatch.setattr(qmp, "WATCH_INTERVAL_S", 100.0)

    async def test(qemu: Qemu, follower: Follower) -> None:
        await follower.noted(1)
        qemu.answers |= {"query-migrate": {"status": "cancelled"}, "migrate-set-capabilities": {}}
        await follower.look()
        cancelled = MigrationStatus(MigrationState.CANCELLED)
        assert follower.events[1:] == [EVENTS_ON, cancelled]

    run(path, test, migrate_set_capabilities=REFUSED, query_migrate={"status": "active"})


def test_answer_that_an_event_has_overtaken_is_dropped(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else has switched the events on, and QEMU's migration has gone on."""

    monkeypatch.setattr(qmp, "WATCH_INTERVAL_S", 100.0)

    async def test(qemu: Qemu, follower: Follower) -> None:
        await follower.noted(1)

        def answer() -> object:
            qemu.tell("MIGRATION", status="completed")
            return {"status": "active", "ram": {"dirty-sync-count": 2}}

        qemu.answers["query-migrate"] = answer
        assert await follower.look() == EVENTS_OFF
        assert follower.events[1:] == [MigrationStatus(MigrationState.COMPLETED)]

    run(path, test, migrate_set_capabilities=REFUSED)


def test_capabilities_are_asked_for_when_a_migration_is_set_up(path: Path) -> None:
    """Somebody may have set them in this moment; later nobody can, and QEMU is left in peace."""

    async def test(qemu: Qemu, follower: Follower) -> None:
        await follower.noted(1)
        asked_before = len(qemu.asked)
        qemu.answers["query-migrate-capabilities"] = [CAPABILITY, COLO]
        qemu.tell("MIGRATION", status="setup")
        qemu.tell("MIGRATION", status="active")
        colo = Capabilities(events=True, colo=True)
        events = await follower.noted(4)
        assert events[1:] == [
            MigrationStatus(MigrationState.SETUP),
            MigrationStatus(MigrationState.ACTIVE),
            colo,
        ]
        assert len(qemu.asked) == asked_before + 1
        assert await follower.look() == colo
        assert len(follower.events) == 4

    run(path, test)


def test_qemu_that_tells_of_its_migration_is_not_asked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(qemu: Qemu, follower: Follower) -> None:
        await follower.noted(1)
        qemu.tell("MIGRATION", status="active")
        await follower.noted(2)
        monkeypatch.setattr(qmp, "WATCH_INTERVAL_S", 0.0)
        follower._look_now.set()
        count = asked(qemu, "query-migrate-capabilities")
        while asked(qemu, "query-migrate-capabilities") == count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert asked(qemu, "query-migrate-capabilities") == count + 1

    run(path, test)


@pytest.mark.parametrize(
    "answer",
    [
        {"query-uuid": {"UUID": "x"}},
        {"query-uuid": {}},
        {"query-uuid": []},
        {"query-status": {"running": 1, "status": "running"}},
        {"query-status": {"running": True, "status": "Running\n"}},
        {"query-status": None},
        {"query-migrate": {"status": 1}},
        {"query-migrate": {"status": "a b"}},
        {"query-uuid": VtpmdError("not now")},
    ],
    ids=str,
)
def test_qemu_that_answers_nonsense_is_not_followed(
    path: Path, answer: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again, said once, and followed when it answers well."""

    async def test(qemu: Qemu, follower: Follower) -> None:
        qemu.answers |= answer
        while len(qemu.asked) < 4 * len(ANSWERS):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert follower.events == []
        assert caplog.text.count("cannot follow QEMU on") == 1
        qemu.answers = dict(ANSWERS)
        assert await follower.noted(1) == [CONNECTED]

    run(path, test)


def test_message_may_reach_its_limit_and_no_further(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest of an answer is a few dozen bytes."""

    async def test(qemu: Qemu, follower: Follower) -> None:
        def answer(padding_bytes: int) -> object:
            return {"running": True, "status": "running", "padding": "x" * padding_bytes}

        qemu.answers["query-status"] = answer(qmp.MESSAGE_BYTES_MAX)
        while "cannot follow QEMU on" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert follower.events == []
        qemu.answers["query-status"] = answer(qmp.MESSAGE_BYTES_MAX - 200)
        assert await follower.noted(1) == [CONNECTED]

    run(path, test)


def test_query_migration(path: Path) -> None:
    async def test(qemu: Qemu, follower: Follower) -> None:
        await follower.noted(1)
        assert await follower.query_migration() == Migration(status=MigrationState.NONE)
        ram = {"dirty-sync-count": 3, "transferred": 4, "remaining": -1, "total": True}
        qemu.answers["query-migrate"] = {
            "status": "failed",
            "ram": ram | {"dirty-pages-rate": 2**70},
            "setup-time": 5,
            "downtime": "6",
            "error-desc": "a\nb" + "c" * 1000,
        }
        migration = await follower.query_migration()
        assert migration == Migration(
            status=MigrationState.FAILED,
            passes=3,
            ram_transferred_bytes=4,
            setup_ms=5,
            error="a b" + "c" * (qmp.TEXT_LENGTH_MAX - 3),
        )
        qemu.answers["query-migrate"] = {"status": "active", "ram": 5}
        assert (await follower.query_migration()).ram_total_bytes is None
        qemu.answers["query-migrate"] = []
        with pytest.raises(QmpError, match="no object"):
            await follower.query_migration()

    run(path, test)


def test_command_that_qemu_refuses(path: Path) -> None:
    async def test(_: Qemu, follower: Follower) -> None:
        await follower.noted(1)
        with pytest.raises(QemuCommandFailed) as raised:
            await follower.execute("query-fail")
        assert raised.value.error_class == "GenericError"
        text = str(raised.value)
        assert text.startswith(f"QEMU on {path} refuses query-fail: no, ?[31mxxx")
        assert len(text) < len(str(path)) + qmp.TEXT_LENGTH_MAX + 50
        with pytest.raises(QemuCommandFailed) as raised:
            await follower.execute("query-there-is-none", {"a": 1})
        assert raised.value.error_class == "CommandNotFound"

    run(path, test)


def test_command_that_is_not_answered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(_: Qemu, follower: Follower) -> None:
        await follower.noted(1)
        monkeypatch.setattr(qmp, "COMMAND_TIMEOUT_S", 0.05)
        with pytest.raises(QmpError, match=r"query-nothing: .* has not answered within"):
            await follower.execute("query-nothing")

    run(path, test)


def test_command_without_a_qemu(path: Path) -> None:
    """The error says the actual and the required state."""

    async def test() -> None:
        follower = Follower(path)
        with pytest.raises(QemuNotConnected, match="is IDLE, must be FOLLOWING"):
            await follower.execute("query-status")
        async with following(path) as follower:
            await asyncio.sleep(0)
            with pytest.raises(QemuNotConnected, match="is WAITING, must be FOLLOWING"):
                await follower.query_migration()

    asyncio.run(test())


def test_command_while_qemu_goes_away(path: Path) -> None:
    """It ends, and so does the next one; the next QEMU is followed."""

    async def test() -> None:
        async with following(path) as follower:
            async with qemu_on(path) as qemu:
                await follower.noted(1)
                asking = asyncio.create_task(follower.execute("query-nothing"))
                while qemu.asked[-1][0] != "query-nothing":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            with pytest.raises(QemuNotConnected, match="went away before it answered"):
                await asking
            await follower.noted(2)
            with pytest.raises(QemuNotConnected):
                await follower.execute("query-status")
            async with qemu_on(path):
                events = await follower.noted(3)
            assert events[:3] == [CONNECTED, QemuDisconnected(), CONNECTED]

    asyncio.run(test())


def test_follower_that_ends_in_the_moment_in_which_qemu_does(path: Path) -> None:
    """As when both are stopped at once: no error is left that nobody has asked for."""
    forgotten: list[object] = []

    async def test() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: forgotten.append(context["message"]))

        def deliver(event: QemuEvent) -> None:
            if isinstance(event, QemuDisconnected):
                task.cancel()
            else:
                connected.set()

        connected = asyncio.Event()
        async with asyncio.timeout(TIMEOUT_S):
            async with qemu_on(path):
                task = asyncio.create_task(QemuFollower(path, deliver).run())
                await connected.wait()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(test())
    gc.collect()
    assert forgotten == []


QUERIES = ("query-uuid", "query-migrate", "query-status")
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'
NEGOTIATED = GREETING + b'{"return": {}}\n'


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"hello\n",
        b"\xff\n",
        b"[]\n",
        b"{}\n",
        b'{"QMP": 1}\n',
        b"[" * 100_000 + b"\n",
        b'{"QMP": ' + b"9" * 5000 + b"}\n",
        b"x" * (3 * qmp.MESSAGE_BYTES_MAX),
        GREETING + b'{"error": {}}\n',
        GREETING + b"\n",
        NEGOTIATED + b"\xff\n",
        NEGOTIATED + b"\n",
        NEGOTIATED + b'{"id": []}\n',
        NEGOTIATED + b'{"error": {}}\n',
        NEGOTIATED + b'{"event": "STOP"}\n' * 10,
        NEGOTIATED + b'{"return": ' + b"[" * 100_000 + b"\n",
        NEGOTIATED + b'{"return": "' + b"x" * (3 * qmp.MESSAGE_BYTES_MAX) + b'"}\n',
    ],
    ids=lambda said: f"{said[-40:]!r}",
)
def test_bytes_that_are_no_qmp(
    path: Path, said: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever they are: the connection is given up, and the QEMU after it is followed."""
    monkeypatch.setattr(qmp, "COMMAND_TIMEOUT_S", 1.0)
    caplog.set_level(logging.WARNING)

    async def test() -> None:
        left = asyncio.Event()

        async def talk(reader: StreamReader, writer: StreamWriter) -> None:
            try:
                writer.write(said)
                if not said:
                    writer.write_eof()
                while await reader.read(1000):
                    pass
            except ConnectionError:
                pass  # it was given up before all was said
            finally:
                writer.close()
                left.set()

        async with following(path) as follower:
            with listen(path) as listening:
                server = await asyncio.start_unix_server(talk, sock=listening.dup())
                await left.wait()
                server.close()
            async with qemu_on(path):
                assert await follower.noted(1) == [CONNECTED]

    asyncio.run(test())
    records = [record for record in caplog.records if record.name != "vtpmd.daemon.qmp"]
    assert not records
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("said", [b"hello\n", b"\xff\n", b"x" * (3 * qmp.MESSAGE_BYTES_MAX), b""])
def test_bytes_that_are_no_qmp_from_a_qemu_that_is_followed(path: Path, said: bytes) -> None:
    """The events before them are delivered, the connection is given up."""

    async def talk(reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(NEGOTIATED)
        await reader.read(1000)  # qmp_capabilities
        for name in ("query-migrate-capabilities", "migrate-set-capabilities", *QUERIES):
            request = Message(await reader.read(1000))
            assert request["execute"] == name
            answer = Message({"return": ANSWERS[name], "id": request["id"]})
            writer.write(bytes(answer) + b"\n")
        writer.write(b'{"event": "SHUTDOWN"}\n' + said)
        writer.close()

    async def test() -> None:
        async with following(path) as follower:
            with listen(path) as listening:
                server = await asyncio.start_unix_server(talk, sock=listening.dup())
                events = await follower.noted(3)
                server.close()
        assert events[:3] == [CONNECTED, QemuShutdown(), QemuDisconnected()]

    asyncio.run(test())


def test_monitor_without_a_greeting(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when another program is connected: it is said once, and tried again."""
    monkeypatch.setattr(qmp, "GREETING_TIMEOUT_S", 0.05)

    async def test() -> None:
        async with following(path) as follower:
            with listen(path) as listening:
                listening.setblocking(False)
                for _ in range(3):
                    client, _ = await asyncio.get_running_loop().sock_accept(listening)
                    with client:
                        assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
            assert follower.events == []
        assert caplog.text.count("no greeting") == 1

    asyncio.run(test())


def test_path_too_long_for_a_socket() -> None:
    Follower(Path("/" + "x" * 106))
    with pytest.raises(QmpError, match="at most 107 bytes"):
        Follower(Path("/" + "x" * 107))


@pytest.mark.parametrize("there", [False, True])
def test_place_that_cannot_be_connected_to(
    path: Path, there: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody there yet is no reason to say anything; what will not pass by itself is said once."""
    if there:
        path.write_text("a file")

    async def test() -> None:
        async with following(path / "below"):
            await asyncio.sleep(0.1)

    asyncio.run(test())
    assert [record.getMessage() for record in caplog.records] == (
        [
            f"cannot follow QEMU on {path / 'below'}: Not a directory; give vtpmd a monitor that "
            "it may connect to; trying again"
        ]
        if there
        else []
    )
