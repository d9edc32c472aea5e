"""Asking another host whose a vTPM is ends only with an answer. Invariant 3: nobody is stuck."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from tests.harness.fake_peer import FakeDestination
from vtpmd.daemon.asking import Asking
from vtpmd.daemon.outgoing import Peer
from vtpmd.testing.credentials import HOST, credentials
from vtpmd.wire import peer

SESSION = b"s" * peer.SESSION_BYTES
TIMEOUT_S = 20.0


def answer(other: FakeDestination) -> None:
    """Answer one who asks."""
    stream = other.accept()
    stream.receive(peer.Ask)
    stream.send(peer.Released(SESSION))


def test_mistake_in_taking_an_answer_does_not_end_the_asking() -> None:
    other = FakeDestination(credentials())
    host, _, port = other.address.rpartition(":")
    taken: list[peer.Message] = []

    async def take(message: peer.Message) -> None:
        taken.append(message)
        if len(taken) == 1:
            raise RuntimeError("a mistake")

    async def ask() -> None:
        question = peer.Ask(SESSION)
        to = Peer(host, int(port), credentials(), (HOST,))
        asking = Asking(to, lambda: question if len(taken) < 2 else None, take)
        asking.begin()
        async with asyncio.timeout(TIMEOUT_S):
            await asking.finished()

    try:
        with ThreadPoolExecutor(1) as pool:
            answers = [pool.submit(answer, other) for _ in range(2)]
            asyncio.run(ask())
            for each in answers:
                each.result()
    finally:
        other.close()
    assert taken == [peer.Released(SESSION)] * 2
