"""Where a vTPM's migrations meet its control channel: at most one session out, and one in.

Imports the sessions when there is one: TLS and what they need is not part of a vTPM's memory that
never moves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Final

from vtpmd import core
from vtpmd.core import LinkInit, LinkOperation, Store
from vtpmd.daemon.engine import Engine
from vtpmd.daemon.wakefulness import Wakefulness
from vtpmd.errors import VtpmdError
from vtpmd.store.handover import Handover
from vtpmd.wire import peer

if TYPE_CHECKING:
    from vtpmd.daemon.incoming import Incoming
    from vtpmd.daemon.outgoing import Notice, Outgoing, Peer
    from vtpmd.daemon.tls import Connection
    from vtpmd.wire.peer import Decoder, Hello

log = logging.getLogger(__name__)

NO_UUID: Final = bytes(16)
# QEMU's monitor says that a pass begins, or that the guest has stopped, and in the same moment QEMU
# may ask for the state: then that is answered first, and includes what a round would do.
QEMU_FIRST_S: Final = 0.001
# Longer than a hand-over takes, and nothing to a person.
TELL_AFTER_S: Final = 0.02

Tell = Callable[[str, dict[str, object]], None]


class NotOurs(VtpmdError):
    """The vTPM is another host's, and must not be served here."""


