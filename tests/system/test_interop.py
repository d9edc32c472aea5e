"""swtpm and ours take each other's guests, directories and blobs, with swtpm's options for keys.

One table of both programs, both TPMs and the keys. Invariants 6 (whole blobs are swtpm's) and 9 (a
directory that was stopped cleanly is swtpm's, and swtpm's is ours).
"""

from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Protocol

import pytest

from tests.harness.lab import Lab
from tests.harness.still_machine import StillMachine
from tests.harness.swtpm_program import PROGRAMS, TIMEOUT_S, Place
from tests.support import tpm12
from tests.support.emulator_client import (
    INIT_DELETE_VOLATILE,
    STATEBLOB_DECRYPTED,
    Blob,
    ControlClient,
    ControlError,
    DataSocket,
)
from tests.support.tpm2 import Handle, Tpm
from tests.support.tpm12 import Tpm12
from vtpmd.testing import migration
from vtpmd.wire.tpm import TpmVersion

NV_INDEX = Handle.NV_FIRST + 7
SECRET, SECRET_THERE = b"kept across hosts", b"written over here"
PCR = 10
DIGEST = {
    TpmVersion.TPM_1_2: bytes(range(tpm12.DIGEST_BYTES)),
    TpmVersion.TPM_2_0: bytes(range(sha256().digest_size)),
}
KEY_128 = "00112233445566778899aabbccddeeff"
OPTIONS = {
    "plain": [],
    "file key": ["--key", "file=key,mode=aes-128-cbc"],
    "file key, 256 bits": ["--key", "file=key-256,mode=aes-256-cbc,format=binary"],
    "migration key": ["--migration-key", "pwdfile=password,mode=aes-256-cbc"],
    "both keys": [
        *("--key", "pwdfile=password,kdf=sha512"),
        *("--migration-key", "file=key,mode=aes-cbc,format=hex"),
    ],
}
CASES = [
    *((TpmVersion.TPM_2_0, name) for name in OPTIONS),
    *((TpmVersion.TPM_1_2, name) for name in ("plain", "file key", "migration key")),
]
IDS = [f"{version.facts.word}, {name}" for version, name in CASES]


class MakePlace(Protocol):
    """Makes a place of a program."""

    def __call__(self, program: str, version: TpmVersion = TpmVersion.TPM_2_0) -> Place:
        """Make it."""


@pytest.fixture
def make_place(tmp_path: Path) -> Iterator[MakePlace]:
    numbers, made = count(), []

    def make(program: str, version: TpmVersion = TpmVersion.TPM_2_0) -> Place:
        directory = tmp_path / str(next(numbers))
        directory.mkdir()
        (directory / "key").write_text(KEY_128)
        (directory / "key-256").write_bytes(bytes(range(32)))
        (directory / "password").write_text("secret\n")
        for name in ("key", "key-256", "password"):
            (directory / name).chmod(0o600)
        made.append(Place(PROGRAMS[program], directory, version))
        return made[-1]

    yield make
    for each in made:
        each.end()


def make_state(tpm: Tpm | Tpm12, index: int) -> None:
    tpm.startup()
    tpm.nv_define(index, len(SECRET))
    tpm.nv_write(index, SECRET)


def make_state_by_hand(control: ControlClient, version: TpmVersion = TpmVersion.TPM_2_0) -> None:
    with closing(control.attach_data()) as data:
        control.init()
        make_state(*tpm_of(version, data))


def tpm_of(version: TpmVersion, data: DataSocket | StillMachine) -> tuple[Tpm | Tpm12, int]:
    """Return what speaks with a TPM of that version, and an NV index there."""
    if version is TpmVersion.TPM_1_2:
        return Tpm12(data.transact), tpm12.NV_INDEX
    return Tpm(data.transact), NV_INDEX


