"""What the engine is told of keeping state before it has any: journals, the key, the anchor."""

from __future__ import annotations

from vtpmd import core
from vtpmd.core import LinkOperation
from vtpmd.daemon.engine import Engine, Reply
from vtpmd.errors import VtpmdError
from vtpmd.store.anchor import NO_DIGEST, Anchor
from vtpmd.store.keys import INFO_JOURNAL, Key
from vtpmd.store.start import Start


async def set_up(engine: Engine, begun: Start, key: Key | None, anchor: Anchor | None) -> None:
    """Have the engine keep journals, encrypt with the key and write the anchor, where there is one.

    It gets copies, also of the anchor's descriptor. Raises EngineDied, or VtpmdError if it refuses.
    """
    secret = None if key is None else key.derive(INFO_JOURNAL)
    journal = core.pack_link_journal(begun.identity, begun.generation, begun.loaded, secret)
    try:
        reply = await engine.request(LinkOperation.SET_JOURNAL, payload=journal)
    finally:
        journal[:] = bytes(len(journal))
    _check(reply, "journal")
    if key is not None:
        _check(await engine.request(LinkOperation.SET_KEY, payload=key.material), "key")
    if anchor is not None:
        digest = NO_DIGEST if anchor.mark is None else anchor.mark.digest
        says = core.pack_link_anchor(begun.identity, anchor.serial, anchor.generation, digest)
        reply = await engine.request(LinkOperation.SET_ANCHOR, payload=says, descriptor=anchor.fd)
        _check(reply, "anchor")


def _check(reply: Reply, what: str) -> None:
    if reply.result:
        raise VtpmdError(
            f"the engine refuses the {what} with {reply.result:#x}; install vtpmd again"
        )
