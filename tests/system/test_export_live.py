"""A vTPM that runs is exported with its volatile state, and its guest goes on.

Invariants that are checked: what is exported is one moment's, between two of the guest's commands,
and of a generation that was acknowledged; a session to another host notices nothing of it; what is
not this host's TPM, or does not run, is refused in a line.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.command import vtpmd
from tests.harness.handover import (
    assert_serves,
    assert_tail,
    make_armed_pair,
)
from tests.harness.lab import Lab
from tests.harness.proxy import WithholdingProxy
from tests.harness.raw_guest import NV_INDEX, NV_SIZE, RawGuest12
from tests.harness.saved_guest import MACHINE, SavedGuest, load
from tests.support import sealed_object, states, tpm2, tpm2_rare
from tests.support.beside import repeating
from tests.support.emulator_client import Control
from tests.support.tpm2 import Handle, Tpm, TpmError
from tests.system.test_export import tpm_of
from tests.system.test_state_directory import contents, fill, powered
from vtpmd.store.exporting import take
from vtpmd.testing import migration
from vtpmd.testing.disk import Disk
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.testing.facts import differences
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType, TpmVersion

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
EXPORTS = 12
PCR = 16
COUNTER = Handle.NV_FIRST + 9
DIGEST = bytes(range(32))
SECRET = b"the key of a disk"


class Served(NamedTuple):
    """A vTPM that is served, and where it is managed."""

    emulator: Emulator
    manage: Path


def serve(lab: Lab, *options: str, version: TpmVersion = TpmVersion.TPM_2_0) -> Served:
    """Start a vtpmd with a management socket."""
    manage = lab.new_path("manage")
    options = ("--manage", str(manage), *options)
    return Served(lab.emulator(VTPMD, options=options, version=version), manage)


def export(lab: Lab, manage: Path, *options: str) -> tuple[Path, int]:
    """Export a vTPM that runs, with its volatile state; return also of which generation it is."""
    out = lab.new_path("export")
    ended = vtpmd("export", "--manage", manage, "--volatile", "--out", out, "--json", *options)
    assert ended.status == 0, ended.error
    assert ended.outcome["served"] and ended.outcome["states"][:2] == ["permanent", "volatile"]
    return out, ended.outcome["generation"]


def restore(lab: Lab, file: Path, *options: str) -> Path:
    """Import an export with its volatile state into a new directory."""
    directory = lab.new_path("restored")
    ended = vtpmd("import", file, directory, "--identity", "copy", "--volatile", *options)
    assert ended.status == 0, ended.error
    return directory


class Steps:
    """A guest that extends a PCR, then counts it, again and again."""

    def __init__(self, tpm: Tpm) -> None:
        self.done = 0  # steps that were acknowledged
        self._tpm = tpm
        tpm.nv_define(COUNTER, 8, tpm2.NV_COUNTER)
        tpm.nv_increment(COUNTER)
        self._first = tpm.nv_counter(COUNTER)

    def take(self) -> None:
        """Take one."""
        self._tpm.extend(PCR, DIGEST)
        self._tpm.nv_increment(COUNTER)
        self.done += 1

    def taken(self, tpm: Tpm) -> int:
        """Return how many a TPM has counted; its PCR must have as many, or the one before it."""
        counted = tpm.nv_counter(COUNTER) - self._first
        pcr = bytes(32)
        for _ in range(counted):
            pcr = hashlib.sha256(pcr + DIGEST).digest()
        assert tpm.pcr(PCR) in (pcr, hashlib.sha256(pcr + DIGEST).digest())
        return counted


@pytest.mark.parametrize("is_sealed", [False, True], ids=["in the clear", "sealed"])
def test_an_export_under_load_is_of_one_moment(lab: Lab, is_sealed: bool) -> None:
    """Each of them, which goes on as the guest's TPM was between two commands."""
    options: tuple[str, ...] = ()
    if is_sealed:
        options = ("--key", f"file={lab.key_file('17' * 32)},mode=aes-256-cbc")
    emulator, manage = serve(lab, *options)
    guest = lab.raw_guest(emulator)
    guest.control.init()
    guest.tpm.startup()
    steps, exports = Steps(guest.tpm), []
    with repeating(steps.take):
        for _ in range(EXPORTS):
            before = steps.done
            file, generation = export(lab, manage, *options)
            exports.append((before, file, generation, steps.done + 1))
    found = []
    for before, file, generation, after in exports:
        copy = lab.emulator(VTPMD, restore(lab, file, *options), options=options)
        with powered(copy) as (_, tpm):
            found.append((steps.taken(tpm), generation))
            assert before <= found[-1][0] <= after
        copy.kill()
    assert found == sorted(found) and len(set(found)) > EXPORTS // 2


