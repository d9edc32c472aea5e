"""A snapshot that QEMU loads begins the vTPM's next restore epoch, and everything tells of it.

Invariant 13 of the design: a restored older state is known as one. And 10: generations only grow;
1: the epoch is durable before INIT is answered.
"""

from pathlib import Path

import pytest

from tests.harness.command import vtpmd
from tests.harness.handover import (
    Host,
    Pair,
    assert_serves,
    killed,
    make_host,
    restarted,
)
from tests.harness.lab import Lab
from tests.harness.owners import boot, freeze, hand_over, reconnected
from tests.support.page import Page
from tests.system.test_lineage import anchored, by_blobs, by_session, told
from vtpmd.cli.diff import EXIT_DIFFERENT, EXIT_SAME
from vtpmd.testing.disk import Disk
from vtpmd.testing.emulator import EmulatorKind
from vtpmd.testing.facts import differences
from vtpmd.testing.guest import Machine
from vtpmd.testing.waiting import wait_until
from vtpmd.wire.tpm import EPOCH_GENERATIONS, epoch_of

SNAPSHOT = "checked"
BY_A_SNAPSHOT = "an older state was put back, by an import or by a snapshot"


def epoch_at(state: Path) -> int:
    """Return the restore epoch that a directory's files tell of."""
    generation: int = vtpmd("status", state, "--json").outcome["generation"]
    return epoch_of(generation)


def loaded(lab: Lab) -> Host:
    """Return a host whose guest was put back to a snapshot."""
    host = make_host(lab)
    host.guest.boot()
    snapshot = host.guest.save()
    host.guest.work()
    host.guest.load(snapshot)
    assert epoch_of(told(host).generation) == 1
    return host


def shown(lab: Lab, *arguments: str | Path) -> Page:
    """Return the page that a command makes."""
    path = lab.new_path("page")
    assert vtpmd(*arguments, "--html", path).status in (EXIT_SAME, EXIT_DIFFERENT)
    return Page(path.read_bytes())


