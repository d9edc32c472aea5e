"""A vtpmd beside an engine of another version: what it may ask of it, and what it says if not.

The engines are canaries: one that says no version, and ends the link at what it does not know, as
engines of before there were versions do; and one that says a later version than vtpmd's.
"""

from pathlib import Path

import pytest

from tests.harness import canary
from tests.harness.command import vtpmd
from tests.harness.handover import assert_serves, assert_tail, make_armed_pair
from tests.harness.lab import Lab
from vtpmd.testing.emulator import EmulatorKind

VTPMD = EmulatorKind.VTPMD
LATER = "is of a later version of vtpmd, whose link is version 2, and not 1: attach that version"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    replaced = ("sendmsg", "message_receive")
    return canary.build("older", replaced, tmp_path_factory.mktemp("older"))


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return canary.build("later", ("sendmsg",), tmp_path_factory.mktemp("later"))


def test_an_older_engine_is_asked_nothing_that_it_does_not_know(
    lab: Lab, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says so; the guest is served on, a session is as it was, and all else works."""
    monkeypatch.setenv("PYTHONPATH", str(older))
    pair = make_armed_pair(lab)
    source, manage, out = pair.source, pair.source.vtpmd.manage_path, lab.new_path("out")
    for _ in range(2):
        ended = vtpmd("export", "--manage", manage, "--volatile", "--out", out)
        assert ended.status == 1 and not out.exists()
        assert ended.error.startswith(
            "vtpmd: cannot copy the states of the TPM: the vTPM's engine (pid "
        )
        assert ended.error.endswith(
            ") is of an earlier version of vtpmd, which has no COPY: stop the vTPM, and start it "
            "again by this version; or leave out --volatile\n"
        )
    assert "attached no more" not in source.vtpmd.program.output
    assert vtpmd("export", "--manage", manage, "--out", out).status == 0
    assert vtpmd("backup", "--manage", manage, lab.new_path("backups")).status == 0
    source.guest.work()
    facts = source.guest.facts()
    blobs = source.guest.save()
    assert_tail(blobs)
    pair.destination.guest.load(blobs)
    assert pair.destination.guest.facts() == facts


def test_a_vtpmd_is_attached_to_an_older_engine(
    lab: Lab, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade: the vtpmd before it is killed, and its guest notices nothing."""
    monkeypatch.setenv("PYTHONPATH", str(older))
    emulator = lab.peer()
    guest = lab.raw_guest(emulator)
    guest.boot()
    emulator.program.kill()
    monkeypatch.delenv("PYTHONPATH")
    emulator.attach()
    ended = vtpmd("export", "--manage", emulator.manage_path, "--volatile", "--out", "/x/x")
    assert ended.status == 1 and "is of an earlier version of vtpmd" in ended.error
    assert_serves(guest)
    assert emulator.stop() == 0


def test_to_a_later_engine_no_vtpmd_is_attached(
    lab: Lab, later: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, and ends; the engine serves on, alone."""
    monkeypatch.setenv("PYTHONPATH", str(later))
    emulator = lab.emulator(VTPMD)  # which is an engine alone
    guest = lab.raw_guest(emulator)
    guest.boot()
    monkeypatch.delenv("PYTHONPATH")
    for _ in range(2):
        ended = vtpmd("attach", emulator.state)
        assert ended.status == 1 and LATER in ended.error
        assert_serves(guest)
    assert "cannot be taken" not in emulator.program.output
    assert emulator.stop() == 0
