"""The follower, the view and a real QEMU: what it tells of a guest and of its migration, in order.

The guest has 16 MiB, a BIOS and nothing to boot: what is followed is QEMU. Migrations that must not
end by themselves are held back by their bandwidth.
"""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest
from qemu.qmp import QMPClient

from tests.harness import versions
from tests.harness.qemu_listener import Told
from vtpmd.daemon import qmp
from vtpmd.daemon.qemu import QemuView, follow
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
    QemuCommandFailed,
    QemuFollower,
    QemuNotConnected,
)
from vtpmd.errors import VtpmdError
from vtpmd.testing.program import Program

TIMEOUT_S = 60.0
NOWHERE = "exec:cat >/dev/null"
# The guest's memory, some hundred KiB that are not zero, would take minutes.
HELD_BACK_BYTES_S = 4096

NONE = MigrationState.NONE
SETUP = MigrationStatus(MigrationState.SETUP)
ACTIVE = MigrationStatus(MigrationState.ACTIVE)
DEVICE = MigrationStatus(MigrationState.DEVICE)
COMPLETED = MigrationStatus(MigrationState.COMPLETED)
FAILING = MigrationStatus(MigrationState.FAILING)
FAILED = MigrationStatus(MigrationState.FAILED)
CANCELLING = MigrationStatus(MigrationState.CANCELLING)
CANCELLED = MigrationStatus(MigrationState.CANCELLED)
STOPPED, RESUMED = GuestStopped(), GuestResumed()

# What only some versions say.
SAVING = [DEVICE] if versions.qemu().device else []
GIVING_UP = [FAILING] if versions.qemu().failing else []


class Follower(QemuFollower):
    """A follower that notes what it is told; times are checked to be there, and left out."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, self._note)
        self._events: list[QemuEvent] = []
        self._noted = asyncio.Event()

    def _note(self, event: QemuEvent) -> None:
        if isinstance(event, GuestStopped | GuestResumed):
            assert event.timestamp_us is not None
            event = type(event)()
        self._events.append(event)
        self._noted.set()

    async def until(self, last: QemuEvent | type[QemuEvent]) -> list[QemuEvent]:
        """Wait for an event, or for one of a type; return all since the last call, and it."""
        while True:
            for end, event in enumerate(self._events, 1):
                if last in (event, type(event)):
                    found, self._events = self._events[:end], self._events[end:]
                    return found
            self._noted.clear()
            await self._noted.wait()

    async def connected(self) -> QemuConnected:
        """Wait for the first event, which must be that QEMU is connected, and return it."""
        (event,) = await self.until(QemuConnected)
        assert isinstance(event, QemuConnected)
        return event

    async def migrate(self, uri: str, *, held_back: bool = False) -> None:
        """Begin a migration."""
        bandwidth = HELD_BACK_BYTES_S if held_back else 1 << 30
        await self.execute("migrate-set-parameters", {"max-bandwidth": bandwidth})
        await self.execute("migrate", {"uri": uri})


class Lab:
    """QEMUs and their followers, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.qemus: list[Program] = []

    def qemu(self, monitor: str, *arguments: str) -> Program:
        """Start a QEMU with a monitor of that name in the directory."""
        command = "qemu-system-x86_64 -accel tcg -machine pc -m 16 -nodefaults -display none"
        monitor = f"unix:{self.directory / monitor},server=on,wait=off"
        program = Program("qemu", [*command.split(), "-qmp", monitor, *arguments], self.directory)
        self.qemus.append(program)
        return program

    @asynccontextmanager
    async def following(self, monitor: str) -> AsyncIterator[Follower]:
        """Follow the QEMU that has or will have that monitor, at most TIMEOUT_S."""
        follower = Follower(self.directory / monitor)
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
            task = group.create_task(follower.run())
            yield follower
            task.cancel()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with TemporaryDirectory(prefix="vtpmd-", dir="/tmp") as directory:
        lab = Lab(Path(directory))
        yield lab
        for program in lab.qemus:
            program.kill()


