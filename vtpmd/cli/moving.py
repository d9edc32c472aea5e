"""Move a guest and its vTPM: conduct vtpmd's session and QEMU's migration, in order.

    return-path ──► arm ──► a peer holds a base, or it fell back ──► QEMU's migrate ──► disarm
                                        │                                  │
                            a refusal that whole blobs            interrupted, or refused:
                              meet, too: no migration                migrate_cancel

The guest's migration comes first: what is wrong with the vTPM's session is told, and QEMU's stream
carries whole blobs then, unless the destination has said why it cannot take those either. What
became of all that is in moving_verdict. Import this module only to move a guest: asyncio and
qemu.qmp are slow to import.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from vtpmd.cli.management_client import (
    ManagementClient,
    ManagementError,
    ManagementRefusal,
    Session,
    connect,
    line,
)
from vtpmd.cli.moving_verdict import Report, Seen, verdict
from vtpmd.config import Address
from vtpmd.daemon.qemu_events import MigrationState, QemuConnected, QemuEvent
from vtpmd.daemon.qmp import (
    COMMAND_TIMEOUT_S,
    Migration,
    QemuCommandFailed,
    QemuFollower,
    QmpError,
)
from vtpmd.errors import VtpmdError

# How often QEMU is asked; it is what a person can read.
POLL_INTERVAL_S: Final = 0.1
# To connect and send a base takes some ms; vtpmd itself waits 10 s for a peer that is not there.
ARM_TIMEOUT_S: Final = 30.0
# A monitor that another program uses says nothing.
QEMU_TIMEOUT_S: Final = 5.0
# From QEMU's last word to the session's: a destination that was granted says soon that it runs.
OUTCOME_TIMEOUT_S: Final = 15.0
# QEMU says that a migration has failed before it lets the guest go on.
GO_ON_TIMEOUT_S: Final = 15.0
# vtpmd disconnects the client that asks nothing the longest, when it needs room for another.
SIGN_OF_LIFE_INTERVAL_S: Final = 10.0
# Rates are those of the last second.
RATE_WINDOW_S: Final = 1.0

ENDED: Final = {MigrationState.COMPLETED, MigrationState.FAILED, MigrationState.CANCELLED}
IDLE: Final = {MigrationState.NONE, *ENDED}
# What QEMU writes to and never reads from: it would wait there for the destination's word for ever,
# with the guest stopped, and not even migrate_cancel ends that (QEMU 7.2, migration.c:
# await_return_path_close_on_source).
ONE_WAY: Final = ("exec", "fd", "file")
# Why a destination refuses what QEMU's stream would bring it as well.
UNFIT: Final = frozenset(
    ("version", "tpm-version", "libtpms-version", "uuid", "lineage", "limit", "state", "storage")
)
# How vtpmd follows QEMU, where it will not see QEMU migrate.
BLIND: Final = {
    "not-reachable": "no QEMU answers on vtpmd's --qmp: give it another monitor of this QEMU",
    "without-events": "QEMU tells vtpmd nothing of its migrations: it has no migration events",
}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to move, and where to."""

    manage: Path  # the management socket of the source's vtpmd
    to: Address  # where the destination's vtpmd waits
    qmp: Path  # a monitor of the source's QEMU
    uri: str  # where the destination's QEMU waits, as QEMU's migrate takes it
    whole_blobs: bool = False  # also after a refusal that these will probably meet, too


class Progress(NamedTuple):
    """How far a move is. Numbers of bytes; rates are a second's."""

    guest: Migration | None = None  # None: the vTPM's first round comes before
    ram_rate_bytes: int = 0
    rounds: int = 0
    round_bytes: int = 0  # of the last round
    vtpm_bytes: int = 0  # of all rounds
    vtpm_rate_bytes: int = 0
    tail_bytes: int | None = None
    whole_blobs: bool = False


T = TypeVar("T")
Show = Callable[[Progress], None]
Warn = Callable[[str], None]


