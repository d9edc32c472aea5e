"""Where a vTPM's migrations meet its control channel: at most one session out, and one in.

Imports the sessions when there is one: TLS and what they need is not part of a vTPM's memory that
never moves.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtpmd import core
from vtpmd.core import LinkOperation, Store, slices
from vtpmd.core.handover import Handover
from vtpmd.core.link import (
    LinkAskedInit,
    LinkCondition,
    LinkCopy,
    LinkHandover,
    TailRefusal,
)
from vtpmd.daemon.engine import Engine
from vtpmd.daemon.limited_log import log_failure
from vtpmd.daemon.lineage import Lineages
from vtpmd.daemon.qemu import Following, QemuView
from vtpmd.daemon.wakefulness import Wakefulness
from vtpmd.errors import VtpmdError
from vtpmd.store.libtpms import INFO_ACTIVE_PROFILE
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import Outcome, Record, Whose, name_text
from vtpmd.wire import peer
from vtpmd.wire.state_level import active_of

if TYPE_CHECKING:
    import socket

    from vtpmd.daemon import incoming
    from vtpmd.daemon.incoming import Incoming
    from vtpmd.daemon.outgoing import Notice, Outgoing, Owner, Peer
    from vtpmd.daemon.tls import Connection, PeerName
    from vtpmd.migration.destination import Own
    from vtpmd.migration.states import State
    from vtpmd.store.incoming import Resumed
    from vtpmd.wire.greeting import Greeting
    from vtpmd.wire.peer import Decoder, Hello
    from vtpmd.wire.state_level import Needs

log = logging.getLogger(__name__)

NO_UUID: Final = bytes(16)
# Between rounds, while QEMU migrates. Its passes through the guest's memory are no better moments:
# of a small guest the last two begin with the stop, and a round then is in the way of what follows.
# A guest that makes keys has its state settled while one is made, for 30 ms and more: when it stops
# then, the destination has all there is.
FOLLOWED_INTERVAL_S: Final = 0.05
# Longer than a hand-over takes, and nothing to a person.
TELL_AFTER_S: Final = 0.02
# A boot waits for the word of the host that may have the vTPM, and QEMU's main loop with it.
ANSWER_TIMEOUT_S: Final = 2.0

# A refusal that people mend at either host; others are the source's to see to.
UNLIKE_HOSTS: Final = (peer.Reason.VERSION, peer.Reason.TPM_VERSION, peer.Reason.LIBTPMS_VERSION)

Tell = Callable[[str, dict[str, object]], None]


class NotOurs(VtpmdError):
    """The vTPM is another host's, and must not be served here."""


