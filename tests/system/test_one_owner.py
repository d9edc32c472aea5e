"""One vTPM has one owner, whatever is lost, late, restarted or asked for at the wrong moment.

Invariant 3 of the design, with what belongs to it: what the destination lets go of it remembers,
what the source may not know it asks for by itself, and who is not the owner executes and writes
nothing. Clients of the control socket stand for QEMU, as in test_stream_handover.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from tests.harness.handover import (
    Host,
    Pair,
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
    call,
    engine_stands_still,
    files_of,
    freeze,
    give,
    greet,
    hand_over,
    incoming,
    outgoing,
    reconnected,
    record_of,
    session_of,
)
from tests.harness.raw_guest import NV_INDEX, NV_SIZE, PCR
from tests.support.emulator_client import Blob, Control, ControlError
from tests.support.file_names import JOURNAL_NAME
from tests.support.tpm2 import ReturnCode, TpmError, get_random
from vtpmd.daemon.engine import EXIT_JOURNAL
from vtpmd.daemon.outgoing import ROUND_INTERVAL_S
from vtpmd.daemon.peer_server import PEERS_MAX
from vtpmd.migration.source import HEARD_US_MAX
from vtpmd.store.directory import StateDirectory
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import Outcome, Whose
from vtpmd.testing.credentials import HOST, authority, credentials
from vtpmd.testing.disk import Disk
from vtpmd.testing.emulator import Peering
from vtpmd.testing.link import Cut, Direction, Ending
from vtpmd.testing.waiting import WAIT_TIMEOUT_S, wait_until
from vtpmd.wire import peer

HOPS = 100
FIRST_HOPS = 10
STATEBLOB_HEADER_BYTES = 12  # that come after the result of a GET_STATEBLOB, also of a refused one
RACES = 10


def assert_one_serves_after_restarts(lab: Lab, *hosts: Host) -> None:
    """Start all hosts anew, and boot a guest on each: exactly one may."""
    served = 0
    for host in [restarted(lab, stopped(host)) for host in hosts]:
        try:
            boot(host)
        except ControlError:
            assert_serves_nothing(host.guest)
        else:
            assert_serves(host.guest)
            served += 1
    assert served == 1


# Arming.


def test_arming_where_the_vtpm_is_not_ours_is_refused_and_changes_nothing(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    hand_over(pair)
    assert_serves(pair.destination.guest)
    source = restarted(lab, stopped(pair.source))
    wait_until(lambda: record_of(source).whose is Whose.MOVED)
    before = files_of(source)

    with pytest.raises(ExecuteError, match="not this host's"):
        source.manage.command("migrate-arm", to=f"{HOST}:1")

    assert files_of(source) == before
    assert_refuses_to_boot(source)
    assert_serves(pair.destination.guest)


def test_arming_where_the_vtpm_was_given_back_is_refused(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    hand_over(pair)
    pair.source.guest.resume()
    assert_comes_back(pair)
    with pytest.raises(ExecuteError, match="not this host's"):
        pair.destination.manage.command("migrate-arm", to=f"{HOST}:1")
    assert_refuses_to_boot(restarted(lab, stopped(pair.destination)))
    assert_serves(pair.source.guest)


def test_destination_that_is_armed_and_gives_back_serves_no_more(lab: Lab) -> None:
    """Its own session says nothing of whose the vTPM is; that of the source does."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    base_of(lab, pair.destination)  # armed to go to a third host
    pair.source.guest.resume()
    wait_until(lambda: pair.source.manage.migration()["outcome"] == "go-on")

    pair.destination.guest.resume()  # by mistake: somebody says cont at its QEMU

    assert_serves_nothing(pair.destination.guest)
    assert_serves(pair.source.guest)


def test_snapshot_brings_back_no_vtpm_that_was_given_back(lab: Lab) -> None:
    pair = make_pair(lab)
    snapshot = pair.source.guest.save()
    assert_whole(snapshot)
    pair.source.guest.resume()
    assert pair.arm()["event"] == "VTPM_ARMED"
    pair.source.guest.work()
    hand_over(pair)
    pair.source.guest.resume()
    assert_comes_back(pair)

    with pytest.raises(ControlError):
        pair.destination.guest.load(snapshot)

    assert_serves_nothing(pair.destination.guest)
    assert record_of(pair.destination).whose is Whose.MOVED
    assert_serves(pair.source.guest)
    # Another QEMU's snapshot is its operator's decision, as where the vTPM has never been.
    reconnected(lab, pair.destination).guest.load(snapshot)


