"""What comes at the wrong moment, or twice, or from a QEMU that is gone, gives nobody a vTPM.

Invariants of the design that are checked: 2 (never a fresh TPM in place of another), 3 (one owner,
nothing acknowledged is lost) and 13 (a vTPM only takes a state that is its own).
"""

import os
import time
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness.credentials import credentials
from tests.harness.emulator import Peering
from tests.harness.fake_peer import WELCOME, FakeDestination, connect, hello
from tests.harness.handover import *
from tests.harness.lab import Lab
from tests.harness.link import Cut, Direction
from tests.harness.raw_guest import Blobs
from tests.support.emulator_client import Blob, Control, ControlError
from tests.system.test_one_owner import *
from vtpmd.wire import peer


def test_blobs_of_a_qemu_that_is_gone_are_not_the_next_ones(lab: Lab) -> None:
    """They came whole, to a host that had given the vTPM away; the guest goes on elsewhere."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    snapshot = pair.destination.guest.save()
    assert_whole(snapshot)
    source = restarted(lab, stopped(pair.source))
    source.guest.give(snapshot)
    pair.destination.guest.resume()  # that migration failed
    assert_serves(pair.destination.guest)
    source = reconnected(lab, source)
    assert_refuses_to_boot(source)
    assert record_of(source).whose is Whose.MOVED


def test_tail_with_a_whole_volatile_state_starts_nothing(lab: Lab) -> None:
    """The session ended at the source between two of QEMU's questions."""
    pair = make_pair(lab)
    whole = pair.source.guest.save()
    pair.source.guest.resume()
    assert pair.arm()["event"] == "VTPM_ARMED"
    blobs = freeze(pair)
    with pytest.raises(ControlError):
        pair.destination.guest.load(blobs._replace(volatile=whole.volatile))
    assert_serves_nothing(pair.destination.guest)
    pair.source.guest.resume()
    assert_comes_back(pair)


def test_snapshot_that_is_loaded_while_armed_leaves_the_session_armed(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    snapshot = Blobs(*(pair.source.guest.control.get_state_blob(kind) for kind in Blob))
    pair.source.guest.resume()
    other = make_pair(lab)
    assert_whole(whole := other.source.guest.save())
    event = pair.arm() if pair.source.manage.migration()["state"] == "ended" else None
    pair.source.guest.load(whole)
    assert outgoing(pair.source) in ("armed", "round")
    pair.source.guest.work()
    facts = pair.source.guest.facts()
    hand_over(pair)
    assert pair.destination.guest.facts() == facts


def test_state_that_is_asked_for_again_is_not_granted_when_the_guest_has_run(lab: Lab) -> None:
    """The Take comes in the very moment in which QEMU asks again."""
    source = make_host(lab)
    source.guest.boot()
    fake = FakeDestination(credentials())
    lab.close_at_end(fake)
    source.manage.command("migrate-arm", to=fake.address)
    stream, session = fake.hold_base()
    source.manage.wait_for("VTPM_ARMED")
    assert_tail(source.guest.save())
    stream.receive(peer.Stopped)
    said = source.manage.migration()["digests"]
    digests = [bytes.fromhex(said[kind]) for kind in ("permanent", "volatile")]
    source.guest.work()
    with ThreadPoolExecutor(1) as executor:
        with engine_stands_still(source):
            saving = executor.submit(source.guest.control.get_state_blob, Blob.PERMANENT)
            time.sleep(0.2)
            stream.send(peer.Take(session, *digests, 0, 0, 0))
            wait_until(
                lambda: "destination: make durable" in source.manage.migration()["phases-us"]
            )
        saving.result(WAIT_TIMEOUT_S)
    assert not any(isinstance(message, peer.Grant) for message in stream.wait_for_end())
    assert_serves(source.guest)


def test_hello_that_comes_while_a_boot_waits_does_not_become_its_state(lab: Lab) -> None:
    """A source that asks whose its vTPM is; another host's guest comes meanwhile."""
    other, source = make_host(lab), make_host(lab)
    other.guest.boot()
    other.guest.work()
    base = base_of(lab, other)
    source.guest.boot()
    nv = source.guest.facts().nv
    fake = FakeDestination(credentials())
    lab.close_at_end(fake)
    source.manage.command("migrate-arm", to=fake.address)
    stream, session = fake.hold_base()
    source.manage.wait_for("VTPM_ARMED")
    assert_tail(source.guest.save())
    killed(source)
    source = restarted(lab, source)
    asking = fake.accept()
    asking.receive(peer.Ask)
    with ThreadPoolExecutor(1) as executor:
        booting = executor.submit(boot, source)
        wait_until(lambda: any("STOP: " in x or "SET_DATAFD" in x for x in source.log))
        time.sleep(0.3)
        visitor, _ = greet(lab, source)
        if isinstance(visitor.next_message(), peer.Welcome):
            visitor.send(*base)
            visitor.next_message()
        asking.send(peer.Released(session))
        try:
            booting.result(WAIT_TIMEOUT_S)
        except ControlError:
            boot(source)
    assert source.guest.facts().nv == nv


def test_hello_that_comes_between_qemus_blobs_and_init(lab: Lab) -> None:
    other, source, destination = make_host(lab), make_host(lab), make_host(lab)
    other.guest.boot()
    other.guest.work()
    base = base_of(lab, other)
    source.guest.boot()
    facts = source.guest.facts()
    destination.guest.give(source.guest.save())
    visitor, _ = greet(lab, destination)
    if isinstance(visitor.next_message(), peer.Welcome):
        visitor.send(*base)
        visitor.next_message()
    destination.guest.start()
    assert destination.guest.facts() == facts


def test_destination_whose_engine_died_lets_go(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), freeze(pair)
    pair.link.hold(Direction.TO_DESTINATION)
    pair.destination.guest.give(blobs)
    pair.source.manage.wait_for("VTPM_GRANTED")
    (engine,) = pair.destination.vtpmd.engines()
    os.kill(engine, signal.SIGKILL)
    pair.link.cut_after(Cut(records=0))
    pair.link.hold(None)
    assert pair.link.was_cut.wait(WAIT_TIMEOUT_S)
    pair.source.guest.resume()
    wait_until(lambda: pair.source.manage.migration()["outcome"] == "go-on")
    assert pair.source.guest.facts() == facts


def test_peer_with_a_long_name_gets_its_vtpm_back(lab: Lab) -> None:
    from tests.system import test_one_owner  # noqa
    import tempfile, shutil
    from datetime import UTC, datetime, timedelta
    from pathlib import Path
    from vtpmd import pki
    from tests.harness.credentials import authority, HOST

    a = authority()
    ca = pki.read_authority(a.directory)
    now = datetime.now(UTC)
    validity = pki.Validity(not_before=now - timedelta(days=1), not_after=now + timedelta(days=1))
    directory = Path(tempfile.mkdtemp(dir=a.directory))
    shutil.copy(a.directory / "ca-cert.pem", directory)
    names = [HOST, *(f"host{i:02}.a-rather-long-name.of.a.cluster.example" for i in range(10))]
    for role, usage in pki.USAGES.items():
        holder = pki.issue_one(ca, names, usage, validity)
        (directory / f"{role}-cert.pem").write_bytes(holder.certificate_pem())
        key = directory / f"{role}-key.pem"
        key.touch(pki.KEY_MODE)
        key.write_bytes(holder.key_pem())
    pair = make_pair(lab, source=Peering(credentials=directory))
    assert pair.arm()["event"] == "VTPM_ARMED"
    hand_over(pair)
    pair.source.guest.resume()
    assert_comes_back(pair)
