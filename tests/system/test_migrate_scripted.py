"""`vtpmd migrate` with real QEMUs, and a vtpmd that says what a test makes it say.

What a session of real vtpmds does is in test_migrate_cli.py. Here is what they do seldom, or never
at the moment that matters: it must be told from a guest that has moved.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.harness.lab import Lab
from vtpmd.cli import moving
from vtpmd.cli.moving import Order, Progress, move
from vtpmd.cli.moving_report import heading
from vtpmd.cli.moving_verdict import Ending, Report
from vtpmd.config import Address
from vtpmd.daemon.listener import listen
from vtpmd.daemon.management import CLIENTS_MAX, Argument, Arguments, ManagementServer
from vtpmd.daemon.qemu_events import MigrationState
from vtpmd.errors import VtpmdError
from vtpmd.testing.migration import GIVEN_UP
from vtpmd.testing.program import Program

TIMEOUT_S = 60.0
SHORT_S = 0.2  # for what does not come
SLOW_BYTES_S = 100  # a page at a time, so that a migration outlives a test on a busy host
TAIL_BYTES = 96
QEMU = ["qemu-system-x86_64", "-accel", "tcg", "-m", "16", "-nodefaults", "-no-user-config"]
UNFIT = ["version", "tpm-version", "libtpms-version", "uuid", "limit", "state", "storage"]


class Vtpmd:
    """A management socket; what it says of a session is the test's."""

    def __init__(self, server: ManagementServer) -> None:
        self._server = server
        self.commands: list[str] = []
        self.on_arm: Callable[[], None] = lambda: None
        self.stop: Callable[[], object]
        self.session: dict[str, Any] = {
            "state": "none",
            "outcome": None,
            "reason": None,
            "refusal": None,
            "qemu": "following",
            "peer-qemu": "following",
            "session": "00" * 16,
            "rounds": [],
            "tail-bytes": None,
            "phases-us": {},
            "digests": {},
        }
        server.register("migrate-arm", {"to": Argument(str)}, self._arm)
        server.register("migrate-disarm", {}, self._disarm)
        server.register("query-migration", {}, self._query_migration)

    def armed(self, qemu: str = "following") -> None:
        self.session |= {"state": "one-of-many", "qemu": qemu}
        self._server.broadcast("VTPM_ARMED", {"qemu": qemu, "peer-qemu": None})

    def falls_back(self, refusal: str | None) -> None:
        reason = f"the destination says {refusal}"
        self.session |= {"state": "ended", "outcome": "fall-back", "reason": reason}
        self.session |= {"refusal": refusal}
        self._server.broadcast("VTPM_FALL_BACK", {"reason": reason, "refusal": refusal})

    def freezes(self) -> None:
        self.session["tail-bytes"] = TAIL_BYTES
        self._server.broadcast("VTPM_FREEZE", {"tail-bytes": TAIL_BYTES})

    def grants(self) -> None:
        self.session["outcome"] = "granted"
        self._server.broadcast("VTPM_GRANTED", {"to": "host:1"})

    def hands_over(self) -> None:
        self.session["outcome"] = "handed-over"
        self._server.broadcast("VTPM_HANDED_OVER", {"to": "host:1"})

    async def _arm(self, _: Arguments) -> object:
        self.commands.append("migrate-arm")
        self.session["state"] = "connecting"
        self.on_arm()
        return {}

    async def _disarm(self, _: Arguments) -> object:
        self.commands.append("migrate-disarm")
        return {}

    async def _query_migration(self, _: Arguments) -> object:
        return {"state": "none"} if self.session["state"] == "none" else self.session


