"""Move a guest and its vTPM: conduct vtpmd's session and QEMU's migration, in order.

    arm ──► a peer holds a base, or it fell back ──► QEMU's migrate ──► it has ended ──► disarm
                                                          │
                                           interrupted: migrate_cancel

The guest's migration comes first: whatever is wrong with the vTPM's session is told, and QEMU's
stream carries whole blobs then. Import this module only to move a guest: asyncio and qemu.qmp are
slow to import.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from vtpmd.cli.management_client import ManagementClient, ManagementError, Session, connect, line
from vtpmd.config import Address
from vtpmd.daemon.qemu_events import MigrationState, QemuConnected, QemuEvent
from vtpmd.daemon.qmp import COMMAND_TIMEOUT_S, Migration, QemuFollower
from vtpmd.errors import VtpmdError

# How often QEMU is asked; it is what a person can read.
POLL_INTERVAL_S: Final = 0.1
# To connect and send a base takes some ms; vtpmd itself waits 10 s for a peer that is not there.
ARM_TIMEOUT_S: Final = 30.0
# A monitor that another program uses says nothing.
QEMU_TIMEOUT_S: Final = 5.0
# From QEMU's last word to the session's: the destination waits up to 10 s for the grant.
OUTCOME_TIMEOUT_S: Final = 15.0
# The destination says how long its start took a round trip after that; 2 s are plenty.
STARTED_POLLS_MAX: Final = 20
STARTED_PHASE: Final = "destination: start the TPM"
# Rates are those of the last second.
RATE_WINDOW_S: Final = 1.0

ENDED: Final = {MigrationState.COMPLETED, MigrationState.FAILED, MigrationState.CANCELLED}
IDLE: Final = {MigrationState.NONE, *ENDED}


class Ending(StrEnum):
    """What became of the guest and its vTPM."""

    TAIL = "tail"  # both moved; QEMU's stream carried a tail
    WHOLE_BLOBS = "whole-blobs"  # both moved; QEMU's stream carried all of the vTPM's state
    FAILED = "failed"  # the guest goes on at the source
    INTERRUPTED = "interrupted"  # the same, as somebody wished


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to move, and where to."""

    manage: Path  # the management socket of the source's vtpmd
    to: Address  # where the destination's vtpmd waits
    qmp: Path  # a monitor of the source's QEMU
    uri: str  # where the destination's QEMU waits, as QEMU's migrate takes it


