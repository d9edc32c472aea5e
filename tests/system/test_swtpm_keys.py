"""Keys by swtpm's options: swtpm and ours take each other's directories and blobs."""

from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Protocol

import pytest

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
from vtpmd.wire.tpm import TpmVersion

NV_INDEX = Handle.NV_FIRST + 7
SECRET = b"kept across hosts"
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


def make_state(control: ControlClient, version: TpmVersion = TpmVersion.TPM_2_0) -> None:
    with closing(control.attach_data()) as data:
        control.init()
        tpm, index = tpm_of(version, data)
        tpm.startup()
        tpm.nv_define(index, len(SECRET))
        tpm.nv_write(index, SECRET)


def read_state(version: TpmVersion, data: DataSocket, *, starts: bool) -> bytes:
    tpm, index = tpm_of(version, data)
    if starts:
        tpm.startup()
    return tpm.nv_read(index, len(SECRET))


def tpm_of(version: TpmVersion, data: DataSocket) -> tuple[Tpm | Tpm12, int]:
    """Return what speaks with a TPM of that version, and an NV index there."""
    if version is TpmVersion.TPM_1_2:
        return Tpm12(data.transact), tpm12.NV_INDEX
    return Tpm(data.transact), NV_INDEX


@pytest.mark.parametrize(("version", "name"), CASES, ids=IDS)
@pytest.mark.parametrize("reader", PROGRAMS)
@pytest.mark.parametrize("writer", PROGRAMS)
def test_directory_goes_from_one_to_the_other(
    make_place: MakePlace, writer: str, reader: str, version: TpmVersion, name: str
) -> None:
    options = OPTIONS[name]
    first, second = make_place(writer, version), make_place(reader, version)
    process = first.start(*options)
    with ControlClient(first.control) as control:
        make_state(control, version)
        control.shutdown()
    assert process.wait(TIMEOUT_S) == 0
    second.state.rmdir()
    first.state.rename(second.state)
    second.start(*options)
    with ControlClient(second.control) as control, closing(control.attach_data()) as data:
        control.init()
        assert read_state(version, data, starts=True) == SECRET


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
        make_state(giving, version)
        assert giving.get_config() == expected_config(options)
        for kind in Blob:
            blob = giving.get_state_blob(kind, flags)
            assert (SECRET in blob) == (kind is Blob.PERMANENT and is_in_the_clear(options, flags))
            if blob:  # as QEMU does
                taking.set_state_blob(kind, blob)
        taking.init(INIT_DELETE_VOLATILE)
        assert read_state(version, data, starts=False) == SECRET


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
        make_state(giving)
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
