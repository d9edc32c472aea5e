"""A vTPM that is granted before the destination's disk has all of it (invariants 2 and 3).

The engine may ask for it as soon as the TPM is on standby, and the disk may be slow, or fail, or
vtpmd be killed, before that. Nothing is executed until the file has it, and says that it is ours.
"""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.fake_peer import hello
from vtpmd.core import Image, LinkOperation
from vtpmd.core.delta import delta_encode
from vtpmd.core.handover import Handover
from vtpmd.core.link import LinkCondition, LinkCustody, LinkHandover
from vtpmd.daemon.engine import Meanwhile, Reply
from vtpmd.daemon.images import NOTHING
from vtpmd.daemon.mobility import Mobility
from vtpmd.daemon.settling import settle
from vtpmd.daemon.tls import PeerName
from vtpmd.migration import events
from vtpmd.migration.states import State
from vtpmd.store.directory import StateDirectory, StateDirectoryError
from vtpmd.store.incoming import Found
from vtpmd.store.moving import MovingFiles
from vtpmd.wire import peer
from vtpmd.wire.state_level import Library
from vtpmd.wire.tpm import Result, StateType, TpmVersion

SESSION, LINEAGE = b"s" * 16, b"l" * 16
HOST = PeerName(("host1.example.org",), None)
BASE = Image(StateType.PERMANENT, 5, b"what was there when it was armed")
LAST = Image(StateType.PERMANENT, 7, b"what the guest has left")
VOLATILE = Image(StateType.VOLATILE, 3, b"PCRs")


class Granted:
    """An engine whose TPM has started from LAST, and which was granted it at once."""

    library = Library("0.9.2", {})
    tpm_version = TpmVersion.TPM_2_0

    def __init__(self, files: MovingFiles) -> None:
        self._files = files
        self.found: Found | None = None  # when commands were to be executed
        self.serves = asyncio.Event()  # what follows that may be done
        self.serves.set()

    async def request(
        self,
        operation: LinkOperation,
        _argument: int = 0,
        payload: bytes = b"",
        meanwhile: Meanwhile | None = None,
    ) -> Reply:
        del payload
        if meanwhile is not None:
            meanwhile.run()
        if operation is LinkOperation.WITHDRAW:
            return Reply(Result.BAD_ORDINAL, Handover.STARTED, bytearray())
        if operation is LinkOperation.ADMIT and self.found is None:
            self.found = self._files.incoming.find()
        if operation is LinkOperation.STORE_PERMANENT:
            await self.serves.wait()
        return Reply(Result.SUCCESS, 0, bytearray())

    async def condition(self) -> tuple[LinkCondition, LinkCustody]:
        return LinkCondition.ON, LinkCustody.PENDING

    async def staged(self) -> Image:
        return LAST

    async def raise_generations(self, floor: int) -> None:
        """None is used here."""

    async def set_lane(self, *_: object, **__: object) -> None:
        """Nothing is said there."""


class Connection:
    """One from a source, which hears what is said while it is open."""

    name = HOST

    def __init__(self) -> None:
        self.stream = self
        self.heard_ns = 0
        self.said: list[peer.Message] = []
        self.is_open = True

    def write(self, data: bytes) -> None:
        decoder = peer.Decoder()
        decoder.receive_data(data)
        message = decoder.next_message()
        if self.is_open and message is not None:
            self.said.append(message)

    def close(self) -> None:
        self.is_open = False


class FailsOnce:
    """IncomingStates.append(), of a disk that is full for a moment."""

    def __init__(self, append: Callable[..., None]) -> None:
        self._append = append
        self.fails = False

    def __call__(self, *arguments: Any) -> None:
        if self.fails:
            self.fails = False
            raise StateDirectoryError("cannot write tpm2-00.incoming: no space left on device")
        self._append(*arguments)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[MovingFiles]:
    with StateDirectory.open(tmp_path / "state") as directory:
        files = MovingFiles(directory, None)
        yield files
        files.close()


def begun(files: MovingFiles) -> MovingFiles:
    """Have a session be begun here whose file has the base, and not what came last."""
    files.owner.expect(SESSION, str(HOST))
    files.incoming.make(SESSION, LINEAGE)
    files.incoming.append(delta_encode(NOTHING.permanent, BASE), lambda: BASE)
    return files


def mobility(files: MovingFiles, engine: Any) -> Mobility:
    return Mobility(engine, engine, files, bytes(16), follows_qemu=False)


def assert_has_all(found: Found | None) -> None:
    """Check what a start would have taken up, when the first command could be executed."""
    assert found is not None
    assert (found.granted, found.generation, found.state) == (True, LAST.generation, LAST.data)
    assert found.used >= LAST.generation