@dataclass(frozen=True, kw_only=True)
class Report:
    """What happened."""

    ending: Ending
    reason: str | None = None  # for whole blobs, or a failure
    guest: Migration | None = None  # None: QEMU's migration was not started
    vtpm: Session | None = None  # None: there was no session


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
    be asked, or QEMU refuses: the guest goes on where it is.
    """
    mover = _Mover(order, show, warn)
    async with AsyncExitStack() as stack:
        vtpmd = await stack.enter_async_context(connect(order.manage, mover.deliver))
        await _check_is_free(vtpmd)
        qemu = await stack.enter_async_context(_qemu(order.qmp))
        return await mover.run(vtpmd, qemu)


async def _check_is_free(vtpmd: ManagementClient) -> None:
    session = await vtpmd.query_migration()
    if session.outcome == "handed-over":
        raise VtpmdError(
            "this vtpmd has handed its vTPM over: the guest is at the destination, move it there"
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
        self._fell_back: str | None = None  # why
        self._started = False  # QEMU was told to migrate

    async def run(self, vtpmd: ManagementClient, qemu: QemuFollower) -> Report:
        """Move; connected to both. Raises VtpmdError."""
        guest, interrupted = None, False
        try:
            await self._arm(vtpmd)
            guest = await self._migrate(qemu)
        except asyncio.CancelledError:
            interrupted = True
            guest = await self._cancel(qemu)
        finally:
            vtpm = await _to_its_end(self._conclude(vtpmd, guest))
        return _report(guest, vtpm, self._fell_back, interrupted=interrupted)

    def deliver(self, name: str, data: Mapping[str, object]) -> None:
        """Take an event of vtpmd's."""
        if self._session is None:
            return
        match name, data:
            case "VTPM_ARMED", _:
                self._note(state="armed")
            case "VTPM_ROUND", {"bytes": int(record_bytes)}:
                self._count_round(record_bytes)
            case "VTPM_FREEZE", {"tail-bytes": int(tail_bytes)}:
                self._note(tail_bytes=tail_bytes)
                self._step(tail_bytes=tail_bytes)
            case "VTPM_FALL_BACK", {"reason": str(reason)}:
                self._note(state="ended", outcome="fall-back", reason=line(reason))
                self._fall_back(line(reason))
            case "VTPM_GO_ON", {"reason": str(reason)}:
                self._note(state="ended", outcome="go-on", reason=line(reason))
            case "VTPM_HANDED_OVER", _:
                self._note(state="granted", outcome="handed-over")

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

    def _fall_back(self, reason: str) -> None:
        """The guest moves all the same, its vTPM's whole state in QEMU's stream."""
        if self._fell_back is not None:
            return
        self._fell_back = reason
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

    async def _arm(self, vtpmd: ManagementClient) -> None:
        """Arm a session; return when QEMU may begin."""
        self._session = Session(state="connecting", phases_us={}, digests={})
        try:
            await vtpmd.execute("migrate-arm", to=str(self._order.to))
        except ManagementError as error:
            self._session = None
            self._fall_back(str(error))
            return
        if not await self._until(lambda session: session.state != "connecting", ARM_TIMEOUT_S):
            await self._disarm(vtpmd)
            self._fall_back(f"{self._order.to} has not taken it within {ARM_TIMEOUT_S:.0f} s")

    async def _migrate(self, qemu: QemuFollower) -> Migration:
        """Have QEMU migrate, and wait until it has ended. Raises VtpmdError."""
        self._started = True
        await qemu.execute("migrate", {"uri": self._order.uri})
        return await self._watch(qemu)

    async def _watch(self, qemu: QemuFollower) -> Migration:
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
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _cancel(self, qemu: QemuFollower) -> Migration | None:
        """Have QEMU give up, before the session ends; it may be too late. Raises VtpmdError."""
        if not self._started:
            return None
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                await qemu.execute("migrate_cancel")
                return await self._watch(qemu)
        except TimeoutError as error:
            raise VtpmdError(
                f"QEMU on {self._order.qmp} has not cancelled its migration within "
                f"{COMMAND_TIMEOUT_S:.0f} s; see query-migrate there"
            ) from error

    async def _conclude(self, vtpmd: ManagementClient, guest: Migration | None) -> Session | None:
        """Wait for the session's outcome, disarm what is still armed, and return what it was."""
        if self._session is None:
            return None
        moved = guest is not None and guest.status is MigrationState.COMPLETED
        with suppress(ManagementError):
            # QEMU may have said first that it has ended: events wait until no guest does.
            self._session = await vtpmd.query_migration()
        if self._session.outcome == "fall-back":
            self._fall_back(line(self._session.reason or "vtpmd does not say why"))
        if self._session.tail_bytes is not None:
            wanted = {"handed-over", "go-on"} if moved else {"go-on"}
            await self._until(lambda session: session.outcome in wanted, OUTCOME_TIMEOUT_S)
        try:
            if moved and self._session.outcome == "handed-over":
                await _wait_until_started(vtpmd)
            session = await vtpmd.query_migration()
        except ManagementError as error:
            self._warn(f"what the vTPM's session did is known only in part: {error}")
            session = self._session
        await self._disarm(vtpmd)
        return session

    async def _disarm(self, vtpmd: ManagementClient) -> None:
        """End the session if it has not ended; what it says of that is nothing new."""
        self._session = None
        with suppress(ManagementError):
            await vtpmd.execute("migrate-disarm")


async def _to_its_end(work: Coroutine[object, object, T]) -> T:
    """Wait for what takes only so long, and must not be cut short by an interrupt."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        return await task


async def _wait_until_started(vtpmd: ManagementClient) -> None:
    """Wait until the destination has said how long its start took, or says no more."""
    for _ in range(STARTED_POLLS_MAX):
        if STARTED_PHASE in (await vtpmd.query_migration()).phases_us:
            return
        await asyncio.sleep(POLL_INTERVAL_S)


def _report(
    guest: Migration | None, vtpm: Session | None, fell_back: str | None, *, interrupted: bool
) -> Report:
    reason = None
    if guest is None or guest.status is not MigrationState.COMPLETED:
        ending = Ending.INTERRUPTED if interrupted else Ending.FAILED
        reason = None if guest is None else _failure(guest, vtpm)
    elif vtpm is None or vtpm.tail_bytes is None:
        ending = Ending.WHOLE_BLOBS
        reason = fell_back or (
            "QEMU took it although a session was armed: vtpmd did not see QEMU migrate; is its "
            "--qmp another monitor of this QEMU?"
        )
    elif vtpm.outcome == "handed-over":
        ending = Ending.TAIL
    else:
        ending = Ending.FAILED
        reason = (
            f"the destination has not taken the vTPM ({vtpm.reason or 'no word from it'}); see its "
            "QEMU, and let the guest go on here with QEMU's cont"
        )
    return Report(ending=ending, reason=reason, guest=guest, vtpm=vtpm)


def _failure(guest: Migration, vtpm: Session | None) -> str:
    if guest.status is MigrationState.CANCELLED:
        said = "QEMU's migration was cancelled"
    else:
        said = guest.error or "QEMU gives no reason; the destination's QEMU may have printed one"
    if vtpm is None or vtpm.tail_bytes is None:
        return said
    if vtpm.outcome == "handed-over":
        return (
            f"{said}; the destination has not given the vTPM back: stop the guest there, then see "
            "vtpmd's log here"
        )
    return f"{said}; the vTPM goes on here: {vtpm.reason or 'no word from the destination'}"


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
