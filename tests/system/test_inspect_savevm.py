"""A guest that QEMU's savevm has put into a disk image: its vTPM is found there, as it was."""

import json
import subprocess
from pathlib import Path

from tests.harness.lab import Lab
from vtpmd.testing.emulator import VTPMD, EmulatorKind
from vtpmd.testing.guest import Machine


def inspected(*arguments: str | Path) -> dict[str, object]:
    command = [VTPMD, "inspect", "--json", *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    known: dict[str, object] = json.loads(shown.stdout)
    return known


def test_a_guests_vtpm_is_found_in_its_snapshot(lab: Lab) -> None:
    disk = lab.new_disk()
    emulator = lab.emulator(EmulatorKind.VTPMD)
    guest = lab.booted_guest(emulator, Machine(disk=disk))
    assert guest.human_monitor("savevm first") == ""
    guest.command("work 60")
    assert guest.human_monitor("savevm second") == ""
    guest.close()
    last, first = inspected(disk), inspected(disk, "--snapshot", "first")
    assert (last["kind"], last["snapshot"], first["snapshot"]) == ("snapshot", "second", "first")
    for known in (last, first):
        found = known["states"]
        assert isinstance(found, dict)
        assert set(found) == {"permanent", "volatile"}
        assert all(each["decoded-bytes"] == each["bytes"] for each in found.values())
        assert known["identity"] == inspected(emulator.state)["identity"]
    assert isinstance(first["generation"], int)
    assert isinstance(last["generation"], int)
    assert first["generation"] < last["generation"]
    assert first["pcrs"] != last["pcrs"]
