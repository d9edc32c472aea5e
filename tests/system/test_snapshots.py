"""A guest's TPM state is saved and restored with the guest; pausing and restarting keep it.

Invariant of the design that is checked: 6 (savevm, `virsh save` and loadvm keep working).
"""

import pytest

from tests.harness import versions
from tests.harness.lab import Lab
from tests.harness.saved_guest import SavedGuest, go_on
from vtpmd.testing import migration
from vtpmd.testing.emulator import EmulatorKind
from vtpmd.testing.facts import differences
from vtpmd.testing.guest import Machine
from vtpmd.testing.workload import WorkloadFailedError

KINDS = [EmulatorKind.VTPMD, EmulatorKind.SWTPM]
SNAPSHOT = "checked"


@pytest.mark.parametrize("kind", KINDS)
def test_loadvm_brings_the_tpm_back_with_the_guest(lab: Lab, kind: EmulatorKind) -> None:
    """Guest and TPM go back together: the guest's model of then fits the TPM again."""
    guest = lab.booted_guest(lab.emulator(kind), Machine(disk=lab.new_disk()))
    before = guest.check()
    assert guest.human_monitor(f"savevm {SNAPSHOT}") == ""
    assert differences(before, guest.check(), worked=False) == []
    guest.command("work 60")
    later = guest.check()
    assert later["pcr_chain"] != before["pcr_chain"]

    assert guest.human_monitor(f"loadvm {SNAPSHOT}") == ""

    assert differences(before, guest.check(), worked=False) == []
    guest.command("work 60")
    guest.check()


@pytest.mark.parametrize("kind", KINDS)
def test_loadvm_restores_the_tpm_in_another_process(lab: Lab, kind: EmulatorKind) -> None:
    """A snapshot starts a new QEMU, whose new emulator has an empty state directory."""
    machine = Machine(disk=lab.new_disk())
    guest = lab.booted_guest(lab.emulator(kind), machine)
    before = guest.check()
    assert guest.human_monitor(f"savevm {SNAPSHOT}") == ""
    guest.close()

    restored = lab.guest(lab.emulator(kind), machine, ("-loadvm", SNAPSHOT))

    assert differences(before, restored.check(), worked=False) == []


@pytest.mark.parametrize(
    "pair",
    [tuple(KINDS), tuple(reversed(KINDS)), (EmulatorKind.VTPMD, EmulatorKind.VTPMD)],
    ids="-to-".join,
)
def test_guest_saved_to_a_file_is_restored_from_it(
    lab: Lab, saved_guest: SavedGuest, pair: tuple[EmulatorKind, EmulatorKind]
) -> None:
    """What `virsh save` does: migrate into a file, end QEMU, and start from the file later."""
    saved = lab.directory / "saved"
    guest = go_on(saved_guest, lab.emulator(pair[0]), lab)
    before = guest.check()
    migration.set_capabilities(guest, return_path=False)
    guest.pause()
    guest.qmp("migrate", uri=f"exec:cat >{saved}")
    assert migration.wait_until_ended(guest) == "completed"
    guest.close()

    restored = lab.guest(lab.emulator(pair[1]), Machine(), migration.INCOMING)
    migration.set_capabilities(restored, return_path=False)
    restored.qmp("migrate-incoming", uri=f"exec:cat {saved}")
    migration.wait_until(restored, "paused")
    restored.resume()

    assert differences(before, restored.check(), worked=False) == []


def test_guest_sees_one_changed_byte_of_its_tpm(lab: Lab) -> None:
    """The canary: a saved guest whose TPM is changed in one byte of NV is not fooled."""
    saved = lab.directory / "saved"
    guest = lab.guest(lab.emulator(EmulatorKind.VTPMD), Machine())
    guest.wait_for_workload()
    guest.command("setup")
    migration.set_capabilities(guest, return_path=False)
    guest.qmp("migrate", uri=f"exec:cat >{saved}")
    assert migration.wait_until_ended(guest) == "completed"
    guest.close()
    # Guest memory, which comes first, holds the same bytes: they are the workload's model.
    content = saved.read_bytes()
    position = content.index(bytes(range(256)), content.index(b"tpm-emulator"))
    saved.write_bytes(content[:position] + b"\x01" + content[position + 1 :])

    restored = lab.guest(lab.emulator(EmulatorKind.VTPMD), Machine(), migration.INCOMING)
    migration.set_capabilities(restored, return_path=False)
    restored.qmp("migrate-incoming", uri=f"exec:cat {saved}")
    migration.wait_until(restored, "running")

    with pytest.raises(WorkloadFailedError, match="NV contents differ from the model"):
        restored.check()


@pytest.mark.parametrize("kind", KINDS)
def test_pause_and_resume_change_nothing(
    lab: Lab, saved_guest: SavedGuest, kind: EmulatorKind
) -> None:
    """stop and cont, also in the middle of the guest's commands."""
    guest = go_on(saved_guest, lab.emulator(kind), lab)
    before = guest.check()
    guest.command("start")
    for _ in range(20):
        guest.pause()
        guest.resume()
    guest.command("stop")
    assert differences(before, guest.check(), worked=True) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["tpm-tis", "tpm-crb"])
def test_reset_of_the_guest_restarts_its_tpm(lab: Lab, kind: EmulatorKind, model: str) -> None:
    """A guest that is reset finds NV and persistent keys as they were, and fresh PCRs."""
    guest = lab.booted_guest(lab.emulator(kind), Machine(tpm_model=model))
    before = guest.check()

    guest.qmp("system_reset")
    guest.wait_for_workload()
    after = guest.command("read")

    kept = ["nv", "counter", "signing_key"]
    assert [after[name] for name in kept] == [before[name] for name in kept]
    assert after["pcr_seal"] == after["pcr_chain"] == "00" * 32
    is_counted = kind is not EmulatorKind.SWTPM or versions.swtpm().counts_resets
    assert int(after["reset_count"]) == int(before["reset_count"]) + int(is_counted)
    assert int(after["clock_ms"]) >= int(before["clock_ms"])