def test_qemu_that_starts_later_and_is_restarted(lab: Lab) -> None:
    async def test() -> None:
        async with lab.following("qmp") as follower:
            await asyncio.sleep(2 * qmp.POLL_INTERVAL_S)
            first, second = str(uuid4()), str(uuid4())
            lab.qemu("qmp", "-uuid", first)
            connected = QemuConnected(
                uuid=first,
                running=True,
                status="running",
                migration_status=NONE,
                capabilities=Capabilities(events=True, colo=False),
            )
            assert await follower.connected() == connected
            await follower.execute("stop")
            await follower.execute("cont")
            await follower.execute("quit")
            ending = [STOPPED, RESUMED, QemuShutdown(), QemuDisconnected()]
            assert await follower.until(QemuDisconnected()) == ending
            lab.qemu("qmp", "-uuid", second, "-S")
            again = await follower.connected()
            assert (again.uuid, again.running, again.status) == (second, False, "prelaunch")

    asyncio.run(test())


def test_migration(lab: Lab) -> None:
    async def test() -> None:
        lab.qemu("qmp")
        async with lab.following("qmp") as follower:
            await follower.connected()
            await follower.migrate(NOWHERE)
            assert await follower.until(COMPLETED) == [SETUP, ACTIVE, STOPPED, *SAVING, COMPLETED]
            migration = await follower.query_migration()
            assert migration.status is MigrationState.COMPLETED
            assert migration.passes is not None
            assert migration.passes >= 2
            assert migration.ram_total_bytes is not None
            assert migration.ram_total_bytes >= 16 << 20
            assert None not in (migration.downtime_ms, migration.total_ms, migration.setup_ms)
            assert migration.error is None

    asyncio.run(test())


def test_both_sides_of_a_migration(lab: Lab) -> None:
    """The destination has its own events; its guest is resumed there, not at the source."""

    async def test() -> None:
        wire = f"unix:{lab.directory / 'wire'}"
        lab.qemu("source")
        lab.qemu("destination", "-incoming", wire)
        async with lab.following("source") as source, lab.following("destination") as destination:
            await source.connected()
            waiting = await destination.connected()
            assert (waiting.running, waiting.status) == (False, "inmigrate")
            assert waiting.capabilities.events
            await source.migrate(wire)
            await source.until(COMPLETED)
            assert await destination.until(COMPLETED) == [ACTIVE, RESUMED, COMPLETED]

    asyncio.run(test())


def test_cancelled_migration(lab: Lab) -> None:
    """The guest was never stopped; the next migration goes through."""

    async def test() -> None:
        lab.qemu("qmp")
        async with lab.following("qmp") as follower:
            await follower.connected()
            await follower.migrate(NOWHERE, held_back=True)
            assert await follower.until(ACTIVE) == [SETUP, ACTIVE]
            assert (await follower.query_migration()).status is MigrationState.ACTIVE
            await follower.execute("migrate_cancel")
            assert await follower.until(CANCELLED) == [CANCELLING, CANCELLED]
            await follower.migrate(NOWHERE)
            assert (await follower.until(STOPPED))[0] == SETUP
            await follower.until(COMPLETED)

    asyncio.run(test())


def test_migration_that_cannot_begin(lab: Lab) -> None:
    async def test() -> None:
        lab.qemu("qmp")
        async with lab.following("qmp") as follower:
            await follower.connected()
            await follower.migrate(f"unix:{lab.directory / 'nobody'}")
            assert await follower.until(FAILED) == [SETUP, *GIVING_UP, FAILED]
            assert "No such file" in str((await follower.query_migration()).error)

    asyncio.run(test())


