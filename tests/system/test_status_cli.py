"""`vtpmd status` beside vTPMs that are served, by vtpmd and by swtpm, and that move meanwhile."""

import shutil

from tests.harness.command import vtpmd
from tests.harness.handover import Pair, make_armed_pair, make_pair
from tests.harness.lab import Lab
from tests.harness.raw_guest import NV_INDEX
from tests.support.file_names import JOURNAL_NAME, PERMANENT_NAME
from vtpmd.testing.credentials import HOST, credentials
from vtpmd.testing.emulator import EmulatorKind, Peering
from vtpmd.testing.waiting import wait_until


def hand_over(pair: Pair) -> None:
    pair.destination.guest.load(pair.source.guest.save())
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    wait_until(lambda: not (pair.destination.vtpmd.state / "tpm2-00.incoming").exists())


def test_a_served_vtpm_is_left_alone(lab: Lab) -> None:
    """It is told while the guest writes, and the guest notices nothing."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    guest = lab.raw_guest(emulator)
    guest.boot()
    generations = []
    for _ in range(5):
        guest.work()
        ended = vtpmd("status", emulator.state, "--json")
        assert (ended.status, ended.error) == (0, "")
        assert ended.outcome["problems"] == []
        (holder,) = ended.outcome["served-by"]
        assert holder == {"pid": emulator.program.pid, "program": "vtpmd-engine"}
        generations.append(ended.outcome["generation"])
    assert generations == sorted(set(generations))
    assert guest.facts()


def test_swtpms_vtpm(lab: Lab) -> None:
    emulator = lab.emulator(EmulatorKind.SWTPM)
    guest = lab.raw_guest(emulator)
    guest.boot()
    (holder,) = vtpmd("status", emulator.state, "--json").outcome["served-by"]
    assert holder["program"] == "swtpm"


def test_a_copy_of_two_moments_is_told(lab: Lab) -> None:
    """As docs/journal-format.md says: file by file, and the journal is folded in between."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    guest = lab.raw_guest(emulator)
    guest.boot()
    older, newer, of_one_moment = (lab.new_path("copy") for _ in range(3))
    for path in (older, newer, of_one_moment):
        path.mkdir()
    shutil.copy(emulator.state / PERMANENT_NAME, older)
    shutil.copy(emulator.state / JOURNAL_NAME, newer)
    before = guest.facts()
    journal = (emulator.state / JOURNAL_NAME).stat().st_ino
    while (emulator.state / JOURNAL_NAME).stat().st_ino == journal:
        guest.work()
    shutil.copy(emulator.state / JOURNAL_NAME, older)
    shutil.copy(emulator.state / PERMANENT_NAME, newer)
    for name in (PERMANENT_NAME, JOURNAL_NAME):
        shutil.copy(emulator.state / name, of_one_moment)
    assert vtpmd("status", of_one_moment).status == 0
    for copy, age, restored_has_it in ((older, "older", False), (newer, "newer", True)):
        ended = vtpmd("status", copy)
        assert ended.status == 5
        assert f"{PERMANENT_NAME} is {age}" in ended.output
        restored = vtpmd("recover", "--restore", copy)
        assert restored.status == 0
        assert ("lost: " not in restored.output) == restored_has_it
        assert (
            " before tpm2-00.journal, which neither file has" in restored.output
        ) != restored_has_it
        again = lab.raw_guest(lab.emulator(EmulatorKind.VTPMD, copy))
        again.control.init()
        again.tpm.startup()
        assert again.tpm.nv_is_defined(NV_INDEX) == restored_has_it
        if restored_has_it:
            assert again.facts().nv >= before.nv  # a counter's bytes


def test_both_hosts_after_a_move(lab: Lab) -> None:
    """By the directory and by the management socket: whose it is, since when, and the session."""
    pair = make_armed_pair(lab)
    hand_over(pair)
    source, destination = pair.source.vtpmd, pair.destination.vtpmd

    away = vtpmd("status", source.state, "--json").outcome
    here = vtpmd("status", destination.state, "--json").outcome
    assert (away["owner"], away["peer"], here["owner"]) == ("moved", pair.link.address, "ours")
    assert away["session"] == here["sessions"][-1]["session"]
    assert away["identity"] == here["identity"]

    asked = vtpmd("status", "--manage", source.manage_path)
    assert (asked.status, asked.error) == (0, "")
    first, *others = asked.output.splitlines()
    assert f"the vTPM is another host's, {pair.link.address}, since {away['since']}" in first
    assert "the TPM is off, or not served here" in others
    assert f"last session out: {away['session']}, moved, handed-over" in others
    asked = vtpmd("status", "--manage", destination.manage_path)
    assert "the TPM is on" in asked.output.splitlines()
    answers = vtpmd("status", "--manage", destination.manage_path, "--json").outcome
    assert answers["status"]["owner"] == "ours"
    assert answers["status"]["lineage"]["identity"] == here["identity"]


def test_both_hosts_say_that_it_has_moved(lab: Lab) -> None:
    """A line in each log, also at level info; and what programs are answered is true."""
    peering = Peering(credentials=credentials(), log_level="info")
    pair = make_pair(lab, source=peering, destination=peering)
    assert pair.arm()["event"] == "VTPM_ARMED"
    assert pair.source.manage.vtpm()["running"]
    hand_over(pair)
    moved = "vtpmd: the vTPM has moved: "
    assert f"{moved}{pair.link.address} says that it has it" in pair.source.log
    assert f"{moved}it came from {HOST}, and is served here" in pair.destination.log
    for host, owner in ((pair.source, "moved"), (pair.destination, "ours")):
        vtpm, status = host.manage.vtpm(), host.manage.command("query-status")
        assert (vtpm["owner"], status["owner"]) == (owner, owner)
        assert vtpm["running"] == status["running"] == (owner == "ours")
