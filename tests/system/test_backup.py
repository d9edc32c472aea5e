"""A vTPM is backed up while it is served, and brought back as it was at each of its backups.

Invariants of the design that are checked: a backup is a generation that was acknowledged, whatever
is written meanwhile, and each can be restored; whatever step a loss of power comes at, no fewer
backups can be restored than are to be kept.
"""

import subprocess
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from tests.harness.command import Ended, vtpmd
from tests.harness.dying import Killed, dying
from tests.harness.lab import Lab
from tests.harness.nv_load import Contents, NvLoad, contents
from tests.harness.raw_guest import RawGuest, RawGuest12
from tests.harness.swtpm_program import OURS
from tests.support import sealed_object
from tests.support.beside import repeating
from tests.support.tpm2 import Tpm
from tests.system.test_export import COMMAND_TIMEOUT_S, SECRET, Writing, import_into
from tests.system.test_state_directory import powered
from vtpmd import cli
from vtpmd.store import chain
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.wire.tpm import StateType, TpmVersion

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
BACKUPS = 6
WRITES = 20
KEEP = 3


class Served(NamedTuple):
    """A vTPM that is served, and where it is managed."""

    emulator: Emulator
    manage: Path

    def back_up(self, dest: Path, *options: str) -> Ended:
        """Back it up by its management socket alone: who does sees no state directory there."""
        state = self.emulator.state
        words = ["--manage", str(self.manage), str(dest), "--json", *options]
        ended = vtpmd("backup", *words, hidden=state)
        assert ended.status == 0, ended.error
        assert ended.outcome["served"] and ended.outcome["path"] == str(self.manage)
        return ended


def serve(
    lab: Lab,
    state: Path | None = None,
    options: tuple[str, ...] = (),
    version: TpmVersion = TpmVersion.TPM_2_0,
) -> Served:
    """Start a vtpmd with a management socket."""
    manage = lab.new_path("manage")
    options = ("--manage", str(manage), *options)
    return Served(lab.emulator(VTPMD, state, options=options, version=version), manage)


def back_up(path: Path, dest: Path, *options: str) -> Ended:
    """Back up a vTPM."""
    ended = vtpmd("backup", path, dest, "--json", *options)
    assert ended.status == 0, ended.error
    return ended


@pytest.mark.parametrize("is_sealed", [False, True], ids=["in the clear", "sealed"])
def test_a_vtpm_comes_back_that_was_backed_up_by_its_socket_alone(
    lab: Lab, random: Random, is_sealed: bool
) -> None:
    """While its guest works, and when it is off; who has the directory goes on with the chain."""
    options: tuple[str, ...] = ()
    if is_sealed:
        options = ("--key", f"file={lab.key_file('17' * 32)},mode=aes-256-cbc")
    served, dest = serve(lab, options=options), lab.new_path("backups")
    load = NvLoad(random)
    then: dict[int, Contents] = {}
    with powered(served.emulator) as (_, tpm):
        tpm.startup()
        load.define(tpm)
        for _ in range(KEEP + 1):
            for _ in range(WRITES):
                load.step(tpm)
            said = served.back_up(dest, "--keep", str(KEEP), *options).outcome
            assert said["changed"] and said["whole"] == (not then)
            then[said["generation"]] = load.owed
        assert not served.back_up(dest, *options).outcome["changed"]
    said = served.back_up(dest, "--keep", str(KEEP), *options).outcome
    then[said["generation"]] = load.owed  # it was shut down
    assert served.emulator.stop() == 0
    back_up(served.emulator.state, dest, "--keep", str(KEEP), *options)
    assert vtpmd("verify", dest, *options).status == 0
    kept = [each.header.generation for each in chain.read(dest).check().points()]
    assert len(kept) == KEEP and set(kept) & set(then)
    for generation in set(kept) & set(then):
        into = lab.new_path("into")
        import_into(dest, into, "--at", str(generation), *options)
        copy = lab.emulator(VTPMD, into, options=options)
        with powered(copy) as (_, tpm):
            tpm.startup()
            assert contents(tpm) == then[generation]
        copy.kill()