def test_migration_whose_destination_is_killed(lab: Lab) -> None:
    """QEMU says that it failed; the guest, which was not stopped yet, runs on."""

    async def test() -> None:
        wire = f"unix:{lab.directory / 'wire'}"
        lab.qemu("source")
        destination = lab.qemu("destination", "-incoming", wire)
        async with lab.following("source") as source:
            async with lab.following("destination") as follower:
                await follower.connected()
            await source.connected()
            await source.migrate(wire, held_back=True)
            await source.until(ACTIVE)
            destination.kill()
            assert await source.until(FAILED) == [*GIVING_UP, FAILED]
            status = await source.execute("query-status")
            assert isinstance(status, dict)
            assert status["running"]

    asyncio.run(test())


def test_qemu_that_is_killed_while_it_migrates(lab: Lab) -> None:
    """Its last event is that it is gone; commands say so, and its successor is followed."""

    async def test() -> None:
        qemu = lab.qemu("qmp")
        async with lab.following("qmp") as follower:
            await follower.connected()
            await follower.migrate(NOWHERE, held_back=True)
            await follower.until(ACTIVE)
            qemu.kill()
            assert await follower.until(QemuDisconnected()) == [QemuDisconnected()]
            with pytest.raises(QemuNotConnected):
                await follower.query_migration()
            lab.qemu("qmp")
            assert (await follower.connected()).migration_status is NONE

    asyncio.run(test())


def test_savevm_is_no_active_migration(lab: Lab) -> None:
    """QEMU tells of it as of a migration, but for the state that says that it pre-copies."""
    disk = lab.directory / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)

    async def test() -> None:
        lab.qemu("qmp", "-drive", f"if=none,id=snapshots,format=qcow2,file={disk}")
        async with lab.following("qmp") as follower:
            await follower.connected()
            save = {"command-line": "savevm one"}
            assert await follower.execute("human-monitor-command", save) == ""
            assert await follower.until(RESUMED) == [STOPPED, SETUP, COMPLETED, RESUMED]

    asyncio.run(test())


async def status_of_migration(client: QMPClient) -> object:
    answer = await client.execute("query-migrate")
    assert isinstance(answer, dict)
    return answer.get("status")


@pytest.mark.parametrize("enabled", [False, True])
def test_qemu_that_migrates_already(lab: Lab, enabled: bool) -> None:
    """Then the capability cannot be set; the consumer is told whether there will be events."""
    monitor = lab.directory / "qmp"
    lab.qemu("qmp").connect(monitor).close()

    async def test() -> None:
        if enabled:
            async with lab.following("qmp") as follower:
                await follower.connected()
        client = QMPClient()
        await client.connect(str(monitor))
        await client.execute("migrate-set-parameters", {"max-bandwidth": HELD_BACK_BYTES_S})
        await client.execute("migrate", {"uri": NOWHERE})
        # There is no event to wait for, unless the capability is enabled.
        while await status_of_migration(client) != "active":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await client.disconnect()
        async with lab.following("qmp") as follower:
            connected = await follower.connected()
            assert connected.migration_status is MigrationState.ACTIVE
            assert connected.capabilities.events is enabled

    asyncio.run(test())


