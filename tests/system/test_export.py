"""A vTPM is taken out and brought back: while it is served, from and to swtpm, with its guest.

Invariants of the design that are checked: an export is a generation that was acknowledged, whatever
is written meanwhile; 9 (an imported directory is swtpm's, and swtpm's is exported as it is); a
directory that is imported into is the old one or the imported one after any loss of power.
"""

import json
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from random import Random
from threading import Event, Thread

import pytest

from tests.harness.command import vtpmd
from tests.harness.dying import Killed, dying
from tests.harness.handover import make_host
from tests.harness.lab import Lab
from tests.harness.nv_load import Contents, NvLoad, contents
from tests.harness.raw_guest import RawGuest, RawGuest12
from tests.harness.swtpm_program import OURS
from tests.support import sealed_object
from tests.support.beside import repeating
from tests.support.tpm2 import Handle, Tpm, TpmError
from tests.system.test_linear_file import DEVICE_BYTES, loop_device
from tests.system.test_state_directory import change, fill, powered
from tests.system.test_state_directory import contents as contents_of
from vtpmd import cli
from vtpmd.store.exporting import NoVtpm, take
from vtpmd.testing.emulator import EmulatorKind
from vtpmd.testing.guest import Guest, Machine
from vtpmd.wire.tpm import StateType, TpmVersion

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
EXPORTS = 12
SECRET = b"the key of a disk"
NV_INDEX = Handle.NV_FIRST + 7
COMMAND_TIMEOUT_S = 60


def export(lab: Lab, path: Path, *options: str) -> Path:
    """Export a vTPM."""
    out = lab.new_path("export")
    ended = vtpmd("export", path, "--out", out, *options)
    assert ended.status == 0, ended.error
    return out


def import_into(file: Path, directory: Path, *options: str) -> None:
    """Import a vTPM as a copy."""
    ended = vtpmd("import", file, directory, "--identity", "copy", *options)
    assert ended.status == 0, ended.error


class Writing:
    """A guest that writes NV memory, and what it was answered, in order."""

    def __init__(self, load: NvLoad, tpm: Tpm) -> None:
        self.acknowledged: list[Contents] = [load.owed]
        self._load, self._tpm = load, tpm

    def write(self) -> None:
        """Write once."""
        self._load.step(self._tpm)
        self.acknowledged.append(self._load.owed)


@pytest.mark.parametrize("is_sealed", [False, True], ids=["in the clear", "sealed"])
def test_an_export_under_load_is_a_generation_that_was_acknowledged(
    lab: Lab, random: Random, is_sealed: bool
) -> None:
    """Of those from when the command began on, across foldings; and it starts."""
    options: tuple[str, ...] = ()
    if is_sealed:
        options = ("--key", f"file={lab.key_file('17' * 32)},mode=aes-256-cbc")
    emulator = lab.emulator(VTPMD, options=options)
    guest = lab.raw_guest(emulator)
    load = NvLoad(random)
    guest.control.init()
    guest.tpm.startup()
    load.define(guest.tpm)
    load.weights = (0, 95, 1, 1, 3)  # a journal is full after some hundred of them
    writing, exports, journals = Writing(load, guest.tpm), [], set()
    with repeating(writing.write):
        for _ in range(EXPORTS):
            n_before = len(writing.acknowledged)
            exports.append((n_before, export(lab, emulator.state, *options)))
            journals.add((emulator.state / "tpm2-00.journal").stat().st_ino)
    assert len(journals) > 1, "no folding came between"
    assert len(writing.acknowledged) > EXPORTS
    ends: list[int] = []
    for n_before, file in exports:
        directory = lab.new_path("imported")
        import_into(file, directory, *options)
        copy = lab.emulator(VTPMD, directory, options=options)
        with powered(copy) as (_, tpm):
            tpm.startup()
            found = contents(tpm)
        copy.kill()
        assert found in writing.acknowledged[n_before - 1 :], "never acknowledged, or too old"
        ends.append(writing.acknowledged.index(found, n_before - 1))
    assert ends == sorted(ends) and len(set(ends)) > EXPORTS // 2