class Stage:
    """Two QEMUs without a guest to speak of, a vtpmd, and what was shown of a move."""

    def __init__(self, lab: Lab, vtpmd: Vtpmd, manage: Path) -> None:
        self.vtpmd = vtpmd
        self.uri = f"unix:{lab.new_path('stream')}"
        self._manage = manage
        self._monitor = lab.new_path("monitor")
        self._own_monitor = lab.new_path("monitor")
        self._source = self._start(lab, "source", self._monitor, self._own_monitor)
        self._destination_monitor = lab.new_path("monitor")
        incoming = ["-incoming", self.uri]
        self._start(lab, "destination", self._destination_monitor, arguments=incoming)
        self.source, self.destination = QMPClient(), QMPClient()
        self.warnings: list[tuple[str, Progress | None]] = []  # and how far the move was
        self.shown: Progress | None = None
        self.on_progress: Callable[[Progress], None] = lambda _: None

    def _start(
        self, lab: Lab, name: str, *monitors: Path, arguments: list[str] | None = None
    ) -> Program:
        directory = lab.new_path(name)
        directory.mkdir()
        options = [f"unix:{monitor},server=on,wait=off" for monitor in monitors]
        words = [word for option in options for word in ("-qmp", option)]
        program = Program(
            "qemu", [*QEMU, "-display", "none", *words, *(arguments or [])], directory
        )
        lab.close_at_end(_Killed(program))
        program.connect(monitors[0]).close()
        return program

    async def connect(self) -> None:
        """Connect to both monitors. A QEMU that greets waits for its guest already."""
        await self.source.connect(str(self._own_monitor))
        await self.destination.connect(str(self._destination_monitor))

    async def disconnect(self) -> None:
        for client in (self.source, self.destination):
            await hang_up(client)

    async def connect_to_vtpmd(self) -> QMPClient:
        client = QMPClient()
        await client.connect(str(self._manage))
        return client

    def kill_source(self) -> None:
        self._source.kill()

    async def qemu(self, command: str, **arguments: object) -> Any:
        return await self.source.execute(command, arguments)

    async def migration_status(self) -> str | None:
        status: str | None = (await self.qemu("query-migrate")).get("status")
        return status

    async def slow_down(self) -> None:
        await self.qemu("migrate-set-parameters", **{"max-bandwidth": SLOW_BYTES_S})

    def move(self, *, whole_blobs: bool = False) -> Coroutine[object, object, Report]:
        order = Order(
            manage=self._manage,
            to=Address("host", 1),
            qmp=self._monitor,
            uri=self.uri,
            whole_blobs=whole_blobs,
        )
        return move(order, self._show, lambda text: self.warnings.append((text, self.shown)))

    def _show(self, progress: Progress) -> None:
        self.shown = progress
        self.on_progress(progress)


class _Killed:
    def __init__(self, program: Program) -> None:
        self.close = program.kill


@asynccontextmanager
async def staged(lab: Lab) -> AsyncIterator[Stage]:
    manage = lab.new_path("manage")
    async with AsyncExitStack() as stack:
        listening = stack.enter_context(listen(manage))
        server = ManagementServer(listening, on_quit=lambda: None)
        await stack.enter_async_context(asyncio.timeout(TIMEOUT_S))
        serving = asyncio.create_task(server.serve())
        stage = Stage(lab, Vtpmd(server), manage)
        stage.vtpmd.stop = serving.cancel
        await stage.connect()
        try:
            yield stage
        finally:
            await stage.disconnect()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


async def hang_up(client: QMPClient) -> None:
    """Disconnect, also where the other side has done so."""
    with suppress(EOFError):
        await client.disconnect()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what has no event; the test's own time limit ends it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


Test = Callable[[Stage], Coroutine[object, object, None]]
Run = Callable[[Test], None]


@pytest.fixture
def run(lab: Lab) -> Run:
    """Run a coroutine on a stage."""

    async def play(test: Test) -> None:
        async with staged(lab) as stage:
            await test(stage)

    return lambda test: asyncio.run(play(test))


def when_active(stage: Stage, act: Callable[[], object]) -> None:
    """Act once, when QEMU's migration is under way."""
    has_acted = False

    def look(progress: Progress) -> None:
        nonlocal has_acted
        guest = progress.guest
        if not has_acted and guest is not None and guest.status is MigrationState.ACTIVE:
            has_acted = True
            act()

    stage.on_progress = look


def test_return_path_is_switched_on_and_stays(run: Run) -> None:
    async def test(stage: Stage) -> None:
        stage.vtpmd.on_arm = lambda: stage.vtpmd.falls_back("busy")
        report = await stage.move()
        assert report.ending is Ending.WHOLE_BLOBS
        assert report.reason == "the destination says busy"
        status = await stage.destination.execute("query-status")
        assert isinstance(status, dict) and status["running"]
        capabilities = await stage.qemu("query-migrate-capabilities")
        assert {"capability": "return-path", "state": True} in capabilities

    run(test)


def test_nothing_is_begun_where_qemu_refuses_return_path(run: Run) -> None:
    async def test(stage: Stage) -> None:
        snapshot = {"capability": "background-snapshot", "state": True}
        await stage.qemu("migrate-set-capabilities", capabilities=[snapshot])
        with pytest.raises(VtpmdError, match="without return-path nobody hears whether"):
            await stage.move()
        assert "migrate-arm" not in stage.vtpmd.commands
        assert await stage.migration_status() is None

    run(test)


