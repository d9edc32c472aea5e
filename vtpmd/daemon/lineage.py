"""Of which vTPM a state is that QEMU brings in whole blobs, and whether that is an older one.

A session's source says it in its Hello, a state file and a blob of vtpmd's in a TLV that swtpm does
not look at. Where nothing is said, nothing can be known.
"""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

from vtpmd import core
from vtpmd.core import LinkInit, LinkOperation
from vtpmd.daemon.engine import Engine, Reply
from vtpmd.store.moving import NOT_KNOWN, MovingFiles
from vtpmd.wire.swtpm_format import Lineage

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """An older state of the vTPM's own has taken the place of a newer one."""

    generation: int
    newest: int  # that it took the place of
    at: str  # ISO 8601, UTC


class Lineages:
    """What the vTPM is, and what a state is that may become it."""

    def __init__(self, engine: Engine, files: MovingFiles) -> None:
        self._engine = engine
        self._files = files
        self._brought: Lineage | None = None
        self._is_older_than = 0  # the generation that what is brought would take the place of
        self.restored: Restored | None = None  # the last time

    async def own(self) -> Lineage:
        """Return what the vTPM is here, and how far it has come. Raises EngineDied."""
        reply = await self._engine.request(LinkOperation.GET_LINEAGE)
        return Lineage(*core.unpack_link_lineage(reply.payload))

    async def bring(self, brought: Lineage | None, *, by_migration: bool) -> str | None:
        """Remember whose permanent state QEMU brings; return why it must not be used, or None.

        Invariant 13. What comes with a migration takes no other vTPM's place. A snapshot is on the
        VM's own disk, whose word is taken.
        """
        self._brought, self._is_older_than = brought, 0
        held = self._files.lineage()
        if brought is None or held in (None, NOT_KNOWN):
            return None
        if brought.identity == held:
            own = await self.own()
            if brought.generation < own.generation:
                self._is_older_than = own.generation
            return None
        if not by_migration:
            log.warning("the snapshot is of another vTPM, which takes the place of this one's")
            return None
        self._brought = None
        return (
            "QEMU brings another vTPM than the state directory holds, which must not be lost; the "
            "guest goes on at the source: give this one a directory of its own, and migrate again"
        )

    async def start(self) -> Reply:
        """Start the TPM from what was brought. Raises EngineDied."""
        brought = self._brought
        payload = b"" if brought is None else core.pack_link_lineage(*brought[:2])
        return await self._engine.request(LinkOperation.INIT, LinkInit.CAME, payload)

    def has_started(self) -> Restored | None:
        """Say if what was brought, and runs now, is an older state than there was; return that."""
        brought, newest = self._brought, self._is_older_than
        self._brought, self._is_older_than = None, 0
        if brought is None or not newest:
            return None
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.restored = Restored(brought.generation, newest, at)
        log.warning(
            "an older state of the vTPM was restored: generation %d, and there was %d",
            *self.restored[:2],
        )
        return self.restored