def test_exports_keep_no_guest_waiting(lab: Lab) -> None:
    """A guest's writes take as long as without; and exports of it are made, one after the other."""
    emulator = lab.emulator(VTPMD)
    guest = lab.raw_guest(emulator)
    guest.boot()
    taken, end = [], Event()

    def keep_exporting() -> None:
        while not end.is_set():
            taken.append(take(emulator.state, None))

    thread = Thread(target=keep_exporting)
    thread.start()
    try:
        for _ in range(500):
            guest.work()
    finally:
        end.set()
        thread.join()
    generations = [each.generation for each in taken]
    assert len(taken) > 10 and generations == sorted(generations)
    assert all(each.is_served for each in taken)


@pytest.mark.parametrize("kinds", [(SWTPM, VTPMD), (VTPMD, SWTPM)], ids="-to-".join)
@pytest.mark.parametrize("is_sealed", [False, True], ids=["in the clear", "sealed"])
def test_a_vtpm_goes_from_either_program_to_the_other(
    lab: Lab, kinds: tuple[EmulatorKind, EmulatorKind], is_sealed: bool
) -> None:
    """Stopped in the middle: its volatile state goes with it."""
    options: tuple[str, ...] = ()
    if is_sealed:
        options = ("--key", f"file={lab.key_file('2a' * 16)},mode=aes-128-cbc")
    first = lab.emulator(kinds[0], options=options)
    with powered(first) as (control, tpm):
        fill(tpm)
        change(tpm)
        sealed = sealed_object.seal(tpm, SECRET)
        before = contents_of(tpm)
        control.store_volatile()
        first.kill()
    out, into = export(lab, first.state, "--volatile", *options), lab.new_path("into")
    import_into(out, into, "--volatile", *options)
    with powered(lab.emulator(kinds[1], into, options=options)) as (_, tpm):
        assert contents_of(tpm) == before
        assert sealed_object.unseal(tpm, sealed) == SECRET


def test_a_running_swtpm_is_exported(lab: Lab) -> None:
    emulator = lab.emulator(SWTPM)
    with powered(emulator) as (_, tpm):
        fill(tpm)
        out = export(lab, emulator.state)
        counter = contents_of(tpm).counter
        change(tpm)
    into = lab.new_path("into")
    import_into(out, into)
    with powered(lab.emulator(VTPMD, into)) as (_, tpm):
        tpm.startup()
        assert contents_of(tpm).counter == counter


@pytest.mark.parametrize("kinds", [(SWTPM, VTPMD), (VTPMD, SWTPM)], ids="-to-".join)
def test_a_tpm_12_goes_from_either_program_to_the_other(
    lab: Lab, kinds: tuple[EmulatorKind, EmulatorKind]
) -> None:
    first = lab.emulator(kinds[0], version=TpmVersion.TPM_1_2)
    guest = RawGuest12(first.control_path)
    guest.boot()
    before = guest.facts()
    guest.control.store_volatile()
    guest.close()
    first.kill()
    out, into = export(lab, first.state, "--volatile"), lab.new_path("into")
    import_into(out, into, "--volatile")
    second = lab.emulator(kinds[1], into, version=TpmVersion.TPM_1_2)
    guest = RawGuest12(second.control_path)
    guest.control.init()
    assert guest.facts() == before
    guest.close()


