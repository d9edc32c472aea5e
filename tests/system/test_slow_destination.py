"""A destination that is granted a vTPM while its disk stands still, and what is killed then.

Invariants 2 (nothing acknowledged is lost), 3 (one owner) and 11 (vtpmd may be killed). The engine
has asked for the vTPM by itself, and been granted it; the file that has to have its state has not.

Linux gives its TPM 750 ms for a PCR_Extend, and then up. So no step of the host's after the Grant
may have a command that stores nothing wait for the disk: it is answered, or told to come again.
"""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from tests.harness.owners import boot, freeze, hand_over, incoming, reconnected, record_of
from tests.harness.raw_guest import PCR, Facts
from tests.support.file_names import JOURNAL_NAME
from tests.support.tpm2 import ReturnCode, parse_response, pcr_extend
from vtpmd.store.owner import Outcome, Whose
from vtpmd.testing.disk import Disk
from vtpmd.testing.waiting import wait_until

HELD = ROOT / "tests/canary/held"
# A replacement of the state's file begins with making this one, which a directory resists.
PERMANENT_TEMPORARY = "TMP2-00.permall"
# Of pairs: a round that was due just then has brought what the tail was to bring.
TRIES_MAX = 10
HELD_TIMEOUT_S = 5.0
TAIL_HAS_COME = "before-what-the-tail-brought"
# What has to be done before a guest's command is executed, and what is done after that.
STEPS = {
    "before-the-grant-is-written": ReturnCode.RETRY,
    "before-it-is-admitted": ReturnCode.RETRY,
    "before-its-own-file": ReturnCode.SUCCESS,
    "before-the-owner-record": ReturnCode.SUCCESS,
    "before-what-came-is-removed": ReturnCode.SUCCESS,
}
ANSWER_TIMEOUT_S = 20.0


def slow_host(
    lab: Lab,
    held: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str = TAIL_HAS_COME,
    state: Path | None = None,
) -> Host:
    """Start a host whose vtpmd makes the file, and stands still until it is gone, at a step."""
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HELD))
        patch.setenv("VTPMD_HELD_AT", step)
        patch.setenv("VTPMD_HELD", str(held))
        return make_host(lab, state=state)


def waits_for_a_disk(process: int) -> bool:
    """Say whether a thread of a process is in a call that the kernel cannot end."""
    found = Path(f"/proc/{process}/task").glob("*/stat")
    return any(path.read_text().rpartition(")")[2].split()[0] == "D" for path in found)


@contextmanager
def stalled_from(held: Path, disk: Disk, host: Host) -> Iterator[None]:
    """Have a host's disk take nothing from the step on that its vtpmd has come to, meanwhile."""
    (engine,) = host.vtpmd.engines()
    processes = engine, host.vtpmd.program.pid
    wait_until(held.exists)
    with disk.stalled():
        held.unlink()
        wait_until(lambda: any(map(waits_for_a_disk, processes)))
        yield


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


@pytest.mark.parametrize(("step", "code"), STEPS.items(), ids=list(STEPS))
def test_command_that_stores_nothing_does_not_wait_for_the_disk(
    lab: Lab, disk: Disk, monkeypatch: pytest.MonkeyPatch, step: str, code: ReturnCode
) -> None:
    """The vTPM was here before, so that there is a journal of it to be removed, too."""
    held = lab.new_path("held")
    host = slow_host(lab, held, monkeypatch, step, disk.path / "state")
    host.guest.boot()
    there = make_host(lab)
    pair = Pair(host, there, lab.link(there.vtpmd))
    assert pair.arm()["event"] == "VTPM_ARMED"
    hand_over(pair)
    there.guest.work()
    host = reconnected(lab, host)
    host.guest.control.stop()  # as a QEMU says that starts
    assert (host.vtpmd.state / JOURNAL_NAME).exists()
    back = Pair(there, host, lab.link(host.vtpmd))
    assert back.arm()["event"] == "VTPM_ARMED"
    host.guest.load(freeze(back))
    extend = pcr_extend(PCR, bytes(32))
    with ThreadPoolExecutor(1) as executor, stalled_from(held, disk, host):
        answer = executor.submit(host.guest.data.transact, extend).result(ANSWER_TIMEOUT_S)
    assert parse_response(answer).return_code == code
    wait_until(lambda: incoming(host) == "settled")
    assert_serves(host.guest)