@pytest.mark.parametrize(("version", "name"), CASES, ids=IDS)
@pytest.mark.parametrize("destination", PROGRAMS)
@pytest.mark.parametrize("source", PROGRAMS)
def test_qemu_takes_a_tpm_to_the_other_and_its_directory_goes_back(
    make_place: MakePlace, lab: Lab, source: str, destination: str, version: TpmVersion, name: str
) -> None:
    options = OPTIONS[name]
    first, second, last = (make_place(each, version) for each in (source, destination, source))
    first.start(*options)
    process = second.start(*options)
    here = machine(lab, first)
    tpm, index = tpm_of(version, here)
    make_state(tpm, index)
    tpm.extend(PCR, DIGEST[version])
    before = tpm.pcr(PCR)

    there = machine(lab, second, *migration.INCOMING)
    migrate(lab, here, there)

    tpm, _ = tpm_of(version, there)
    assert (tpm.pcr(PCR), tpm.nv_read(index, len(SECRET))) == (before, SECRET)
    tpm.nv_write(index, SECRET_THERE)
    there.quit()
    assert process.wait(TIMEOUT_S) == 0
    at_rest = (second.state / second.names.permanent).read_bytes()
    assert (SECRET_THERE in at_rest) == ("--key" not in options)

    move(second, last)
    last.start(*options)
    tpm, _ = tpm_of(version, machine(lab, last))
    tpm.startup()
    assert tpm.nv_read(index, len(SECRET)) == SECRET_THERE


def machine(lab: Lab, place: Place, *arguments: str) -> StillMachine:
    """Start a QEMU with what is served there."""
    started = StillMachine(lab.new_path("machine"), place.control, arguments)
    lab.close_at_end(started)
    return started


def migrate(lab: Lab, here: StillMachine, there: StillMachine) -> None:
    """Migrate from one QEMU to another, whose TPM runs then; end the first."""
    migration.set_capabilities(here)
    migration.set_capabilities(there)
    here.qmp("migrate", uri=migration.listen_unix(there, lab.new_path("stream")))
    assert migration.wait_until_ended(here) == "completed"
    migration.wait_until(there, "prelaunch")  # as the source was
    here.quit()


def move(first: Place, second: Place) -> None:
    """Move a directory that nobody serves."""
    second.state.rmdir()
    first.state.rename(second.state)


@pytest.mark.parametrize(("version", "name"), CASES, ids=IDS)
@pytest.mark.parametrize("flags", [0, STATEBLOB_DECRYPTED], ids=["as-it-is", "decrypted"])
@pytest.mark.parametrize("destination", PROGRAMS)
@pytest.mark.parametrize("source", PROGRAMS)
def test_blobs_go_from_one_to_the_other(
    make_place: MakePlace,
    source: str,
    destination: str,
    flags: int,
    version: TpmVersion,
    name: str,
) -> None:
    options = OPTIONS[name]
    first, second = make_place(source, version), make_place(destination, version)
    first.start(*options)
    second.start(*options)
    with (
        ControlClient(first.control) as giving,
        ControlClient(second.control) as taking,
        closing(taking.attach_data()) as data,
    ):
        make_state_by_hand(giving, version)
        assert giving.get_config() == expected_config(options)
        for kind in Blob:
            blob = giving.get_state_blob(kind, flags)
            assert (SECRET in blob) == (kind is Blob.PERMANENT and is_in_the_clear(options, flags))
            if blob:  # as QEMU does
                taking.set_state_blob(kind, blob)
        taking.init(INIT_DELETE_VOLATILE)
        tpm, index = tpm_of(version, data)
        assert tpm.nv_read(index, len(SECRET)) == SECRET


def is_in_the_clear(options: list[str], flags: int) -> bool:
    return "--migration-key" not in options and ("--key" not in options or bool(flags))


def expected_config(options: list[str]) -> int:
    return ("--key" in options) | 2 * ("--migration-key" in options)


@pytest.mark.parametrize("program", PROGRAMS)
def test_blob_of_a_migration_key_is_refused_without_it_and_with_another(
    make_place: MakePlace, program: str
) -> None:
    first = make_place("swtpm")
    first.start(*OPTIONS["migration key"])
    with ControlClient(first.control) as giving:
        make_state_by_hand(giving)
        blob = giving.get_state_blob(Blob.PERMANENT, STATEBLOB_DECRYPTED)
    refusals = {
        "plain": "0xd",
        "file key": "0xd",
        "both keys": "0x28",  # its length is another one
    }
    for name, result in refusals.items():
        second = make_place(program)
        second.start(*OPTIONS[name])
        with (
            ControlClient(second.control) as taking,
            pytest.raises(ControlError, match=f"{result}$"),
        ):
            taking.set_state_blob(Blob.PERMANENT, blob)