def test_everything_tells_of_a_snapshot_that_was_loaded(lab: Lab) -> None:
    """With a real guest, while it is served; and a chain of backups is told to end."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    state, chain, out = emulator.state, lab.new_path("chain"), lab.new_path("out")
    guest = lab.booted_guest(emulator, Machine(disk=lab.new_disk()))
    before = guest.check()
    assert guest.human_monitor(f"savevm {SNAPSHOT}") == ""
    guest.command("work 60")
    assert vtpmd("backup", state, chain).status == 0
    assert vtpmd("export", state, "--out", out).status == 0
    assert "epoch" not in vtpmd("status", state).output

    for epoch in (1, 2):
        assert guest.human_monitor(f"loadvm {SNAPSHOT}") == ""
        assert differences(before, guest.check(), worked=False) == []
        emulator.program.wait_for_output(f"; restore epoch {epoch} begins")
        line = f"{epoch}: {BY_A_SNAPSHOT}"
        assert epoch_at(state) == epoch
        for command in ("status", "owner", "inspect", "log"):
            assert line in vtpmd(command, state).output, command
        for command in ("owner", "inspect"):
            assert vtpmd(command, state, "--json").outcome["restore-epoch"] == epoch
        commits = vtpmd("log", state, "--json").outcome["commits"]
        assert [commit["restore-epoch"] for commit in commits][-1] == epoch
        assert f"A is of restore epoch 0, B of {epoch}: " in vtpmd("diff", out, state).output
        page = shown(lab, "inspect", state)
        assert page.text.count(line) >= 2  # at a glance, and in its history
        assert len(page.having("restored")) >= 2  # on its lane, and in its row
        assert f"A is of restore epoch 0, B of {epoch}: " in shown(lab, "diff", out, state).text
        ended = vtpmd("backup", state, chain)
        assert ended.status != 0
        assert f"of restore epoch {epoch}, and" in ended.error
        assert "it was imported, or QEMU has loaded a snapshot, in between" in ended.error
        guest.command("work 20")
    assert vtpmd("backup", state, lab.new_path("another")).status == 0
    guest.close()
    assert emulator.stop() == 0
    assert epoch_at(state) == 2


def test_a_snapshot_that_nothing_was_written_since_begins_none(lab: Lab) -> None:
    host = make_host(lab)
    host.guest.boot()
    snapshot = host.guest.save()
    before = told(host)
    host.guest.load(snapshot)
    assert told(host) == before
    host.guest.work()
    assert epoch_of(told(host).generation) == 0


def test_each_time_that_it_is_loaded_begins_an_epoch(lab: Lab) -> None:
    """Also if its guest did nothing in between: its TPM was shut down."""
    host = make_host(lab)
    host.guest.boot()
    snapshot, facts = host.guest.save(), host.guest.facts()
    host.guest.work()
    for epoch in (1, 2, 3):
        host.guest.load(snapshot)
        assert told(host).generation == epoch * EPOCH_GENERATIONS
        assert host.guest.facts() == facts
        asked = vtpmd("status", "--manage", host.vtpmd.manage_path).output
        assert f"restore epoch: {epoch}: {BY_A_SNAPSHOT}" in asked
    host = restarted(lab, killed(host))
    assert epoch_of(told(host).generation) == 3


def test_invariant_1_the_epoch_survives_a_loss_of_power(lab: Lab, disk: Disk) -> None:
    """From the answer to INIT on."""
    emulator = lab.emulator(EmulatorKind.VTPMD, disk.path / "state")
    guest = lab.raw_guest(emulator)
    guest.boot()
    snapshot = guest.save()
    guest.work()
    guest.load(snapshot)
    disk.lose_power()
    emulator.kill()
    guest.close()
    disk.repair()
    assert epoch_at(emulator.state) == 1


def test_an_anchor_follows_it(lab: Lab) -> None:
    """The vTPM starts again after a crash: what was put back is the newest that it has seen."""
    anchor = lab.new_path("anchor")
    host = anchored(lab, anchor)
    host.guest.boot()
    snapshot = host.guest.save()
    host.guest.work()
    host.guest.load(snapshot)
    host = anchored(lab, anchor, killed(host).vtpmd.state)
    assert epoch_of(told(host).generation) == 1
    boot(host)
    assert_serves(host.guest)


def test_a_vtpm_moves_by_a_tail_right_after_it(lab: Lab) -> None:
    """And comes back, in whole blobs: of the same epoch, as it is the same line."""
    here, there = loaded(lab), make_host(lab)
    facts = here.guest.facts()
    assert here.manage.arm(there.vtpmd.address)["event"] == "VTPM_ARMED"
    hand_over(Pair(here, there, lab.link(there.vtpmd)))
    assert there.guest.facts() == facts
    assert epoch_of(told(there).generation) == 1
    here = reconnected(lab, here)
    here.guest.control.stop()
    by_blobs(lab, there, here)
    assert epoch_of(told(here).generation) == 1
    assert_serves(here.guest)


def test_a_vtpm_that_is_armed_is_put_back_and_moves(lab: Lab) -> None:
    here, there = make_host(lab), make_host(lab)
    here.guest.boot()
    snapshot, facts = here.guest.save(), here.guest.facts()
    here.guest.work()
    assert here.manage.arm(there.vtpmd.address)["event"] == "VTPM_ARMED"
    here.guest.load(snapshot)
    hand_over(Pair(here, there, lab.link(there.vtpmd)))
    assert there.guest.facts() == facts
    assert epoch_of(told(there).generation) == 1


def given_back(lab: Lab, source: Host, target: Host) -> Host:
    """Hand a vTPM over and have it given back, unused; return the target with another QEMU."""
    assert source.manage.arm(target.vtpmd.address)["event"] == "VTPM_ARMED"
    source.guest.work()
    target.guest.load(freeze(Pair(source, target, lab.link(target.vtpmd))))
    source.manage.wait_for("VTPM_GRANTED")
    target.guest.close()
    source.guest.resume()
    wait_until(lambda: source.manage.migration()["outcome"] == "go-on")
    assert_serves(source.guest)
    again = reconnected(lab, target)
    again.guest.control.stop()
    return again


def test_epochs_go_on_over_a_hand_over_that_is_given_back(lab: Lab) -> None:
    """On both sides of it, and where the vTPM moves to in the end."""
    here, there = make_host(lab), make_host(lab)
    here.guest.boot()
    snapshot, facts = here.guest.save(), here.guest.facts()
    here.guest.work()
    there = given_back(lab, here, there)
    here.guest.load(snapshot)
    assert (epoch_of(told(here).generation), here.guest.facts()) == (1, facts)
    there = given_back(lab, here, there)
    by_session(lab, here, there)
    assert epoch_of(told(there).generation) == 1
    there.guest.load(snapshot)
    assert (epoch_of(told(there).generation), there.guest.facts()) == (2, facts)
    here = reconnected(lab, here)
    here.guest.control.stop()
    here = given_back(lab, there, here)
    by_blobs(lab, there, here)
    assert epoch_of(told(here).generation) == 2
    assert_serves(here.guest)


def test_where_it_was_before_warns_of_a_fork(lab: Lab) -> None:
    """That host has a state of before the snapshot was loaded."""
    here, there = make_host(lab), make_host(lab)
    here.guest.boot()
    snapshot = here.guest.save()
    by_session(lab, here, there)
    here = reconnected(lab, here)
    here.guest.control.stop()
    by_session(lab, there, here)
    here.guest.load(snapshot)
    there = reconnected(lab, there)
    there.guest.control.stop()
    by_session(lab, here, there)
    there.vtpmd.program.wait_for_output(
        "is of restore epoch 1, the one here of 0: one was imported, or a snapshot was loaded,"
    )


@pytest.mark.parametrize("kind", [EmulatorKind.SWTPM, EmulatorKind.VTPMD])
def test_a_snapshot_of_swtpms_begins_one_too(lab: Lab, kind: EmulatorKind) -> None:
    """It says nothing of whose it is, but that the VM has it on its disk."""
    other = lab.raw_guest(lab.emulator(kind))
    other.boot()
    snapshot = other.save()
    host = make_host(lab)
    host.guest.boot()
    own = told(host)

    host.guest.load(snapshot)

    now = told(host)
    assert (now.identity == own.identity) == (kind is EmulatorKind.SWTPM)
    assert epoch_of(now.generation) == 1
    assert_serves(host.guest)