@pytest.mark.parametrize("is_sealed", [False, True], ids=["in the clear", "sealed"])
def test_a_served_vtpm_comes_back_as_it_was_at_each_backup(
    lab: Lab, random: Random, is_sealed: bool
) -> None:
    """Also after it was stopped, or killed and folded, and served again; its secret unseals."""
    options: tuple[str, ...] = ()
    if is_sealed:
        options = ("--key", f"file={lab.key_file('17' * 32)},mode=aes-256-cbc")
    dest, state = lab.new_path("backups"), lab.new_path("state")
    load = NvLoad(random)
    then: dict[int, Contents] = {}
    sealed: sealed_object.Sealed | None = None
    for run in range(BACKUPS // 2):
        emulator = lab.emulator(VTPMD, state, options=options)
        with powered(emulator) as (_, tpm):
            tpm.startup()
            if sealed is None:
                load.define(tpm)
                sealed = sealed_object.seal(tpm, SECRET)
            for _ in range(2):
                for _ in range(WRITES):
                    load.step(tpm)
                said = back_up(state, dest, *options).outcome
                assert said["served"] and said["changed"]
                then[said["generation"]] = load.owed
        if run == 0:
            assert emulator.stop() == 0
        else:
            emulator.kill()
            assert vtpmd("fold", state, *options).status == 0
    back_up(state, dest, *options)
    assert len(then) == BACKUPS
    ended = vtpmd("verify", dest, *options)
    assert ended.status == 0, ended.output
    for generation, owed in then.items():
        into = lab.new_path("into")
        import_into(dest, into, "--at", str(generation), *options)
        copy = lab.emulator(VTPMD, into, options=options)
        with powered(copy) as (_, tpm):
            tpm.startup()
            assert contents(tpm) == owed
            assert sealed is not None and sealed_object.unseal(tpm, sealed) == SECRET
        copy.kill()


@pytest.mark.parametrize("is_asked", [False, True], ids=["of its directory", "by its socket"])
def test_backups_under_load_are_generations_that_were_acknowledged(
    lab: Lab, random: Random, is_asked: bool
) -> None:
    """One after the other, across foldings, the newest of them kept."""
    served = serve(lab)
    emulator = served.emulator
    guest, dest = lab.raw_guest(emulator), lab.new_path("backups")
    load = NvLoad(random)
    guest.control.init()
    guest.tpm.startup()
    load.define(guest.tpm)
    load.weights = (0, 95, 1, 1, 3)  # a journal is full after some hundred of them
    writing, journals = Writing(load, guest.tpm), set()
    with repeating(writing.write):
        for _ in range(BACKUPS * 2):
            if is_asked:
                served.back_up(dest, "--keep", str(BACKUPS))
            else:
                back_up(emulator.state, dest, "--keep", str(BACKUPS))
            journals.add((emulator.state / "tpm2-00.journal").stat().st_ino)
    assert len(journals) > 1, "no folding came between"
    ends = []
    for file in chain.read(dest).check().points():
        into = lab.new_path("into")
        import_into(dest / file.name, into)
        copy = lab.emulator(VTPMD, into)
        with powered(copy) as (_, tpm):
            tpm.startup()
            ends.append(writing.acknowledged.index(contents(tpm)))
        copy.kill()
    assert len(ends) == BACKUPS and ends == sorted(set(ends))


def test_a_vtpm_of_swtpms_is_backed_up(lab: Lab, random: Random) -> None:
    """It has no generations: what was restored is named by its file."""
    emulator, dest = lab.emulator(SWTPM), lab.new_path("backups")
    load = NvLoad(random)
    then: dict[str, Contents] = {}
    with powered(emulator) as (_, tpm):
        tpm.startup()
        load.define(tpm)
        for _ in range(2):
            load.step(tpm)
            then[back_up(emulator.state, dest).outcome["file"]] = load.owed
        assert not back_up(emulator.state, dest).outcome["changed"]
    assert_restored(lab, dest, then)


def assert_restored(lab: Lab, dest: Path, then: dict[str, Contents]) -> None:
    """Restore each file of a chain, and look at what is in NV memory."""
    assert [name.rpartition(".")[2] for name in sorted(then)] == ["full", "delta"]
    for name, owed in then.items():
        into = lab.new_path("into")
        import_into(dest / name, into)
        copy = lab.emulator(VTPMD, into)
        with powered(copy) as (_, tpm):
            tpm.startup()
            assert contents(tpm) == owed
        copy.kill()


def test_a_linear_file_is_backed_up_while_it_is_served(lab: Lab, random: Random) -> None:
    linear, dest = lab.new_path("linear"), lab.new_path("backups")
    load = NvLoad(random)
    then: dict[str, Contents] = {}
    control = lab.new_path("control")
    command = [str(OURS), "socket", "--tpm2", "--tpmstate", f"backend-uri=file://{linear}"]
    with subprocess.Popen([*command, "--ctrl", f"type=unixio,path={control}"]) as process:
        while not control.exists():
            time.sleep(0.01)
        guest = RawGuest(control)
        guest.control.init()
        guest.tpm.startup()
        load.define(guest.tpm)
        for _ in range(2):
            load.step(guest.tpm)
            then[back_up(linear, dest).outcome["file"]] = load.owed
        guest.control.shutdown()
        guest.close()
        assert process.wait(timeout=COMMAND_TIMEOUT_S) == 0
    assert_restored(lab, dest, then)


def test_a_tpm_12_is_backed_up(lab: Lab) -> None:
    """Of its directory, and by its socket."""
    served, dest = serve(lab, version=TpmVersion.TPM_1_2), lab.new_path("backups")
    emulator = served.emulator
    guest = RawGuest12(emulator.control_path)
    guest.boot()
    then = []
    for is_asked in (False, True):
        guest.work()
        ended = served.back_up(dest) if is_asked else back_up(emulator.state, dest)
        assert ended.outcome["changed"] and ended.outcome["tpm"] == "1.2"
        then.append(guest.facts().nv)
    guest.close()
    emulator.kill()
    for file, nv in zip(chain.read(dest).check().points(), then, strict=True):
        into = lab.new_path("into")
        import_into(dest / file.name, into)
        copy = lab.emulator(VTPMD, into, version=TpmVersion.TPM_1_2)
        guest = RawGuest12(copy.control_path)
        guest.control.init()
        guest.tpm12.startup()
        assert guest.facts().nv == nv
        guest.close()
        copy.kill()


def work(tpm: Tpm, load: NvLoad) -> None:
    """Have a vTPM go on."""
    for _ in range(3):
        load.step(tpm)


@pytest.mark.parametrize(("keep", "is_asked"), [(KEEP, False), (None, False), (KEEP, True)])
def test_a_loss_of_power_at_any_step_leaves_as_many_backups_as_are_kept(
    lab: Lab, random: Random, keep: int | None, is_asked: bool
) -> None:
    """On a real disk, which forgets what was not synced; the next backup then goes on."""
    served, load = serve(lab), NvLoad(random)
    emulator, disk = served.emulator, lab.new_power_disk()
    dest = disk.path / "backups"
    words = ["backup", *(["--manage", str(served.manage)] if is_asked else [str(emulator.state)])]
    words.append(str(dest))
    words += [] if keep is None else ["--keep", str(keep)]
    made: dict[int, bytes] = {}
    have_happened = []
    with powered(emulator) as (_, tpm):
        tpm.startup()
        load.define(tpm)
        for _ in range(KEEP):
            work(tpm, load)
            assert cli.main(words) == 0
        at = 0
        while True:
            before = restored(dest)
            made |= before
            work(tpm, load)
            with suppress(Killed), dying(at) as steps:
                assert cli.main(words) == 0
            disk.lose_power()
            disk.repair()
            found = restored(dest)
            is_new = not found.keys() <= before.keys()
            removed = is_new if keep else 0
            assert found.keys() >= set(sorted(before)[removed:]), at
            assert all(made.get(number, state) == state for number, state in found.items())
            have_happened.append(is_new)
            if steps.done < at:
                break
            assert cli.main(words) == 0
            assert len(restored(dest)) == len(list(dest.glob("0*"))) == (keep or len(before) + 1)
            at += 1
    assert have_happened == sorted(have_happened) and set(have_happened) == {True, False}


def test_what_cannot_be_backed_up_by_a_socket_is_one_line(lab: Lab) -> None:
    """A vTPM that is not there yet, a key that is not given, and a vtpmd that has gone."""
    key = f"file={lab.key_file('17' * 32)},mode=aes-256-cbc"
    served, dest = serve(lab, options=("--key", key)), lab.new_path("backups")

    def refused(*options: str) -> Ended:
        ended = vtpmd("backup", "--manage", served.manage, dest, *options)
        assert not dest.exists()
        return ended

    ended = refused("--key", key)
    assert ended.status == 9 and "there is no vTPM in it yet" in ended.error
    lab.raw_guest(served.emulator).boot()
    ended = refused()
    assert ended.status == 4 and "cannot export the vTPM: it is encrypted" in ended.error
    served.emulator.kill()
    ended = refused("--key", key)
    assert ended.status == 1 and "cannot manage vtpmd on" in ended.error


@pytest.mark.parametrize("keep", [KEEP, None])
def test_a_backup_after_one_that_died_is_durable_if_it_says_that_it_is_there(
    lab: Lab, random: Random, keep: int | None
) -> None:
    """Also if nothing has changed since: what the first one has written it may not have synced."""
    emulator, load = lab.emulator(VTPMD), NvLoad(random)
    disk = lab.new_power_disk()
    dest = disk.path / "backups"
    words = ["backup", str(emulator.state), str(dest)]
    words += [] if keep is None else ["--keep", str(keep)]
    with powered(emulator) as (_, tpm):
        tpm.startup()
        load.define(tpm)
        at, is_dead = 0, True
        while is_dead:
            work(tpm, load)
            with suppress(Killed), dying(at) as steps:
                assert cli.main(words) == 0
            is_dead = steps.done == at
            assert cli.main(words) == 0
            said = restored(dest)
            disk.lose_power()
            disk.repair()
            assert restored(dest) == said, at
            at += 1


def restored(dest: Path) -> dict[int, bytes]:
    """Return all that a chain has, by generation; nothing is wrong with it."""
    found = {}
    for each in chain.read(dest).check().points():
        header, states = chain.restore(dest, None, name=each.name)
        found[header.generation] = states[StateType.PERMANENT]
    return found