def test_monitor_that_another_program_uses(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and QEMU is followed when the other leaves; until then it is left in peace."""
    monkeypatch.setattr(qmp, "GREETING_TIMEOUT_S", 0.2)
    monitor = lab.directory / "qmp"
    lab.qemu("qmp").connect(monitor).close()

    async def test() -> None:
        client = QMPClient()
        await client.connect(str(monitor))
        async with lab.following("qmp") as follower:
            while "no greeting; if another program" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            with pytest.raises(QemuNotConnected):
                await follower.execute("query-status")
            await client.execute("query-status")
            await client.disconnect()
            monkeypatch.setattr(qmp, "GREETING_TIMEOUT_S", TIMEOUT_S)
            await follower.connected()

    asyncio.run(test())


def test_errors_of_qemu(lab: Lab) -> None:
    async def test() -> None:
        lab.qemu("qmp")
        async with lab.following("qmp") as follower:
            await follower.connected()
            with pytest.raises(QemuCommandFailed, match="no-such has not been found") as raised:
                await follower.execute("no-such")
            assert raised.value.error_class == "CommandNotFound"
            with pytest.raises(QemuCommandFailed, match="refuses migrate") as raised:
                await follower.execute("migrate", {"uri": "no-such:uri"})
            assert raised.value.error_class == "GenericError"

    asyncio.run(test())


class Viewed:
    """A QEMU that a view follows on one monitor, while the test commands it on another."""

    def __init__(self, view: QemuView, told: Told, client: QMPClient) -> None:
        self.view = view
        self.told = told
        self._client = client

    async def execute(self, command: str, **arguments: object) -> object:
        return await self._client.execute(command, arguments)

    async def set(self, **states: bool) -> None:
        """Set capabilities, whose names have ``_`` for ``-``."""
        capabilities = [
            {"capability": name.replace("_", "-"), "state": state} for name, state in states.items()
        ]
        await self.execute("migrate-set-capabilities", capabilities=capabilities)

    async def has_events(self) -> bool:
        answer = await self.execute("query-migrate-capabilities")
        assert isinstance(answer, list)
        return {"capability": "events", "state": True} in answer

    async def migrate(self, uri: str, *, held_back: bool = False) -> None:
        await self.bandwidth(HELD_BACK_BYTES_S if held_back else 1 << 30)
        await self.execute("migrate", uri=uri)

    async def bandwidth(self, bytes_s: int) -> None:
        await self.execute("migrate-set-parameters", **{"max-bandwidth": bytes_s})


@asynccontextmanager
async def commanded(lab: Lab, name: str, *arguments: str) -> AsyncIterator[QMPClient]:
    """Start a QEMU with a monitor of that name, and be connected to a second one."""
    second = lab.directory / f"{name}-2"
    program = lab.qemu(name, "-qmp", f"unix:{second},server=on,wait=off", *arguments)
    program.connect(second).close()
    client = QMPClient()
    await client.connect(str(second))
    try:
        yield client
    finally:
        await client.disconnect()


@asynccontextmanager
async def viewed(lab: Lab, name: str, client: QMPClient) -> AsyncIterator[Viewed]:
    """View a QEMU, at most TIMEOUT_S; all that it has begun is ended then."""
    told = Told()
    view = QemuView(told, asked_for=True)
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        task = group.create_task(follow(lab.directory / name, view))
        while view.word == "not-reachable":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        yield Viewed(view, told, client)
        task.cancel()
    assert told.take()[-1] == "disconnected"
    assert view.word == "not-reachable"


AWAY = ["migration_began", "guest_stopped", "migration_ended"]


def test_view_of_both_sides(lab: Lab) -> None:
    """A destination that listens does not receive; when its guest has run, it is a source."""

    async def test() -> None:
        wire = f"unix:{lab.directory / 'wire'}"
        async with (
            commanded(lab, "source") as first,
            commanded(lab, "destination", "-incoming", "defer") as second,
            viewed(lab, "source", first) as source,
            viewed(lab, "destination", second) as destination,
        ):
            await destination.execute("migrate-incoming", uri=wire)
            await destination.view.check_can_arm()  # what QEMU said before has been read then
            assert destination.told.take() == []
            await source.migrate(wire)
            came = ["receiving(True)", "guest_resumed", "receiving(False)"]
            assert await destination.told.until("receiving(False)") == came
            assert await source.told.until("migration_ended") == AWAY
            await destination.migrate(NOWHERE)
            assert await destination.told.until("migration_ended") == AWAY

    asyncio.run(test())


@pytest.mark.parametrize("paused", [False, True])
def test_view_of_a_destination_in_the_middle(lab: Lab, paused: bool) -> None:
    """The monitor is reached when the stream comes in already."""

    async def test() -> None:
        wire = f"unix:{lab.directory / 'wire'}"
        options = ["-S"] if paused else []
        async with (
            commanded(lab, "source") as first,
            commanded(lab, "destination", "-incoming", wire, *options) as second,
            viewed(lab, "source", first) as source,
        ):
            await source.migrate(wire, held_back=True)
            while await status_of_migration(second) != "active":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            async with viewed(lab, "destination", second) as destination:
                assert destination.told.take() == ["receiving(True)"]
                assert destination.view.is_receiving
                assert not destination.view.is_migrating
                await source.bandwidth(1 << 30)
                calls = await destination.told.until("receiving(False)")
                assert calls == ([] if paused else ["guest_resumed"]) + ["receiving(False)"]
                await source.told.until("migration_ended")

    asyncio.run(test())


def test_view_of_post_copy(lab: Lab) -> None:
    """The guest is stopped, and its state asked for, in a state of its own."""

    async def test() -> None:
        wire = f"unix:{lab.directory / 'wire'}"
        async with (
            commanded(lab, "source") as first,
            commanded(lab, "destination", "-incoming", "defer") as second,
            viewed(lab, "source", first) as source,
            viewed(lab, "destination", second) as destination,
        ):
            for side in (source, destination):
                await side.set(postcopy_ram=True, return_path=True)
            await destination.execute("migrate-incoming", uri=wire)
            await source.migrate(wire, held_back=True)
            await source.told.until("migration_began")
            await source.execute("migrate-start-postcopy")
            await source.told.until("guest_stopped")
            await source.bandwidth(1 << 30)
            await source.told.until("migration_ended")
            calls = await destination.told.until("receiving(False)")
            assert calls == ["receiving(True)", "guest_resumed", "receiving(False)"]

    asyncio.run(test())


def test_view_of_savevm(lab: Lab) -> None:
    disk = lab.directory / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    drive = f"if=none,id=snapshots,format=qcow2,file={disk}"

    async def test() -> None:
        async with (
            commanded(lab, "qmp", "-drive", drive) as client,
            viewed(lab, "qmp", client) as qemu,
        ):
            for command in ("savevm one", "loadvm one"):
                await qemu.execute("human-monitor-command", **{"command-line": command})
                assert await qemu.told.until("guest_resumed") == ["guest_stopped", "guest_resumed"]

    asyncio.run(test())


def test_view_of_a_migration_without_events(lab: Lab) -> None:
    """QEMU is asked, and told to say more as soon as it lets itself be."""

    async def test() -> None:
        async with commanded(lab, "qmp") as client:
            await client.execute("migrate-set-parameters", {"max-bandwidth": HELD_BACK_BYTES_S})
            await client.execute("migrate", {"uri": NOWHERE})
            while await status_of_migration(client) != "active":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            async with viewed(lab, "qmp", client) as qemu:
                assert qemu.view.word == "without-events"
                assert qemu.view.is_migrating
                await qemu.execute("migrate_cancel")
                assert (await qemu.told.until("migration_ended"))[0] == "migration_began"
                while qemu.view.word != "following":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                qemu.told.take()
                await qemu.migrate(NOWHERE)
                assert await qemu.told.until("migration_ended") == AWAY

    asyncio.run(test())


def test_capabilities_that_somebody_else_sets(lab: Lab) -> None:
    """Events are on again by themselves, and when somebody arms; x-colo keeps from arming."""

    async def test() -> None:
        async with commanded(lab, "qmp") as client, viewed(lab, "qmp", client) as qemu:
            await qemu.set(events=False)
            while not await qemu.has_events():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await qemu.set(events=False)
            await qemu.view.check_can_arm()
            assert await qemu.has_events()
            await qemu.set(x_colo=True, return_path=True)  # a later QEMU has it only with that
            await qemu.told.until("colo_seen")
            with pytest.raises(VtpmdError, match="x-colo is on"):
                await qemu.view.check_can_arm()
            await qemu.set(x_colo=False)
            await qemu.view.check_can_arm()

    asyncio.run(test())