async def move(order: Order, show: Show, warn: Warn) -> Report:
    """Move a guest and its vTPM; return what happened.

    ``show`` is called with each step forward, ``warn`` with a line for people. When the task is
    cancelled, QEMU's migration is, then the session; the report says what became of them. Before
    there is anything to undo, CancelledError is raised. Raises VtpmdError when QEMU or vtpmd cannot
    be asked, or QEMU refuses: then QEMU's migration was not started. QEMU keeps return-path.
    """
    _check_uri(order.uri)
    mover = _Mover(order, show, warn)
    async with AsyncExitStack() as stack:
        vtpmd = await stack.enter_async_context(connect(order.manage, mover.deliver))
        await _check_is_free(vtpmd)
        qemu = await stack.enter_async_context(_qemu(order.qmp))
        return await mover.run(vtpmd, qemu)


def _check_uri(uri: str) -> None:
    transport, _, _ = uri.partition(":")
    if transport in ONE_WAY:
        raise VtpmdError(
            f"{transport}: carries no word back from the destination, and without that nobody "
            "knows whether the guest runs there: give a --uri with tcp: or unix:"
        )


async def _check_is_free(vtpmd: ManagementClient) -> None:
    session = await vtpmd.query_migration()
    if session.outcome == "handed-over":
        raise VtpmdError("this vtpmd has handed its vTPM over: it runs at the destination")
    if session.outcome == "granted":
        raise VtpmdError(
            "this vtpmd has granted its vTPM to a destination that has not said that it runs "
            "there: see there; `vtpmd owner DIR --ask` asks it"
        )
    if session.state not in ("none", "ended"):
        raise VtpmdError(
            f"vtpmd has a session already, which is {session.state}: another migration needs it; "
            "if none does, end it with migrate-disarm on the management socket"
        )


@asynccontextmanager
async def _qemu(path: Path) -> AsyncIterator[QemuFollower]:
    """Connect to QEMU's monitor, for migration events too. Raises VtpmdError."""
    connected: asyncio.Future[QemuConnected] = asyncio.get_running_loop().create_future()

    def deliver(event: QemuEvent) -> None:
        if isinstance(event, QemuConnected) and not connected.done():
            connected.set_result(event)

    _check_is_socket(path)
    follower = QemuFollower(path, deliver)
    task = asyncio.create_task(follower.run())
    try:
        try:
            async with asyncio.timeout(QEMU_TIMEOUT_S):
                state = await connected
        except TimeoutError as error:
            raise VtpmdError(
                f"cannot ask QEMU on {path}: no answer; a monitor serves one client, which may be "
                "vtpmd itself: start QEMU with one more -qmp"
            ) from error
        if state.migration_status not in IDLE:
            raise VtpmdError(
                f"QEMU on {path} is migrating its guest already ({state.migration_status}); wait "
                "for that to end, or cancel it"
            )
        yield follower
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _check_is_socket(path: Path) -> None:
    # A follower would wait for it to appear.
    if not path.is_socket():
        raise VtpmdError(
            f"cannot ask QEMU on {path}: there is no such socket; start QEMU with -qmp "
            f"unix:{path},server=on,wait=off"
        )