class Mobility:
    """One vTPM's comings and goings."""

    def __init__(self, engine: Engine, store: Store, handover: Handover, uuid: bytes) -> None:
        self._engine = engine
        self._store = store
        self._handover = handover
        self._uuid = uuid
        self._tasks: set[asyncio.Task[None]] = set()
        self.outgoing: Outgoing | None = None
        self.incoming: Incoming | None = None
        self._settling: asyncio.Task[None] | None = None
        # QEMU has brought a tail: the TPM starts from that or not at all, as what the directory
        # holds is not what QEMU's guest had.
        self._tail_came = False
        self._wakefulness = Wakefulness()
        self._round: asyncio.TimerHandle | None = None
        self._guest_stands_still = False
        self._untold: list[tuple[str, dict[str, object]]] = []
        # None: QEMU's monitor is not followed, and an armed session is trusted to be for this.
        self.qemu_migrates: Callable[[], bool] | None = None
        # Who is told of rounds, freeze and hand-over.
        self.tell: Tell | None = None
        self.is_running: Callable[[], bool] = lambda: False

    # The source's side.

    def arm(self, to: Peer) -> Outgoing:
        """Begin a session with a destination. Raises VtpmdError while there is another."""
        from vtpmd.daemon import outgoing

        if self.outgoing is not None and not self.outgoing.ended.is_set():
            raise VtpmdError("a session is armed already; disarm it first")
        owner = outgoing.Owner(
            engine=self._engine,
            store=self._store,
            uuid=self._uuid,
            handover=self._handover,
            wakefulness=self._wakefulness,
            tell=self._tell,
        )
        session = self.outgoing = outgoing.Outgoing(owner, to)
        self._spawn(self._run_when_settled(session))
        if self.qemu_migrates is None:
            self._spawn(_rounds_by_time(session))
        return session

    def _tell(self, notice: Notice, data: dict[str, object]) -> None:
        self._untold.append((notice.value, data))
        if len(self._untold) == 1:
            # Who listens is told when the guest does not wait for it.
            asyncio.get_running_loop().call_later(TELL_AFTER_S, self.tell_now)

    def tell_now(self) -> None:
        """Tell what has not been told yet."""
        untold, self._untold = self._untold, []
        for event, data in untold:
            if self.tell is not None:
                self.tell(event, data)

    async def tail(self) -> bytes | None:
        """Return what QEMU's stream carries for the permanent state, or None: a whole blob.

        Invariant 6: a tail only when the authenticated peer has acknowledged a base, and QEMU, if
        it can be asked, is migrating.
        """
        if self.outgoing is None or self.outgoing.ended.is_set():
            return None
        if self.qemu_migrates is not None:
            # What QEMU's monitor said before QEMU asked may still be waiting to be read.
            await asyncio.sleep(0)
            if not self.qemu_migrates():
                log.info("QEMU saves its state without migrating: it gets whole blobs")
                return None
        return await self.outgoing.freeze()

    def is_frozen(self) -> bool:
        """True while the state is QEMU's tail: the other blobs are empty then."""
        return self.outgoing is not None and self.outgoing.is_frozen

    async def guest_resumed(self) -> None:
        """The guest runs here. Raises NotOurs unless its TPM may be served here."""
        if self.outgoing is not None and not await self.outgoing.guest_resumed():
            raise NotOurs("the vTPM was handed over, and the destination has not let go of it")

    # The destination's side.

    async def welcome(self, connection: Connection, decoder: Decoder, hello: Hello) -> None:
        """Serve a source until its session ends."""
        from vtpmd.daemon import incoming
        from vtpmd.migration.destination import Own

        own = Own(
            running=self.is_running() or (self.incoming is not None and self.incoming.awaits_init),
            uuid=self._uuid,
            tpm_version=peer.TPM_VERSION,
            libtpms_version=self._engine.libtpms_version,
            image_bytes_max=core.IMAGE_BYTES_MAX,
        )
        owner = incoming.Owner(
            engine=self._engine, own=own, handover=self._handover, wakefulness=self._wakefulness
        )
        session = incoming.Incoming(owner, connection)
        if not own.running:
            if self.incoming is not None:
                await self.incoming.set_aside("a source begins a new session")
            self.incoming = session
        await session.run(decoder, hello)

    async def reclaim(self, connection: Connection, session: bytes) -> None:
        """A source asks for its vTPM over a new connection."""
        incoming = self.incoming
        known = incoming is not None and incoming.session == session
        if incoming is not None and known and not incoming.has_ended:
            await incoming.reclaim_over(connection)
            return
        # A session that is over was never granted, or was released before. Of one that is not
        # known nobody can say that no guest was served.
        released = known or self._handover.has_declined(session)
        answer = peer.Released(session) if released else peer.Kept(session)
        connection.stream.write(peer.encode(answer))

    async def set_tail(self, blob: bytes) -> None:
        """Take the tail that QEMU has brought. Raises VtpmdError: nothing of it is used then."""
        self._tail_came = True
        if self.incoming is None:
            raise VtpmdError(
                "the tail is refused: no source has a session here; the guest goes on at the "
                "source: migrate again"
            )
        await self.incoming.apply_tail(blob)

    async def set_aside(self) -> None:
        """QEMU brings a whole blob: what a peer may have sent is of no use."""
        self._wakefulness.hold()
        self._tail_came = False
        if self.incoming is not None:
            await self.incoming.set_aside("QEMU brings whole blobs")

    async def init(self, *, has_blob: bool) -> int:
        """Start the TPM from what there is; return libtpms' result.

        Raises NotOurs or VtpmdError: it may not start.
        """
        if self.incoming is not None and self.incoming.awaits_init:
            result = await self.incoming.start()
            if not result:
                self._has_started()
            return result
        self._check_ours(has_blob=has_blob)
        if self.incoming is not None:
            await self.incoming.set_aside("QEMU starts the TPM without the tail")
        start = LinkInit.CAME if has_blob else LinkInit(0)
        reply = await self._engine.request(LinkOperation.INIT, start)
        if has_blob and not reply.result:
            self._handover.strike_out()
            self._has_started()
        return reply.result

    def _check_ours(self, *, has_blob: bool) -> None:
        if self._tail_came:
            raise NotOurs("QEMU's guest came with a tail that could not be used; migrate again")
        owner = self._handover.read_owner()
        if owner is not None and not has_blob:
            raise NotOurs(
                f"the vTPM was handed over to {owner.to} at {owner.at}; if it does not run there "
                "and will not, remove tpm2-00.owner from the state directory to start it here"
            )

    def _has_started(self) -> None:
        """A vTPM that has come to this host runs: what went out before is history."""
        self._tail_came = False
        self.outgoing = None

    def qemu_connected(self) -> None:
        """Another QEMU has connected: what the last one brought is not its guest's."""
        self._tail_came = False

    async def finish(self) -> None:
        """Do what an answer to QEMU did not have to wait for."""
        incoming = self.incoming
        if incoming is not None and incoming.awaits_admission and await incoming.admit():
            self._settling = self._spawn(incoming.settle())

    async def close(self) -> None:
        """End all sessions; the vTPM stays whose it is."""
        self._wakefulness.release()
        if self._round is not None:
            self._round.cancel()
        if self.outgoing is not None:
            await self.outgoing.disarm("vtpmd stops")
        if self._settling is not None:
            # Which generations the last host has used must be known at the next start.
            await asyncio.wait([self._settling])
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def round_due(self) -> None:
        """QEMU begins another pass."""
        if self._round is None:
            self._round = asyncio.get_running_loop().call_later(QEMU_FIRST_S, self._begin_round)

    def _begin_round(self) -> None:
        stopped, self._guest_stands_still, self._round = self._guest_stands_still, False, None
        session = self.outgoing
        if session is not None and not session.ended.is_set():
            self._spawn(session.guest_stopped() if stopped else session.round_due())

    def guest_was_stopped(self) -> None:
        """QEMU's monitor says that the guest stands still; QEMU may soon ask for the state.

        What is sent now, the guest does not wait for then.
        """
        if self.qemu_migrates is not None and self.qemu_migrates():
            self._guest_stands_still = True
            self.round_due()

    def guest_was_resumed(self) -> None:
        """QEMU's monitor says that the guest runs; who asks next for its TPM hears the outcome."""
        if self.outgoing is not None and self.outgoing.is_frozen:
            self._spawn(self._resume())

    async def _resume(self) -> None:
        try:
            await self.guest_resumed()
        except NotOurs as error:
            log.error("the guest runs, but its TPM answers with errors: %s", error)

    async def _run_when_settled(self, session: Outgoing) -> None:
        # Until then it is not known here which generations the last host has used.
        if self._settling is not None:
            await asyncio.wait([self._settling])
        await session.run()

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a migration's session failed: %s", error, exc_info=error)


async def _rounds_by_time(session: Outgoing) -> None:
    from vtpmd.daemon.outgoing import ROUND_INTERVAL_S

    while not session.ended.is_set():
        await asyncio.sleep(ROUND_INTERVAL_S)
        await session.round_due()
