"""State at rest under a key: swtpm's own format, and nothing in the clear, in any file or line.

Invariants of the design that are checked: 9 (a cleanly stopped directory is swtpm's, also under a
key), 7 (no secret is ever logged or put in an error) and 2 (never a fresh TPM in place of one that
does not open). The real swtpm writes and reads the directories.
"""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.credentials import credentials
from tests.harness.emulator import Emulator, EmulatorKind, Peering
from tests.harness.handover import assert_serves, assert_tail, wait_until
from tests.harness.lab import Lab
from tests.harness.raw_guest import RawGuest
from tests.support.emulator_client import Blob, Control, ControlClient
from tests.support.tpm2 import StartupType, Tpm
from tests.system.test_state_directory import change, contents, fill, powered
from vtpmd.store.directory import StateDirectory
from vtpmd.store.handover import Handover
from vtpmd.store.keys import Key
from vtpmd.wire import swtpm_format

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
    path = lab.new_path("key")
    path.write_text(f"{key.hex()}\n")
    return Sealed(key, ("--key", f"file={path},mode=aes-{8 * len(key)}-cbc"))


def refusal(state: Path, *options: str) -> tuple[int, str]:
    """Start a vtpmd that must not start; return its exit status and the one line that it says."""
    vtpmd = Path(sys.executable).with_name("vtpmd")
    command: list[str | Path] = [
        vtpmd,
        "run",
        state,
        "--socket",
        state.with_suffix(".sock"),
        *options,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    return ended.returncode, ended.stderr


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
    for offset in (16, 500, len(file.read_bytes()) - 1):
        content = before["tpm2-00.permall"][0]
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
        files = Handover(directory, Key(bytearray(sealed.key)))
        files.prepare_to_take(b"s" * 16)
        files.stage(swtpm_format.decode_blob(guest.save().permanent))
        files.take()
    assert all(SECRET not in content for content in read_anywhere(state))
    before = snapshot(state)
    for options, reason in [
        ((), "tpm2-00.incoming is sealed: give its key"),
        (other.options, "tpm2-00.incoming does not open with this key"),
    ]:
        status, line = refusal(state, *options)
        assert (status, reason in line) == (4, True), line
        assert snapshot(state) == before

    vtpmd = lab.emulator(VTPMD, state, options=sealed.options)
    with powered(vtpmd) as (_, tpm):
        tpm.startup()
        assert tpm.nv_read(INDEX, len(SECRET)) == SECRET
    assert_nothing_is_told(state, vtpmd.program.output, SECRET, sealed.key)


def test_remove_takes_the_key_file_away_before_the_guest_is_served(lab: Lab) -> None:
    path = lab.new_path("key")
    path.write_text("00" * 16)
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