class Mobility:
    """One vTPM's comings and goings."""

    def __init__(
        self, engine: Engine, store: Store, files: MovingFiles, uuid: bytes, *, follows_qemu: bool
    ) -> None:
        self._engine = engine
        self._store = store
        self._files = files
        self._uuid = uuid
        self._tasks: set[asyncio.Task[None]] = set()
        self.outgoing: Outgoing | None = None
        self.incoming: Incoming | None = None
        # Held while it is decided what the TPM starts from: no source is welcomed meanwhile.
        self._starting = asyncio.Lock()
        self.lineages = Lineages(engine, self._tell_soon)
        self._wakefulness = Wakefulness()
        self._rounds: asyncio.Task[None] | None = None
        self._untold: list[tuple[str, dict[str, object]]] = []
        self.qemu = QemuView(self, asked_for=follows_qemu)
        # What the engine has told. What is decided by it is asked for.
        self.runs = False
        # Who is told of rounds, freeze and hand-over.
        self.tell: Tell | None = None

    async def ask(self, state: State, credentials: Path | None, allowed: tuple[str, ...]) -> bool:
        """Ask the host that the owner record says may have the vTPM, which is fenced here.

        ``state`` is the one that the session is in, one of ``GIVEN_AWAY``. Return False if it
        cannot be asked. Raises VtpmdError for a record that cannot be read.
        """
        record = self._files.owner.read()
        if credentials is None:
            log.warning(
                "the vTPM is %s to %s, which cannot be asked without --tls-creds: it is not served "
                "here",
                *(record.whose, record.peer),
            )
            return False
        from vtpmd.config import parse_address
        from vtpmd.daemon.outgoing import Outgoing, Peer
        from vtpmd.migration.source import Source

        machine = Source.found(bytes.fromhex(record.session), state)
        to = Peer(*parse_address(record.peer), credentials, allowed)
        self.outgoing = Outgoing(await self._owner(), to, machine)
        self._spawn(self.outgoing.run())
        return True

    def found_incoming(self, state: State, resumed: Resumed) -> Incoming:
        """Go on with a peer's session that another vtpmd has left in a state."""
        from vtpmd.daemon.incoming import Incoming
        from vtpmd.migration.destination import Destination

        owner = self._incoming_owner(self._own(busy=None))
        machine = Destination.found(owner.own, state, resumed.session, resumed.lineage)
        line = self._files.owner.read().find(resumed.session.hex())
        peer_name = "" if line is None else line.peer
        self.incoming = Incoming.found(owner, machine, peer_name, resumed.used)
        return self.incoming

    def owner_record(self) -> Record:
        """Return what the owner record says. Raises VtpmdError."""
        return self._files.owner.read()

    @property
    def is_served(self) -> bool:
        """Whether the TPM is on and this host's, for people. Raises VtpmdError."""
        # Where it was given away it stays on, fenced, for as long as its QEMU does.
        return self.runs and not self._is_fenced

    async def copy_states(self) -> LinkCopy:
        """Return the TPM's states of one moment, of which no session knows. Raises VtpmdError."""
        return await self._engine.copy()

    async def export_permanent(self, directory: str) -> dict[str, object]:
        """Return the permanent state that is durable, as is answered to who asks for it.

        Neither a guest nor a peer waits for it. Raises VtpmdError.
        """
        return await asyncio.to_thread(self._files.export_permanent, directory)

    # The source's side.

    async def rest(self) -> None:
        """Have the engine ask nothing that it need not, until there is a session."""
        is_ours = self._files.owner.read().whose is Whose.OURS
        if self.outgoing is None and self.incoming is None and is_ours:
            await self._engine.request(LinkOperation.BE_ASKED, 0)

    async def arm(self, to: Peer) -> Outgoing:
        """Begin a session with a destination. Raises VtpmdError while that may not be."""
        from vtpmd.daemon.outgoing import Outgoing

        await self.qemu.check_can_arm()
        await self._engine.request(LinkOperation.BE_ASKED, 1)
        owner = await self._owner()
        condition, _ = await self._engine.condition()
        if self.outgoing is not None:
            await self.outgoing.wait_until_written()
        # From here to the session there is no wait: who asks at the same time finds it.
        if self.incoming is not None and not self.incoming.is_settled:
            raise VtpmdError("a vTPM is on its way in, or not in its own file yet; arm later")
        record = self._files.owner.read()
        if record.whose is not Whose.OURS:
            raise VtpmdError(
                f"the vTPM is not this host's: it is {record.whose} to {record.peer}; arm it there"
            )
        if self.outgoing is not None and not self.outgoing.ended.is_set():
            raise VtpmdError("a session is armed already; disarm it first")
        if LinkCondition.RUNNING not in condition:
            raise VtpmdError("the guest has not started its TPM; arm when it runs")
        session = self.outgoing = Outgoing(owner, to)
        self._spawn(session.run())
        if self.qemu.following is Following.NOT_ASKED_FOR:
            self._spawn(_rounds_by_time(session))
        return session

    async def _needs(self) -> Needs:
        """Return what the state needs of libtpms, so far as libtpms says it."""
        reply = await self._engine.request(LinkOperation.GET_INFO, INFO_ACTIVE_PROFILE)
        return active_of(bytes(reply.payload).decode(errors="replace"))

    async def _owner(self) -> Owner:
        from vtpmd.daemon import outgoing

        return outgoing.Owner(
            engine=self._engine,
            store=self._store,
            uuid=self._uuid,
            lineage=(await self.lineages.own()).identity,
            needs=await self._needs(),
            record=self._files.owner,
            wakefulness=self._wakefulness,
            following=self.following,
            tell=self._tell,
        )

    def following(self) -> peer.Following:
        """Return what is known of this side's QEMU."""
        return peer.Following[self.qemu.following.name]

    def _tell(self, notice: Notice, data: dict[str, object]) -> None:
        self._tell_soon(notice.value, data)

    def _tell_soon(self, event: str, data: dict[str, object]) -> None:
        self._untold.append((event, data))
        if len(self._untold) == 1:
            # Who listens is told when the guest does not wait for it.
            asyncio.get_running_loop().call_later(TELL_AFTER_S, self.tell_now)

    def tell_now(self) -> None:
        """Tell what has not been told yet."""
        untold, self._untold = self._untold, []
        for event, data in untold:
            if self.tell is not None:
                self.tell(event, data)

    async def give_tail(self) -> None:
        """Have QEMU's stream carry a tail, where that may be; else it carries a whole blob.

        Invariant 6: a tail only when the authenticated peer has acknowledged a base and is there,
        and QEMU, if it can be asked, is migrating. Raises NotOurs.
        """
        session = self.outgoing
        if session is None or session.ended.is_set():
            return
        if session.is_fenced:
            raise NotOurs("the vTPM may be another host's: its state is not given away here")
        # Without a monitor an armed session is trusted to be for this migration.
        if self.qemu.following is not Following.NOT_ASKED_FOR:
            # What QEMU's monitor said before QEMU asked may still be waiting to be read.
            await asyncio.sleep(0)
            if not self.qemu.is_migrating:
                log.info("QEMU saves its state without migrating: it gets whole blobs")
                return
        await session.freeze()

    def gave_whole_state(self) -> None:
        """QEMU has got the TPM's whole state: a session that is not armed yet is of no use."""
        if self.outgoing is not None:
            self._spawn(self.outgoing.state_given())

    def handed_over(self, state: Handover, told: LinkHandover) -> None:
        """The engine has done something by itself of what a session has prepared."""
        if told.is_source and self.outgoing is not None:
            self._spawn(self.outgoing.told(state, told))
        elif not told.is_source and self.incoming is not None:
            self._spawn(self._arrived(self.incoming, state, told))

    async def _arrived(self, session: Incoming, state: Handover, told: LinkHandover) -> None:
        await session.told(state, told)
        if state is Handover.STARTED:
            await self._end_outgoing()

    async def guest_runs(self) -> None:
        """The guest runs here, or will; what must be found out for that is not waited for."""
        if self.outgoing is not None and not self.outgoing.ended.is_set():
            await self.outgoing.guest_resumed()
        await self._serve_on()

    async def _serve_on(self) -> None:
        """Have the engine serve and write unless the vTPM may be another host's.

        Of a state that was given away in whole blobs, or was to be given back.
        """
        if not self._is_fenced:
            await self._engine.request(LinkOperation.UNRETIRE)

    @property
    def _is_fenced(self) -> bool:
        """True while the vTPM may be another host's."""
        if self.outgoing is not None and self.outgoing.is_fenced:
            return True
        if self.incoming is not None and self.incoming.is_releasing:
            return True
        # It may have been given back while it was armed to go elsewhere.
        whose = self._files.owner.read().whose
        return whose is Whose.MOVED or (whose is Whose.OFFERED and not self._is_only_offered)

    @property
    def _is_only_offered(self) -> bool:
        """True where what the record says is offered was not granted by this process' session."""
        return self.outgoing is not None and not self.outgoing.is_fenced

    async def stopping(self) -> None:
        """QEMU powers the TPM off: a reset, or what it brings from now on belongs together."""
        if self.incoming is not None and await self.incoming.was_granted():
            # What was started ahead of time is the only state there is, until that is durable.
            await self._end_incoming("QEMU stops the TPM")

    # The destination's side.

    async def welcome(self, connection: Connection, decoder: Decoder, hello: Hello) -> None:
        """Serve a source until its session needs the connection no more."""
        from vtpmd.daemon import incoming
        from vtpmd.migration.destination import why_refused

        async with self._starting:
            await self._engine.request(LinkOperation.BE_ASKED, 1)
            condition, _ = await self._engine.condition()
            own = self._own(busy=self._why_busy(connection.name, condition))
            refusal = why_refused(own, hello)
            if refusal is not None and refusal.reason in UNLIKE_HOSTS:
                log.warning("a vTPM of %s is refused: %s", connection.name, refusal.text)
            # One that is refused takes nothing's place.
            if self.incoming is not None and refusal is None:
                await self.incoming.set_aside("a source begins a new session")
                # It may have been granted the vTPM by then.
                own = own._replace(busy=self._why_busy(connection.name, condition))
            owner = self._incoming_owner(own)
            session = incoming.Incoming(owner, connection)
            if why_refused(own, hello) is None:
                self.incoming = session
        await session.run(decoder, hello)

    def _own(self, *, busy: str | None) -> Own:
        from vtpmd.migration.destination import Own

        return Own(
            busy=busy,
            uuid=self._uuid,
            lineage=self._files.lineage(),
            tpm_version=self._engine.tpm_version,
            library=self._engine.library,
            image_bytes_max=core.IMAGE_BYTES_MAX,
            following=self.following(),
        )

    def _incoming_owner(self, own: Own) -> incoming.Owner:
        from vtpmd.daemon import incoming

        return incoming.Owner(
            engine=self._engine,
            own=own,
            files=self._files,
            wakefulness=self._wakefulness,
            is_receiving=lambda: self.qemu.is_receiving,
            serve_on=self._serve_on,
        )

    def _why_busy(self, name: PeerName, condition: LinkCondition) -> str | None:
        """Return why no source can be welcomed now, or None."""
        from vtpmd.migration.states import BEFORE_ACK, ON_APPROVAL, State

        session = self.incoming
        if LinkCondition.RUNNING in condition:
            return "a guest uses the TPM there already"
        if LinkCondition.BLOBS in condition:
            return "QEMU brings a guest's whole state there"
        if session is None or session.state in (*BEFORE_ACK, State.ENDED):
            return None
        if session.state is State.SETTLED:
            return None
        if session.state not in (State.STAGING, State.HOLDING, State.STANDBY):
            return "a vTPM is being handed over to it"
        assert session.state in ON_APPROVAL  # noqa: S101 - else it could not be set aside
        if not is_named(session.peer, name) and session.is_alive:
            return "another host's session is armed there"
        return None

    async def take_lane(self, accepted: socket.socket, greets: Greeting) -> None:
        """Take the second connection of the session that comes in. Raises VtpmdError, OSError."""
        if self.incoming is None or self.incoming.has_ended(greets.session):
            raise VtpmdError("a lane is refused: there is no session here that it is of")
        await self.incoming.take_lane(accepted, greets.hello)

    async def answer(self, connection: Connection, question: peer.Ask | peer.Reclaim) -> None:
        """Tell a source that asks over a new connection what became of its session."""
        session = self.incoming
        line = self._files.owner.read().find(question.session.hex())
        known = line is not None and line.outcome is not Outcome.SENT
        if line is not None and known and not is_named(line.peer, connection.name):
            reason = peer.Reason.NOT_ALLOWED
            text = "the session is another host's: only the one that began it may ask"
            connection.stream.write(peer.encode(peer.Refuse(reason, text)))
            return
        if session is not None and known and not session.has_ended(question.session):
            # What is on its way back is fenced for who asks: its record may be written now.
            if isinstance(question, peer.Reclaim) or session.is_releasing:
                await session.reclaim(connection)
                return
            await self._ask(session)
        connection.stream.write(peer.encode(self._outcome(question.session)))

    async def _ask(self, session: Incoming) -> None:
        """Who asks has lost the connection of a session that is not granted yet: that is over.

        Raises VtpmdError where it is not known whether it was granted: that is no answer, after
        which the source asks again.
        """
        from vtpmd.migration.states import OWNING, State

        if session.state not in OWNING:
            await session.lose("the source asks whose its vTPM is")
        if session.state not in (*OWNING, State.ENDED):
            raise VtpmdError("whose the vTPM is is not known before its engine says so: ask again")

    def _outcome(self, session: bytes) -> peer.Message:
        line = self._files.owner.read().find(session.hex())
        if line is None or line.outcome is Outcome.SENT:
            return peer.Unknown(session)
        incoming = self.incoming
        if line.outcome is Outcome.OPEN and (incoming is None or incoming.has_ended(session)):
            # It ended, and the disk did not take it then.
            self._files.owner.decline(session)
            return peer.Released(session)
        if line.outcome in (Outcome.DECLINED, Outcome.RELEASED):
            return peer.Released(session)
        return peer.Kept(session)

    async def refuse_tail(self, why: TailRefusal) -> None:
        """Say why a tail is refused that the engine has no use for. Raises VtpmdError."""
        if self.incoming is None:
            raise VtpmdError(
                "the tail is refused: no source has a session here; the guest goes on at the "
                "source: migrate again"
            )
        await self.incoming.refuse_tail(why)

    async def take_blob(self) -> int:
        """Have the engine take the whole blob that QEMU has brought; return its result.

        What a peer may have sent is of no use then. Raises NotOurs; the blob is not used.
        """
        self._wakefulness.hold()
        if self.outgoing is not None and self.outgoing.is_its_qemus:
            raise NotOurs("the vTPM may be at another host: load a snapshot there")
        self._check_not_given_back()
        condition, _ = await self._engine.condition()
        if LinkCondition.STARTED in condition and self._is_fenced:
            raise NotOurs("this QEMU's vTPM is at another host: load a snapshot there")
        async with self._starting:
            await self._end_incoming("QEMU brings whole blobs")
            return (await self._engine.request(LinkOperation.TAKE_BLOB)).result

    async def _end_incoming(self, reason: str) -> None:
        """Have a session that came by a peer settled, or set aside. Raises NotOurs."""
        session = self.incoming
        if session is None:
            return
        await session.set_aside(reason)
        if not session.is_granted:
            return
        if not await session.adopt():
            raise NotOurs("the vTPM that was granted to this host cannot be taken up yet")
        await self._end_outgoing()
        # It was on, ahead of time: its guest has lost power now.
        await self._engine.request(LinkOperation.STOP)

    async def init(self, asked: LinkAskedInit) -> int:
        """Start the TPM from what QEMU has brought, or what there is; return libtpms' result.

        Raises NotOurs: it may not start.
        """
        async with self._starting:
            if LinkAskedInit.INCOMING in asked and LinkAskedInit.TAIL in asked:
                raise NotOurs(
                    "QEMU's guest came with a state that could not be used; migrate again"
                )
            if LinkAskedInit.BLOBS in asked:
                return await self._start_from_blobs()
            await self._end_incoming("QEMU starts the TPM without the tail")
            self._check_not_releasing()
            await self._check_ours()
            return (await self._engine.request(LinkOperation.INIT)).result

    async def _start_from_blobs(self) -> int:
        """Start what QEMU's stream has brought: whoever migrated or restored it decided."""
        self._check_not_given_back()
        reply = await self._engine.request(LinkOperation.INIT)
        if reply.result:
            return reply.result
        try:
            self._check_not_given_back()  # while the TPM started
            self._files.owner.arrive()
            log.info("QEMU has brought the vTPM's whole state: it is served here")
        except VtpmdError:
            # What is not written down as this host's must not serve it, also when nobody is asked.
            is_ours = self._files.owner.read().is_ours
            await self._engine.request(LinkOperation.STOP, not is_ours)
            raise
        await self._end_outgoing()
        return 0

    def _check_not_given_back(self) -> None:
        """Raise NotOurs where this QEMU's vTPM is at the source again, or on its way there."""
        session = self.incoming
        if session is None:
            return
        record = self._files.owner.read()
        was_given_back = record.whose is Whose.MOVED and record.session == session.session.hex()
        if was_given_back or session.is_releasing:
            raise NotOurs("the vTPM was given back to where it came from: load a snapshot there")

    def _check_not_releasing(self) -> None:
        """Raise NotOurs while a vTPM is fenced that is still to be given back."""
        session = self.incoming
        if session is not None and session.is_releasing:
            raise NotOurs(
                f"{session.peer} has asked for the vTPM back, and that it has it back is not "
                "written down yet: boot its guest there; or see to this host's disk, and if the "
                "other host is gone for good start vtpmd again"
            )

    async def _check_ours(self) -> None:
        """Raise NotOurs unless the vTPM is, or becomes, this host's."""
        session = self.outgoing
        if session is not None and not session.ended.is_set():
            await session.guest_resumed()
            await session.wait_until_served(ANSWER_TIMEOUT_S)
        record = self._files.owner.read()
        if record.whose is Whose.OFFERED and self._is_only_offered:
            return  # not granted, and never will be
        if record.whose is Whose.OURS and self._files.is_without_a_state():
            raise NotOurs(
                "a peer's vTPM was not taken, and there is no other here; boot its guest where it "
                f"came from, or remove {self._files.names.owner} for a new TPM"
            )
        if record.whose is not Whose.OURS:
            raise NotOurs(
                f"the vTPM was {record.whose} to {record.peer} at {record.since}, which has not "
                "let go of it; if that host is gone for good: vtpmd owner DIR --claim"
            )

    async def _end_outgoing(self) -> None:
        """The vTPM has come to this host: what went out before is history."""
        if self.outgoing is not None:
            await self.outgoing.came_back()
            if self.outgoing.ended.is_set():
                self.outgoing = None

    async def qemu_connected(self) -> None:
        """Another QEMU has connected."""
        if self.incoming is not None and self.incoming.has_ended(self.incoming.session):
            self.incoming = None
        if self.outgoing is not None:
            await self.outgoing.qemu_left()

    def init_answered(self) -> None:
        """QEMU has the answer to its INIT: do what that did not have to wait for."""
        if self.incoming is not None:
            self._spawn(self.incoming.init_answered())

    async def conclude(self) -> None:
        """End what can be ended, and wait a moment for what is about to end."""
        if self.outgoing is not None:
            await self.outgoing.close()
        if self.incoming is not None:
            await self.incoming.close()

    async def close(self) -> None:
        """End all sessions; the vTPM stays whose it is."""
        self._wakefulness.release()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for session in (self.outgoing, self.incoming):
            if session is not None:
                session.abandon()

    # What QEMU's monitor says (vtpmd.daemon.qemu.Listener).

    def guest_stopped(self) -> None:
        """The guest stands still; QEMU may soon ask for the state.

        What is sent now, and written down, the guest does not wait for then.
        """
        if not self.qemu.is_migrating:
            return
        self._wakefulness.hold()
        if self.outgoing is not None and not self.outgoing.ended.is_set():
            self._spawn(self.outgoing.guest_stopped())

    def guest_resumed(self) -> None:
        """The guest runs."""
        self._spawn(self.guest_runs())

    def receiving(self, now: bool) -> None:
        """A stream comes in, or does so no more."""
        if self.incoming is not None:
            self._spawn(self.incoming.receiving(now))

    def migration_began(self) -> None:
        """What the guest does is brought to the destination, round by round.

        The processors of a host that migrates are busy. Once the guest stops, all is to be done
        before QEMU asks for the state: so this process is to be woken up at once.
        """
        slices.be_short()
        if self._rounds is None or self._rounds.done():
            self._rounds = self._spawn(self._go_round())

    async def _go_round(self) -> None:
        while self.qemu.is_migrating:
            await asyncio.sleep(FOLLOWED_INTERVAL_S)
            if self.outgoing is not None and not self.outgoing.ended.is_set():
                self._spawn(self.outgoing.round_due())

    def migration_ended(self) -> None:
        """Whoever received it, does so no more."""
        slices.be_usual()
        if self.outgoing is not None:
            self._spawn(self.outgoing.migration_ended())

    def colo_seen(self) -> None:
        """The guest would run on both hosts."""
        if self.outgoing is not None:
            self._spawn(self.outgoing.fall_back("QEMU's capability x-colo is on"))

    def disconnected(self) -> None:
        """``is_migrating`` is false from now on: QEMU gets whole blobs."""
        slices.be_usual()

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log_failure(log, "a migration's session failed", error)


async def _rounds_by_time(session: Outgoing) -> None:
    from vtpmd.daemon.outgoing import ROUND_INTERVAL_S

    while not session.ended.is_set():
        await asyncio.sleep(ROUND_INTERVAL_S)
        await session.round_due()


def is_named(recorded: str, name: PeerName) -> bool:
    """Return whether a peer is the one that was written down, or has one of its names.

    Certificates are renewed, with more names or fewer. A name with a comma in it is quoted, and so
    is none of those that a comma divides.
    """
    names = recorded.split(", ")
    return recorded == name_text(str(name)) or any(
        shlex.quote(each) in names for each in name.names
    )