def put_another_key_on(file: Path) -> None:
    file.write_bytes(swtpm_format.encode_file(states.BUSY, key=bytes(16), iv=bytes(16)))


# What becomes of the state file under a vtpmd that serves it; that of 9 was never powered on.
REFUSALS: dict[int, Callable[[Path], object]] = {
    4: put_another_key_on,
    5: lambda file: file.write_bytes(swtpm_format.encode_file(states.BUSY)[:-1]),
    9: Path.exists,
}


@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_ends_the_command_as_where_the_directory_is_read(lab: Lab, status: int) -> None:
    emulator, manage = serve(lab)
    if status != 9:
        lab.raw_guest(emulator).control.init()
    REFUSALS[status](emulator.state / "tpm2-00.permall")
    for path, options in ((emulator.state, ()), (manage, ("--manage",))):
        out, chain = lab.new_path("export"), lab.new_path("chain")
        ended = vtpmd("export", *options, path, "--out", out)
        backed_up = vtpmd("backup", *options, path, chain)
        assert (ended.status, backed_up.status) == (status, status), (options, ended.error)
        assert ended.error.count("\n") == backed_up.error.count("\n") == 1
        assert not out.exists()


def test_a_refusal_without_a_status_of_its_own_ends_with_1(lab: Lab) -> None:
    emulator, manage = serve(lab)
    (emulator.state / "tpm2-00.permall").mkdir()
    ended = vtpmd("export", "--manage", manage, "--out", lab.new_path("export"))
    assert ended.status == 1
    assert ended.error.count("\n") == 1


@pytest.mark.parametrize("kind", EmulatorKind)
def test_what_the_tpm_had_is_had_by_the_one_that_is_restored(lab: Lab, kind: EmulatorKind) -> None:
    """PCRs, NV memory, a session, a transient key; vtpmd and swtpm both go on from it."""
    emulator, manage = serve(lab)
    guest = lab.raw_guest(emulator)
    guest.control.init()
    fill(guest.tpm)
    sealed = sealed_object.seal(guest.tpm, SECRET)
    session = tpm2.Reader(
        guest.tpm.execute(tpm2_rare.start_session(tpm2_rare.SessionType.POLICY, cipher=False))
    ).unsigned(4)
    guest.tpm.execute(tpm2_rare.policy_command_code(session, tpm2.CommandCode.NV_READ))
    key = guest.tpm.create_primary(tpm2.ecc_signing_template())
    before = contents(guest.tpm), guest.tpm.ecc_public(key)
    file, generation = export(lab, manage)
    stored = take(emulator.state, None)
    assert stored.generation == generation
    guest.tpm.extend(PCR, DIGEST)
    restored = lab.emulator(kind, restore(lab, file))
    with powered(restored) as (_, tpm):
        assert (contents(tpm), tpm.ecc_public(key)) == before
        assert sealed_object.unseal(tpm, sealed) == SECRET
        tpm.execute(tpm2_rare.context_save(session))
    assert_serves(guest)


def test_a_guests_memory_and_its_exported_tpm_go_on_together(lab: Lab) -> None:
    """A real guest's: QEMU has saved the one, and an export the other, of the same moment."""
    emulator, manage = serve(lab)
    guest = lab.booted_guest(emulator, MACHINE)
    sealed = sealed_object.seal(tpm_of(guest), SECRET)
    before = guest.check()
    guest.pause()
    file, _ = export(lab, manage)
    memory = lab.new_path("memory")
    migration.set_capabilities(guest, return_path=False)
    guest.qmp("migrate", uri=f"exec:cat >{memory}")
    assert migration.wait_until_ended(guest) == "completed"
    guest.close()

    proxy = WithholdingProxy(lab.new_path("proxy"), lab.emulator(VTPMD, restore(lab, file)))
    lab.close_at_end(proxy)
    again = lab.guest(proxy, MACHINE, migration.INCOMING)
    load(SavedGuest(memory, before), again)
    assert Control.SET_STATEBLOB in proxy.seen
    assert differences(before, again.check(), worked=False) == []
    assert sealed_object.unseal(tpm_of(again), sealed) == SECRET
    again.command("work 60")
    assert differences(before, again.check(), worked=True) == []


def test_the_permanent_state_is_that_of_its_generation(lab: Lab) -> None:
    """As it is in the state directory, byte for byte, with and without a change since."""
    emulator, manage = serve(lab)
    guest = lab.raw_guest(emulator)
    guest.boot()
    for _ in range(3):
        guest.work()
        file, _ = export(lab, manage)
        directory = lab.new_path("restored")
        assert vtpmd("import", file, directory, "--identity", "copy").status == 0
        stored, copied = take(emulator.state, None), take(directory, None)
        assert copied.states[StateType.PERMANENT] == stored.states[StateType.PERMANENT]


