"""A destination that is granted a vTPM while its disk stands still, and what is killed then.

Invariants 2 (nothing acknowledged is lost), 3 (one owner) and 11 (vtpmd may be killed). The engine
has asked for the vTPM by itself, and been granted it; the file that has to have its state has not.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.harness.canary import ROOT
from tests.harness.handover import (
    Host,
    Pair,
    assert_serves,
    assert_serves_nothing,
    assert_tail,
    killed,
    make_host,
    restarted,
)
from tests.harness.lab import Lab
from tests.harness.owners import boot, incoming, record_of
from tests.harness.raw_guest import Facts
from vtpmd.store.owner import Outcome, Whose
from vtpmd.testing.waiting import wait_until

HELD = ROOT / "tests/canary/held"
# A replacement of the state's file begins with making this one, which a directory resists.
PERMANENT_TEMPORARY = "TMP2-00.permall"
# Of pairs: a round that was due just then has brought what the tail was to bring.
TRIES_MAX = 10
HELD_TIMEOUT_S = 5.0


def slow_host(lab: Lab, held: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Start a host whose vtpmd makes the file, and stands still, when the tail has come."""
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HELD))
        patch.setenv("VTPMD_HELD_AT", "before-what-the-tail-brought")
        patch.setenv("VTPMD_HELD", str(held))
        return make_host(lab)


def is_there_in_time(path: Path) -> bool:
    deadline = time.monotonic() + HELD_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def granted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, Facts]:
    """Move a vTPM to a host that is slow; return what its guest knows, too."""
    for _ in range(TRIES_MAX):
        held = lab.new_path("held")
        source, destination = make_host(lab), slow_host(lab, held, monkeypatch)
        source.guest.boot()
        pair = Pair(source, destination, lab.link(destination.vtpmd))
        assert pair.arm()["event"] == "VTPM_ARMED"
        source.guest.work()
        facts = source.guest.facts()
        blobs = source.guest.save()
        assert_tail(blobs)
        destination.guest.load(blobs)
        if is_there_in_time(held):
            source.manage.wait_for("VTPM_GRANTED")
            return pair, facts
    raise AssertionError("a round came in between each time")


def test_vtpmd_that_is_killed_then_is_gone_on_from_and_the_host_after_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two faults, and a start after each: the guest finds its TPM, and then what that has kept.

    The disk takes what is written in place, and not yet a file of the vTPM's own.
    """
    pair, facts = granted(lab, monkeypatch)
    destination = pair.destination
    blocked = destination.vtpmd.state / PERMANENT_TEMPORARY
    blocked.mkdir()
    os.kill(destination.vtpmd.program.pid, signal.SIGKILL)
    assert destination.vtpmd.program.wait() == -signal.SIGKILL
    destination.vtpmd.attach()
    destination = destination._replace(manage=lab.management(destination.vtpmd))
    assert destination.guest.facts() == facts
    assert_serves_nothing(pair.source.guest)
    assert incoming(destination) == "admitted"
    killed(destination)
    blocked.rmdir()
    host = restarted(lab, destination)
    boot(host)
    assert host.guest.facts().nv == facts.nv
    assert_serves(host.guest)
    wait_until(lambda: record_of(pair.source).whose is Whose.MOVED)


def test_host_that_is_gone_then_gives_it_back(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk has not taken that it was granted, nor what: nobody has executed a command there."""
    pair, facts = granted(lab, monkeypatch)
    host = restarted(lab, killed(pair.destination))
    assert [line.outcome for line in record_of(host).sessions] == [Outcome.DECLINED]
    pair.source.guest.resume()
    wait_until(lambda: pair.source.manage.migration()["outcome"] == "go-on")
    assert pair.source.guest.facts() == facts
    assert_serves(pair.source.guest)
    assert_serves_nothing(host.guest)
