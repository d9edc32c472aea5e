"""A session whose engine has hung up on vtpmd, and serves on: it may have been granted the vTPM."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from vtpmd.daemon.engine import EngineDetached
from vtpmd.daemon.mobility import Mobility
from vtpmd.migration.states import State
from vtpmd.store.directory import INCOMING_NAME, StateDirectory
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import Outcome

SESSION, LINEAGE = b"s" * 16, b"l" * 16


class HungUp:
    """The engine, as a vtpmd finds it that did not answer for too long."""

    libtpms_version = 0x000902

    async def request(self, *_: object, **__: object) -> None:
        raise EngineDetached("the link to the engine is closed, which serves on")


def test_invariant_3_session_is_not_declined_without_the_engine_s_word(tmp_path: Path) -> None:
    """Nor is its end remembered, which is what a source that asks is told."""
    with StateDirectory.open(tmp_path / "state") as directory:
        files = MovingFiles(directory, None)
        files.owner.expect(SESSION, "host1.example.org")
        files.incoming.make(SESSION, LINEAGE)
        engine: Any = HungUp()

        async def decline() -> None:
            mobility = Mobility(engine, engine, files, bytes(16), follows_qemu=False)
            session = mobility.found_incoming(State.HOLDING, files.incoming.resume())
            with pytest.raises(EngineDetached):
                await session.set_aside("the source asks for its vTPM")
            await session.close()

        asyncio.run(decline())
        line = files.owner.read().find(SESSION.hex())
        assert line is not None
        assert line.outcome is Outcome.OPEN
        assert (tmp_path / "state" / INCOMING_NAME).exists()
        files.close()