def test_a_tpm_12_goes_on_from_its_export(lab: Lab) -> None:
    emulator, manage = serve(lab, version=TpmVersion.TPM_1_2)
    guest = RawGuest12(emulator.control_path)
    guest.boot()
    before = guest.facts()
    file, _ = export(lab, manage)
    guest.work()
    guest.close()
    restored = lab.emulator(VTPMD, restore(lab, file), version=TpmVersion.TPM_1_2)
    again = RawGuest12(restored.control_path)
    again.control.init()
    assert again.facts() == before
    again.close()


@pytest.mark.parametrize("volatile", [[], ["--volatile"]], ids=["permanent", "and volatile"])
def test_who_has_the_socket_alone_needs_no_directory(lab: Lab, volatile: list[str]) -> None:
    """As in a container, or where the vtpmd sees other mounts than who exports it."""
    emulator, manage = serve(lab)
    guest, out = lab.raw_guest(emulator), lab.new_path("export")
    guest.boot()
    guest.work()
    words = ["--manage", str(manage), "--out", str(out), "--json", *volatile]
    ended = vtpmd("export", *words, hidden=emulator.state)
    assert ended.status == 0, ended.error
    assert ended.outcome["path"] == str(emulator.state)
    assert ended.outcome["states"] == ["permanent", *(["volatile"] if volatile else [])]
    directory, stored = lab.new_path("restored"), take(emulator.state, None)
    assert vtpmd("import", out, directory, "--identity", "copy").status == 0
    copied = take(directory, None)
    assert copied.states[StateType.PERMANENT] == stored.states[StateType.PERMANENT]


def test_a_session_notices_nothing_of_an_export(lab: Lab) -> None:
    """What was not captured yet is not taken for captured: the destination has all of it."""
    pair = make_armed_pair(lab)
    source, destination = pair.source, pair.destination
    export(lab, source.vtpmd.manage_path)
    source.guest.work()
    before = source.guest.facts()
    source.manage.command("export-states")  # sooner than the next round
    blobs = source.guest.save()
    assert_tail(blobs)
    export(lab, source.vtpmd.manage_path)
    destination.guest.load(blobs)
    assert destination.guest.facts() == before
    ended = vtpmd("export", "--manage", source.vtpmd.manage_path, "--volatile", "--out", "/x/x")
    assert ended.status == 1 and "does not run here" in ended.error


def test_what_could_not_be_stored_is_not_exported(lab: Lab, disk: Disk) -> None:
    """Nothing starts from what a TPM has that stopped. The directory has what was acknowledged, and
    maybe the change that was not.
    """
    manage = lab.new_path("manage")
    options = ("--manage", str(manage))
    emulator = lab.emulator(VTPMD, disk.path / "state", options=options)
    guest, out = lab.raw_guest(emulator), lab.new_path("export")
    guest.boot()
    nv, refused = guest.facts().nv, bytes([1]) * NV_SIZE
    disk.fail_writes(True)
    with pytest.raises(TpmError):
        guest.tpm.nv_write(NV_INDEX, refused)
    disk.fail_writes(False)
    ended = vtpmd("export", "--manage", manage, "--volatile", "--out", out)
    assert ended.status == 1 and not out.exists()
    assert "has stopped, as its state could not be stored" in ended.error
    assert vtpmd("export", "--manage", manage, "--out", out).status == 0
    directory = lab.new_path("restored")
    assert vtpmd("import", out, directory, "--identity", "copy").status == 0
    restored = lab.raw_guest(lab.emulator(VTPMD, directory))
    restored.control.init()
    restored.tpm.startup()
    assert restored.facts().nv in (nv, refused)
    guest.control.init()
    guest.tpm.startup()
    export(lab, manage)


def test_what_does_not_run_is_refused_in_a_line(lab: Lab) -> None:
    """A TPM that is off, and a vtpmd that has gone; nothing is made."""
    emulator, manage = serve(lab)
    guest, out = lab.raw_guest(emulator), lab.new_path("export")
    guest.boot()
    guest.control.stop()
    ended = vtpmd("export", "--manage", manage, "--volatile", "--out", out)
    assert ended.status == 1
    assert "the vTPM's TPM does not run here, so it has no volatile state" in ended.error
    emulator.kill()
    ended = vtpmd("export", "--manage", manage, "--volatile", "--out", out)
    assert ended.status == 1 and "cannot manage vtpmd" in ended.error
    assert not out.exists()
