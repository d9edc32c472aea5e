"""A vTPM only ever takes a state that is its own, and a restored older one is known as one.

Invariant 13 of the design, and with it 10: generations only grow. Clients of the control socket
stand for QEMU, as in test_one_owner.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.command import vtpmd
from tests.harness.fake_peer import hello
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
    boot,
    call,
    files_of,
    freeze,
    give,
    hand_over,
    incoming,
    reconnected,
)
from tests.harness.raw_guest import NV_INDEX, NV_SIZE, Blobs
from tests.harness.state_files import lineage
from tests.support.emulator_client import ControlError
from tests.support.file_names import INCOMING_NAME, JOURNAL_NAME, PERMANENT_NAME
from vtpmd.daemon.engine import EXIT_JOURNAL
from vtpmd.store.anchor import Anchor
from vtpmd.testing.emulator import EmulatorKind
from vtpmd.testing.link import Direction
from vtpmd.wire import peer, swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import GENERATION_GIVEN_MAX, epoch_of

ANOTHER = "holds another vTPM"
BROUGHT = "QEMU brings another vTPM"
OLDER = "an older state of the vTPM was restored"


def told(host: Host) -> Lineage:
    """Return what a host says that its vTPM is."""
    answer = host.manage.command("query-status")["lineage"]
    return Lineage(bytes.fromhex(answer["identity"]), answer["generation"])


def of_blobs(blobs: Blobs) -> Lineage:
    """Return what whole blobs say of their vTPM."""
    assert_whole(blobs)
    found = swtpm_format.read_blob_lineage(blobs.permanent)
    assert found is not None
    return found


def nv_of(host: Host) -> bytes:
    """Return what the guest's NV index holds."""
    return host.guest.tpm.nv_read(NV_INDEX, NV_SIZE)


# Sessions.


def test_invariant_13_a_session_of_another_vm_takes_no_stopped_vtpms_place(lab: Lab) -> None:
    """Neither was given a uuid; and vtpmd migrate knows that whole blobs would be refused, too."""
    pair = make_pair(lab)
    boot(pair.destination)
    pair.destination.guest.tpm.nv_define(NV_INDEX, NV_SIZE)
    pair.destination.guest.work()
    pair.destination.guest.work()
    nv = nv_of(pair.destination)
    destination = restarted(lab, stopped(pair.destination))
    before = files_of(destination)

    event = pair.source.manage.arm(destination.vtpmd.address)

    assert event["event"] == "VTPM_FALL_BACK"
    assert event["data"]["refusal"] == "lineage"
    assert ANOTHER in event["data"]["reason"]
    assert files_of(destination) == before
    boot(destination)
    assert nv_of(destination) == nv
    assert_serves(pair.source.guest)


def test_invariant_13_a_session_takes_no_place_of_a_vtpm_that_swtpm_has_left(lab: Lab) -> None:
    """Nobody has written down of which lineage it is: it may be another VM's only state."""
    swtpm = lab.emulator(EmulatorKind.SWTPM)
    lab.raw_guest(swtpm).boot()
    assert swtpm.stop() == 0
    vtpmd = lab.peer(state=swtpm.state)
    before = (vtpmd.state / PERMANENT_NAME).read_bytes()
    source = make_host(lab)
    source.guest.boot()

    event = source.manage.arm(vtpmd.address)

    assert (event["event"], event["data"]["refusal"]) == ("VTPM_FALL_BACK", "lineage")
    assert (vtpmd.state / PERMANENT_NAME).read_bytes() == before
    assert_serves(source.guest)


def test_invariant_13_a_session_of_another_vm_takes_no_settled_ones_place(lab: Lab) -> None:
    """Its guest has not used its TPM yet, and runs on at the source, which gets it back."""
    pair = make_armed_pair(lab)
    pair.destination.guest.load(freeze(pair))
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    pair.destination.guest.close()
    destination = reconnected(lab, pair.destination)
    destination.guest.control.stop()

    stream = call(lab, destination)
    stream.send(hello())
    assert stream.receive(peer.Refuse).reason == peer.Reason.LINEAGE
    stream.close()
    assert incoming(destination) == "settled"

    pair.source.guest.resume()
    assert_comes_back(pair._replace(destination=destination))


def test_invariant_13_a_refused_source_ends_no_other_session(lab: Lab) -> None:
    """Of whatever reason: what holds a base goes on."""
    pair = make_armed_pair(lab)
    stream = call(lab, pair.destination)
    stream.send(hello()._replace(image_bytes_max=(1 << 32) - 1))
    assert stream.receive(peer.Refuse).reason in (peer.Reason.BUSY, peer.Reason.LIMIT)
    stream.close()
    facts = pair.source.guest.facts()
    hand_over(pair)
    assert pair.destination.guest.facts() == facts


