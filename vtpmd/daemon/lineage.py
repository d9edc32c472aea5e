"""Of which vTPM the state is that is served, and whether it is an older one than there was.

The engine compares what comes in whole blobs with what it has (``csrc/engine/arrival.h``); a
session's source says it in its Hello.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vtpmd import moment
from vtpmd.core import LinkOperation
from vtpmd.core.link import unpack_link_lineage
from vtpmd.daemon.engine import Engine
from vtpmd.wire.swtpm_format import Lineage


class Restored(NamedTuple):
    """An older state of the vTPM's own has taken the place of a newer one."""

    generation: int
    newest: int  # that it took the place of
    epoch: int | None  # the restore epoch that began; None: nothing differs, or none is left
    at: str  # ISO 8601, UTC

    def json(self) -> dict[str, object]:
        """Return what programs get: docs/management.md has the members."""
        return {
            "generation": self.generation,
            "newest": self.newest,
            "restore-epoch": self.epoch,
            "at": self.at,
        }


class Lineages:
    """What the vTPM is, and if an older state of it was restored."""

    def __init__(self, engine: Engine, tell: Callable[[str, dict[str, object]], None]) -> None:
        self._engine = engine
        self._tell = tell
        self.restored: Restored | None = None  # the last time

    async def own(self) -> Lineage:
        """Return what the vTPM is here, and how far it has come. Raises EngineDied."""
        reply = await self._engine.request(LinkOperation.GET_LINEAGE)
        return Lineage(*unpack_link_lineage(reply.payload))

    def has_restored(self, generation: int, newest: int, *, epoch: int) -> None:
        """Remember and tell that QEMU has brought an older state, which runs now.

        ``epoch`` is the restore epoch that began with it, or 0.
        """
        at = moment.now()
        self.restored = Restored(generation, newest, epoch or None, at)
        self._tell("VTPM_RESTORED", self.restored.json())
