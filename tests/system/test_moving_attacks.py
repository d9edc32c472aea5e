"""What comes at the wrong moment, or from a QEMU that is gone, gives nobody a vTPM.

Invariants of the design that are checked: 2 (never a fresh TPM in place of another), 3 (one owner,
nothing acknowledged is lost) and 13 (a vTPM only takes a state that is its own). Clients of the
control socket stand for QEMU, as in test_one_owner.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from qemu.qmp import ExecuteError

from tests.harness.fake_peer import FakeDestination, Stream
from tests.harness.handover import (
    Host,
    assert_serves,
    assert_serves_nothing,
    assert_tail,
    assert_whole,
    killed,
    make_armed_pair,
    make_host,
    make_pair,
    restarted,
    stopped,
)
from tests.harness.lab import Lab
from tests.harness.owners import (
    assert_comes_back,
    assert_refuses_to_boot,
    base_of,
    boot,
    bring,
    engine_stands_still,
    freeze,
    greet,
    hand_over,
    incoming,
    link_stands_still,
    outgoing,
    reconnected,
    record_of,
)
from tests.support.emulator_client import Blob, ControlError
from tests.support.tail import is_tail
from tests.support.tpm2 import ReturnCode, get_random
from tests.system.test_arming import qemu_of
from vtpmd.core.lane import LaneFrame, LaneKind
from vtpmd.store.owner import TEXT_LENGTH_MAX, Whose
from vtpmd.testing.credentials import HOST, authority, credentials
from vtpmd.testing.disk import Disk
from vtpmd.testing.emulator import Peering
from vtpmd.testing.link import Direction
from vtpmd.testing.waiting import WAIT_TIMEOUT_S, wait_until
from vtpmd.wire import peer

A_MOMENT_S = 0.5  # in which a fault shows itself, if it is there


@pytest.fixture
def fake(lab: Lab) -> FakeDestination:
    """Give a test a destination that says what the test says."""
    destination = FakeDestination(credentials())
    lab.close_at_end(destination)
    return destination


def test_blobs_of_a_qemu_that_is_gone_are_not_the_next_ones(lab: Lab) -> None:
    """They came whole, to a host that had given the vTPM away; its guest goes on elsewhere."""
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


@pytest.mark.parametrize("kind", [Blob.VOLATILE, Blob.SAVESTATE])
def test_invariant_2_tail_with_a_whole_blob_beside_it_starts_nothing(lab: Lab, kind: Blob) -> None:
    """The session ended at the source between two of QEMU's questions."""
    pair = make_pair(lab)
    whole = pair.source.guest.save().volatile
    assert pair.arm()["event"] == "VTPM_ARMED"
    blobs = freeze(pair)
    pair.link.hold(Direction.TO_SOURCE)  # nothing is granted meanwhile
    pair.destination.guest.give(blobs)
    with suppress(ControlError):
        pair.destination.guest.control.set_state_blob(kind, whole)
    with pytest.raises(ControlError):
        pair.destination.guest.start()
    assert_serves_nothing(pair.destination.guest)
    assert any("migrate again" in line for line in pair.destination.log)
    pair.link.hold(None)
    pair.source.guest.resume()
    assert_comes_back(pair)


def test_invariant_3_tail_whose_session_has_ended_starts_no_older_state(lab: Lab) -> None:
    """There is one: the guest was at the destination before, whole, and went on at the source."""
    pair = make_pair(lab)
    pair.destination.guest.load(pair.source.guest.save())
    pair = pair._replace(destination=reconnected(lab, pair.destination))
    pair.destination.guest.control.stop()
    pair.source.guest.resume()  # that migration failed
    pair.source.guest.work()
    assert pair.arm()["event"] == "VTPM_ARMED"
    blobs = freeze(pair)
    pair.link.hold(Direction.TO_SOURCE)  # nothing is granted meanwhile
    pair.destination.guest.give(blobs)
    pair.source.guest.resume()
    wait_until(lambda: incoming(pair.destination) == "ended")
    with pytest.raises(ControlError):
        pair.destination.guest.start()
    assert_serves_nothing(pair.destination.guest)
    assert_serves(pair.source.guest)


def test_snapshot_that_is_loaded_while_armed_leaves_the_session_armed(lab: Lab) -> None:
    """Else it would go on beside the next one, and each would miss what the other captures."""
    pair = make_pair(lab)
    snapshot = pair.source.guest.save()
    pair.source.guest.work()
    assert pair.arm()["event"] == "VTPM_ARMED"
    pair.source.guest.load(snapshot)
    assert outgoing(pair.source) in ("armed", "round")
    facts = pair.source.guest.facts()
    hand_over(pair)
    assert pair.destination.guest.facts() == facts


