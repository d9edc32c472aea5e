"""A host: its disk, and its vtpmd, which is the real one but for engine, sockets and TLS."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.sim.disk import Disk, SimDirectory
from tests.sim.engine import SimEngine
from tests.sim.loop import PowerLoss
from tests.sim.network import Connection, Stream
from tests.sim.server import Command, Said
from vtpmd.daemon.asked import Asked
from vtpmd.daemon.mobility import Mobility
from vtpmd.daemon.outgoing import Peer
from vtpmd.daemon.qemu_events import QemuEvent
from vtpmd.errors import VtpmdError
from vtpmd.store import start
from vtpmd.store.directory import INCOMING_NAME, OWNER_NAME, PERMANENT_NAME
from vtpmd.store.incoming import HEAD, IncomingStates
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import OwnerRecord, Record, parse
from vtpmd.wire import peer
from vtpmd.wire.tpm import StateType

if TYPE_CHECKING:
    from tests.sim.world import World

CREDENTIALS: Final = Path("credentials")
# What a supervisor waits for before it starts vtpmd again.
RESTART_S: Final = 0.2
PORT: Final = 1


class NoWakefulness:
    """Processors that are simulated do not sleep."""

    def hold(self) -> None:
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
        self.qemu: Any = None
        self.generation = 0  # the highest that the owner record has said

    @property
    def record(self) -> Record:
        """What the owner record on the disk says."""
        content = self.disk.files.get(OWNER_NAME)
        return parse(None if content is None else bytes(content))

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
        """Start vtpmd."""
        if self.daemon is None:
            self.daemon = Daemon(self)

    def crash(self) -> None:
        """Lose power: vtpmd, engine and QEMU are gone, and are started again by a supervisor."""
        daemon, self.daemon = self.daemon, None
        qemu, self.qemu = self.qemu, None
        self.world.log(f"{self.name}: CRASH")
        self.world.scheduler.after(self.world.rng.choice((0.01, 0.2, 3.0)), self.start)
        if qemu is not None:
            qemu.gone()
        if daemon is not None:
            daemon.process.kill()
            self.world.network.host_died(daemon.process)

    def stopped(self, daemon: Daemon) -> None:
        """Its vtpmd has ended by itself."""
        if self.daemon is daemon:
            self.daemon = None
            self.world.log(f"{self.name}: vtpmd ends")
            self.world.network.host_died(daemon.process)
            if self.qemu is not None:
                self.qemu.lost_tpm()
            self.world.scheduler.after(RESTART_S, self.start)

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
            and self.daemon is not None
            and self.daemon.engine is not None
            and self.daemon.engine.executes
        )


class Daemon:
    """A run of vtpmd, with its engine."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.world = host.world
        self.process = self.world.scheduler.process(host.name, self)
        self.engine: SimEngine | None = None
        self.mobility: Mobility | None = None
        self.serves_qemu = False
        self.is_ready = False  # for peers, and for people
        self._stop = asyncio.Event()
        self.process.spawn(self._run())

    # What disk and engine tell.

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

    def new_bytes(self) -> bytes:
        return self.world.rng.randbytes(16)

    # The process.

    async def _run(self) -> None:
        host = self.host
        directory = SimDirectory(host.disk, self, host.written)
        files = MovingFiles(directory)
        files.owner = OwnerRecord(directory, directory, now=lambda: "2030-01-01T00:00:00Z")
        files.incoming = IncomingStates(directory, directory, None)
        self.world.log(f"{host.name}: vtpmd starts")
        try:
            begun = start.start(directory, files, None, None)
            engine = self.engine = SimEngine(self.process, directory, begun, self)
            self._begin_control()
            mobility = self.mobility = Mobility(
                engine,  # type: ignore[arg-type]
                engine,  # type: ignore[arg-type]
                files,
                host.uuid,
                follows_qemu=host.follows_qemu,
            )
            mobility._wakefulness = NoWakefulness()  # type: ignore[assignment]
            mobility.tell = lambda event, data: self.world.log(f"{host.name}: {event} {data}")
            await mobility.begin(CREDENTIALS, ())
            engine.answer_by(Asked(mobility, self._stop.set))
        except VtpmdError as error:
            self.world.log(f"{host.name}: vtpmd does not start: {error}")
            self.world.start_failed(host, error)
            self._end()
            return
        self.is_ready = True
        await self._stop.wait()
        await engine.end_control()
        await mobility.conclude()
        mobility.tell_now()
        await mobility.close()
        self._end()

    def _begin_control(self) -> None:
        """Serve QEMU, which the engine does from its start on."""
        assert self.engine is not None
        self.process.spawn(self.engine.server.run())
        self.serves_qemu = True
        if self.host.qemu is not None:
            self.host.qemu.lost_tpm()

    def _end(self) -> None:
        if self.engine is not None:
            self.engine.stop()
        self.serves_qemu = self.is_ready = False
        self.host.stopped(self)
        self.process.kill()

    def _mistake(self, error: Exception) -> None:
        self.world.log(f"{self.host.name}: {type(error).__name__}: {error}")
        if not isinstance(error, VtpmdError):
            self.world.violated(f"{self.host.name}: {type(error).__name__}: {error}")

    # What others have it do.

    def control(self, command: Command, answered: Callable[[Said], None]) -> None:
        """QEMU sends a command."""
        assert self.engine is not None
        self.engine.server.send(command, answered)

    def stop(self) -> None:
        """A signal ends it in order."""
        self.world.log(f"{self.host.name}: STOP")
        self._later(self._stop.set)

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
