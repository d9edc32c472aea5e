"""State at rest under a key: swtpm's own format, and nothing in the clear, in any file or line.

Invariants of the design that are checked: 9 (a cleanly stopped directory is swtpm's, also under a
key), 7 (no secret is ever logged or put in an error) and 2 (never a fresh TPM in place of one that
does not open). The real swtpm writes and reads the directories.
"""

import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.command import vtpmd
from tests.harness.handover import assert_serves, assert_tail
from tests.harness.lab import Lab
from tests.harness.raw_guest import RawGuest
from tests.support import tpm2
from tests.support.emulator_client import Blob, Control, ControlClient
from tests.support.file_names import JOURNAL_NAME
from tests.support.journal import write_journal
from tests.support.tpm2 import StartupType, Tpm
from tests.system.test_state_directory import change, contents, fill, powered
from vtpmd.core import Image
from vtpmd.core.delta import delta_encode
from vtpmd.store.directory import StateDirectory
from vtpmd.store.incoming import NO_STATE
from vtpmd.store.keys import INFO_JOURNAL, Key
from vtpmd.store.moving import MovingFiles
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Emulator, EmulatorKind, Peering
from vtpmd.testing.waiting import wait_until
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
MODES = pytest.mark.parametrize("mode", ["aes-128-cbc", "aes-256-cbc"])
KEYS = {"aes-128-cbc": b"\x17" * 16, "aes-256-cbc": b"\x2a" * 32}
INDEX = 0x01500020
SECRET = b"what only the guest may know, 40 bytes.."


class Sealed(NamedTuple):
    """A key, and the option that gives it to either program."""

    key: bytes
    options: tuple[str, str]


def sealed_with(lab: Lab, key: bytes) -> Sealed:
    """Write a key into a file of its own."""
    path = lab.key_file(f"{key.hex()}\n")
    return Sealed(key, ("--key", f"file={path},mode=aes-{8 * len(key)}-cbc"))


def refusal(state: Path, *options: str) -> tuple[int, str]:
    """Start a vtpmd that must not start; return its exit status and the one line that it says."""
    ended = vtpmd("run", state, "--socket", state.with_suffix(".sock"), *options)
    assert ended.output == ""
    assert len(ended.error.splitlines()) == 1, ended.error
    return ended.status, ended.error