def test_vtpm_is_armed_once_when_two_ask_at_once(lab: Lab) -> None:
    """QEMU is asked in between whether x-colo is on."""
    following = Peering(credentials=credentials(), follows_qemu=True)
    pair = make_pair(lab, source=following)
    second = lab.management(pair.source.vtpmd)
    with qemu_of(lab, pair.source), ThreadPoolExecutor(2) as executor:
        wait_until(lambda: pair.source.manage.command("query-status")["qemu"] == "following")
        both = [
            executor.submit(manage.command, "migrate-arm", to=pair.link.address)
            for manage in (pair.source.manage, second)
        ]
        failures = [arming.exception(WAIT_TIMEOUT_S) for arming in both]
    assert sorted(map(type, failures), key=str) == [type(None), ExecuteError]


def frozen_for(lab: Lab, fake: FakeDestination) -> tuple[Host, Stream, bytes, LaneFrame]:
    """Return a source whose tail is at QEMU, its session, and the TAKE of its destination."""
    source = make_host(lab)
    source.guest.boot()
    source.manage.command("migrate-arm", to=fake.address)
    stream, session = fake.hold_base()
    source.manage.wait_for("VTPM_ARMED")
    assert_tail(source.guest.save())
    stream.receive(peer.Stopped)
    said = source.manage.migration()["digests"]
    both = bytes.fromhex(said["permanent"]), bytes.fromhex(said["volatile"])
    return source, stream, session, LaneFrame(LaneKind.TAKE, 0, *both)


def test_invariant_3_state_that_is_asked_for_again_when_the_guest_has_run_is_not_granted(
    lab: Lab, fake: FakeDestination
) -> None:
    """The Take comes in the very moment in which QEMU asks again."""
    source, _, _, take = frozen_for(lab, fake)
    source.guest.work()
    facts = source.guest.facts()
    with ThreadPoolExecutor(1) as executor:
        with link_stands_still(source):  # which serves the lane, too
            saving = executor.submit(source.guest.control.get_state_blob, Blob.PERMANENT)
            time.sleep(A_MOMENT_S)
            fake.lanes[-1].send(take)
        saving.result(WAIT_TIMEOUT_S)
    assert fake.lanes[-1].receive().kind is LaneKind.GO_ON
    assert fake.lanes[-1].has_ended()
    assert source.guest.facts() == facts
    assert_serves(source.guest)


def test_answer_to_an_earlier_question_fails_no_command(lab: Lab, fake: FakeDestination) -> None:
    """The link is lost, so the source asks; its guest resumes before it is told."""
    source, stream, session, take = frozen_for(lab, fake)
    fake.lanes[-1].send(take)
    assert fake.lanes[-1].receive().kind is LaneKind.GRANT
    stream.close()
    first = fake.accept()
    first.receive(peer.Ask)
    source.guest.resume()
    first.send(peer.Kept(session))
    second = fake.accept()
    second.receive(peer.Reclaim)
    response = source.guest.data.transact(get_random(8))
    assert int.from_bytes(response[6:10], "big") == ReturnCode.RETRY
    second.send(peer.Released(session))
    assert_serves(source.guest)


def test_invariant_13_hello_while_a_boot_waits_does_not_become_its_state(
    lab: Lab, fake: FakeDestination
) -> None:
    """A restarted source asks whose its vTPM is; another host's comes meanwhile."""
    other, source = make_host(lab), make_host(lab)
    other.guest.boot()
    other.guest.work()
    base = base_of(lab, other)
    source.guest.boot()
    nv = source.guest.facts().nv
    source.manage.command("migrate-arm", to=fake.address)
    stream, session = fake.hold_base()
    source.manage.wait_for("VTPM_ARMED")
    assert_tail(source.guest.save())
    stream.receive(peer.Stopped)
    source = restarted(lab, killed(source))
    asking = fake.accept()
    asking.receive(peer.Ask)
    with ThreadPoolExecutor(2) as executor:
        booting = executor.submit(source.guest.control.init)
        visitor, greeting = greet(lab, source)
        bringing = executor.submit(bring, visitor, greeting, base)
        with suppress(TimeoutError):
            bringing.result(A_MOMENT_S)
        asking.send(peer.Released(session))
        booting.result(WAIT_TIMEOUT_S)
        bringing.result(WAIT_TIMEOUT_S)
    source.guest.tpm.startup()
    assert source.guest.facts().nv == nv