class _Mover:
    """One move, from arming to the report."""

    def __init__(self, order: Order, show: Show, warn: Warn) -> None:
        self._order = order
        self._show = show
        self._warn = warn
        self._progress = Progress()
        self._ram_rate, self._vtpm_rate = Rate(), Rate()
        self._session: Session | None = None  # as events tell it; None: no session is ours
        self._changed = asyncio.Event()
        self._started = False  # QEMU was told to migrate
        self._seen = Seen()

    async def run(self, vtpmd: ManagementClient, qemu: QemuFollower) -> Report:
        """Move; connected to both. Raises VtpmdError before QEMU was told to migrate."""
        try:
            await self._prepare(vtpmd, qemu)
            if self._seen.refused is None:
                await self._migrate(vtpmd, qemu)
        except asyncio.CancelledError:
            self._see(interrupted=True)
            if self._started:
                await self._cancel(vtpmd, qemu)
        finally:
            await _to_its_end(self._conclude(vtpmd, qemu))
        return verdict(self._seen)

    def deliver(self, name: str, data: Mapping[str, object]) -> None:
        """Take an event of vtpmd's."""
        if self._session is None:
            return
        match name, data:
            case "VTPM_ARMED", {"qemu": str(qemu)}:
                self._note(state="armed", qemu=line(qemu))
            case "VTPM_ROUND", {"bytes": int(record_bytes)}:
                self._count_round(record_bytes)
            case "VTPM_FREEZE", {"tail-bytes": int(tail_bytes)}:
                self._note(tail_bytes=tail_bytes)
                self._step(tail_bytes=tail_bytes)
            case "VTPM_FALL_BACK", {"reason": str(reason)}:
                self._note(state="ended", outcome="fall-back", reason=line(reason))
                self._fall_back(line(reason), data.get("refusal"))
            case "VTPM_GO_ON", {"reason": str(reason)}:
                self._note(state="ended", outcome="go-on", reason=line(reason))
            case "VTPM_GRANTED", _:
                self._note(outcome="granted")
            case "VTPM_HANDED_OVER", _:
                self._note(outcome="handed-over")

    def _see(self, **changes: Any) -> None:
        self._seen = replace(self._seen, **changes)

    def _note(self, **changes: Any) -> None:
        assert self._session is not None  # noqa: S101 - deliver() has looked
        self._session = replace(self._session, **changes)
        self._changed.set()

    def _count_round(self, record_bytes: int) -> None:
        total_bytes = self._progress.vtpm_bytes + record_bytes
        self._step(
            rounds=self._progress.rounds + 1,
            round_bytes=record_bytes,
            vtpm_bytes=total_bytes,
            vtpm_rate_bytes=self._vtpm_rate.of(total_bytes, time.monotonic()),
        )

    def _step(self, **changes: Any) -> None:
        self._progress = self._progress._replace(**changes)
        self._show(self._progress)

    def _fall_back(self, reason: str, refusal: object = None) -> None:
        """QEMU's stream would carry the vTPM's whole state; say so, unless it must not."""
        if self._seen.whole_blobs is not None:
            return
        self._see(whole_blobs=reason)
        if refusal in UNFIT and not self._order.whole_blobs:
            advice = "whole blobs would meet that, too; who knows better gives --whole-blobs"
            self._see(refused=f"{reason}; {advice}")
            return
        self._warn(f"the vTPM's whole state goes into QEMU's stream: {reason}")
        self._step(whole_blobs=True)

    async def _until(self, is_so: Callable[[Session], bool], timeout_s: float) -> bool:
        """Wait until the session is as wanted; return False if it is not in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._session is not None and not is_so(self._session):
                    self._changed.clear()
                    await self._changed.wait()
                return True
        return False

    async def _prepare(self, vtpmd: ManagementClient, qemu: QemuFollower) -> None:
        """Have QEMU listen to the destination, and arm a session. Raises VtpmdError."""
        capability = {"capability": "return-path", "state": True}
        try:
            await qemu.execute("migrate-set-capabilities", {"capabilities": [capability]})
        except QemuCommandFailed as error:
            raise VtpmdError(
                f"{error}; without return-path nobody hears whether the guest runs at the "
                "destination: switch off in QEMU what stands against it"
            ) from error
        self._session = Session(state="connecting", phases_us={}, digests={})
        try:
            await vtpmd.execute("migrate-arm", to=str(self._order.to))
        except ManagementRefusal as error:
            self._session = None
            self._fall_back(str(error))
            return
        if not await self._until(lambda session: session.state != "connecting", ARM_TIMEOUT_S):
            self._fall_back(f"{self._order.to} has not taken it within {ARM_TIMEOUT_S:.0f} s")
            await vtpmd.execute("migrate-disarm")
        if (blindness := BLIND.get(self._session.qemu or "")) is not None:
            self._warn(f"the vTPM's whole state will go into QEMU's stream: {blindness}")

    async def _migrate(self, vtpmd: ManagementClient, qemu: QemuFollower) -> None:
        """Have QEMU migrate, and wait until it has ended. Raises VtpmdError if it refuses."""
        self._started = True
        try:
            await qemu.execute("migrate", {"uri": self._order.uri})
        except QemuCommandFailed:
            raise
        except QmpError as error:
            self._see(qemu_lost=str(error))
            return
        await self._watch(vtpmd, qemu)

    async def _watch(self, vtpmd: ManagementClient, qemu: QemuFollower) -> None:
        """Wait until QEMU's migration has ended, or QEMU cannot be asked."""
        try:
            self._see(guest=await self._follow(vtpmd, qemu))
        except QmpError as error:
            self._see(qemu_lost=str(error))

    async def _follow(self, vtpmd: ManagementClient, qemu: QemuFollower) -> Migration:
        """Return how QEMU's migration has ended; give it up on a refusal. Raises QmpError."""
        is_cancelled = False
        asked_s = time.monotonic()
        while True:
            guest = await qemu.query_migration()
            now_s = time.monotonic()
            self._step(
                guest=guest,
                ram_rate_bytes=self._ram_rate.of(guest.ram_transferred_bytes or 0, now_s),
                vtpm_rate_bytes=self._vtpm_rate.of(self._progress.vtpm_bytes, now_s),
            )
            if guest.status in IDLE:
                return guest
            if self._seen.refused is not None and not is_cancelled:
                is_cancelled = True
                await qemu.execute("migrate_cancel")
            if now_s - asked_s > SIGN_OF_LIFE_INTERVAL_S:
                asked_s = now_s
                with suppress(ManagementError):
                    await vtpmd.execute("query-version")
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _cancel(self, vtpmd: ManagementClient, qemu: QemuFollower) -> None:
        """Have QEMU give up, before the session ends; it may be too late."""
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                await qemu.execute("migrate_cancel")
                await self._watch(vtpmd, qemu)
        except TimeoutError:
            lost = f"has not cancelled its migration within {COMMAND_TIMEOUT_S:.0f} s"
            self._see(qemu_lost=f"QEMU on {self._order.qmp} {lost}; see query-migrate there")
        except QmpError as error:
            self._see(qemu_lost=str(error))

    async def _conclude(self, vtpmd: ManagementClient, qemu: QemuFollower) -> None:
        """See what became of the guest here and of the session; disarm what is still armed."""
        guest = self._seen.guest
        moved = guest is not None and guest.status is MigrationState.COMPLETED
        if guest is not None and not moved:
            await self._see_guest(qemu)
        if self._session is None:
            return
        try:
            # QEMU may have said first that it has ended: events wait until no guest does.
            self._session = await vtpmd.query_migration()
            if self._session.outcome == "fall-back":
                reason = self._session.reason or "vtpmd does not say why"
                self._fall_back(reason, self._session.refusal)
            elif self._session.tail_bytes is not None:
                wanted = {"handed-over", "go-on"} if moved else {"go-on"}
                await self._until(lambda session: session.outcome in wanted, OUTCOME_TIMEOUT_S)
            self._session = await vtpmd.query_migration()
            self._step(tail_bytes=self._session.tail_bytes)  # events may come after the answer
        except ManagementError as error:
            self._see(vtpmd_lost=str(error))
        self._see(vtpm=self._session)
        self._session = None  # what is said of a session that is ended here is nothing new
        with suppress(ManagementError):
            await vtpmd.execute("migrate-disarm")

    async def _see_guest(self, qemu: QemuFollower) -> None:
        """See whether the guest goes on here, which is after QEMU said that its migration failed.

        Nothing is seen when QEMU goes away.
        """
        with suppress(TimeoutError, QmpError):
            async with asyncio.timeout(GO_ON_TIMEOUT_S):
                while (run_state := await _run_state(qemu)) == "finish-migrate":  # noqa: ASYNC110
                    await asyncio.sleep(POLL_INTERVAL_S)
                self._see(run_state=run_state)


async def _run_state(qemu: QemuFollower) -> str | None:
    answer = await qemu.execute("query-status")
    return line(answer["status"]) if isinstance(answer, dict) and "status" in answer else None


async def _to_its_end(work: Coroutine[object, object, T]) -> T:
    """Wait for what takes only so long, and must not be cut short by an interrupt."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        return await task


class Rate:
    """How fast a number of bytes grows."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def of(self, total_bytes: int, now_s: float) -> int:
        """Take the number as it is now; return what came in a second, over the last one."""
        self._samples.append((now_s, total_bytes))
        while now_s - self._samples[0][0] > RATE_WINDOW_S and len(self._samples) > 2:
            self._samples.popleft()
        then_s, before_bytes = self._samples[0]
        return round((total_bytes - before_bytes) / (now_s - then_s)) if now_s > then_s else 0