def snapshot(state: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return all that a directory holds, and when each file was last written."""
    return {
        path.name: (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in state.iterdir()
        if path.is_file()
    }


def assert_nothing_is_told(state: Path, log: str, *secrets: bytes) -> None:
    """Look for secrets in every file of a directory, and in what a program has said."""
    assert any(path.name == "tpm2-00.permall" for path in state.iterdir())
    for path in (path for path in state.rglob("*") if path.is_file()):
        for secret in secrets:
            assert secret not in path.read_bytes(), path.name
    for secret in secrets:
        for form in (secret.hex(), secret.hex().upper(), repr(secret)[2:-1]):
            assert form not in log


@MODES
def test_invariant_9_a_sealed_directory_goes_there_and_back(lab: Lab, mode: str) -> None:
    """swtpm, vtpmd, swtpm, vtpmd: each finds what the other left, under one key."""
    state, sealed = lab.directory / "state", sealed_with(lab, KEYS[mode])
    expected = None
    for step, kind in enumerate([SWTPM, VTPMD, SWTPM, VTPMD]):
        emulator = lab.emulator(kind, state, options=sealed.options)
        with powered(emulator) as (control, tpm):
            if step == 0:
                fill(tpm)
            else:
                tpm.startup(StartupType.STATE)
                assert contents(tpm) == expected, f"{kind} in step {step}"
            change(tpm)
            expected = contents(tpm)
            tpm.shutdown(StartupType.STATE)
            control.shutdown()
        assert emulator.program.wait() == 0
        file = (state / "tpm2-00.permall").read_bytes()
        assert swtpm_format.decode_file(file, key=sealed.key)


@pytest.mark.parametrize("kinds", [(SWTPM, VTPMD), (VTPMD, SWTPM)], ids="-to-".join)
def test_a_sealed_volatile_state_resumes_in_the_other_program(
    lab: Lab, kinds: tuple[EmulatorKind, EmulatorKind]
) -> None:
    state, sealed = lab.directory / "state", sealed_with(lab, KEYS["aes-256-cbc"])
    first = lab.emulator(kinds[0], state, options=sealed.options)
    with powered(first) as (control, tpm):
        fill(tpm)
        before = contents(tpm)
        control.store_volatile()
        first.kill()
    with powered(lab.emulator(kinds[1], state, options=sealed.options)) as (_, tpm):
        assert contents(tpm) == before


def make_sealed(lab: Lab, kind: EmulatorKind, sealed: Sealed) -> Path:
    """Have a program make a directory with a secret in it, and stop."""
    emulator = lab.emulator(kind, options=sealed.options)
    with powered(emulator) as (control, tpm):
        tpm.startup()
        tpm.nv_define(INDEX, len(SECRET))
        tpm.nv_write(INDEX, SECRET)
        control.store_volatile()
        control.shutdown()
    assert emulator.program.wait() == 0
    assert_nothing_is_told(emulator.state, emulator.program.output, SECRET, sealed.key)
    return emulator.state


@pytest.mark.parametrize("kind", EmulatorKind)
def test_what_does_not_go_with_the_key_is_refused_and_left(lab: Lab, kind: EmulatorKind) -> None:
    """No key, a wrong one, one of another length, an altered byte: one line, exit status 4."""
    sealed = sealed_with(lab, KEYS["aes-128-cbc"])
    state = make_sealed(lab, kind, sealed)
    other, longer = sealed_with(lab, b"\x18" * 16), sealed_with(lab, KEYS["aes-256-cbc"])
    before = snapshot(state)
    for options, reason in [
        ((), "is encrypted with swtpm's file key: give it with --key"),
        (other.options, "does not open with this key"),
        (longer.options, "a key of 128 bits; the one given has 256"),
    ]:
        status, line = refusal(state, *options)
        assert status == 4
        assert reason in line
        assert line.startswith(f"vtpmd: cannot read state file {state}/tpm2-00.permall: ")
    assert snapshot(state) == before

    file = state / "tpm2-00.permall"
    content = before["tpm2-00.permall"][0]
    # The last is of the IV: a lineage, which swtpm does not write, is not sealed.
    for offset in (
        16,
        500,
        len(content) - 1 - (swtpm_format.LINEAGE_BYTES if kind == VTPMD else 0),
    ):
        altered = bytearray(content)
        altered[offset] ^= 1
        file.write_bytes(altered)
        status, line = refusal(state, *sealed.options)
        assert status == 4
        assert "it was altered" in line
        assert file.read_bytes() == altered


def test_a_directory_in_the_clear_is_refused_with_a_key(lab: Lab) -> None:
    plain = lab.emulator(VTPMD)
    with powered(plain):
        pass
    assert plain.stop() == 0
    before = snapshot(plain.state)
    status, line = refusal(plain.state, *sealed_with(lab, KEYS["aes-128-cbc"]).options)
    assert status == 4
    assert "is not encrypted, but a key was given" in line
    assert "vtpmd rekey" in line
    assert snapshot(plain.state) == before


def test_control_channel_says_that_there_is_a_key_and_seals_blobs(lab: Lab) -> None:
    """As swtpm: a blob that is not asked for in the clear goes to who has the key."""
    sealed = sealed_with(lab, KEYS["aes-256-cbc"])
    answers = []
    for kind in (SWTPM, VTPMD):
        emulator = lab.emulator(kind, options=sealed.options)
        with powered(emulator) as (control, tpm):
            tpm.startup()
            answers.append(control.get_config())
            assert (
                control.request(Control.GET_STATEBLOB, bytes.fromhex("000000000000000100000000"))
                == 0
            )
            header = control.receive(12)
            assert header[:4] == bytes.fromhex("00000002")
            blob = control.receive(int.from_bytes(header[8:], "big"))
            plain = swtpm_format.decode_blob(control.get_state_blob(Blob.PERMANENT))
            assert swtpm_format.decode_blob(blob, key=sealed.key) == plain
    assert answers == [1, 1]


@pytest.mark.parametrize("kinds", [(SWTPM, VTPMD), (VTPMD, SWTPM)], ids="-to-".join)
def test_sealed_blobs_are_taken_by_the_other_program(
    lab: Lab, kinds: tuple[EmulatorKind, EmulatorKind]
) -> None:
    sealed = sealed_with(lab, KEYS["aes-128-cbc"])
    with powered(lab.emulator(kinds[0], options=sealed.options)) as (control, tpm):
        fill(tpm)
        before = contents(tpm)
        kinds_of_blob = (Blob.PERMANENT, Blob.VOLATILE)
        blobs = {kind: control.get_state_blob(kind, flags=0) for kind in kinds_of_blob}
    with ControlClient(lab.emulator(kinds[1], options=sealed.options).control_path) as control:
        data = control.attach_data()
        for kind, blob in blobs.items():
            control.set_state_blob(kind, blob, flags=0)
        control.init()
        assert contents(Tpm(data.transact)) == before


def read_anywhere(state: Path) -> list[bytes]:
    """Return the content of every file that is there now."""
    return [path.read_bytes() for path in state.iterdir() if path.is_file()]


def work_with_secret(guest: RawGuest) -> None:
    """Put the secret into the TPM, several times over, so that each commit has it."""
    guest.tpm.nv_define(INDEX, len(SECRET))
    for _ in range(5):
        guest.tpm.nv_write(INDEX, bytes(len(SECRET)))
        guest.tpm.nv_write(INDEX, SECRET)


@MODES
def test_no_file_of_a_sealed_directory_tells_a_secret(lab: Lab, mode: str) -> None:
    """At any moment: while it serves, killed, resumed, moved to another host, and stopped."""
    sealed = sealed_with(lab, KEYS[mode])
    peering = Peering(credentials=credentials())
    source = lab.peer(peering, options=sealed.options)
    destination = lab.peer(peering, options=sealed.options)
    guest = lab.raw_guest(source)
    guest.boot()
    work_with_secret(guest)
    manage = lab.management(source)
    assert manage.arm(destination.address)["event"] == "VTPM_ARMED"
    work_with_secret_again(guest)
    for emulator in (source, destination):
        assert all(SECRET not in content for content in read_anywhere(emulator.state))
    assert (destination.state / "tpm2-00.incoming").exists()

    blobs = guest.save()
    assert_tail(blobs)
    arrived = lab.raw_guest(destination)
    arrived.load(blobs)
    manage.wait_for("VTPM_HANDED_OVER")
    assert arrived.tpm.nv_read(INDEX, len(SECRET)) == SECRET
    assert_serves(arrived)
    wait_until(lambda: not (destination.state / "tpm2-00.incoming").exists())
    assert_nothing_is_told(destination.state, destination.program.output, SECRET, sealed.key)
    destination.kill()
    assert_nothing_is_told(destination.state, destination.program.output, SECRET, sealed.key)

    again = lab.peer(peering, destination.state, sealed.options)
    resumed = lab.raw_guest(again)
    resumed.control.init()
    resumed.tpm.startup()
    assert resumed.tpm.nv_read(INDEX, len(SECRET)) == SECRET
    assert again.stop() == 0
    assert_nothing_is_told(again.state, again.program.output, SECRET, sealed.key)


def work_with_secret_again(guest: RawGuest) -> None:
    """Change what the secret's index holds, and leave the secret in it."""
    guest.tpm.nv_write(INDEX, bytes(len(SECRET)))
    guest.tpm.nv_write(INDEX, SECRET)


def test_canary_an_unsealed_directory_tells_the_secret(lab: Lab) -> None:
    """The search finds what there is to find."""
    emulator = lab.emulator(VTPMD)
    guest = lab.raw_guest(emulator)
    guest.boot()
    work_with_secret(guest)
    assert emulator.stop() == 0
    with pytest.raises(AssertionError):
        assert_nothing_is_told(emulator.state, emulator.program.output, SECRET)


def test_granted_state_is_taken_up_under_its_key_only(lab: Lab) -> None:
    """What a destination leaves that dies between the Grant and its first write of the state."""
    sealed, other = (sealed_with(lab, KEYS[mode]) for mode in KEYS)
    maker = lab.emulator(VTPMD)
    guest = lab.raw_guest(maker)
    guest.boot()
    work_with_secret(guest)
    state = lab.new_path("state")
    with StateDirectory.open(state) as directory:
        files = MovingFiles(directory, Key(bytearray(sealed.key)))
        files.owner.expect(b"s" * 16, "host1.example.org")
        files.incoming.make(b"s" * 16, b"l" * 16)
        image = Image(1, 1, swtpm_format.decode_blob(guest.save().permanent))
        files.incoming.append(delta_encode(NO_STATE, image), lambda: image)
        files.incoming.grant(0)
        files.close()
    assert all(SECRET not in content for content in read_anywhere(state))
    before = snapshot(state)
    for options, reason in [
        ((), "tpm2-00.incoming is sealed: give its key"),
        (other.options, "tpm2-00.incoming does not open with this key"),
    ]:
        status, line = refusal(state, *options)
        assert (status, reason in line) == (4, True), line
        assert snapshot(state) == before
    ended = vtpmd("recover", state, "--restore", *sealed.options)
    assert ended.status == 1
    assert "take it up with `vtpmd fold" in ended.error
    assert snapshot(state) == before

    emulator = lab.emulator(VTPMD, state, options=sealed.options)
    with powered(emulator) as (_, tpm):
        tpm.startup()
        assert tpm.nv_read(INDEX, len(SECRET)) == SECRET
    assert_nothing_is_told(state, emulator.program.output, SECRET, sealed.key)


def test_remove_takes_the_key_file_away_before_the_guest_is_served(lab: Lab) -> None:
    path = lab.key_file("00" * 16)
    emulator: Emulator = lab.emulator(VTPMD, options=("--key", f"file={path},remove"))
    assert not path.exists()
    with powered(emulator) as (_, tpm):
        tpm.startup()
    assert emulator.stop() == 0
    file = (emulator.state / "tpm2-00.permall").read_bytes()
    assert swtpm_format.decode_file(file, key=bytes(16))


def test_a_wrong_key_option_is_refused_before_the_directory_is_made(lab: Lab) -> None:
    state = lab.new_path("state")
    assert refusal(state, "--key", "file=a,pwdfile=b")[0] == 2
    assert not state.exists()


def key_option(sealed: Sealed | None, name: str = "--key") -> list[str]:
    """Return the option that gives a key, if there is one."""
    return [] if sealed is None else [name, sealed.options[1]]


def assert_swtpm_opens(lab: Lab, state: Path, sealed: Sealed | None) -> None:
    """Have swtpm go on from a directory: the secret is there."""
    emulator = lab.emulator(SWTPM, state, options=key_option(sealed))
    with powered(emulator) as (control, tpm):
        assert tpm.nv_read(INDEX, len(SECRET)) == SECRET
        control.store_volatile()
        control.shutdown()
    assert emulator.program.wait() == 0


def test_rekey_adds_changes_and_removes_the_key(lab: Lab) -> None:
    """Each time swtpm opens all of it, the volatile state too, with the new key and only that."""
    keys = [None, *(sealed_with(lab, key) for key in (*KEYS.values(), b"\x55" * 16)), None]
    state = make_plain(lab)
    for old, new in pairwise(keys):
        wanted = ["--no-key"] if new is None else key_option(new, "--new-key")
        ended = vtpmd("rekey", state, *key_option(old), *wanted, "--json")
        assert ended.status == 0, ended.error
        assert ended.outcome == {
            "directory": str(state),
            "changed": ["tpm2-00.permall", "tpm2-00.volatilestate"],
        }
        if new is not None:
            assert_nothing_is_told(state, ended.output, SECRET, new.key)
        assert refusal(state, *key_option(old))[0] == 4
        again = vtpmd("rekey", state, *key_option(old), *wanted)
        assert again.output == f"{state}: there is nothing to change\n"
        assert_swtpm_opens(lab, state, new)


def make_plain(lab: Lab) -> Path:
    """Have vtpmd make a directory without a key, with a secret and a volatile state in it."""
    emulator = lab.emulator(VTPMD)
    with powered(emulator) as (control, tpm):
        tpm.startup()
        tpm.nv_define(INDEX, len(SECRET))
        tpm.nv_write(INDEX, SECRET)
        control.store_volatile()
        control.shutdown()
    assert emulator.program.wait() == 0
    return emulator.state


def test_an_interrupted_rekey_is_finished_by_another(lab: Lab) -> None:
    """After each number of files; until then either key is refused, and nothing is lost."""
    old, new = (sealed_with(lab, key) for key in KEYS.values())
    state = make_sealed(lab, VTPMD, old)
    before = {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()}
    wanted = [*key_option(old), *key_option(new, "--new-key")]
    assert vtpmd("rekey", state, *wanted).status == 0
    after = {name: (state / name).read_bytes() for name in before}
    (state / "tpm2-00.volatilestate").write_bytes(before["tpm2-00.volatilestate"])
    for sealed in (old, new):
        assert refusal(state, *key_option(sealed))[0] == 4
    ended = vtpmd("rekey", state, *wanted, "--json")
    assert ended.outcome["changed"] == ["tpm2-00.volatilestate"]
    assert (state / "tpm2-00.permall").read_bytes() == after["tpm2-00.permall"]
    assert_swtpm_opens(lab, state, new)


def test_a_refused_rekey_changes_nothing(lab: Lab) -> None:
    sealed, other = (sealed_with(lab, key) for key in KEYS.values())
    state = make_sealed(lab, VTPMD, sealed)
    before = snapshot(state)
    for options, status in [
        ((), 2),
        (("--no-key",), 4),
        (("--no-key", *key_option(other)), 4),
        ((*key_option(other), *key_option(other, "--new-key")), 4),
        (("--no-key", *key_option(sealed, "--new-key")), 2),
        ((*key_option(sealed), "--new-key", "file=/nonexistent"), 1),
    ]:
        assert vtpmd("rekey", state, *options).status == status
        assert snapshot(state) == before


@pytest.mark.parametrize("command", [("fold",), ("recover",), ("rekey", "--no-key")])
def test_commands_want_a_directory_that_is_there_and_not_in_use(
    lab: Lab, command: tuple[str, ...]
) -> None:
    missing = lab.directory / "missing"
    ended = vtpmd(*command, missing)
    assert ended.status == 1
    assert str(missing) in ended.error
    assert not missing.exists()
    ended = vtpmd(*command, lab.emulator(VTPMD).state)
    assert ended.status == 3
    assert "is in use" in ended.error


def test_a_clean_directory_has_nothing_to_fold_or_recover(lab: Lab) -> None:
    state = make_plain(lab)
    before = snapshot(state)
    ended = vtpmd("fold", state)
    assert (ended.status, ended.output) == (0, f"{state}: there is no journal to fold\n")
    assert not vtpmd("fold", state, "--json").outcome["folded"]
    ended = vtpmd("recover", state)
    assert ended.status == 0
    assert ended.output == f"{state}: nothing is wrong; vtpmd run starts from the checkpoint\n"
    outcome = vtpmd("recover", state, "--restore", "--json").outcome
    assert (outcome["verdict"], outcome["restored"], outcome["problems"]) == ("B", False, [])
    assert snapshot(state) == before


class Crashed(NamedTuple):
    """A directory whose last commits are in a journal, and what the guest's counter said."""

    state: Path
    counters: list[int]  # after each commit; the checkpoint has the first


def make_crashed(lab: Lab, sealed: Sealed | None) -> Crashed:
    """Have vtpmd make the states of a counter, and leave them as a crash does."""
    emulator = lab.emulator(VTPMD, options=key_option(sealed))
    images, counters = [], []
    with powered(emulator) as (control, tpm):
        tpm.startup()
        tpm.nv_define(INDEX, 8, tpm2.NV_COUNTER)
        for _ in range(5):
            tpm.nv_increment(INDEX)
            images.append(swtpm_format.decode_blob(control.get_state_blob(Blob.PERMANENT)))
            counters.append(tpm.nv_counter(INDEX))  # the guest runs on
    assert emulator.stop() == 0
    with StateDirectory.open(emulator.state) as directory:
        key = None if sealed is None else Key(bytearray(sealed.key))
        directory.write_state(StateType.PERMANENT, images[0], key)
        lineage = directory.read_lineage()
        assert lineage is not None
        secret = None if key is None else key.derive(INFO_JOURNAL)
        journal = write_journal(
            images,
            secret=secret,
            identity=lineage.identity,
            first_generation=lineage.generation,
        )
        directory.replace(JOURNAL_NAME, bytes(journal))
    return Crashed(emulator.state, counters)


def counter_in(lab: Lab, kind: EmulatorKind, state: Path, sealed: Sealed | None) -> int:
    """Return what the counter says when a program has gone on from a directory."""
    emulator = lab.emulator(kind, state, options=key_option(sealed))
    with powered(emulator) as (control, tpm):
        tpm.startup()
        counter = tpm.nv_counter(INDEX)
        control.shutdown()
    assert emulator.program.wait() == 0
    return counter


SEALED_OR_NOT = pytest.mark.parametrize("key", [None, *KEYS.values()], ids=["plain", *KEYS])


@SEALED_OR_NOT
def test_a_crashed_directory_is_gone_on_from(lab: Lab, key: bytes | None) -> None:
    """By vtpmd as it is, and by swtpm after it was folded."""
    sealed = None if key is None else sealed_with(lab, key)
    crashed = make_crashed(lab, sealed)
    copy = lab.new_path("copy")
    shutil.copytree(crashed.state, copy)
    assert counter_in(lab, VTPMD, crashed.state, sealed) == crashed.counters[-1]
    assert counter_in(lab, SWTPM, crashed.state, sealed) == crashed.counters[-1]

    ended = vtpmd("fold", copy, *key_option(sealed))
    assert ended.status == 0
    assert "folded 4 commits" in ended.output
    assert counter_in(lab, SWTPM, copy, sealed) == crashed.counters[-1]


@SEALED_OR_NOT
def test_invariant_2_a_damaged_journal_stops_the_start(lab: Lab, key: bytes | None) -> None:
    """Exit status 5, one line, nothing changed; recover restores when told to, and keeps it all."""
    sealed = None if key is None else sealed_with(lab, key)
    state, counters = make_crashed(lab, sealed)
    journal = state / JOURNAL_NAME
    content = bytearray(journal.read_bytes())
    content[3 * 512 + 99] ^= 1  # in the third of four records
    journal.write_bytes(content)
    before = snapshot(state)
    for command in ("run", "fold"):
        ended = vtpmd(command, state, *key_option(sealed))
        assert ended.status == 5
        assert "a sector is altered, at byte 1536 (K)" in ended.error
    ended = vtpmd("recover", state, *key_option(sealed))
    assert ended.status == 5
    assert re.search(r"could be restored: generation \d+, with 2 commits", ended.output)
    assert snapshot(state) == before

    ended = vtpmd("recover", state, *key_option(sealed), "--restore", "--json")
    assert ended.status == 0
    for name, original in ended.outcome["originals"].items():
        assert (state / original).read_bytes() == before[name][0]
    assert counter_in(lab, VTPMD, state, sealed) == counters[2]


def test_rekey_folds_first(lab: Lab) -> None:
    old, new = (sealed_with(lab, key) for key in KEYS.values())
    state, counters = make_crashed(lab, old)
    assert refusal(state, *key_option(new))[0] == 4
    ended = vtpmd("rekey", state, *key_option(old), *key_option(new, "--new-key"))
    assert ended.status == 0
    assert not (state / JOURNAL_NAME).exists()
    assert counter_in(lab, SWTPM, state, new) == counters[-1]
