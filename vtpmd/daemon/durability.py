"""What the engine is told of keeping state, before it has any: under what key, and which anchor."""

from __future__ import annotations

from vtpmd import core
from vtpmd.core import LinkOperation
from vtpmd.daemon.engine import Engine, Reply
from vtpmd.errors import VtpmdError
from vtpmd.store.anchor import NO_DIGEST, NO_IDENTITY, Anchor, Mark
from vtpmd.store.keys import INFO_JOURNAL, Key


async def set_up(engine: Engine, key: Key | None, anchor: Anchor | None) -> None:
    """Give the engine the key, and a copy of the anchor's descriptor, if there are any.

    Raises EngineDied, or VtpmdError if it refuses one.
    """
    if key is not None:
        keys = core.pack_link_keys(key.material, key.derive(INFO_JOURNAL))
        try:
            reply = await engine.request(LinkOperation.SET_KEYS, payload=keys)
        finally:
            keys[:] = bytes(len(keys))
        _check(reply, "key")
    if anchor is not None:
        mark = anchor.mark or Mark(NO_IDENTITY, 0, NO_DIGEST)
        says = core.pack_link_anchor(mark.identity, anchor.serial, mark.generation, mark.digest)
        reply = await engine.request(LinkOperation.SET_ANCHOR, payload=says, descriptor=anchor.fd)
        _check(reply, "anchor")


def _check(reply: Reply, what: str) -> None:
    if reply.result:
        raise VtpmdError(
            f"the engine refuses the {what} with {reply.result:#x}; install vtpmd again"
        )