def test_give_back_while_a_snapshot_is_loaded_counts(lab: Lab) -> None:
    pair = make_pair(lab)
    snapshot = pair.source.guest.save()
    pair.source.guest.resume()
    assert pair.arm()["event"] == "VTPM_ARMED"
    hand_over(pair)
    pair.destination.guest.give(snapshot)
    pair.source.guest.resume()
    wait_until(lambda: pair.source.manage.migration()["outcome"] == "go-on")

    with pytest.raises(ControlError):
        pair.destination.guest.start()

    assert_serves_nothing(pair.destination.guest)
    assert_serves(pair.source.guest)


def test_boot_that_takes_up_a_vtpm_ends_the_session_in_which_it_left(lab: Lab) -> None:
    """It comes back, and its QEMU dies before INIT: it can be saved, and move again."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    source = reconnected(lab, pair.source)
    source.guest.control.stop()  # as a QEMU says that starts
    assert pair.destination.manage.arm(source.vtpmd.address)["event"] == "VTPM_ARMED"
    give(Pair(pair.destination, source, pair.link))
    source = reconnected(lab, source)

    boot(source)

    assert_whole(source.guest.save())
    source.guest.resume()
    base_of(lab, source)
    assert_serves(source.guest)


# What became of a session is remembered.


def test_restarted_destination_that_was_not_granted_says_so(lab: Lab) -> None:
    """The Grant is lost, the destination sets the session aside, and is restarted in order."""
    pair = make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), freeze(pair)
    pair.link.cut_at(Cut(after=1))  # the Take passes
    with pytest.raises(ControlError):
        pair.destination.guest.load(blobs)
    assert pair.link.was_cut.wait(WAIT_TIMEOUT_S)
    pair = pair._replace(destination=restarted(lab, stopped(pair.destination)))

    pair.source.guest.resume()

    assert_comes_back(pair)
    assert pair.source.guest.facts().pcr != facts.pcr  # it was used since
    assert not any("does not let go" in line for line in pair.source.log)


def test_restarted_destination_that_has_let_go_says_so_again(lab: Lab) -> None:
    """Its Released is lost, and it loses power."""
    pair = make_armed_pair(lab)
    blobs = freeze(pair)
    pair.destination.guest.load(blobs)
    wait_until(lambda: incoming(pair.destination) == "settled")
    lost = call(lab, pair.destination)
    lost.send(peer.Reclaim(session_of(blobs)))

    def is_released() -> bool:
        line = record_of(pair.destination).find(session_of(blobs).hex())
        return line is not None and line.outcome is Outcome.RELEASED

    wait_until(is_released)
    lost.close()
    pair = pair._replace(destination=restarted(lab, killed(pair.destination)))

    pair.source.guest.resume()

    assert_comes_back(pair)
    assert_refuses_to_boot(pair.destination)


# Nothing is left behind.


def descriptors(host: Host) -> int:
    return sum(1 for _ in Path(f"/proc/{host.vtpmd.program.pid}/fd").iterdir())


def test_a_hundred_hops_between_two_daemons_leave_nothing_behind(lab: Lab) -> None:
    """Neither descriptors nor places for peers, of which there are eight."""
    assert HOPS > 2 * PEERS_MAX
    here, there = make_host(lab), make_host(lab)
    here.guest.boot()
    seen: list[int] = []
    for _ in range(HOPS):
        assert here.manage.arm(there.vtpmd.address)["event"] == "VTPM_ARMED"
        here.guest.work()
        blobs = here.guest.save()
        assert_tail(blobs)
        there.guest.load(blobs)
        here.manage.wait_for("VTPM_HANDED_OVER")
        here.guest.control.stop()
        wait_until(lambda there=there: incoming(there) == "settled")  # type: ignore[misc]
        here, there = there, here
        if len(seen) < FIRST_HOPS:
            seen.append(descriptors(here) + descriptors(there))
    assert_serves(here.guest)
    # The first hops open what is kept open; the connection of the last may still be closing.
    wait_until(lambda: descriptors(here) + descriptors(there) <= max(seen))


# A Reclaim that meets an admission.


def test_reclaim_that_comes_while_the_destination_admits(lab: Lab) -> None:
    """vtpmd is not scheduled for a moment, and finds both when it is."""
    pair = make_armed_pair(lab)
    blobs = freeze(pair)
    pair.link.hold(Direction.TO_DESTINATION)  # the Grant
    pair.destination.guest.give(blobs)
    pair.source.manage.wait_for("VTPM_GRANTED")
    wait_until(lambda: incoming(pair.destination) == "taking")
    asking = call(lab, pair.destination)
    os.kill(pair.destination.vtpmd.program.pid, signal.SIGSTOP)
    pair.link.hold(None)
    pair.destination.guest.start()
    asking.send(peer.Reclaim(session_of(blobs)))
    os.kill(pair.destination.vtpmd.program.pid, signal.SIGCONT)
    (answer,) = [said for said in asking.wait_for_end() if not isinstance(said, peer.Running)]
    assert isinstance(answer, peer.Released)

    pair.source.guest.resume()

    assert_comes_back(pair)
    assert_one_serves_after_restarts(lab, *pair[:2])


def test_source_that_is_resumed_right_when_the_destination_starts(lab: Lab) -> None:
    """Nobody owns the order here: again and again, and then both are started anew."""
    pair = make_armed_pair(lab)
    for race in range(RACES):
        if race:
            assert pair.arm()["event"] == "VTPM_ARMED"
        pair.destination.guest.load(freeze(pair))
        pair.source.guest.resume()
        assert_comes_back(pair)
        assert record_of(pair.source).whose is Whose.OURS
        assert record_of(pair.destination).whose is Whose.MOVED
        pair.destination.guest.control.stop()
    assert_one_serves_after_restarts(lab, *pair[:2])


# The link.


def test_flow_that_is_forgotten_after_the_grant_is_not_used_again(lab: Lab) -> None:
    """Nobody is told that nothing gets through; a new connection does."""
    pair = make_armed_pair(lab)
    give(pair)
    pair.link.forget()
    pair = pair._replace(destination=reconnected(lab, pair.destination))  # its QEMU has died
    pair.source.guest.resume()
    assert_comes_back(pair)


def test_flow_that_is_forgotten_while_armed_leads_to_whole_blobs(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    pair.source.manage.wait_for_acknowledgement()
    pair.link.forget()
    time.sleep(HEARD_US_MAX / 1e6)  # from then on it is silent for too long: that takes this long
    facts, blobs = pair.source.guest.facts(), pair.source.guest.save()
    assert_whole(blobs)
    assert "has not been heard of" in pair.source.manage.migration()["reason"]
    pair.destination.guest.load(blobs)
    assert pair.destination.guest.facts() == facts


def command(host: Host) -> int:
    """Send a TPM a command once; return its response code."""
    return int.from_bytes(host.guest.data.transact(get_random(8))[6:10], "big")


def test_grant_that_is_lost_blocks_nobody(lab: Lab) -> None:
    """INIT and LOCK_STORAGE are answered; commands are to be sent again until it is clear."""
    pair = make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), freeze(pair)
    pair.link.cut_at(Cut(after=1, ending=Ending.SILENCE))  # the Take passes
    pair.destination.guest.give(blobs)
    pair.source.manage.wait_for("VTPM_GRANTED")
    with pytest.raises(ControlError) as raised:
        pair.destination.guest.start()
    assert raised.value.control == Control.INIT

    pair.source.guest.resume()

    assert outgoing(pair.source) == "reclaiming"
    assert command(pair.source) == ReturnCode.RETRY
    pair.link.heal()
    while (code := command(pair.source)) == ReturnCode.RETRY:
        pass  # as a guest's driver does
    assert code == ReturnCode.SUCCESS
    assert pair.source.guest.facts() == facts
    assert_comes_back(pair)


# The source's QEMU ends as soon as it has sent all.


def test_source_that_is_shut_down_right_after_the_tail_stays_for_the_take(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), freeze(pair)
    pair.link.hold(Direction.TO_SOURCE)  # the Take
    pair.destination.guest.give(blobs)
    with ThreadPoolExecutor(1) as executor:
        starting = executor.submit(pair.destination.guest.start)
        wait_until(lambda: incoming(pair.destination) == "taking")
        pair.source.guest.control.shutdown()
        pair.link.hold(None)
        starting.result(WAIT_TIMEOUT_S)
    assert pair.source.vtpmd.program.wait() == 0
    assert pair.destination.guest.facts() == facts
    assert_serves(pair.destination.guest)
    assert_refuses_to_boot(restarted(lab, pair.source))


def test_source_that_is_shut_down_and_gets_no_take_starts_again(lab: Lab) -> None:
    """The guest is lost, as with any emulator; its vTPM is not."""
    pair = make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), freeze(pair)
    pair.link.hold(Direction.TO_SOURCE)
    pair.destination.guest.give(blobs)
    pair.source.guest.control.shutdown()
    assert pair.source.vtpmd.program.wait() == 0
    pair.link.hold(None)
    with pytest.raises(ControlError):
        pair.destination.guest.start()
    source = restarted(lab, pair.source)
    boot(source)
    assert source.guest.facts().nv == facts.nv
    assert_serves(source.guest)
    assert_serves_nothing(pair.destination.guest)


# Other hosts.


def test_two_hellos_at_once_never_mix_two_vtpms(lab: Lab) -> None:
    """Both come while the session before them is being set aside, and the engine stands still."""
    other, pair = make_host(lab), make_pair(lab)
    other.guest.boot()
    other.guest.work()
    base = base_of(lab, other)
    facts = pair.source.guest.facts()
    assert other.guest.facts() != facts
    first, greeting = greet(lab, pair.destination)
    bring(first, greeting, base)
    with ThreadPoolExecutor(1) as executor, engine_stands_still(pair.destination):
        first.send(peer.Stopped(greeting.session))
        wait_until(lambda: incoming(pair.destination) == "standby")
        arming = executor.submit(pair.arm)
        wait_until(lambda: sum("a source has connected" in x for x in pair.destination.log) == 2)
        second, greeting = greet(lab, pair.destination)
        wait_until(lambda: sum("a source has connected" in x for x in pair.destination.log) == 3)
    arming.result(WAIT_TIMEOUT_S)
    bring(second, greeting, base)

    pair.destination.guest.load(pair.source.guest.save())

    assert pair.destination.guest.facts() == facts


def test_third_host_gets_nothing_by_a_sessions_name(lab: Lab) -> None:
    """The name is in the clear in QEMU's stream; the host is one that is allowed."""
    third = authority().issue("third.example")
    allowing = Peering(credentials=credentials(), allow=(HOST, "third.example"))
    pair = make_pair(lab, destination=allowing)
    assert pair.arm()["event"] == "VTPM_ARMED"
    blobs = freeze(pair)
    pair.destination.guest.load(blobs)
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    for question in (peer.Reclaim(session_of(blobs)), peer.Ask(session_of(blobs))):
        stream = call(lab, pair.destination, third)
        stream.send(question)
        assert stream.receive(peer.Refuse).reason == peer.Reason.NOT_ALLOWED
    assert_serves(pair.destination.guest)


