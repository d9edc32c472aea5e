"""A vTPM moves by rounds and a tail, and is one host's at every instant.

Invariants of the design that are checked: 3 (at most one side serves; after a failure exactly one
can), 4 (what was acknowledged is durable), 5 (the state is the same, bit for bit), 6 (a tail only
while armed) and 10 (generations only grow). Clients of the control socket stand for QEMU: what only
a guest can notice is for test_stream_guest.
"""

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import count
from typing import Any

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
from tests.harness.raw_guest import Blobs, Facts, RawGuest
from tests.harness.state_files import durable_state
from tests.support import tail
from tests.support.emulator_client import Blob, Control, ControlError
from tests.support.image_digest import whole_digest
from tests.support.tpm2 import StartupType, Tpm, TpmError
from vtpmd.core.lane import LaneKind
from vtpmd.daemon import tls
from vtpmd.daemon.listener import listen_for_peers
from vtpmd.testing.credentials import HOST, credentials
from vtpmd.testing.emulator import EmulatorKind, Peering
from vtpmd.testing.link import Cut, Direction, Ending, MessageLink
from vtpmd.testing.waiting import WAIT_TIMEOUT_S, wait_until
from vtpmd.wire import peer, swtpm_format

REFUSED = "the tail is refused: "


SAVED_PCR = 10  # one that TPM2_Shutdown(STATE) keeps


def hand_over(pair: Pair) -> dict[str, Any]:
    """Move an armed pair's vTPM; return what the source then says of the migration."""
    blobs = pair.source.guest.save()
    assert_tail(blobs)
    pair.destination.guest.load(blobs)
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    return pair.source.manage.migration()


def assert_stays(pair: Pair, facts: Facts) -> None:
    """Let the guest run on at the source: the TPM is the source's alone, and lost nothing."""
    assert_serves_nothing(pair.destination.guest)
    pair.source.guest.resume()
    assert pair.source.guest.facts() == facts
    assert_serves(pair.source.guest)
    assert_serves_nothing(pair.destination.guest)
    wait_until(lambda: pair.source.manage.migration()["outcome"] == "go-on")


def assert_cannot_start(host: Host) -> None:
    """Power a TPM on, which must fail and must keep on failing."""
    for _ in range(2):
        with pytest.raises(ControlError):
            host.guest.start()
        assert_serves_nothing(host.guest)