def test_invariant_2_granted_state_that_a_killed_vtpmd_has_not_written_is_written_first(
    files: MovingFiles,
) -> None:
    async def attach() -> Any:
        engine: Any = Granted(begun(files))
        config: Any = None  # it is not looked at, as whose it is, the session says
        await settle(mobility(files, engine), engine, files, config)
        return engine

    assert_has_all(asyncio.run(attach()).found)


def test_invariant_2_granted_state_that_the_disk_did_not_take_is_written_first(
    files: MovingFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = FailsOnce(files.incoming.append)
    monkeypatch.setattr(files.incoming, "append", append)

    async def move() -> Any:
        engine: Any = Granted(files)
        moving, connection = mobility(files, engine), Connection()
        session = await _receiving(moving, connection)
        await _bring(session, NOTHING.permanent, BASE, is_last=0)
        append.fails = True
        await _bring(session, BASE, LAST, is_last=1)
        assert session.state is State.STARTED
        await session.init_answered()
        return engine

    assert_has_all(asyncio.run(move()).found)


class Overtaking(Granted):
    """One that QEMU has brought the tail to, which has what a round brings, or more."""

    def __init__(self, files: MovingFiles) -> None:
        super().__init__(files)
        self.refuses: tuple[LinkOperation, ...] = ()
        self.asked: list[LinkOperation] = []

    async def request(
        self,
        operation: LinkOperation,
        argument: int = 0,
        payload: bytes = b"",
        meanwhile: Meanwhile | None = None,
    ) -> Reply:
        self.asked.append(operation)
        reply = await super().request(operation, argument, payload, meanwhile)
        if operation in self.refuses:
            return Reply(Result.BAD_ORDINAL, Handover.TAKING, bytearray())
        return reply


@pytest.mark.parametrize("is_last", [0, 1])
@pytest.mark.parametrize("refused", [LinkOperation.STAGE, LinkOperation.FORGET_STATE])
def test_round_that_the_tail_has_overtaken_ends_nothing(
    files: MovingFiles, is_last: int, refused: LinkOperation
) -> None:
    """It is granted, and what it has is in the file before the first command is executed."""

    async def move() -> tuple[Any, Any, Connection]:
        engine: Any = Overtaking(files)
        connection = Connection()
        session = await _receiving(mobility(files, engine), connection)
        await _bring(session, NOTHING.permanent, BASE, is_last=0)
        if refused is LinkOperation.FORGET_STATE:  # it is on standby, which is let go of first
            await session._take_message(peer.Stopped(SESSION))
        engine.refuses = (refused,)
        await _bring(session, BASE, LAST, is_last=is_last)
        assert session.state is State.TAKING
        told = LinkHandover(
            SESSION, False, 0, 0, 0, 0, 0, 0, (LAST.generation, VOLATILE.generation)
        )
        await session.told(Handover.TAKING, told)
        await session.told(Handover.STARTED, told)
        await session.init_answered()
        return engine, session, connection

    engine, session, connection = asyncio.run(move())
    assert session.state is State.SETTLED
    assert LinkOperation.WITHDRAW not in engine.asked
    assert not any(isinstance(each, peer.Refuse) for each in connection.said)
    assert_has_all(engine.found)


async def _receiving(moving: Mobility, connection: Any) -> Any:
    """Have a source be welcomed, up to its first round."""
    from vtpmd.daemon.incoming import Incoming

    session = Incoming(moving._incoming_owner(moving._own(busy=None)), connection)
    await session._take_message(hello(session=SESSION, lineage=LINEAGE))
    await session._take_message(peer.Key(bytes(peer.KEY_BYTES)))
    await session._events.run(events.LaneCame(0))
    return session


async def _bring(session: Any, before: Image, after: Image, *, is_last: int) -> None:
    """Bring a round, in which only the permanent state changes after the first."""
    await session._take_message(peer.Record(delta_encode(before, after)))
    if before is NOTHING.permanent:
        await session._take_message(peer.Record(delta_encode(NOTHING.volatile, VOLATILE)))
    commit = peer.Commit(1 + is_last, after.generation, VOLATILE.generation, 0, is_last)
    await session._take_message(commit)


def test_reclaim_is_answered_where_it_came_though_what_was_before_closes_its_connection(
    files: MovingFiles,
) -> None:
    """It comes while the state gets its own file, after which the session needs no connection."""

    async def reclaim() -> list[peer.Message]:
        engine: Any = Granted(begun(files))
        moving, asks = mobility(files, engine), Connection()
        engine.serves.clear()
        session: Any = moving.found_incoming(State.ADMITTED, files.incoming.resume())
        settling = asyncio.create_task(session.go_on())
        await asyncio.sleep(0)
        reclaiming = asyncio.create_task(session.reclaim(asks))
        await asyncio.sleep(0)
        engine.serves.set()
        await asyncio.gather(settling, reclaiming)
        return asks.said

    (answer,) = asyncio.run(reclaim())
    assert isinstance(answer, peer.Released)