@pytest.mark.parametrize("refusal", [None, "busy", "not-allowed"])
def test_whole_blobs_are_moved_where_the_session_alone_is_refused(
    run: Run, refusal: str | None
) -> None:
    async def test(stage: Stage) -> None:
        stage.vtpmd.on_arm = lambda: stage.vtpmd.falls_back(refusal)
        assert (await stage.move()).ending is Ending.WHOLE_BLOBS
        ((warning, _),) = stage.warnings
        assert warning.endswith(f"goes into QEMU's stream: the destination says {refusal}")

    run(test)


@pytest.mark.parametrize("refusal", UNFIT)
def test_qemu_is_not_started_where_whole_blobs_would_be_refused_too(run: Run, refusal: str) -> None:
    """Unless somebody who knows says so."""

    async def test(stage: Stage) -> None:
        stage.vtpmd.on_arm = lambda: stage.vtpmd.falls_back(refusal)
        report = await stage.move()
        assert (report.ending, report.guest, stage.warnings) == (Ending.FAILED, None, [])
        assert report.vtpm is not None and report.vtpm.refusal == refusal
        assert heading(report).startswith(
            f"the guest has not moved: the destination says {refusal}"
        )
        assert heading(report).endswith("gives --whole-blobs")
        assert await stage.migration_status() is None

        stage.vtpmd.session["state"] = "none"
        assert (await stage.move(whole_blobs=True)).ending is Ending.WHOLE_BLOBS

    run(test)


def test_refusal_while_qemu_migrates_cancels_that(run: Run) -> None:
    async def test(stage: Stage) -> None:
        await stage.slow_down()
        stage.vtpmd.on_arm = stage.vtpmd.armed
        when_active(stage, lambda: stage.vtpmd.falls_back("storage"))
        report = await stage.move()
        assert (report.ending, report.run_state) == (Ending.FAILED, "running")
        said = "the guest has not moved, the guest is running at the source: the destination says"
        assert heading(report).startswith(f"{said} storage; ")
        assert await stage.migration_status() in GIVEN_UP

    run(test)


def test_refusal_while_qemu_migrates_is_a_warning_for_those_who_know(run: Run) -> None:
    async def test(stage: Stage) -> None:
        stage.vtpmd.on_arm = stage.vtpmd.armed
        when_active(stage, lambda: stage.vtpmd.falls_back("storage"))
        await stage.slow_down()
        moving_on = asyncio.create_task(stage.move(whole_blobs=True))
        await until(lambda: bool(stage.warnings))
        await stage.qemu("migrate-set-parameters", **{"max-bandwidth": 1 << 30})
        assert (await moving_on).ending is Ending.WHOLE_BLOBS

    run(test)


def tail_moves(stage: Stage, act: Callable[[], None]) -> None:
    """Arm; have QEMU get a tail as soon as it migrates, and do what follows."""

    def is_shown(progress: Progress) -> None:
        if progress.guest is not None and stage.vtpmd.session["tail-bytes"] is None:
            stage.vtpmd.freezes()
            act()

    stage.vtpmd.on_arm = stage.vtpmd.armed
    stage.on_progress = is_shown


def test_word_of_the_destination_is_waited_for(run: Run) -> None:
    """QEMU has completed, and the vTPM is granted; it has moved when the TPM is said to run."""

    async def test(stage: Stage) -> None:
        tail_moves(stage, stage.vtpmd.grants)
        moving_on = asyncio.create_task(stage.move())
        await until(lambda: is_completed(stage.shown))
        done, _ = await asyncio.wait([moving_on], timeout=10 * moving.POLL_INTERVAL_S)
        assert not done
        stage.vtpmd.hands_over()
        report = await moving_on
        assert (report.ending, report.reason) == (Ending.TAIL, None)

    run(test)


def is_completed(progress: Progress | None) -> bool:
    """Whether QEMU was seen to have completed its migration."""
    guest = None if progress is None else progress.guest
    return guest is not None and guest.status is MigrationState.COMPLETED


@pytest.mark.parametrize("outcome", ["granted", None])
def test_nothing_is_called_moved_without_a_word_of_the_destination(
    run: Run, monkeypatch: pytest.MonkeyPatch, outcome: str | None
) -> None:
    monkeypatch.setattr(moving, "OUTCOME_TIMEOUT_S", SHORT_S)

    async def test(stage: Stage) -> None:
        tail_moves(stage, stage.vtpmd.grants if outcome else lambda: None)
        report = await stage.move()
        assert report.guest is not None and report.guest.status is MigrationState.COMPLETED
        assert report.ending is Ending.UNKNOWN
        assert "moved" not in heading(report)
        assert ("`vtpmd owner DIR --ask` asks it" in heading(report)) is (outcome == "granted")

    run(test)