def test_rounds_and_tail_move_the_tpm_bit_by_bit(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    for _ in range(3):
        pair.source.manage.wait_for("VTPM_ROUND")
        pair.source.guest.work()
    facts = pair.source.guest.facts()

    report = hand_over(pair)

    assert report["outcome"] == "handed-over"
    wait_until(lambda: not (pair.destination.vtpmd.state / "tpm2-00.incoming").exists())
    arrived = durable_state(pair.destination.vtpmd.state)
    assert whole_digest(arrived).hex() == report["digests"]["permanent"]
    assert len(report["digests"]["volatile"]) == 64
    assert pair.destination.guest.facts() == facts
    assert_serves(pair.destination.guest)
    assert_serves_nothing(pair.source.guest)


def test_report_tells_rounds_tail_and_phases(lab: Lab) -> None:
    pair = make_armed_pair(lab)

    report = hand_over(pair)

    events = {event["event"]: event["data"] for event in pair.source.manage.events}
    freeze_bytes = events["VTPM_FREEZE"]["tail-bytes"]
    assert report["tail-bytes"] == freeze_bytes > 0
    assert report["rounds"][0]["round"] == 1
    assert all(each["bytes"] > 0 for each in report["rounds"])
    # The freeze may overtake the last one.
    assert all(each["acknowledged-us"] > 0 for each in report["rounds"][:-1])
    assert all(duration >= 0 for duration in report["phases-us"].values())
    assert {name.partition(":")[0] for name in report["phases-us"]} == {"source", "destination"}


def test_idle_tpm_has_one_round_and_an_empty_tail(lab: Lab) -> None:
    """Nothing is captured or sent when no command ran."""
    pair = make_pair(lab)
    pair.arm()
    facts = pair.source.guest.facts()  # the clock ran meanwhile; so did these commands
    report = hand_over(pair)
    assert len(report["rounds"]) <= 2
    assert pair.destination.guest.facts() == facts


def test_hand_over_is_told_of_also_when_vtpmd_ends_at_once(lab: Lab) -> None:
    """QEMU ends at the source as soon as its guest has moved."""
    pair = make_armed_pair(lab)
    pair.destination.guest.load(pair.source.guest.save())
    pair.source.guest.control.shutdown()
    pair.source.manage.wait_for("VTPM_HANDED_OVER")


def test_acknowledged_round_is_durable_at_the_destination(lab: Lab) -> None:
    """The destination dies right after the acknowledgement: it holds what the source holds."""
    pair = make_pair(lab)
    sent = swtpm_format.decode_blob(pair.source.guest.save().permanent)
    pair.arm()
    pair.destination.vtpmd.kill()
    assert sent in (pair.destination.vtpmd.state / "tpm2-00.incoming").read_bytes()


@pytest.mark.parametrize("ends", ["stopped", "killed"])
def test_restarted_source_refuses_and_says_who_has_the_tpm(lab: Lab, ends: str) -> None:
    pair = make_armed_pair(lab)
    hand_over(pair)
    source = killed(pair.source) if ends == "killed" else stopped(pair.source)

    again = restarted(lab, source)

    assert_cannot_start(again)
    refusal = next(line for line in again.log if "INIT is refused" in line)
    assert pair.link.address in refusal
    assert_serves(pair.destination.guest)


@pytest.mark.parametrize("kind", Blob)
def test_source_gives_no_state_after_it_handed_over(lab: Lab, kind: Blob) -> None:
    """A snapshot or a second migration from the source would be a second owner."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    try:
        blob = pair.source.guest.control.get_state_blob(kind)
    except ControlError:
        return
    # QEMU asks again for what it has asked for before; a tail opens once, and nowhere else.
    assert blob == b"" or tail.is_tail(blob)


def test_restarted_destination_has_the_permanent_state(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    nv = pair.source.guest.facts().nv
    hand_over(pair)

    again = restarted(lab, killed(pair.destination))
    again.guest.control.init()
    again.guest.tpm.startup()

    assert again.guest.facts().nv == nv


def generations(report: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the generations of each round."""
    return [
        (each["permanent-generation"], each["volatile-generation"]) for each in report["rounds"]
    ]


@pytest.mark.parametrize("restart", [False, True], ids=["at-once", "after-a-restart"])
def test_generations_only_grow_from_host_to_host_and_back(lab: Lab, restart: bool) -> None:
    there = make_armed_pair(lab)
    for _ in range(3):
        there.source.manage.wait_for("VTPM_ROUND")
        there.source.guest.work()
    first = generations(hand_over(there))
    host = there.destination
    facts = host.guest.facts()
    if restart:
        host = restarted(lab, stopped(host))
        host.guest.control.init()
        host.guest.tpm.startup()
        facts = host.guest.facts()
    back = Pair(host, there.source, lab.link(there.source.vtpmd))
    back.destination.guest.control.stop()

    assert back.arm()["event"] == "VTPM_ARMED"
    second = generations(hand_over(back))

    for permanent, volatile in second:
        assert permanent >= first[-1][0]
        assert volatile > first[-1][1]
    assert back.destination.guest.facts() == facts
    assert_serves(back.destination.guest)
    assert_serves_nothing(host.guest)
    nv = back.destination.guest.facts().nv
    again = restarted(lab, killed(back.destination))
    again.guest.control.init()
    again.guest.tpm.startup()
    assert again.guest.facts().nv == nv


def flip(blob: bytes, offset: int) -> bytes:
    """Return a blob with one bit changed."""
    return blob[:offset] + bytes([blob[offset] ^ 1]) + blob[offset + 1 :]


HEAD = tail.HEADER.size
ALTERATIONS: dict[str, Callable[[bytes], bytes]] = {
    "version": lambda blob: flip(blob, 9),
    "flags": lambda blob: flip(blob, 11),
    "session": lambda blob: flip(blob, 12),
    "permanent-from": lambda blob: flip(blob, 35),
    "permanent-to": lambda blob: flip(blob, 43),
    "volatile-from": lambda blob: flip(blob, 51),
    "volatile-to": lambda blob: flip(blob, 59),
    "nonce": lambda blob: flip(blob, 60),
    "first-byte-sealed": lambda blob: flip(blob, HEAD),
    "last-byte-sealed": lambda blob: flip(blob, len(blob) - tail.TAG_BYTES - 1),
    "tag": lambda blob: flip(blob, len(blob) - 1),
    "cut-to-its-magic": lambda blob: blob[: len(tail.MAGIC)],
    "cut-to-its-header": lambda blob: blob[:HEAD],
    "cut-by-a-byte": lambda blob: blob[:-1],
    "longer-by-a-byte": lambda blob: blob + b"\0",
}


def assert_refused(host: Host, blob: bytes) -> None:
    """Give a tail, which must be refused in one line; nothing must start then."""
    before = len(host.log)
    with pytest.raises(ControlError) as raised:
        host.guest.give(Blobs(blob, b"", b""))
    assert raised.value.control == Control.SET_STATEBLOB
    said = [line for line in host.log[before:] if REFUSED in line]
    assert len(said) == 1
    assert not any("Traceback" in line for line in host.log[before:])
    assert_cannot_start(host)


def test_altered_or_cut_tail_is_refused_and_the_source_goes_on(lab: Lab) -> None:
    """Each alteration in a session of its own, on the same two hosts."""
    pair = make_pair(lab)
    for name, alter in ALTERATIONS.items():
        assert pair.arm()["event"] == "VTPM_ARMED", name
        pair.source.guest.work()
        facts = pair.source.guest.facts()
        blobs = pair.source.guest.save()
        assert_tail(blobs)

        assert_refused(pair.destination, alter(blobs.permanent))

        assert_stays(pair, facts)
    assert pair.arm()["event"] == "VTPM_ARMED"
    assert hand_over(pair)["outcome"] == "handed-over"


def test_replayed_tail_is_refused(lab: Lab) -> None:
    """A tail that was good in an earlier session of the same vTPM with the same peer."""
    pair = make_armed_pair(lab)
    old = pair.source.guest.save()
    assert_tail(old)
    pair.source.guest.resume()
    assert pair.arm()["event"] == "VTPM_ARMED"
    facts = pair.source.guest.facts()
    assert_tail(pair.source.guest.save())

    assert_refused(pair.destination, old.permanent)

    assert "another session" in next(line for line in pair.destination.log if REFUSED in line)
    assert_stays(pair, facts)


def test_tail_of_another_vtpm_is_refused(lab: Lab) -> None:
    """Two guests migrate between the same hosts, and their streams are mixed up."""
    pair, other = make_armed_pair(lab), make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), pair.source.guest.save()
    foreign = other.source.guest.save()
    assert_tail(blobs)

    assert_refused(pair.destination, foreign.permanent)

    assert_stays(pair, facts)