def test_a_linear_file_of_swtpm_is_exported(lab: Lab) -> None:
    """Also one of a TPM 1.2, which the file does not say."""
    for version in TpmVersion:
        linear, control = lab.new_path("linear"), lab.new_path("control")
        wanted = ["--tpm2"] if version is TpmVersion.TPM_2_0 else []
        command = ["swtpm", "socket", *wanted, "--tpmstate", f"backend-uri=file://{linear}"]
        command += ["--ctrl", f"type=unixio,path={control}", "--terminate"]
        with subprocess.Popen(command) as process:
            while not control.exists():
                time.sleep(0.01)
            guest = RawGuest12(control) if not wanted else RawGuest(control)
            guest.boot()
            before = guest.facts().nv
            out = export(lab, linear)
            guest.control.shutdown()
            guest.close()
            assert process.wait(timeout=COMMAND_TIMEOUT_S) == 0
        into = lab.new_path("into")
        import_into(out, into)
        emulator = lab.emulator(VTPMD, into, version=version)
        again = RawGuest12(emulator.control_path) if not wanted else RawGuest(emulator.control_path)
        again.control.init()
        if isinstance(again, RawGuest12):
            again.tpm12.startup()
        else:
            again.tpm.startup()
        assert again.facts().nv == before
        again.close()


def test_the_volatile_state_of_a_served_vtpm_is_refused(lab: Lab) -> None:
    emulator = lab.emulator(VTPMD)
    ended = vtpmd("export", emulator.state, "--volatile", "--out", lab.new_path("export"))
    assert ended.status == 3
    assert "the vTPM is served; give --manage, the management socket of its" in ended.error


def test_a_vtpmd_says_where_its_state_is(lab: Lab) -> None:
    manage, out = lab.new_path("manage"), lab.new_path("export")
    emulator = lab.emulator(VTPMD, options=("--manage", str(manage)))
    lab.raw_guest(emulator).boot()
    ended = vtpmd("export", "--manage", manage, "--out", out, "--json")
    assert ended.status == 0, ended.error
    assert ended.outcome["path"] == str(emulator.state)
    assert ended.outcome["served"] and out.exists()


def tpm_of(guest: Guest) -> Tpm:
    """Return a TPM as a program in the guest has it, through the guest's driver."""
    return Tpm(lambda sent: bytes.fromhex(guest.command(f"raw {sent.hex()}")["response"]))


def test_what_a_guest_has_sealed_unseals_after_a_restore(lab: Lab) -> None:
    """Real guests; in another TPM it does not. What was written after the export is gone."""
    emulator = lab.emulator(VTPMD)
    guest = lab.guest(emulator, Machine())
    guest.wait_for_workload()
    tpm = tpm_of(guest)
    sealed = sealed_object.seal(tpm, SECRET)
    tpm.nv_define(NV_INDEX, 8)
    tpm.nv_write(NV_INDEX, b"exported")
    out, restored = export(lab, emulator.state), lab.new_path("restored")
    tpm.nv_write(NV_INDEX, b"after it")
    guest.close()
    import_into(out, restored)

    again = lab.guest(lab.emulator(VTPMD, restored), Machine())
    again.wait_for_workload()
    tpm = tpm_of(again)
    assert sealed_object.unseal(tpm, sealed) == SECRET
    assert tpm.nv_read(NV_INDEX, 8) == b"exported"

    with powered(lab.emulator(VTPMD)) as (_, other):
        other.startup()
        with pytest.raises(TpmError):
            sealed_object.unseal(other, sealed)


def test_a_copy_that_meets_its_original_is_known_to_be_a_fork(lab: Lab) -> None:
    """As the original is to be moved to where the copy is."""
    source = make_host(lab)
    source.guest.boot()
    into = lab.new_path("into")
    import_into(export(lab, source.vtpmd.state), into)
    destination = lab.peer(state=into)
    destination.program.wait_for_output("possible fork: the vTPM was imported at 2")
    event = source.manage.arm(destination.address)
    assert event["event"] == "VTPM_ARMED"
    destination.program.wait_for_output(
        "is of restore epoch 0, the one here of 1: one was imported, or a snapshot was loaded,"
    )


