"""A destination whose disk, engine or record is in the way of what the source asks of it.

Invariant 3 of the design (one owner, and no guest left without its vTPM for longer than it must)
and that what is said of it is what was seen.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from tests.harness.fake_peer import FakeDestination
from tests.harness.handover import (
    Pair,
    assert_serves,
    assert_serves_nothing,
    killed,
    make_armed_pair,
)
from tests.harness.lab import Lab
from tests.harness.owners import (
    assert_refuses_to_boot,
    freeze,
    give,
    hand_over,
    incoming,
    link_stands_still,
    outgoing,
    reconnected,
    record_of,
)
from tests.support.emulator_client import Blob
from tests.support.file_names import OWNER_NAME
from vtpmd.daemon.incoming import RETRY_S
from vtpmd.store.owner import Whose
from vtpmd.testing.credentials import credentials
from vtpmd.testing.link import Direction, MessageLink
from vtpmd.testing.waiting import wait_until
from vtpmd.wire import peer

# A replacement of the owner record begins with removing this one, which a directory resists.
OWNER_TEMPORARY = "TMP2-00.owner"
# A try takes some milliseconds on an idle machine, and rounds are due 100 apart.
TRIES_MAX = 30


def test_vtpm_that_is_offered_elsewhere_is_served_when_that_fails(lab: Lab) -> None:
    """Its source asked for it meanwhile, which the record does not allow any more."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    third, host = FakeDestination(credentials()), pair.destination
    lab.close_at_end(third)
    host.manage.command("migrate-arm", to=third.address)
    stream, _ = third.hold_base()
    host.manage.wait_for("VTPM_ARMED")
    host.guest.save()
    wait_until(lambda: record_of(host).whose is Whose.OFFERED)
    pair.source.guest.resume()
    wait_until(lambda: "says that it has it" in pair.source.vtpmd.program.output)
    killed(pair.source)  # it would ask again, and be given it before the guest uses it
    stream.close()
    host.manage.wait_for("VTPM_GO_ON")
    assert_serves(host.guest)


def test_boot_of_a_vtpm_that_is_on_its_way_back_says_so(lab: Lab) -> None:
    """The disk does not take that it was given back, and the source is gone."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    (pair.destination.vtpmd.state / OWNER_TEMPORARY).mkdir()
    pair.source.guest.resume()
    wait_until(lambda: incoming(pair.destination) == "releasing")
    killed(pair.source)
    host = reconnected(lab, pair.destination)
    before = len(host.log)
    assert_refuses_to_boot(host)
    refusals = [line for line in host.log[before:] if "INIT is refused" in line]
    assert len(refusals) == 1 and "asked for the vTPM back" in refusals[0]
    assert not any("libtpms" in line for line in host.log[before:])


def test_destination_whose_engine_died_before_init_lets_go(lab: Lab) -> None:
    """It was granted the vTPM, and executed nothing: what is dead cannot have."""
    pair = make_armed_pair(lab)
    facts = pair.source.guest.facts()
    give(pair)
    (engine,) = pair.destination.vtpmd.engines()
    os.kill(engine, signal.SIGKILL)
    pair.source.guest.resume()
    wait_until(lambda: pair.source.manage.migration()["outcome"] == "go-on")
    assert pair.source.guest.facts() == facts


def test_source_whose_disk_does_not_take_that_the_vtpm_has_moved_writes_it_later(lab: Lab) -> None:
    """Nobody has to start it anew, or to ask, for its record to say what it has been told."""
    pair = make_armed_pair(lab)
    blobs = freeze(pair)
    record = pair.source.vtpmd.state / OWNER_NAME
    aside = record.rename(lab.new_path("owner"))
    record.mkdir()
    pair.destination.guest.load(blobs)
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    wait_until(lambda: "record still says offered" in pair.source.vtpmd.program.output)
    record.rmdir()
    aside.rename(record)
    assert record_of(pair.source).whose is Whose.OFFERED
    wait_until(lambda: record_of(pair.source).whose is Whose.MOVED)


def test_disk_that_stays_full_is_complained_of_once(lab: Lab) -> None:
    """It may stay so for days, and is tried every second; room is all that it needs then."""
    pair = make_armed_pair(lab)
    blocked = pair.destination.vtpmd.state / OWNER_TEMPORARY
    blocked.mkdir()
    pair.destination.guest.load(freeze(pair))
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    time.sleep(3 * RETRY_S)
    assert sum("the state stays in" in line for line in pair.destination.log) == 1
    blocked.rmdir()
    wait_until(lambda: incoming(pair.destination) == "settled")
    assert_serves(pair.destination.guest)


def offered_while_fenced(lab: Lab, pair: Pair) -> bool:
    """Have a vTPM be offered to a third host when it is about to be given back.

    The record was looked at, and says that it may; but the engine, which is to be fenced, takes
    nothing for a while. When it does, the tail of the other session comes first, and with that the
    record says that the vTPM is offered. Return False if a round was due in that while: the engine
    is asked for that first, and the vTPM was given back.
    """
    third, host = FakeDestination(credentials()), pair.destination
    lab.close_at_end(third)
    host.manage.command("migrate-arm", to=third.address)
    stream, _ = third.hold_base()
    host.manage.wait_for("VTPM_ARMED")
    with ThreadPoolExecutor() as pool:
        pool.submit(stream.wait_for_end)  # so that it is heard of
        pair.link.hold(Direction.TO_DESTINATION)
        pair.source.guest.resume()
        pair.link.wait_for_held(peer.Reclaim)
        with link_stands_still(host):
            wait_until(lambda: outgoing(host) == "round")
        wait_until(lambda: outgoing(host) == "armed")  # the next one has just become far away
        with link_stands_still(host):
            pair.link.hold(None)
            wait_until(lambda: incoming(host) == "releasing")
            asked = pool.submit(host.guest.control.get_state_blob, Blob.PERMANENT)
            wait_until(lambda: outgoing(host) in ("freezing", "round"))
            is_offered = outgoing(host) == "freezing"
        if is_offered:
            asked.result()
            assert record_of(host).whose is Whose.OFFERED
            host.manage.command("migrate-disarm")
        stream.close()
    return is_offered


def test_guest_whose_vtpm_could_not_be_given_back_is_served_on(lab: Lab) -> None:
    """It was offered elsewhere while its engine was fenced for the source, and QEMU says nothing.

    As a QEMU does that knows no LOCK_STORAGE, or whose migration fails before it needs to.
    """
    pair = make_armed_pair(lab, link=MessageLink)
    hand_over(pair)
    tries = 1
    while not offered_while_fenced(lab, pair):
        tries += 1
        assert tries < TRIES_MAX
        pair = make_armed_pair(lab, link=MessageLink)
        hand_over(pair)
    pair.destination.manage.wait_for("VTPM_GO_ON")
    assert_serves(pair.destination.guest)
    assert_serves_nothing(pair.source.guest)