@pytest.mark.parametrize("qemu", ["not-reachable", "without-events"])
def test_vtpmd_that_sees_no_migration_is_warned_about_before_it_begins(run: Run, qemu: str) -> None:
    async def test(stage: Stage) -> None:
        stage.vtpmd.on_arm = lambda: stage.vtpmd.armed(qemu)
        report = await stage.move()
        assert report.ending is Ending.WHOLE_BLOBS
        assert report.vtpm is not None and report.vtpm.qemu == qemu
        ((warning, shown),) = stage.warnings
        assert warning.startswith("the vTPM's whole state will go into QEMU's stream: ")
        assert shown is None or shown.guest is None

    run(test)


def test_qemu_that_goes_away_has_not_moved_its_guest_nor_kept_it(run: Run) -> None:
    async def test(stage: Stage) -> None:
        await stage.slow_down()
        stage.vtpmd.on_arm = stage.vtpmd.armed
        when_active(stage, stage.kill_source)
        report = await stage.move()
        assert (report.ending, report.guest) == (Ending.UNKNOWN, None)
        assert heading(report).endswith("see on both sides where the guest runs")

    run(test)


def test_vtpmd_that_goes_away_leaves_it_open_what_moved(run: Run) -> None:
    async def test(stage: Stage) -> None:
        def stop(progress: Progress) -> None:
            if progress.guest is not None:
                stage.vtpmd.stop()

        stage.vtpmd.on_arm = stage.vtpmd.armed
        stage.on_progress = stop
        report = await stage.move()
        assert report.ending is Ending.UNKNOWN
        assert "QEMU's migration has completed, but vtpmd" in heading(report)

    run(test)


def test_vtpmd_does_not_take_a_long_move_for_an_idle_client(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it needs room for another, somebody else has asked for nothing for longer."""
    monkeypatch.setattr(moving, "SIGN_OF_LIFE_INTERVAL_S", 0.0)

    async def test(stage: Stage) -> None:
        await stage.slow_down()
        active = asyncio.Event()
        stage.vtpmd.on_arm = stage.vtpmd.armed
        when_active(stage, active.set)
        moving_on = asyncio.create_task(stage.move())
        await active.wait()
        others = [await stage.connect_to_vtpmd() for _ in range(CLIENTS_MAX - 1)]
        steps = 0

        def count(_: Progress) -> None:
            nonlocal steps
            steps += 1

        stage.on_progress = count
        await until(lambda: steps > 2)  # a sign of life comes after each
        others.append(await stage.connect_to_vtpmd())
        moving_on.cancel()
        assert (await moving_on).ending is Ending.INTERRUPTED
        for other in others:
            await hang_up(other)

    run(test)


def test_interrupt_before_qemu_began(run: Run) -> None:
    async def test(stage: Stage) -> None:
        begun = asyncio.Event()
        stage.vtpmd.on_arm = begun.set
        moving_on = asyncio.create_task(stage.move())
        await begun.wait()
        moving_on.cancel()
        report = await moving_on
        assert heading(report) == "interrupted before QEMU began to migrate"
        assert "migrate-disarm" in stage.vtpmd.commands
        assert await stage.migration_status() is None

    run(test)


@pytest.mark.parametrize("granted", [False, True])
def test_interrupt_while_qemu_migrates(
    run: Run, monkeypatch: pytest.MonkeyPatch, granted: bool
) -> None:
    """A vTPM that was granted is not said to be here."""
    monkeypatch.setattr(moving, "OUTCOME_TIMEOUT_S", SHORT_S)

    async def test(stage: Stage) -> None:
        await stage.slow_down()
        active = asyncio.Event()
        stage.vtpmd.on_arm = stage.vtpmd.armed
        when_active(stage, active.set)
        moving_on = asyncio.create_task(stage.move())
        await active.wait()
        if granted:
            stage.vtpmd.freezes()
            stage.vtpmd.grants()
        moving_on.cancel()
        report = await moving_on
        assert report.run_state == "running"
        assert report.ending is (Ending.UNKNOWN if granted else Ending.INTERRUPTED)
        if granted:
            assert "the destination has not given the vTPM back" in heading(report)
        else:
            assert heading(report).startswith("interrupted, the guest is running at the source: ")

    run(test)
