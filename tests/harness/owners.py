"""Who owns a vTPM that moves between two hosts, and other hosts that want something of them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.fake_peer import WELCOME, FakeDestination, Stream, connect, hello
from tests.harness.handover import Host, Pair, assert_serves, assert_serves_nothing, assert_tail
from tests.harness.held_thread import thread_stands_still
from tests.harness.lab import Lab
from tests.harness.raw_guest import Blobs
from tests.support.emulator_client import ControlError
from tests.support.file_names import OWNER_NAME
from vtpmd.store import owner
from vtpmd.store.owner import Record
from vtpmd.testing.credentials import credentials
from vtpmd.testing.waiting import wait_until
from vtpmd.wire import peer

KEY = bytes(range(peer.KEY_BYTES))


def record_of(host: Host) -> Record:
    """Return what a host's owner record says."""
    path = host.vtpmd.state / OWNER_NAME
    return owner.parse(path.read_bytes() if path.exists() else None, OWNER_NAME)


def files_of(host: Host) -> dict[str, bytes]:
    """Return all that a host's state directory holds."""
    return {path.name: path.read_bytes() for path in host.vtpmd.state.glob("tpm2-*")}


def session_of(blobs: Blobs) -> bytes:
    """Return the session's name: it is in the clear in QEMU's stream."""
    return blobs.permanent[12 : 12 + peer.SESSION_BYTES]


def outgoing(host: Host) -> str:
    """Return where a host's session as a source is."""
    return str(host.manage.migration()["state"])


def incoming(host: Host) -> str:
    """Return where a host's session as a destination is."""
    return str(host.manage.vtpm()["incoming"])


def freeze(pair: Pair) -> Blobs:
    """Have QEMU take the tail; no round is under way then."""
    blobs = pair.source.guest.save()
    assert_tail(blobs)
    pair.source.manage.wait_for_acknowledgement()
    return blobs


def hand_over(pair: Pair) -> None:
    """Move an armed pair's vTPM, and wait until the destination has its own files."""
    pair.destination.guest.load(freeze(pair))
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    wait_until(lambda: incoming(pair.destination) == "settled")


def give(pair: Pair) -> None:
    """Bring the tail, and wait for the Grant; the destination's QEMU has not sent INIT."""
    pair.destination.guest.give(freeze(pair))
    pair.source.manage.wait_for("VTPM_GRANTED")
    wait_until(lambda: incoming(pair.destination) == "entitled")


def boot(host: Host) -> None:
    """Power a TPM on and start it as a guest that boots does."""
    host.guest.control.init()
    host.guest.tpm.startup()


def assert_refuses_to_boot(host: Host) -> None:
    """Boot a guest, whose TPM must not start."""
    with pytest.raises(ControlError):
        host.guest.control.init()
    assert_serves_nothing(host.guest)


def assert_comes_back(pair: Pair) -> None:
    """Wait until the source serves its guest again, and check that it alone does."""
    wait_until(lambda: pair.source.manage.migration()["outcome"] == "go-on")
    assert_serves(pair.source.guest)
    assert_serves_nothing(pair.destination.guest)


@contextmanager
def engine_stands_still(host: Host) -> Iterator[None]:
    """Have a host's engine not scheduled while the block runs."""
    (engine,) = host.vtpmd.engines()
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine, signal.SIGCONT)


@contextmanager
def record_stands_still(host: Host) -> Iterator[None]:
    """Have a host's engine not come to write its owner record while the block runs: a slow disk."""
    (engine,) = host.vtpmd.engines()
    (thread,) = [
        int(path.parent.name)
        for path in Path(f"/proc/{engine}/task").glob("*/comm")
        if path.read_text() == "recorder\n"
    ]
    with thread_stands_still(thread):
        yield


@contextmanager
def link_stands_still(host: Host) -> Iterator[None]:
    """Have a host's engine take nothing from vtpmd while the block runs: it asks, and waits."""
    (engine,) = host.vtpmd.engines()
    with thread_stands_still(engine):  # its first thread
        yield


def base_of(lab: Lab, host: Host) -> list[peer.Message]:
    """Return a host's records and Commit, which it sends to a destination that says no more."""
    fake = FakeDestination(credentials())
    lab.close_at_end(fake)
    host.manage.command("migrate-arm", to=fake.address)
    stream = fake.accept()
    greeting = stream.receive(peer.Hello)
    stream.send(WELCOME)
    fake.accept_lane(stream, greeting)
    messages: list[peer.Message] = []
    while not messages or not isinstance(messages[-1], peer.Commit):
        message = stream.next_message()
        assert message is not None
        messages.append(message)
    return messages


def bring(stream: Stream, greeting: peer.Hello, base: list[peer.Message]) -> None:
    """Send a base, with a key and a lane, if the Hello is welcomed; wait for what comes of it."""
    if isinstance(stream.next_message(), peer.Welcome):
        stream.open_lane(greeting, KEY)
        stream.send(*base)
        stream.next_message()


def call(lab: Lab, host: Host, directory: Path | None = None) -> Stream:
    """Connect to a host as a source."""
    stream = connect(host.vtpmd.port, directory or credentials())
    lab.close_at_end(stream)
    return stream


def greet(lab: Lab, host: Host) -> tuple[Stream, peer.Hello]:
    """Connect to a host as a source, and say Hello."""
    stream, greeting = call(lab, host), hello()
    stream.send(greeting)
    return stream, greeting


def reconnected(lab: Lab, host: Host) -> Host:
    """Connect to a host's vtpmd as another QEMU."""
    host.guest.close()
    return host._replace(guest=lab.raw_guest(host.vtpmd))