@pytest.mark.parametrize("kind", EmulatorKind)
def test_an_import_makes_a_linear_file(lab: Lab, kind: EmulatorKind) -> None:
    """Of which either program serves the same TPM; another one is kept beside it."""
    emulator = lab.emulator(VTPMD)
    with powered(emulator) as (_, tpm):
        fill(tpm)
        before = contents_of(tpm)
    assert emulator.stop() == 0
    out, linear = export(lab, emulator.state), lab.new_path("linear")
    import_into(out, linear, "--linear")
    first = linear.read_bytes()
    ended = vtpmd("import", out, linear, "--identity", "copy", "--linear")
    assert (ended.status, linear.read_bytes()) == (10, first)
    import_into(out, linear, "--linear", "--force")
    assert linear.with_name(f"{linear.name}.before-1").read_bytes() == first
    control = lab.new_path("control")
    program = ["swtpm"] if kind is SWTPM else [str(OURS)]
    command = [*program, "socket", "--tpm2", "--tpmstate", f"backend-uri=file://{linear}"]
    with subprocess.Popen([*command, "--ctrl", f"type=unixio,path={control}"]) as process:
        while not control.exists():
            time.sleep(0.01)
        guest = RawGuest(control)
        guest.control.init()
        guest.tpm.startup()
        found = contents_of(guest.tpm)
        guest.control.shutdown()
        guest.close()
        assert process.wait(timeout=COMMAND_TIMEOUT_S) == 0
    assert replace(found, pcr=before.pcr) == before


def test_an_import_into_a_device_has_happened_or_not_at_each_step(lab: Lab, tmp_path: Path) -> None:
    """One that has not leaves what is as good as empty; and nothing is written over."""
    emulator = lab.emulator(VTPMD)
    lab.raw_guest(emulator).boot()
    out = export(lab, emulator.state)
    with loop_device(tmp_path / "disk", DEVICE_BYTES) as device:
        words = ["import", str(out), str(device), "--identity", "copy", "--linear"]
        have_happened = []
        for at in count():
            device.write_bytes(bytes(DEVICE_BYTES))
            with suppress(Killed), dying(at) as steps:
                assert cli.main(words) == 0
            try:
                take(device, None)
            except NoVtpm:
                have_happened.append(False)
            else:
                have_happened.append(True)
            if steps.done < at:
                break
        assert have_happened == sorted(have_happened) and have_happened[0] != have_happened[-1]
        if device.is_block_device():  # only root makes one
            content = device.read_bytes()
            assert cli.main([*words, "--force"]) == 10
            assert device.read_bytes() == content


def test_a_loss_of_power_at_any_step_leaves_the_old_vtpm_or_the_imported_one(lab: Lab) -> None:
    """On a real disk, which forgets what was not synced. Two vTPMs take each other's place."""
    exported = []
    for _ in range(2):
        emulator = lab.emulator(VTPMD)
        lab.raw_guest(emulator).boot()
        state = take(emulator.state, None).states[StateType.PERMANENT]
        exported.append((export(lab, emulator.state), state))
    disk = lab.new_power_disk()
    directory = disk.path / "state"
    words = [str(directory), "--identity", "copy", "--force"]
    (first, old), (second, new) = exported
    assert cli.main(["import", str(first), *words]) == 0
    with dying(None) as steps:
        assert cli.main(["import", str(second), *words]) == 0
    (second, new), (first, old) = exported
    have_happened = []
    for at in range(steps.done):
        with pytest.raises(Killed), dying(at):
            cli.main(["import", str(second), *words])
        disk.lose_power()
        disk.repair()
        assert vtpmd("fold", directory).status == 0
        found = take(directory, None).states[StateType.PERMANENT]
        assert found in (old, new), at
        have_happened.append(found == new)
        if found == new:
            (first, old), (second, new) = (second, new), (first, old)
    assert have_happened == sorted(have_happened) and set(have_happened) == {True, False}
    assert json.loads(vtpmd("status", directory, "--json").output)["problems"] == []
