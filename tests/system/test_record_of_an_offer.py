"""The moment at which the source's record says offered, durably: what comes before, and after.

A disk that stands still there, and a vtpmd that is killed.

Invariants of the design that are checked: 3 (one host serves, and exactly one can once a vtpmd is
attached again) and 11 (what a guest sees is a move, or none). The engine writes it, and grants
nothing before the disk has it, whatever QEMU and the destination have by then; and once it has,
vtpmd is not needed. Real processes, and clients of the control and data channels in QEMU's and the
guest's place.
"""

import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.bench.moving.monitor import Monitor
from tests.harness.canary import ROOT
from tests.harness.followed import followed
from tests.harness.handover import (
    Host,
    assert_serves,
    assert_serves_nothing,
    assert_tail,
    killed,
    make_armed_pair,
    restarted,
)
from tests.harness.lab import Lab
from tests.harness.owners import incoming, outgoing, record_of, record_stands_still
from tests.harness.raw_guest import Blobs, Facts
from tests.support.emulator_client import ControlError
from vtpmd.daemon.outgoing import ROUND_INTERVAL_S
from vtpmd.store.owner import Whose
from vtpmd.testing.waiting import WAIT_TIMEOUT_S, wait_until

HELD = ROOT / "tests/canary/held"
ATTACHING_S = 1.0  # what a start takes, and some more


class Move(NamedTuple):
    """A move whose source's vtpmd stands still, with the tail in its engine."""

    source: Host
    destination: Host
    facts: Facts

    def kill(self) -> None:
        """Kill the source's vtpmd; its engine serves on."""
        os.kill(self.source.vtpmd.program.pid, signal.SIGKILL)
        assert self.source.vtpmd.program.wait() == -signal.SIGKILL

    def bring(self, executor: ThreadPoolExecutor, blobs: Blobs) -> Future[None]:
        """Bring a tail, and have the destination's TPM started; return when it has come."""
        self.destination.guest.give(blobs)
        started = executor.submit(self.destination.guest.start)
        wait_until(lambda: incoming(self.destination) not in ("holding", "standby"))
        return started

    def assert_stays(self) -> None:
        """Have the guest go on at the source, and check that its TPM is there, and only there."""
        self.source.guest.resume()
        assert self.source.guest.facts() == self.facts
        assert_serves(self.source.guest)
        assert_serves_nothing(self.destination.guest)
        wait_until(lambda: record_of(self.source).whose is Whose.OURS)


class Migration(NamedTuple):
    """What both QEMUs say of it."""

    source: Monitor
    destination: Monitor

    def begin(self, move: Move) -> None:
        """Begin, and wait until the source's vtpmd knows that the destination's takes a stream."""
        for host, each in ((move.destination, self.destination), (move.source, self.source)):
            each.migration("setup")
            each.migration("active")
            host.vtpmd.program.wait_for_output("MigrationState.ACTIVE")
        # What the destination has said of a stream that comes in, the source knows with an Ack.
        wait_for_silence(move.source)

    def say(self, status: str) -> None:
        """Have both say it."""
        self.destination.migration(status)
        self.source.migration(status)


def wait_for_silence(source: Host) -> None:
    """Wait until a round was sent and acknowledged, and the next ones have nothing to send."""
    source.manage.wait_for("VTPM_ROUND")
    sent = 0
    while (report := source.manage.migration())["rounds-sent"] != sent or report[
        "state"
    ] != "armed":
        sent = report["rounds-sent"]
        time.sleep(5 * ROUND_INTERVAL_S)


def hold(patch: pytest.MonkeyPatch, step: str, held: Path) -> None:
    """Have a vtpmd that is started stand still at a step, and make a file then."""
    patch.setenv("PYTHONPATH", str(HELD))
    patch.setenv("VTPMD_HELD_AT", step)
    patch.setenv("VTPMD_HELD", str(held))


def armed(
    lab: Lab, *, held: Path | None = None, monkeypatch: pytest.MonkeyPatch
) -> tuple[Move, Migration]:
    """Return a move before QEMU migrates; its source's vtpmd is to stand still where it is told.

    That is once its engine has written the owner record.
    """
    with monkeypatch.context() as patch:
        if held is not None:
            hold(patch, "after-the-record", held)
        source, monitor = followed(lab, is_incoming=False)
    destination, incoming_monitor = followed(lab, is_incoming=True)
    source.guest.boot()
    assert source.manage.arm(destination.vtpmd.address)["event"] == "VTPM_ARMED"
    source.guest.work()
    facts = source.guest.facts()
    return Move(source, destination, facts), Migration(monitor, incoming_monitor)


def offered(move: Move, migration: Migration) -> None:
    """Have QEMU migrate; the guest works on, and the record says offered."""
    migration.begin(move)
    wait_until(lambda: record_of(move.source).whose is Whose.OFFERED)


@pytest.mark.parametrize("is_attached_early", [False, True])
def test_invariant_3_killed_before_the_disk_has_it_stays(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, *, is_attached_early: bool
) -> None:
    """Who attaches next finds what the engine was still writing, and strikes it out."""
    move, migration = armed(lab, monkeypatch=monkeypatch)
    with ThreadPoolExecutor(2) as executor:
        with record_stands_still(move.source):
            migration.begin(move)
            migration.source.stop()
            blobs = move.source.guest.save()
            assert_tail(blobs)
            started = move.bring(executor, blobs)
            assert not started.done()
            assert record_of(move.source).whose is Whose.OURS
            move.kill()
            with pytest.raises(ControlError):
                started.result(WAIT_TIMEOUT_S)
            attached = executor.submit(move.source.vtpmd.attach) if is_attached_early else None
            if attached is not None:
                time.sleep(ATTACHING_S)
                assert not attached.done()
        if attached is None:
            wait_until(lambda: record_of(move.source).whose is Whose.OFFERED)
            move.source.vtpmd.attach()
        else:
            attached.result(WAIT_TIMEOUT_S)
    move.assert_stays()