def test_another_hello_finds_a_granted_destination_busy(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    give(pair)
    pair = pair._replace(destination=reconnected(lab, pair.destination))  # its QEMU has died
    stream, _ = greet(lab, pair.destination)
    assert stream.receive(peer.Refuse).reason == peer.Reason.BUSY
    pair.source.guest.resume()
    assert_comes_back(pair)


def test_another_hello_does_not_make_a_destination_forget(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    blobs = freeze(pair)
    pair.link.cut_at(Cut(after=1))  # the Grant is lost
    with pytest.raises(ControlError):
        pair.destination.guest.load(blobs)
    stream, _ = greet(lab, pair.destination)
    stream.receive(peer.Welcome)
    pair.source.guest.resume()
    assert_comes_back(pair)


def test_guest_that_boots_at_the_destination_finds_no_pcrs_of_the_one_that_came(lab: Lab) -> None:
    """Granted, but QEMU dies before INIT; another one boots: that guest's TPM had no power."""
    pair = make_armed_pair(lab)
    facts = pair.source.guest.facts()
    give(pair)
    destination = reconnected(lab, pair.destination)
    destination.guest.control.init()
    with pytest.raises(TpmError, match=f"{ReturnCode.INITIALIZE:#x}"):
        destination.guest.tpm.pcr(PCR)
    destination.guest.tpm.startup()
    assert destination.guest.tpm.pcr(PCR) == bytes(32)
    assert destination.guest.tpm.nv_read(NV_INDEX, NV_SIZE) == facts.nv
    assert_serves(destination.guest)
    pair.source.guest.resume()
    assert_serves_nothing(pair.source.guest)


# Who is not the owner executes and writes nothing.


def test_advice_of_a_source_that_gave_its_vtpm_away_holds(lab: Lab) -> None:
    """It names the one way to start it without the other host's word; that way works."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    nv = pair.destination.guest.facts().nv
    assert_refuses_to_boot(pair.source)
    assert any("vtpmd owner DIR --claim" in line for line in pair.source.log)
    source = stopped(pair.source)
    killed(pair.destination)
    with StateDirectory.open(source.vtpmd.state) as directory:
        MovingFiles(directory).owner.claim()
    again = restarted(lab, source)
    boot(again)
    assert again.guest.facts().nv == nv


def test_source_that_gave_its_vtpm_away_writes_nothing(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    hand_over(pair)
    before = files_of(pair.source)
    control = pair.source.guest.control
    for refused in (
        control.store_volatile,
        control.hash_start,
        lambda: control.reset_established(3),
        lambda: control.get_state_blob(Blob.PERMANENT),  # the last: its answer is longer
    ):
        with pytest.raises(ControlError):
            refused()
    assert files_of(pair.source) == before
    stopped(pair.source)
    assert files_of(pair.source) == before


def wait_until_idle(pair: Pair) -> None:
    """Wait until a round was due in which nothing was new: a tail brings nothing new then."""
    rounds: list[object] = []
    while rounds != (seen := pair.source.manage.migration()["rounds"]):
        rounds = seen
        time.sleep(5 * ROUND_INTERVAL_S)


@pytest.mark.parametrize("state", ["holding", "standby", "taking", "entitled"])
def test_destination_executes_no_command_out_of_turn(lab: Lab, state: str) -> None:
    """Whatever QEMU's order is: before INIT nothing is executed, given away or written."""
    pair = make_pair(lab)
    assert pair.arm()["event"] == "VTPM_ARMED"
    if state in ("taking", "entitled"):  # else the round of it would be written at any moment
        pair.source.guest.work()
    facts = pair.source.guest.facts()
    if state == "standby":
        wait_until_idle(pair)
    if state != "holding":
        blobs = freeze(pair)
    if state == "taking":
        pair.link.hold(Direction.TO_SOURCE)
    if state in ("taking", "entitled"):
        pair.destination.guest.give(blobs)
    wait_until(lambda: incoming(pair.destination) == state)
    before = files_of(pair.destination)
    control = pair.destination.guest.control
    for refused in (
        control.store_volatile,
        control.hash_start,
        lambda: control.reset_established(3),
        lambda: control.get_state_blob(Blob.PERMANENT),  # the last: its answer is longer
    ):
        with pytest.raises(ControlError):
            refused()
    control.receive(STATEBLOB_HEADER_BYTES)
    assert_serves_nothing(pair.destination.guest)
    assert files_of(pair.destination) == before
    pair.link.hold(None)
    if state in ("holding", "standby"):
        pair.destination.guest.give(freeze(pair) if state == "holding" else blobs)
    pair.destination.guest.start()
    assert pair.destination.guest.facts() == facts
    assert_serves(pair.destination.guest)


def test_guest_that_ran_on_without_a_word_ends_the_freeze(lab: Lab) -> None:
    """QEMU before 7.2 says no LOCK_STORAGE, and saves a snapshot later."""
    pair = make_armed_pair(lab)
    blobs = freeze(pair)
    pair.source.guest.work()
    facts, snapshot = pair.source.guest.facts(), pair.source.guest.save()
    assert_whole(snapshot)
    with pytest.raises(ControlError):
        pair.destination.guest.load(blobs)
    pair.destination.guest.load(snapshot)
    assert pair.destination.guest.facts() == facts


def test_source_that_gave_whole_blobs_writes_nothing_when_it_ends(lab: Lab) -> None:
    """Its directory stays what the guest had there: nobody has said that it runs on here."""
    pair = make_pair(lab)
    pair.source.guest.work()
    assert_whole(pair.source.guest.save())
    before = files_of(pair.source)
    pair.source.guest.control.shutdown()
    assert pair.source.vtpmd.program.wait() == EXIT_JOURNAL
    assert files_of(pair.source) == before


def test_host_that_gave_whole_blobs_and_is_asked_for_its_vtpm_writes_nothing(lab: Lab) -> None:
    """By the host that it came from; it keeps it, and its guest still has not run on."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    host = pair.destination
    host.guest.work()
    assert_whole(host.guest.save())
    before = files_of(host)
    pair.source.guest.resume()
    wait_until(lambda: any("says that it has it" in line for line in pair.source.log))
    host.guest.control.shutdown()
    assert host.vtpmd.program.wait() == EXIT_JOURNAL
    assert files_of(host) == before


def test_source_that_gave_whole_blobs_and_runs_on_is_stopped_in_order(lab: Lab) -> None:
    pair = make_pair(lab)
    assert_whole(pair.source.guest.save())
    nv, before = pair.source.guest.facts().nv, files_of(pair.source)
    assert_whole(pair.source.guest.save())
    pair.source.guest.resume()
    pair.source.guest.control.shutdown()
    assert pair.source.vtpmd.program.wait() == 0
    after = files_of(pair.source)
    assert after["tpm2-00.permall"] != before["tpm2-00.permall"]
    assert JOURNAL_NAME not in after  # as swtpm has it
    again = restarted_without_a_port(lab, pair.source)
    boot(again)
    assert again.guest.facts().nv == nv


def restarted_without_a_port(lab: Lab, host: Host) -> Host:
    """Start a vtpmd on a state directory, on any port."""
    vtpmd = lab.peer(None, host.vtpmd.state)
    return Host(vtpmd, lab.management(vtpmd), lab.raw_guest(vtpmd))


# A source that was restarted asks by itself.


def test_restarted_source_asks_by_itself_and_serves_again(lab: Lab) -> None:
    """It was killed with the tail given; the destination has the tail, and no Grant."""
    pair = make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), freeze(pair)
    pair.link.hold(Direction.TO_SOURCE)
    pair.destination.guest.give(blobs)
    killed(pair.source)
    assert record_of(pair.source).whose is Whose.OFFERED
    pair.link.hold(None)
    vtpmd = lab.peer(None, pair.source.vtpmd.state)  # and no QEMU
    wait_until(lambda: record_of(pair.source).whose is Whose.OURS)
    source = Host(vtpmd, lab.management(vtpmd), lab.raw_guest(vtpmd))
    boot(source)
    assert source.guest.facts().nv == facts.nv
    assert_serves(source.guest)
    with pytest.raises(ControlError):
        pair.destination.guest.start()


def test_restarted_source_refuses_while_the_destination_has_it(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    give(pair)
    killed(pair.source)
    assert record_of(pair.source).whose is Whose.OFFERED
    source = restarted(lab, pair.source)
    assert_refuses_to_boot(source)
    wait_until(lambda: record_of(source).whose is Whose.MOVED)
    pair.destination.guest.start()
    assert_serves(pair.destination.guest)


# Disks.


def test_destination_without_room_refuses_and_nothing_is_lost(lab: Lab) -> None:
    disk = Disk(lab.directory / "disk")
    lab.close_at_end(disk)
    pair = make_pair(lab, state=disk.path / "state")
    source, destination = pair.source, pair.destination
    disk.fill()
    facts = source.guest.facts()
    assert pair.arm()["data"]["refusal"] == "storage"
    assert_serves(source.guest)
    disk.make_room()
    facts = source.guest.facts()
    assert pair.arm()["event"] == "VTPM_ARMED"
    hand_over(pair)
    assert destination.guest.facts() == facts