def test_tail_without_a_session_is_refused(lab: Lab) -> None:
    """QEMU brings it to a vtpmd that no source has spoken to."""
    pair, stranger = make_armed_pair(lab), make_host(lab)
    facts, blobs = pair.source.guest.facts(), pair.source.guest.save()

    assert_refused(stranger, blobs.permanent)

    assert_stays(pair, facts)


def test_tail_given_twice_is_refused_the_second_time(lab: Lab) -> None:
    """What has started from a tail cannot be set back to it."""
    pair = make_armed_pair(lab)
    blobs = pair.source.guest.save()
    pair.destination.guest.load(blobs)
    facts = pair.destination.guest.facts()

    with pytest.raises(ControlError):
        pair.destination.guest.give(blobs)

    assert sum(REFUSED in line for line in pair.destination.log) == 1
    assert_cannot_start(pair.destination)
    again = restarted(lab, stopped(pair.destination))  # it is its own, and lost nothing by that
    again.guest.control.init()
    again.guest.tpm.startup()
    assert again.guest.facts().nv == facts.nv


def test_round_that_the_freeze_overtakes_may_come_before_the_tail(lab: Lab) -> None:
    """The destination has made a round its base; the source did not know that when it froze."""
    pair = make_pair(lab, link=MessageLink)
    pair.arm()
    pair.link.hold(Direction.TO_SOURCE)
    pair.source.guest.work()
    facts = pair.source.guest.facts()
    # Of what the TPM was used for the round may have only the first half.
    pair.link.wait_for_held(peer.Ack)
    blobs = pair.source.guest.save()
    assert_tail(blobs)

    pair.destination.guest.give(blobs)
    pair.link.hold(None)
    pair.destination.guest.start()

    assert pair.destination.guest.facts() == facts
    assert_serves_nothing(pair.source.guest)


