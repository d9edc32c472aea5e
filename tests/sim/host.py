"""A host: its disk, and its vtpmd, which is the real one but for engine, sockets and TLS."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.sim.disk import Disk, SimDirectory
from tests.sim.engine import SimEngine
from tests.sim.link import SimLink
from tests.sim.loop import PowerLoss
from tests.sim.network import Connection, PlainSocket, Stream
from tests.sim.state import Permanent
from tests.support.file_names import INCOMING_NAME, OWNER_NAME, PERMANENT_NAME
from vtpmd.config import RunConfig
from vtpmd.daemon import lane, tls
from vtpmd.daemon.asked import Asked
from vtpmd.daemon.mobility import Mobility
from vtpmd.daemon.outgoing import Peer
from vtpmd.daemon.qemu_events import QemuEvent
from vtpmd.daemon.settling import settle
from vtpmd.errors import VtpmdError
from vtpmd.store import start
from vtpmd.store.incoming import HEAD, IncomingStates
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import OwnerRecord, Record, parse
from vtpmd.wire import peer
from vtpmd.wire.tpm import StateType

if TYPE_CHECKING:
    from tests.sim.world import World

CREDENTIALS: Final = Path("credentials")
CONFIG: Final = RunConfig(None, None, "debug", None, str(CREDENTIALS), (), None, None)
# What a supervisor waits for before it starts vtpmd again.
RESTART_S: Final = 0.2
PORT: Final = 1
PAUSE_S: Final = 0.1  # before it attaches again: vtpmd.daemon.runtime
END_TIMEOUT_S: Final = 10.0  # LINK_END_TIMEOUT_MS
END_POLL_S: Final = 0.01


class NoWakefulness:
    """Processors that are simulated do not sleep, and nobody waits for one."""

    def hold(self) -> None:
        """Nothing to do."""

    def give_way(self) -> None:
        """Nothing to do."""

    def take_back(self) -> None:
        """Nothing to do."""

    def release(self) -> None:
        """Nothing to do."""


class Host:
    """One host with one vTPM."""

    def __init__(self, world: World, name: str, uuid: bytes, *, follows_qemu: bool) -> None:
        self.world = world
        self.name = name
        self.uuid = uuid
        self.follows_qemu = follows_qemu
        self.disk = Disk(world.rng)
        self.disk_fails_until_s = 0.0
        self.daemon: Daemon | None = None
        self.served: Served | None = None
        self.qemu: Any = None
        self.generation = 0  # the highest that the owner record has said

    @property
    def record(self) -> Record:
        """What the owner record on the disk says."""
        content = self.disk.files.get(OWNER_NAME)
        return parse(None if content is None else bytes(content), OWNER_NAME)

    @property
    def has_state(self) -> bool:
        """True if its directory holds a vTPM."""
        directory = SimDirectory(self.disk, None, lambda *_: None)
        found = IncomingStates(directory, directory, None).find()
        return directory.exists(PERMANENT_NAME) or (found is not None and found.granted)

    @property
    def is_entitled(self) -> bool:
        """True while a session there has been granted the vTPM."""
        mobility = self.daemon and self.daemon.mobility
        return bool(mobility and mobility.incoming and mobility.incoming.is_granted)

    @property
    def knows_sessions(self) -> bool:
        """True if its vtpmd remembers that there were sessions."""
        mobility = self.daemon and self.daemon.mobility
        return bool(mobility and mobility.owner_record().sessions)

    def start(self) -> None:
        """Start vtpmd: a new vTPM, or beside an engine that serves."""
        if self.daemon is None:
            self.daemon = Daemon(self)

    def crash(self) -> None:
        """Lose power: vtpmd, engine and QEMU are gone, and are started again by a supervisor."""
        daemon, self.daemon = self.daemon, None
        served, self.served = self.served, None
        qemu, self.qemu = self.qemu, None
        self.world.log(f"{self.name}: CRASH")
        self.world.scheduler.after(self.world.rng.choice((0.01, 0.2, 3.0)), self.start)
        if qemu is not None:
            qemu.gone()
        if served is not None:
            served.process.kill()
            self.world.network.host_died(served.process)
        if daemon is not None:
            daemon.process.kill()
            self.world.network.host_died(daemon.process)

    def lose_daemon(self) -> None:
        """Its vtpmd is killed; its engine serves on, and a supervisor starts another vtpmd."""
        daemon, self.daemon = self.daemon, None
        if daemon is not None:
            self.world.log(f"{self.name}: VTPMD IS KILLED")
            daemon.process.kill()
            self.left(daemon)

    def left(self, daemon: Daemon) -> None:
        """Its vtpmd has ended, in one way or another."""
        if self.daemon is daemon:
            self.daemon = None
        if self.served is not None and daemon.link is not None:
            self.served.engine.detach(daemon.link)
        self.world.network.host_died(daemon.process)
        self.world.scheduler.after(self.world.rng.choice((0.01, RESTART_S, 3.0)), self.start)

    @property
    def serves_qemu(self) -> bool:
        """True while there is an engine that QEMU can connect to."""
        return self.served is not None and self.served.process.alive

    def written(self, name: str, is_told: bool) -> None:
        """A file has changed; whoever wrote it was told so, or was told that it failed."""
        if name == OWNER_NAME and is_told:
            generation = self.record.generation
            if generation < self.generation:
                self.world.violated(f"{self.name}: the owner record's generation has fallen")
            self.generation = generation
        content = self.disk.files.get(INCOMING_NAME)
        if name == INCOMING_NAME and content is not None and HEAD.unpack_from(content)[1]:
            self.world.granted(self)

    @property
    def executes(self) -> bool:
        """True if a command of its QEMU's guest would be executed now."""
        return (
            self.qemu is not None
            and self.qemu.vcpus
            and self.served is not None
            and self.served.engine.executes
        )