# Whole blobs.


@pytest.mark.parametrize("is_restarted", [False, True], ids=["same", "restarted"])
def test_invariant_13_whole_blobs_of_another_vm_are_refused(
    lab: Lab, *, is_restarted: bool
) -> None:
    """The guest goes on at the source, and that of the directory boots as before."""
    source, destination = make_host(lab), make_host(lab)
    for host in (source, destination):
        host.guest.boot()
    destination.guest.work()
    nv = nv_of(destination)
    destination.guest.control.stop()
    if is_restarted:
        destination = restarted(lab, stopped(destination))
    else:
        destination = reconnected(lab, destination)
    before = files_of(destination)

    with pytest.raises(ControlError):
        destination.guest.load(source.guest.save())

    destination.vtpmd.program.wait_for_output(BROUGHT)
    assert any("migrate again" in line for line in destination.log)
    assert files_of(destination) == before
    with pytest.raises(ControlError):
        destination.guest.start()
    assert_serves_nothing(destination.guest)
    source.guest.resume()
    assert_serves(source.guest)
    destination = reconnected(lab, destination)
    boot(destination)
    assert nv_of(destination) == nv


def test_invariant_13_whole_blobs_bring_their_lineage(lab: Lab) -> None:
    """To a directory that holds nothing; generations go on above what the source has used."""
    source, destination = make_host(lab), make_host(lab)
    source.guest.boot()
    for _ in range(5):
        source.guest.work()
    own, facts = told(source), source.guest.facts()
    assert own.identity != told(destination).identity
    blobs = source.guest.save()
    assert of_blobs(blobs) == own

    destination.guest.load(blobs)

    assert destination.guest.facts() == facts
    for found in (told(destination), lineage(destination.vtpmd.state)):
        assert found[:2] == own[:2]  # it is the same state
    destination.guest.work()
    assert told(destination).generation > own.generation
    destination = restarted(lab, killed(destination))
    assert told(destination).identity == own.identity


def test_invariant_13_an_older_whole_blob_is_known_as_one(lab: Lab) -> None:
    host = make_host(lab)
    host.guest.boot()
    facts, older = host.guest.facts(), host.guest.save()
    host.guest.load(older)  # nothing has happened since
    assert host.manage.command("query-status")["restored"] is None
    host.guest.work()
    newest = told(host)

    host.guest.load(older)

    event = host.manage.wait_for("VTPM_RESTORED")
    generation = of_blobs(older).generation
    assert event["data"]["generation"] == generation < newest.generation
    assert event["data"]["newest"] >= newest.generation  # the stop shuts it down
    assert event["data"]["restore-epoch"] == epoch_of(told(host).generation) == 1
    assert ", restore epoch 1" in vtpmd("status", "--manage", host.vtpmd.manage_path).output
    assert host.manage.command("query-status")["restored"] == event["data"]
    host.vtpmd.program.wait_for_output(OLDER)
    assert host.guest.facts() == facts
    assert told(host).identity == newest.identity
    assert told(host).generation > newest.generation
    assert_serves(host.guest)


def test_invariant_13_an_older_blob_is_known_after_a_restart(lab: Lab) -> None:
    """As virsh restore brings it; that of the last stop is none."""
    host = make_host(lab)
    host.guest.boot()
    older = host.guest.save()
    host.guest.resume()
    host.guest.work()
    newest = host.guest.save()
    host = restarted(lab, killed(host))
    host.guest.load(newest)
    assert host.manage.command("query-status")["restored"] is None
    host = restarted(lab, stopped(host))
    host.guest.load(older)
    assert host.manage.command("query-status")["restored"]["generation"] == of_blobs(older)[1]


def stops(lab: Lab, host: Host) -> Host:
    return restarted(lab, stopped(host))


def dies(lab: Lab, host: Host) -> Host:
    return restarted(lab, killed(host))


@pytest.mark.parametrize("works", range(3))
@pytest.mark.parametrize("ends", [stops, dies, reconnected], ids=lambda ends: ends.__name__)
def test_invariant_13_what_came_in_vain_is_no_state_that_another_is_older_than(
    lab: Lab, ends: Callable[[Lab, Host], Host], works: int
) -> None:
    """Its guest ran on at the source, and changed its TPM or did not; the second time it comes."""
    source, destination = make_host(lab), make_host(lab)
    source.guest.boot()
    destination.guest.load(source.guest.save())
    destination = ends(lab, destination)
    source.guest.resume()
    for _ in range(works):
        source.guest.work()
    own, facts = told(source), source.guest.facts()

    destination.guest.load(source.guest.save())

    assert destination.guest.facts() == facts
    assert told(destination)[:2] == own[:2]
    assert destination.manage.command("query-status")["restored"] is None
    assert not any(OLDER in line for line in destination.log)
    for _ in range(2):  # the first may write what is there
        destination.guest.work()
    assert told(destination).generation > own.generation


