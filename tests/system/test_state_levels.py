"""A source says what its state needs of libtpms, and a destination whose libtpms has not, refuses.

Before anything moves; and both hosts say which of them is to be mended.
"""

import threading
from collections.abc import Iterator

import pytest

from tests.harness.fake_peer import FakeDestination, connect, hello
from tests.harness.handover import make_host
from tests.harness.lab import Lab
from vtpmd.store.libtpms import library
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Peering
from vtpmd.testing.waiting import wait_until
from vtpmd.wire import peer
from vtpmd.wire.state_level import Needs

TIMEOUT_S = 20


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.mark.parametrize("needs", [Needs(9, "default-v1"), Needs(7, "default-v9")], ids=str)
def test_a_destination_refuses_what_its_libtpms_does_not_read(lab: Lab, needs: Needs) -> None:
    host = make_host(lab, Peering(credentials=credentials()))
    stream = connect(host.vtpmd.port, credentials())
    lab.close_at_end(stream)
    stream.send(hello(needs))
    refusal = stream.receive(peer.Refuse)
    assert refusal.reason == peer.Reason.LIBTPMS_VERSION
    assert refusal.text == (
        f"the state needs {needs}, and the destination has {library()}: update libtpms on the "
        "destination"
    )
    wait_until(lambda: any(line.endswith(refusal.text) for line in host.log))


def test_a_source_says_what_its_state_needs(lab: Lab) -> None:
    """A new TPM needs what every libtpms has; before 0.10 libtpms does not say it."""
    host = make_host(lab, Peering(credentials=credentials()))
    host.guest.boot()
    destination = FakeDestination(credentials())
    lab.close_at_end(destination)
    said: list[peer.Hello] = []

    def refuse() -> None:
        stream = destination.accept()
        said.append(stream.receive(peer.Hello))
        stream.send(peer.Refuse(peer.Reason.LIBTPMS_VERSION, "update libtpms on the destination"))

    thread = threading.Thread(target=refuse)
    thread.start()
    host.manage.arm(destination.address)
    thread.join(TIMEOUT_S)
    needs = said[0].format_level, said[0].profile.rstrip(b"\0")
    assert needs == ((1, b"null") if library().profiles else (0, b""))
    wait_until(lambda: any("update libtpms on the destination" in line for line in host.log))