def test_round_that_the_freeze_overtakes_may_come_after_the_tail(lab: Lab) -> None:
    """QEMU's stream is faster than ours: the destination gets a round that is of no use now."""
    pair = make_pair(lab, link=MessageLink)
    pair.arm()
    pair.link.hold(Direction.TO_DESTINATION)
    pair.source.guest.work()
    facts = pair.source.guest.facts()
    pair.link.wait_for_held(peer.Commit)
    blobs = pair.source.guest.save()
    assert_tail(blobs)

    pair.destination.guest.give(blobs)
    pair.link.hold(None)
    pair.destination.guest.start()

    assert pair.destination.guest.facts() == facts
    assert_serves_nothing(pair.source.guest)


def test_guest_that_runs_on_during_the_freeze_keeps_its_tpm(lab: Lab) -> None:
    """QEMU said nothing, but a command came: what the tail holds is old."""
    pair = make_armed_pair(lab)
    blobs = pair.source.guest.save()
    assert_tail(blobs)
    pair.source.guest.work()
    facts = pair.source.guest.facts()

    with pytest.raises(ControlError) as raised:
        pair.destination.guest.load(blobs)

    # Its engine is told at once; but QEMU may be faster.
    assert raised.value.control in (Control.SET_STATEBLOB, Control.INIT)
    assert_stays(pair, facts)