def test_a_snapshot_of_another_vtpm_is_the_vms_own_word(lab: Lab) -> None:
    """Loaded by a QEMU that has started the TPM here: the directory is that vTPM's then."""
    other, host = make_host(lab), make_host(lab)
    for each in (other, host):
        each.guest.boot()
    snapshot = other.guest.save()

    host.guest.load(snapshot)

    host.vtpmd.program.wait_for_output("the snapshot is of another vTPM")
    assert told(host).identity == of_blobs(snapshot).identity
    assert lineage(host.vtpmd.state).identity == of_blobs(snapshot).identity
    assert_serves(host.guest)


def test_a_blob_whose_generation_would_use_up_all_is_refused(lab: Lab) -> None:
    host, other = make_host(lab), make_host(lab)
    host.guest.boot()
    blobs = host.guest.save()
    state = swtpm_format.decode_blob(blobs.permanent)
    largest = Lineage(of_blobs(blobs).identity, GENERATION_GIVEN_MAX + 1)
    with pytest.raises(ControlError):
        other.guest.load(blobs._replace(permanent=swtpm_format.encode_blob(state, largest)))
    largest = largest._replace(generation=largest.generation - 1)
    other.guest.load(blobs._replace(permanent=swtpm_format.encode_blob(state, largest)))
    assert_serves(other.guest)


# To and fro.


def by_session(lab: Lab, source: Host, target: Host) -> Host:
    """Move a vTPM with a tail."""
    assert source.manage.arm(target.vtpmd.address)["event"] == "VTPM_ARMED"
    source.guest.work()
    pair = Pair(source, target, lab.link(target.vtpmd))
    hand_over(pair)
    return target


def by_blobs(_: Lab, source: Host, target: Host) -> Host:
    """Move it with whole blobs."""
    source.guest.work()
    blobs = source.guest.save()
    assert_whole(blobs)
    target.guest.load(blobs)
    return target


def by_swtpm(lab: Lab, source: Host, target: Host) -> Host:
    """Move it by way of a swtpm, which forgets of which lineage it is."""
    swtpm = lab.raw_guest(lab.emulator(EmulatorKind.SWTPM))
    swtpm.load(source.guest.save())
    swtpm.work()
    target.guest.load(swtpm.save())
    return target


@pytest.mark.parametrize(
    "ways",
    [
        (by_session, by_session, by_session),
        (by_blobs, by_blobs, by_blobs),
        (by_session, by_blobs, by_session, by_blobs, by_blobs, by_session, by_session),
        (by_blobs, by_session, by_session, by_blobs),
        (by_session, by_swtpm, by_swtpm, by_session, by_blobs),
    ],
    ids=lambda ways: "-".join(way.__name__.removeprefix("by_") for way in ways),
)
@pytest.mark.parametrize("is_restarted", [False, True], ids=["same", "restarted"])
def test_invariant_13_a_vtpm_that_goes_to_and_fro_is_the_same(
    lab: Lab, ways: tuple[Callable[[Lab, Host, Host], Host], ...], is_restarted: bool
) -> None:
    here, there = make_host(lab), make_host(lab)
    here.guest.boot()
    own = told(here)
    for n, way in enumerate(ways):
        facts = None if way is by_swtpm else nv_of(here)
        # Where it comes to another QEMU waits for it.
        gave_blobs = n > 0 and ways[n - 1] is not by_session
        leaves = gave_blobs and (there.vtpmd.state / JOURNAL_NAME).exists()
        if is_restarted:
            there = restarted(lab, stopped(there, EXIT_JOURNAL if leaves else 0))
        else:
            there = reconnected(lab, there)
        there.guest.control.stop()
        here, there = way(lab, here, there), here
        assert facts is None or nv_of(here) != facts  # by one step of work()
        now = told(here)
        knows_it = by_swtpm not in ways[: n + 1] or n > 1
        assert (now.identity == own.identity) or not knows_it
        assert now.generation > own.generation or way is by_swtpm
        own = now if knows_it else own
        assert not any(ANOTHER in line or BROUGHT in line or OLDER in line for line in here.log)
        assert_serves(here.guest)


# Crashes.


