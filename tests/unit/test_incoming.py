"""A session of the destination whose engine was granted the vTPM by the time that it is to end."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.fake_peer import hello
from tests.support.file_names import INCOMING_NAME
from vtpmd.core import LinkOperation
from vtpmd.core.handover import Handover
from vtpmd.core.link import LinkCondition, LinkCustody
from vtpmd.daemon.engine import EngineDetached, Reply
from vtpmd.daemon.mobility import Mobility
from vtpmd.daemon.tls import PeerName
from vtpmd.errors import VtpmdError
from vtpmd.migration.states import State
from vtpmd.store.directory import StateDirectory
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import Outcome
from vtpmd.wire import peer
from vtpmd.wire.state_level import Library
from vtpmd.wire.tpm import Result, TpmVersion

SESSION, OTHERS, LINEAGE = b"s" * 16, b"o" * 16, b"l" * 16
HOST = PeerName(("host1.example.org",), None)


class HungUp:
    """The engine, as a vtpmd finds it that did not answer for too long."""

    library = Library("0.9.2", {})
    tpm_version = TpmVersion.TPM_2_0

    async def request(self, *_: object, **__: object) -> Reply:
        raise EngineDetached("the link to the engine is closed, which serves on")


class Granted:
    """The engine, to which the source's has granted the vTPM just now."""

    library = Library("0.9.2", {})
    tpm_version = TpmVersion.TPM_2_0

    async def request(self, operation: LinkOperation, *_: object, **__: object) -> Reply:
        if operation is LinkOperation.WITHDRAW:
            return Reply(Result.BAD_ORDINAL, Handover.STARTED, bytearray())
        return Reply(Result.SUCCESS, 0, bytearray())

    async def condition(self) -> tuple[LinkCondition, LinkCustody]:
        return LinkCondition.ON, LinkCustody.STANDBY


class Connection:
    """Another session's, that has begun; what it is told is kept."""

    name = HOST

    def __init__(self) -> None:
        self.stream = self
        self.heard_ns = 0
        self.said = peer.Decoder()

    def write(self, data: bytes) -> None:
        self.said.receive_data(data)

    async def give_way(self) -> None:
        """Nothing else is to be done."""

    async def read(self) -> bytes:
        return b""

    def close(self) -> None:
        """Nobody is there."""


@pytest.fixture
def files(tmp_path: Path) -> Iterator[MovingFiles]:
    """A session was begun, and has brought no state."""
    with StateDirectory.open(tmp_path / "state") as directory:
        files = MovingFiles(directory, None)
        files.owner.expect(SESSION, str(HOST))
        files.incoming.make(SESSION, LINEAGE)
        yield files
        files.close()


def with_engine(files: MovingFiles, engine: Any) -> Mobility:
    mobility = Mobility(engine, engine, files, bytes(16), follows_qemu=False)
    mobility.found_incoming(State.STANDBY, files.incoming.resume())
    return mobility


def test_invariant_3_session_is_not_declined_without_the_engine_s_word(
    files: MovingFiles, tmp_path: Path
) -> None:
    """Nor is its end remembered, which is what a source that asks is told."""

    async def decline() -> None:
        session = with_engine(files, HungUp()).incoming
        assert session is not None
        with pytest.raises(EngineDetached):
            await session.set_aside("the source asks for its vTPM")
        await session.close()

    asyncio.run(decline())
    line = files.owner.read().find(SESSION.hex())
    assert line is not None
    assert line.outcome is Outcome.OPEN
    assert (tmp_path / "state" / INCOMING_NAME).exists()


def test_invariant_3_source_is_told_nothing_before_the_engine_s_word(files: MovingFiles) -> None:
    """Neither at first nor later: by Kept the vTPM would be lost, where nothing was granted."""

    async def ask() -> None:
        mobility = with_engine(files, HungUp())
        for _ in range(2):
            connection = Connection()
            asking: Any = connection
            with pytest.raises(VtpmdError):
                await mobility.answer(asking, peer.Ask(SESSION))
            assert connection.said.next_message() is None

    asyncio.run(ask())


def test_invariant_3_no_session_takes_the_place_of_one_that_was_granted(files: MovingFiles) -> None:
    """It was not, when the other one's source was heard; ending it has shown that it is."""
    greeting = hello(session=OTHERS, lineage=LINEAGE)

    async def welcome() -> None:
        mobility = with_engine(files, Granted())
        session, connection = mobility.incoming, Connection()
        other: Any = connection
        await mobility.welcome(other, peer.Decoder(), greeting)
        refusal = connection.said.next_message()
        assert isinstance(refusal, peer.Refuse)
        assert refusal.reason == peer.Reason.BUSY
        assert mobility.incoming is session
        assert session is not None
        assert session.state is State.STARTED

    asyncio.run(welcome())