def test_no_disk_is_waited_for_while_the_guest_stands_still(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record says offered by then: the source's disk may stand still from the stop on."""
    move, migration = armed(lab, monkeypatch=monkeypatch)
    offered(move, migration)
    with record_stands_still(move.source), ThreadPoolExecutor(1) as executor:
        migration.source.stop()
        wait_until(lambda: outgoing(move.source) == "offered")
        blobs = move.source.guest.save()
        assert_tail(blobs)
        move.bring(executor, blobs).result(WAIT_TIMEOUT_S)
    assert move.destination.guest.facts() == move.facts
    assert_serves_nothing(move.source.guest)
    wait_until(lambda: record_of(move.source).whose is Whose.MOVED)


def test_offer_is_struck_out_when_the_migration_ends(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session stays armed, and what a power loss leaves then asks nobody."""
    move, migration = armed(lab, monkeypatch=monkeypatch)
    offered(move, migration)
    migration.say("cancelled")
    wait_until(lambda: record_of(move.source).whose is Whose.OURS)
    assert outgoing(move.source) == "armed"
    assert_serves(move.source.guest)
    assert_serves_nothing(move.destination.guest)


def test_invariant_3_source_that_was_killed_while_its_guest_migrated_asks_first(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guest starts there again once the destination has said that it has nothing."""
    move, migration = armed(lab, monkeypatch=monkeypatch)
    offered(move, migration)
    move.source.guest.work()  # and it commits on
    written = move.source.guest.facts().nv
    again = restarted(lab, killed(move.source))
    again.guest.control.init()
    again.guest.tpm.startup()
    assert again.guest.facts().nv == written
    assert_serves(again.guest)
    assert_serves_nothing(move.destination.guest)
    wait_until(lambda: record_of(again).whose is Whose.OURS)


def test_vtpmd_that_was_killed_while_its_guest_migrates_strikes_the_offer_out(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine serves on, and who attaches next finds that nothing was granted."""
    move, migration = armed(lab, monkeypatch=monkeypatch)
    offered(move, migration)
    move.kill()
    assert_serves(move.source.guest)
    move.source.vtpmd.attach()
    wait_until(lambda: record_of(move.source).whose is Whose.OURS)
    assert_serves(move.source.guest)
    assert_serves_nothing(move.destination.guest)


def test_invariant_11_killed_once_the_disk_has_it_moves(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine grants by itself; who attaches next finds that, and asks nobody to go back."""
    held = lab.new_path("held")
    move, migration = armed(lab, held=held, monkeypatch=monkeypatch)
    with record_stands_still(move.source):
        migration.begin(move)
        migration.source.stop()
        wait_until(lambda: outgoing(move.source) == "offered")
    wait_until(held.exists)
    assert record_of(move.source).whose is Whose.OFFERED
    blobs = move.source.guest.save()
    assert_tail(blobs)
    with ThreadPoolExecutor(1) as executor:
        move.bring(executor, blobs).result(WAIT_TIMEOUT_S)
    move.kill()
    assert move.destination.guest.facts() == move.facts
    assert_serves_nothing(move.source.guest)
    move.source.vtpmd.attach()
    wait_until(lambda: record_of(move.source).whose is Whose.MOVED)
    assert_serves_nothing(move.source.guest)
    assert_serves(move.destination.guest)


def stop_and_run_on(move: Move, monitor: Monitor) -> None:
    """Have the guest stop, and then run on, and use its TPM."""
    monitor.stop()
    wait_until(lambda: outgoing(move.source) == "offered")
    monitor.resume()
    move.source.guest.work()


def test_guest_that_runs_on_and_stops_again_before_the_disk_has_it_moves(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offer is another one then, of what it has done since; the record is of the session."""
    move, migration = armed(lab, monkeypatch=monkeypatch)
    with record_stands_still(move.source):
        migration.begin(move)
        stop_and_run_on(move, migration.source)
        facts = move.source.guest.facts()
        migration.source.stop()
        time.sleep(ROUND_INTERVAL_S)
        assert record_of(move.source).whose is Whose.OURS
    wait_until(lambda: outgoing(move.source) == "offered")
    blobs = move.source.guest.save()
    assert_tail(blobs)
    with ThreadPoolExecutor(1) as executor:
        move.bring(executor, blobs).result(WAIT_TIMEOUT_S)
    assert move.destination.guest.facts() == facts
    assert_serves_nothing(move.source.guest)
    wait_until(lambda: record_of(move.source).whose is Whose.MOVED)


def test_guest_that_runs_on_is_armed_again_at_once(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What strikes the last offer out is waited for."""
    with monkeypatch.context() as patch:
        hold(patch, "before-the-withdrawal", lab.new_path("held"))
        pair = make_armed_pair(lab)
    assert_tail(pair.source.guest.save())
    pair.source.guest.resume()
    assert record_of(pair.source).whose is Whose.OFFERED
    assert pair.arm()["event"] == "VTPM_ARMED"
    assert_serves(pair.source.guest)


def test_guest_that_runs_on_before_the_disk_has_it_stays(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the disk says late is struck out."""
    move, migration = armed(lab, monkeypatch=monkeypatch)
    with record_stands_still(move.source):
        migration.begin(move)
        stop_and_run_on(move, migration.source)
        assert record_of(move.source).whose is Whose.OURS
    wait_until(lambda: outgoing(move.source) == "armed")
    wait_until(lambda: record_of(move.source).whose is Whose.OURS)
    assert_serves(move.source.guest)
    assert_serves_nothing(move.destination.guest)