def test_invariant_2_hello_between_qemus_blobs_and_init_does_not_undo_them(lab: Lab) -> None:
    other, source, destination = make_host(lab), make_host(lab), make_host(lab)
    other.guest.boot()
    base = base_of(lab, other)
    source.guest.boot()
    facts = source.guest.facts()
    destination.guest.give(source.guest.save())
    visitor, greeting = greet(lab, destination)
    bring(visitor, greeting, base)
    destination.guest.start()
    assert destination.guest.facts() == facts


@pytest.mark.parametrize("restart", [False, True], ids=["reclaims", "asks"])
def test_destination_whose_engine_has_died_lets_go(lab: Lab, restart: bool) -> None:
    """It had the tail; the Grant is lost with the link."""
    pair = make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), freeze(pair)
    pair.link.hold(Direction.TO_DESTINATION)
    pair.destination.guest.give(blobs)
    pair.source.manage.wait_for("VTPM_GRANTED")
    (engine,) = pair.destination.vtpmd.engines()
    os.kill(engine, signal.SIGKILL)
    if restart:
        killed(pair.source)
    pair.link.cut_all()
    pair.link.hold(None)
    if restart:
        source = restarted(lab, pair.source)
        wait_until(lambda: record_of(source).whose is Whose.OURS)
        boot(source)
        assert source.guest.facts().nv == facts.nv
        return
    pair.source.guest.resume()
    wait_until(lambda: pair.source.manage.migration()["outcome"] == "go-on")
    assert pair.source.guest.facts() == facts


def test_host_with_more_names_than_a_record_keeps_gets_its_vtpm_back(lab: Lab) -> None:
    names = [f"host{number:02}.a-long-name.of-a-cluster.example" for number in range(10)]
    assert len("".join(names)) > TEXT_LENGTH_MAX
    pair = make_pair(lab, source=Peering(credentials=authority().issue_named(HOST, *names)))
    assert pair.arm()["event"] == "VTPM_ARMED"
    hand_over(pair)
    pair.source.guest.resume()
    assert_comes_back(pair)


def test_signal_to_end_leaves_no_command_half_carried_out(lab: Lab) -> None:
    """Else the session's next request takes the answer of that one, and the engine is killed."""
    destination = make_armed_pair(lab).destination
    with ThreadPoolExecutor(1) as executor, engine_stands_still(destination):
        executor.submit(destination.guest.control.set_locality, 0)
        time.sleep(A_MOMENT_S)  # the command is with the engine
        os.kill(destination.vtpmd.program.pid, signal.SIGTERM)
        time.sleep(A_MOMENT_S)
    assert destination.vtpmd.program.wait() == 0


def test_session_that_ends_between_two_blobs_gives_no_second_one(lab: Lab) -> None:
    """QEMU has a tail for the permanent state: a whole volatile blob does not go with it."""
    pair = make_armed_pair(lab)
    facts = pair.source.guest.facts()
    assert is_tail(pair.source.guest.control.get_state_blob(Blob.PERMANENT))
    pair.destination.vtpmd.kill()
    pair.source.manage.wait_for("VTPM_GO_ON")
    with pytest.raises(ControlError):
        pair.source.guest.control.get_state_blob(Blob.VOLATILE)
    assert pair.source.guest.facts() == facts


def test_vtpm_on_its_way_back_is_given_to_a_source_that_was_restarted(lab: Lab) -> None:
    """The destination's disk did not take that it lets go; the source then only asks."""
    disk = Disk(lab.directory / "disk")
    lab.close_at_end(disk)
    pair = make_pair(lab, state=disk.path / "state")
    source, destination = pair.source, pair.destination
    assert pair.arm()["event"] == "VTPM_ARMED"
    destination.guest.load(source.guest.save())
    source.manage.wait_for("VTPM_HANDED_OVER")
    wait_until(lambda: destination.manage.vtpm()["incoming"] == "settled")
    disk.fill()
    source.guest.resume()
    wait_until(lambda: destination.manage.vtpm()["incoming"] == "releasing")
    killed(source)
    disk.make_room()  # before it asks: one that was told Kept asks again after half a minute
    again = restarted(lab, source)
    wait_until(lambda: again.manage.command("query-status")["owner"] == "ours")
    again.guest.control.init()
    again.guest.tpm.startup()
    assert_serves(again.guest)