def test_resumed_guest_gets_its_tpm_at_once_when_nobody_has_asked_for_it(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    blobs, facts = pair.source.guest.save(), pair.source.guest.facts()
    assert_tail(blobs)

    assert_stays(pair, facts)

    pair.source.manage.wait_for("VTPM_GO_ON")
    with pytest.raises(ControlError):
        pair.destination.guest.load(blobs)
    assert_cannot_start(pair.destination)


def load_with_cut(pair: Pair, cut: Cut) -> bool:
    """Freeze, cut the link, and load the tail; return whether the destination's TPM started.

    The link has no round under way: what comes next is Take.
    """
    blobs = pair.source.guest.save()
    assert_tail(blobs)
    pair.source.manage.wait_for_acknowledgement()
    pair.link.cut_at(cut)
    try:
        pair.destination.guest.load(blobs)
    except ControlError:
        return False
    return True


@pytest.mark.parametrize("ending", [Ending.RESET, Ending.HALFWAY])
def test_link_cut_after_the_freeze_leaves_exactly_one_owner(lab: Lab, ending: Ending) -> None:
    """Cut at the first message after the freeze, at the second, until there is no more."""
    pair = make_pair(lab, link=MessageLink)
    for messages in count():
        assert pair.arm()["event"] == "VTPM_ARMED"
        pair.source.guest.work()
        facts = pair.source.guest.facts()
        started = load_with_cut(pair, Cut(after=messages, ending=ending))
        if started:
            break
        assert pair.link.was_cut.is_set()
        assert_stays(pair, facts)
    assert messages >= 2  # Take, Grant
    assert pair.destination.guest.facts() == facts
    pair.source.guest.resume()
    assert_serves_nothing(pair.source.guest)
    assert_serves(pair.destination.guest)


def test_silent_link_before_the_tail_leaves_the_source_as_owner(lab: Lab) -> None:
    """Nothing passes and nobody is told: the destination gives up waiting for the grant."""
    pair = make_armed_pair(lab, link=MessageLink)
    facts = pair.source.guest.facts()
    assert not load_with_cut(pair, Cut(before=LaneKind.TAKE, ending=Ending.SILENCE))
    assert_stays(pair, facts)


def test_silent_link_after_the_grant_leaves_the_source_as_owner_once_it_is_well(lab: Lab) -> None:
    """The source cannot find out whether its Grant arrived: nobody serves until it can."""
    pair = make_armed_pair(lab, link=MessageLink)
    facts = pair.source.guest.facts()
    assert not load_with_cut(pair, Cut(before=LaneKind.GRANT, ending=Ending.SILENCE))
    assert_cannot_start(pair.destination)
    pair.source.guest.resume()
    assert_serves_nothing(pair.source.guest)
    pair.link.heal()
    wait_until(lambda: pair.source.manage.migration()["outcome"] == "go-on")
    assert pair.source.guest.facts() == facts
    assert_serves(pair.source.guest)
    assert_cannot_start(pair.destination)


@pytest.mark.parametrize("cut", [False, True], ids=["the-same-link", "a-new-connection"])
def test_source_reclaims_a_tpm_that_no_guest_has_used(lab: Lab, cut: bool) -> None:
    """QEMU's destination died before its guest ran; QEMU resumes the source."""
    pair = make_armed_pair(lab, link=MessageLink)
    facts = pair.source.guest.facts()
    if cut:
        assert load_with_cut(pair, Cut(before=peer.Running))
        assert pair.link.was_cut.wait(WAIT_TIMEOUT_S)
    else:
        hand_over(pair)
    pair.destination.guest.close()

    pair.source.guest.resume()

    assert pair.source.guest.facts() == facts
    assert_serves(pair.source.guest)
    wait_until(lambda: pair.source.manage.migration()["outcome"] == "go-on")
    again = restarted(lab, killed(pair.source))
    again.guest.control.init()
    assert_cannot_start(pair.destination._replace(guest=lab.raw_guest(pair.destination.vtpmd)))


def test_reclaimed_tpm_can_migrate_again(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    hand_over(pair)
    pair.source.guest.resume()
    assert_serves(pair.source.guest)
    pair.destination.guest.control.stop()

    assert pair.arm()["event"] == "VTPM_ARMED"
    facts = pair.source.guest.facts()
    assert hand_over(pair)["outcome"] == "handed-over"
    assert pair.destination.guest.facts() == facts


@pytest.mark.parametrize("cut", [False, True], ids=["the-same-link", "a-new-connection"])
def test_source_gets_nothing_back_that_a_guest_has_used(lab: Lab, cut: bool) -> None:
    """The guest at the destination has sent a command; then somebody resumes the source."""
    pair = make_armed_pair(lab, link=MessageLink)
    if cut:
        assert load_with_cut(pair, Cut(before=peer.Running))
    else:
        hand_over(pair)
    assert_serves(pair.destination.guest)

    for _ in range(2):
        pair.source.guest.resume()
        assert_serves_nothing(pair.source.guest)

    assert_serves(pair.destination.guest)
    assert_cannot_start(restarted(lab, killed(pair.source)))


def test_invariant_3_snapshot_at_the_destination_does_not_undo_that_it_served(lab: Lab) -> None:
    """What QEMU's loadvm brings is older than what the guest was told: both are of that guest."""
    pair = make_armed_pair(lab)
    pair.destination.guest.load(pair.source.guest.save())
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    assert_serves(pair.destination.guest)
    snapshot = pair.destination.guest.save()
    assert_whole(snapshot)
    pair.destination.guest.load(snapshot)
    pair.source.guest.resume()
    wait_until(lambda: any("does not let go of it" in line for line in pair.source.log))
    assert_serves_nothing(pair.source.guest)
    assert_serves(pair.destination.guest)


def test_restarted_destination_keeps_a_tpm_that_a_guest_has_used(lab: Lab) -> None:
    """It does not remember the session; the state that the source would go on from is old."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    assert_serves(pair.destination.guest)
    restarted(lab, killed(pair.destination))
    pair.source.guest.resume()
    wait_until(lambda: any("does not let go of it" in line for line in pair.source.log))
    assert_serves_nothing(pair.source.guest)


def test_source_does_not_serve_when_the_destination_cannot_be_asked(lab: Lab) -> None:
    """The destination's host is gone: it may have served the guest, so the source must not."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    pair.destination.vtpmd.kill()
    pair.source.guest.resume()
    assert_serves_nothing(pair.source.guest)
    assert pair.source.manage.migration()["state"] == "reclaiming"


def test_whole_blobs_bring_the_tpm_back_to_a_host_that_gave_it_away(lab: Lab) -> None:
    """Migrated back from where nobody armed a session: QEMU's stream says whose it is."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    facts = pair.destination.guest.facts()
    blobs = pair.destination.guest.save()
    assert_whole(blobs)
    again = restarted(lab, stopped(pair.source))

    again.guest.load(blobs)

    assert again.guest.facts() == facts
    assert_serves(again.guest)


def test_reset_of_the_tpm_while_armed_does_not_end_the_rounds(lab: Lab) -> None:
    """A guest that reboots: QEMU stops the TPM and starts it again."""
    pair = make_armed_pair(lab)
    pair.source.manage.wait_for("VTPM_ROUND")
    pair.source.guest.control.stop()
    assert pair.source.manage.migration()["state"] in ("armed", "round")
    pair.source.guest.control.init()
    pair.source.guest.tpm.startup()
    for _ in range(3):
        pair.source.guest.work()
        pair.source.manage.wait_for("VTPM_ROUND")
    facts = pair.source.guest.facts()
    assert hand_over(pair)["outcome"] == "handed-over"
    assert pair.destination.guest.facts() == facts


def test_destination_that_died_before_it_started_has_nothing_to_keep(lab: Lab) -> None:
    """It had the grant, in memory, and its vtpmd is started again: the source goes on."""
    pair = make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), pair.source.guest.save()
    pair.destination.guest.give(blobs)
    pair.source.manage.wait_for("VTPM_GRANTED")
    restarted(lab, killed(pair.destination))

    pair.source.guest.resume()

    assert pair.source.guest.facts() == facts
    assert_serves(pair.source.guest)


def test_source_that_died_in_the_freeze_starts_again(lab: Lab) -> None:
    """Nobody has asked it for the vTPM; the destination does not get it any more."""
    pair = make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), pair.source.guest.save()
    assert_tail(blobs)
    again = restarted(lab, killed(pair.source))
    with pytest.raises(ControlError):
        pair.destination.guest.load(blobs)
    assert_cannot_start(pair.destination)
    again.guest.control.init()
    again.guest.tpm.startup()
    assert again.guest.facts().nv == facts.nv


def test_host_that_gave_the_tpm_away_and_was_restarted_takes_it_back(lab: Lab) -> None:
    """A guest that comes back to a host which refuses to start its TPM by itself."""
    there = make_armed_pair(lab)
    hand_over(there)
    host, home = there.destination, restarted(lab, stopped(there.source))
    with pytest.raises(ControlError):
        home.guest.start()
    back = Pair(host, home, lab.link(home.vtpmd))
    assert back.arm()["event"] == "VTPM_ARMED"
    facts = host.guest.facts()

    assert hand_over(back)["outcome"] == "handed-over"

    assert home.guest.facts() == facts
    assert_serves(home.guest)
    assert_serves_nothing(host.guest)


@pytest.mark.parametrize("side", ["both", "source", "destination"])
def test_uuid_may_be_given_on_either_side(lab: Lab, side: str) -> None:
    """What one operator gave and the other did not is no reason to refuse, nor to fail later."""
    given = Peering(credentials=credentials(), uuid="8f2c0d6e-5a5b-4c1e-9d1a-3f0c7d1f2b11")
    pair = make_pair(
        lab,
        source=given if side != "destination" else None,
        destination=given if side != "source" else None,
    )
    assert pair.arm()["event"] == "VTPM_ARMED"
    pair.source.guest.work()
    facts = pair.source.guest.facts()
    assert hand_over(pair)["outcome"] == "handed-over"
    assert pair.destination.guest.facts() == facts


def test_second_source_does_not_mix_with_the_first(lab: Lab) -> None:
    """Two guests are armed for one destination: at most one of them gets there with a tail."""
    first, other = make_armed_pair(lab), make_host(lab)
    other.guest.boot()
    second = Pair(other, first.destination, first.link)
    event = second.arm()["event"]
    winner, loser = (second, first) if event == "VTPM_ARMED" else (first, second)
    if loser is first:
        first.source.manage.wait_for("VTPM_FALL_BACK")
    facts = winner.source.guest.facts()

    assert_whole(loser.source.guest.save())
    assert_serves(loser.source.guest)
    assert hand_over(winner)["outcome"] == "handed-over"
    assert winner.destination.guest.facts() == facts


def test_session_is_armed_once_at_a_time(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    with pytest.raises(ExecuteError, match="armed already"):
        pair.source.manage.command("migrate-arm", to=pair.link.address)
    assert hand_over(pair)["outcome"] == "handed-over"


def test_tpm_that_does_not_run_is_not_armed(lab: Lab) -> None:
    """QEMU has not started it yet, or has stopped it: there is no state to send."""
    pair = make_pair(lab)
    pair.source.guest.control.stop()
    with pytest.raises(ExecuteError, match="has not started its TPM"):
        pair.arm()
    pair.source.guest.control.init()
    pair.source.guest.tpm.startup()
    assert pair.arm()["event"] == "VTPM_ARMED"
    facts = pair.source.guest.facts()
    assert hand_over(pair)["outcome"] == "handed-over"
    assert pair.destination.guest.facts() == facts


def test_destination_whose_qemu_died_before_init_lets_go(lab: Lab) -> None:
    """It was granted the vTPM, and its TPM was never powered on."""
    pair = make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), pair.source.guest.save()
    pair.destination.guest.give(blobs)
    pair.source.manage.wait_for("VTPM_GRANTED")
    pair.destination.guest.close()

    pair.source.guest.resume()

    assert pair.source.guest.facts() == facts
    assert_serves(pair.source.guest)


def test_invariant_3_destination_that_cannot_record_the_grant_serves_nothing(lab: Lab) -> None:
    """Every command is to be sent again; the source gets its vTPM back."""
    pair = make_armed_pair(lab)
    facts, blobs = pair.source.guest.facts(), pair.source.guest.save()
    pair.destination.guest.give(blobs)
    pair.source.manage.wait_for("VTPM_GRANTED")
    (pair.destination.vtpmd.state / "tpm2-00.incoming").unlink()

    pair.destination.guest.start()

    assert_serves_nothing(pair.destination.guest)
    pair.source.guest.resume()
    assert pair.source.guest.facts() == facts
    assert_serves(pair.source.guest)
    assert_serves_nothing(pair.destination.guest)


@pytest.mark.parametrize("when", ["before the base", "after the base"])
def test_invariant_12_guest_that_sleeps_finds_its_pcrs_at_the_host_it_moved_to(
    lab: Lab, when: str
) -> None:
    """It said TPM2_Shutdown(STATE) at the source, and wakes up at the destination, by an INIT."""
    pair = make_pair(lab)
    pair.source.guest.tpm.extend(SAVED_PCR, bytes(range(32)))
    before = pair.source.guest.tpm.pcr(SAVED_PCR)
    if when == "before the base":
        pair.source.guest.tpm.shutdown(StartupType.STATE)
    pair.arm()
    if when == "after the base":
        pair.source.guest.tpm.shutdown(StartupType.STATE)
    # Some guests still read something before they sleep.
    pair.source.guest.tpm.pcr(SAVED_PCR)
    hand_over(pair)

    pair.destination.guest.control.init()
    pair.destination.guest.tpm.startup(StartupType.STATE)

    assert pair.destination.guest.tpm.pcr(SAVED_PCR) == before


@pytest.mark.parametrize("by", ["a stop", "a reset"])
def test_invariant_12_guest_that_sleeps_is_moved_by_whole_blobs(lab: Lab, by: str) -> None:
    """Two vtpmd tell each other so in the blob; swtpm does not look at that."""
    source, destination = (lab.raw_guest(lab.emulator(EmulatorKind.VTPMD)) for _ in range(2))
    source.boot()
    source.tpm.extend(SAVED_PCR, bytes(range(32)))
    before = source.tpm.pcr(SAVED_PCR)
    source.tpm.shutdown(StartupType.STATE)
    source.tpm.pcr(SAVED_PCR)
    blobs = source.save()

    destination.load(blobs)
    if by == "a stop":
        destination.control.stop()
    destination.control.init()
    destination.tpm.startup(StartupType.STATE)
    assert destination.tpm.pcr(SAVED_PCR) == before

    awake = destination.save()
    destination.load(awake)
    destination.control.init()
    with pytest.raises(TpmError):
        destination.tpm.startup(StartupType.STATE)


def load_that_of_a_sleeping_guest_of_swtpm(lab: Lab, then: Callable[[Tpm], object]) -> RawGuest:
    """Move a guest from swtpm that has said that it sleeps, and done something ``then``."""
    source = lab.raw_guest(lab.emulator(EmulatorKind.SWTPM))
    destination = lab.raw_guest(lab.emulator(EmulatorKind.VTPMD))
    source.boot()
    source.tpm.extend(SAVED_PCR, bytes(range(32)))
    source.tpm.shutdown(StartupType.STATE)
    then(source.tpm)
    destination.load(source.save())
    return destination


@pytest.mark.parametrize("resets", [1, 2])
def test_invariant_12_guest_that_sleeps_is_known_in_swtpm_s_blobs(lab: Lab, resets: int) -> None:
    """They have no word of it but libtpms' own, which is of what a guest said last."""
    destination = load_that_of_a_sleeping_guest_of_swtpm(lab, lambda tpm: tpm.pcr(SAVED_PCR))
    before = sha256(bytes(32) + bytes(range(32))).digest()
    for _ in range(resets):
        destination.control.stop()
        destination.control.init()
    destination.tpm.startup(StartupType.STATE)
    assert destination.tpm.pcr(SAVED_PCR) == before


def test_guest_that_swtpm_had_work_on_is_not_known_to_sleep(lab: Lab) -> None:
    """libtpms strikes the word out when what it was of has changed; swtpm writes down no other."""
    destination = load_that_of_a_sleeping_guest_of_swtpm(
        lab, lambda tpm: tpm.extend(SAVED_PCR, bytes(32))
    )
    destination.control.init()
    with pytest.raises(TpmError):
        destination.tpm.startup(StartupType.STATE)


def test_invariant_12_guest_that_did_not_sleep_finds_no_pcrs_after_a_reset(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    pair.source.guest.tpm.extend(SAVED_PCR, bytes(range(32)))
    hand_over(pair)
    pair.destination.guest.control.init()
    with pytest.raises(TpmError):
        pair.destination.guest.tpm.startup(StartupType.STATE)
    pair.destination.guest.tpm.startup()
    assert pair.destination.guest.tpm.pcr(SAVED_PCR) == bytes(32)


def test_invariant_3_command_before_the_grant_waits_for_it(lab: Lab) -> None:
    """The TPM is on before the source has decided, but executes nothing."""
    pair = make_armed_pair(lab, link=MessageLink)
    facts, blobs = pair.source.guest.facts(), pair.source.guest.save()
    assert pair.source.manage.wait_for_acknowledgement()
    pair.link.hold(Direction.TO_SOURCE)  # the Take
    pair.destination.guest.give(blobs)
    assert_serves_nothing(pair.destination.guest)
    with ThreadPoolExecutor(1) as executor:
        started = executor.submit(pair.destination.guest.start)
        wait_until(lambda: pair.destination.manage.vtpm()["incoming"] == "taking")
        assert_serves_nothing(pair.destination.guest)
        assert pair.source.manage.migration()["state"] == "frozen"

        pair.link.hold(None)
        started.result(WAIT_TIMEOUT_S)
    assert pair.destination.guest.facts() == facts
    assert_serves_nothing(pair.source.guest)


def test_neither_side_holds_small_messages_back() -> None:
    """With Nagle's algorithm a Take that follows an Ack waits 40 ms for TCP's acknowledgement."""

    async def no_delay() -> list[int]:
        with listen_for_peers("127.0.0.1", 0) as listening:
            port = listening.getsockname()[1]
            context = tls.client_context(credentials())
            async with asyncio.timeout(WAIT_TIMEOUT_S), asyncio.TaskGroup() as group:
                connecting = group.create_task(tls.connect(HOST, port, context))
                accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
                server = await tls.accept(accepted, tls.server_context(credentials()))
            options = []
            for connection in (connecting.result(), server):
                sock = connection.stream.socket
                options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                connection.stream.abort()
        return options

    assert all(asyncio.run(no_delay()))