def test_invariant_13_a_granted_state_that_is_taken_up_is_its_own(lab: Lab) -> None:
    """The host loses power between the grant and the vTPM's own file."""
    pair = make_armed_pair(lab)
    own = told(pair.source)
    in_the_way = pair.destination.vtpmd.state / f"TMP2-00.{PERMANENT_NAME.split('.')[1]}"
    in_the_way.mkdir()
    pair.destination.guest.load(freeze(pair))
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    pair.destination.vtpmd.program.wait_for_output("the state stays in tpm2-00.incoming")
    assert not (pair.destination.vtpmd.state / PERMANENT_NAME).exists()
    killed(pair.destination)
    in_the_way.rmdir()

    destination = restarted(lab, pair.destination)

    assert not (destination.vtpmd.state / INCOMING_NAME).exists()
    for found in (told(destination), lineage(destination.vtpmd.state)):
        assert found.identity == own.identity
        assert found.generation >= own.generation
    boot(destination)
    assert_serves(destination.guest)


def test_invariant_13_a_state_that_was_declined_leaves_no_lineage(lab: Lab) -> None:
    """What is there stays what it was."""
    pair = make_armed_pair(lab)
    own = told(pair.destination)
    blobs = freeze(pair)
    pair.link.hold(Direction.TO_SOURCE)  # nothing is granted
    pair.destination.guest.give(blobs)
    pair.source.guest.resume()
    pair.link.hold(None)
    assert_comes_back(pair)
    assert told(pair.destination) == own


def test_whole_blobs_come_to_where_a_vtpm_was_given_back(lab: Lab) -> None:
    """It was granted, and QEMU there had not started it."""
    pair = make_armed_pair(lab)
    give(pair)
    pair.source.guest.resume()
    assert_comes_back(pair)
    blobs = pair.source.guest.save()
    assert_whole(blobs)
    pair = pair._replace(destination=reconnected(lab, pair.destination))
    pair.destination.guest.load(blobs)
    assert told(pair.destination).identity == told(pair.source).identity


# Anchors.


def anchored(lab: Lab, anchor: Path, state: Path | None = None) -> Host:
    """Start a host whose vTPM has an anchor."""
    vtpmd = lab.peer(None, state, ("--anchor", str(anchor)))
    return Host(vtpmd, lab.management(vtpmd), lab.raw_guest(vtpmd))


def anchors_mark(anchor: Path, lab: Lab) -> bytes:
    copy = lab.new_path("anchor")
    copy.write_bytes(anchor.read_bytes())
    with Anchor.open(copy, lab.new_path("state"), is_new=False) as opened:
        assert opened.mark is not None
        return opened.mark.identity


@pytest.mark.parametrize("way", [by_session, by_blobs], ids=["session", "blobs"])
@pytest.mark.parametrize("end", [stopped, killed])
def test_invariant_13_an_anchor_goes_with_what_has_come(
    lab: Lab, way: Callable[[Lab, Host, Host], Host], end: Callable[[Host], Host]
) -> None:
    """It is this host's storage's; the identity that it knows is the vTPM's that came."""
    anchors = lab.new_path("a"), lab.new_path("b")
    source, target = (anchored(lab, anchor) for anchor in anchors)
    source.guest.boot()
    own = told(source)
    way(lab, source, target)
    assert_serves(target.guest)
    assert anchors_mark(anchors[1], lab) == own.identity

    target = anchored(lab, anchors[1], end(target).vtpmd.state)

    assert told(target).identity == own.identity
    boot(target)
    assert_serves(target.guest)


def test_invariant_13_an_anchored_state_is_taken_up_over_any_crash(lab: Lab) -> None:
    """Also one between the file and the anchor, which a test puts there by hand."""
    anchors = lab.new_path("a"), lab.new_path("b")
    source, target = (anchored(lab, anchor) for anchor in anchors)
    source.guest.boot()
    own = told(source)
    in_the_way = target.vtpmd.state / f"TMP2-00.{PERMANENT_NAME.split('.')[1]}"
    in_the_way.mkdir()
    assert source.manage.arm(target.vtpmd.address)["event"] == "VTPM_ARMED"
    source.guest.work()
    blobs = source.guest.save()
    assert_tail(blobs)
    target.guest.load(blobs)
    target.vtpmd.program.wait_for_output("the state stays in tpm2-00.incoming")
    killed(target)
    in_the_way.rmdir()
    target = anchored(lab, anchors[1], target.vtpmd.state)
    assert told(target).identity == own.identity
    assert anchors_mark(anchors[1], lab) == own.identity
    boot(target)
    assert_serves(target.guest)