class Running:
    """A process of a host's, whose disk and steps others see."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.world = host.world
        self.process = self.world.scheduler.process(name, self)

    def note(self, what: str) -> None:
        """Something happens that counts as a step; it may be the last."""
        self.process.check_alive()
        self.world.note(f"{self.host.name}: {what}")
        self.process.check_alive()

    def before_write(self, what: str) -> str:
        self.note(what)
        return self.world.write_outcome(self.host)

    def lose_power(self) -> None:
        self.host.crash()
        raise PowerLoss

    def captured(self, kind: StateType, generation: int) -> None:
        self.world.captured(self.host, kind, generation)

    def copied(self, permanent: Permanent) -> None:
        self.world.copied(self.host, permanent)

    def new_bytes(self) -> bytes:
        return self.world.rng.randbytes(16)


class Served(Running):
    """A run of an engine: attach.c, main.c."""

    def __init__(self, host: Host, begun: start.Start) -> None:
        super().__init__(host, f"{host.name}: engine")
        directory = SimDirectory(host.disk, self, host.written)
        self.engine = SimEngine(self.process, directory, begun, self)
        self._ending: asyncio.Future[None] | None = None
        self.process.spawn(self._run())
        if host.qemu is not None:
            host.qemu.lost_tpm()

    def take_descriptor(self, descriptor: int) -> Stream:
        stream = self.world.descriptors[descriptor]
        stream.is_handed_down = True
        stream.process = self.process
        return stream

    async def _run(self) -> None:
        await self.engine.server.run()
        # A vtpmd that is there ends it when its sessions have ended.
        until_s = self.engine.now_s + END_TIMEOUT_S
        while self.engine.link is not None and self.engine.now_s < until_s:  # noqa: ASYNC110
            await asyncio.sleep(END_POLL_S)
        self.end()

    def end(self) -> None:
        """Stop in order."""
        if not self.process.alive:
            return
        self.engine.stop()
        self.world.log(f"{self.host.name}: the engine ends")
        self.host.served = None
        self.process.kill()
        self.world.network.host_died(self.process)
        if self.engine.link is not None:
            link, self.engine.link = self.engine.link, None
            link.death = "it has stopped"
            link.close()
        if self.host.qemu is not None:
            self.host.qemu.lost_tpm()


class Daemon(Running):
    """A run of vtpmd."""

    def __init__(self, host: Host) -> None:
        super().__init__(host, host.name)
        self.link: SimLink | None = None
        self.mobility: Mobility | None = None
        self.is_ready = False  # for peers, and for people
        self._stop = asyncio.Event()
        self._ends_vtpm = True
        self.process.spawn(self._run())

    # The process.

    async def _run(self) -> None:
        host = self.host
        self.world.log(f"{host.name}: vtpmd starts")
        try:
            if host.served is None:
                directory, files = self._files()
                host.served = Served(host, start.start(directory, files, None, None))
            while host.served is not None and not self._stop.is_set():
                await self._serve_attached(host.served)
                self.is_ready = False
                if not self._stop.is_set():
                    await asyncio.sleep(PAUSE_S)
        except VtpmdError as error:
            self.world.log(f"{host.name}: vtpmd does not start: {error}")
            self.world.start_failed(host, error)
        if host.served is not None and self._ends_vtpm:
            host.served.end()
        self.is_ready = False
        self.world.log(f"{host.name}: vtpmd ends")
        host.left(self)
        self.process.kill()

    def _files(self) -> tuple[SimDirectory, MovingFiles]:
        directory = SimDirectory(self.host.disk, self, self.host.written)
        files = MovingFiles(directory)
        files.owner = OwnerRecord(directory, directory, now=lambda: "2030-01-01T00:00:00Z")
        files.incoming = IncomingStates(directory, directory, None)
        return directory, files

    async def _serve_attached(self, served: Served) -> None:
        """As ``vtpmd.daemon.runtime`` does."""
        host = self.host
        link = self.link = await SimLink.attach(served.engine, self.process)
        engine: Any = link
        _, files = self._files()
        mobility = self.mobility = Mobility(
            engine, engine, files, host.uuid, follows_qemu=host.follows_qemu
        )
        mobility.tell = lambda event, data: self.world.log(f"{host.name}: {event} {data}")
        try:
            await settle(mobility, engine, files, CONFIG)
            engine.answer_by(Asked(mobility, self._end_vtpm))
            await mobility.rest()
            self.is_ready = True
            if host.qemu is not None:
                host.qemu.monitor_answers()
            stopping = self.process.create_task(self._stop.wait())
            await asyncio.wait({stopping, link.closed}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if self._stop.is_set():
                if self._ends_vtpm:
                    await engine.end_control()
                await mobility.conclude()
        except VtpmdError as error:
            self.world.log(f"{host.name}: vtpmd cannot go on: {error}")
        finally:
            if self.process.alive:
                mobility.tell_now()
                await mobility.close()
                served.engine.detach(link)

    def _end_vtpm(self) -> None:
        self._ends_vtpm = True
        self._stop.set()

    def _mistake(self, error: Exception) -> None:
        self.world.log(f"{self.host.name}: {type(error).__name__}: {error}")
        if not isinstance(error, VtpmdError):
            self.world.violated(f"{self.host.name}: {type(error).__name__}: {error}")

    # What others have it do.

    def stop(self, *, ends_vtpm: bool = True) -> None:
        """A signal ends it in order, and perhaps its vTPM."""
        self.world.log(f"{self.host.name}: {'STOP' if ends_vtpm else 'DETACH'}")
        self._ends_vtpm = ends_vtpm
        self._later(self._stop.set)

    def hang(self, for_s: float) -> None:
        """Do nothing for a while."""
        self.world.log(f"{self.host.name}: HANG")
        self.process.pause(for_s)

    def deliver(self, event: QemuEvent) -> None:
        """QEMU's monitor says something."""
        if self.mobility is not None and self.host.follows_qemu:
            self._later(self.mobility.qemu.deliver, event)

    def _later(self, do: Any, *arguments: Any) -> None:
        if self.process.alive:
            self.process.call_soon(do, *arguments)

    def arm(self, to: str) -> None:
        """An operator arms a session with another host."""

        async def arm() -> None:
            assert self.mobility is not None
            try:
                await self.mobility.arm(Peer(to, PORT, CREDENTIALS, ()))
                self.world.log(f"{self.host.name}: armed to {to}")
            except VtpmdError as error:
                self.world.log(f"{self.host.name}: not armed: {error}")

        if self.is_ready:
            self._later(lambda: self.process.spawn(arm()))

    def export(self) -> None:
        """An operator exports the vTPM, with its volatile state."""

        async def export() -> None:
            assert self.mobility is not None
            try:
                await self.mobility.copy_states()
            except VtpmdError as error:
                self.world.log(f"{self.host.name}: not exported: {error}")

        if self.is_ready:
            self._later(lambda: self.process.spawn(export()))

    async def serve_lane(self, stream: Stream) -> None:
        """As ``vtpmd.daemon.peer_server`` does with what is greeted as a lane."""
        sock: Any = PlainSocket(stream, self.world.descriptors)
        assert self.mobility is not None
        try:
            with sock:
                async with asyncio.timeout(tls.HANDSHAKE_TIMEOUT_S):
                    await self.mobility.take_lane(sock, await lane.read_greeting(sock))
        except (VtpmdError, OSError) as error:
            self.world.log(f"{self.host.name}: a lane could not be served: {error}")
        except Exception as error:
            self._mistake(error)

    async def serve_peer(self, stream: Stream, name: str) -> None:
        """As ``vtpmd.daemon.peer_server`` does once the peer is known."""
        connection: Any = Connection(stream, name)
        decoder = peer.Decoder()
        try:
            while (first := decoder.next_message()) is None:
                data = await stream.read()
                if not data:
                    return
                decoder.receive_data(data)
            assert self.mobility is not None
            if isinstance(first, peer.Hello):
                await self.mobility.welcome(connection, decoder, first)
            elif isinstance(first, peer.Reclaim | peer.Ask):
                await self.mobility.answer(connection, first)
        except VtpmdError as error:
            self.world.log(f"{self.host.name}: a peer could not be served: {error}")
        except (OSError, EOFError, peer.StreamError):
            pass
        except Exception as error:
            self._mistake(error)
        finally:
            stream.close()
