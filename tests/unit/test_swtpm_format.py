"""swtpm's file and blob format, held against swtpm itself: what it writes, takes and refuses.

Nothing here is a recorded state: each run lets swtpm make its own.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.emulator import EmulatorKind
from tests.harness.lab import Lab
from tests.harness.program import Program
from tests.support.emulator_client import Blob, Control, ControlClient
from vtpmd.wire import swtpm_format
from vtpmd.wire.control import BLOB_BYTES_MAX, Result
from vtpmd.wire.swtpm_format import (
    FILE_BYTES_MAX,
    STATE_BYTES_MAX,
    FormatError,
    KeyNeeded,
    Lineage,
)

SWTPM = EmulatorKind.SWTPM
STATE = b"state as libtpms marshalled it"


def header(
    body: bytes, flags: int = 0, version: int = 2, minimum: int = 1, size: int = 10
) -> bytes:
    """Write a header in front of a body, apart from the code under test."""
    return struct.pack(">BBHHI", version, minimum, size, flags, 10 + len(body)) + body


def tlv(tag: int, data: bytes) -> bytes:
    """Write a TLV, apart from the code under test."""
    return struct.pack(">HI", tag, len(data)) + data


FILE = header(tlv(1, STATE))
BLOB = header(tlv(4, tlv(1, STATE)), flags=4)


def test_layout() -> None:
    assert swtpm_format.encode_file(STATE) == FILE
    assert swtpm_format.encode_blob(STATE) == BLOB
    assert swtpm_format.decode_file(FILE) == swtpm_format.decode_blob(BLOB) == STATE


def test_a_state_of_the_largest_size_fits_file_and_blob() -> None:
    state = bytes(STATE_BYTES_MAX)
    assert len(swtpm_format.encode_blob(state)) == BLOB_BYTES_MAX
    file = swtpm_format.encode_file(state, Lineage(bytes(16), 1))
    assert len(file) == FILE_BYTES_MAX
    assert swtpm_format.decode_file(file) == state
    with pytest.raises(FormatError, match="no state has more"):
        swtpm_format.decode_file(file + b"\0")


@pytest.mark.parametrize(
    ("file", "state"),
    [
        (STATE, STATE),  # version 1: no header at all
        (header(STATE, version=1), STATE),
        (header(tlv(1, STATE), version=3), STATE),
        (header(tlv(9, b"later") + tlv(1, STATE)), STATE),
        (header(tlv(1, STATE) + tlv(1, b"second")), STATE),
        (header(tlv(1, STATE) + b"rest"), STATE),
        (header(tlv(1, STATE), flags=0x8000), STATE),
    ],
)
def test_what_swtpm_reads_is_read_alike(file: bytes, state: bytes) -> None:
    assert swtpm_format.decode_file(file) == state


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "it is empty"),
        (header(b""), r"no TLV 1 \(DATA\)"),
        (header(tlv(1, b"")), "it is empty"),
        (FILE[:-1], "its header says"),
        (FILE + b"\0", "its header says"),
        (header(tlv(1, STATE), minimum=3), "needs format version 3"),
        (header(tlv(1, STATE)[:-1]), "announces 30 bytes; 29 are left"),
        (header(b"\0\0\0\xff\xff"), r"no TLV 1 \(DATA\)"),
        (header(b"\0\x01\xff\xff\xff\xff"), "announces 4294967295 bytes; 0 are left"),
    ],
)
def test_a_damaged_file_is_refused(file: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        swtpm_format.decode_file(file)


LINEAGE = tlv(0x5654, b"i" * 16 + (7).to_bytes(8, "big"))
CONTINUED = header(tlv(1, STATE) + LINEAGE, minimum=255)


def test_lineage_is_behind_the_state() -> None:
    assert swtpm_format.encode_file(STATE, Lineage(b"i" * 16, 7)) == header(tlv(1, STATE) + LINEAGE)
    assert swtpm_format.encode_file(STATE, Lineage(b"i" * 16, 7, True)) == CONTINUED
    for file, continued in ((header(tlv(1, STATE) + LINEAGE), False), (CONTINUED, True)):
        assert swtpm_format.decode_file(file) == STATE
        assert swtpm_format.read_lineage(file) == Lineage(b"i" * 16, 7, continued)


@pytest.mark.parametrize(
    "file",
    [
        STATE,
        FILE,
        header(STATE, version=1),
        header(tlv(1, STATE) + tlv(0x5654, b"short")),
        header(tlv(1, STATE) + LINEAGE[:-1]),
        header(tlv(1, LINEAGE)),
        header(tlv(1, STATE)[:-1] + LINEAGE),
    ],
)
def test_what_is_no_lineage_is_none(file: bytes) -> None:
    assert swtpm_format.read_lineage(file) is None


def test_a_file_that_is_continued_by_nobody_knows_what_is_refused() -> None:
    with pytest.raises(FormatError, match="but not which"):
        swtpm_format.read_lineage(header(tlv(1, STATE), minimum=255))
    with pytest.raises(FormatError, match="needs format version 255"):
        swtpm_format.decode_blob(header(tlv(4, tlv(1, STATE)), flags=4, minimum=255))


def test_every_truncation_of_a_file_is_refused_or_bare() -> None:
    for length in range(4, len(FILE)):
        with pytest.raises(FormatError):
            swtpm_format.decode_file(FILE[:length])


@pytest.mark.parametrize(
    ("decode", "data", "key"),
    [
        (swtpm_format.decode_file, header(tlv(2, STATE), flags=0x01), "file"),
        (swtpm_format.decode_file, header(tlv(2, STATE), flags=0x09), "file"),
        (swtpm_format.decode_file, header(tlv(2, STATE) + tlv(3, b"") + tlv(6, b"")), "file"),
        (swtpm_format.decode_blob, header(tlv(5, STATE), flags=0x06), "migration"),
        (swtpm_format.decode_blob, header(tlv(5, STATE), flags=0x16), "migration"),
        (swtpm_format.decode_blob, header(tlv(4, tlv(2, STATE)), flags=0x05), "file"),
        (swtpm_format.decode_blob, header(tlv(4, tlv(2, STATE)), flags=0x04), "file"),
        (swtpm_format.decode_blob, header(tlv(5, STATE), flags=0x04), "migration"),
    ],
)
def test_what_is_encrypted_is_refused_with_the_key_that_it_needs(
    decode: Callable[[bytes], bytes], data: bytes, key: str
) -> None:
    with pytest.raises(KeyNeeded, match=f"swtpm's {key} key") as caught:
        decode(data)
    assert caught.value.result == Result.KEYNOTFOUND


def test_a_blob_that_is_said_to_be_encrypted_is_refused() -> None:
    with pytest.raises(KeyNeeded, match="swtpm's file key"):
        swtpm_format.decode_blob(BLOB, encrypted=True)


def test_errors_do_not_show_what_is_in_the_state() -> None:
    for data in (FILE[:-1], header(tlv(7, STATE)), header(tlv(1, STATE), minimum=3)):
        with pytest.raises(FormatError) as caught:
            swtpm_format.decode_file(data)
        assert STATE.decode()[:5] not in repr(caught.value)


class Made(NamedTuple):
    """What a swtpm made: its files, and its blobs."""

    files: dict[str, bytes]
    blobs: dict[Blob, bytes]


def make(control_path: Path, state: Path) -> Made:
    """Have a fresh swtpm write its files and hand out its blobs."""
    with ControlClient(control_path) as control:
        data = control.attach_data()
        control.init()
        data.transact(bytes.fromhex("80010000000c000001440000"))
        control.store_volatile()
        names = ("permall", "volatilestate")
        files = {name: (state / f"tpm2-00.{name}").read_bytes() for name in names}
        blobs = {kind: control.get_state_blob(kind) for kind in (Blob.PERMANENT, Blob.VOLATILE)}
    return Made(files, blobs)


def make_plain(lab: Lab) -> Made:
    """Have a fresh swtpm write its files and hand out its blobs, without a key."""
    swtpm = lab.emulator(SWTPM)
    return make(swtpm.control_path, swtpm.state)


def test_swtpms_files_and_blobs_survive_decoding_and_encoding(lab: Lab) -> None:
    made = make_plain(lab)
    for file in made.files.values():
        assert swtpm_format.encode_file(swtpm_format.decode_file(file)) == file
    for blob in made.blobs.values():
        assert swtpm_format.encode_blob(swtpm_format.decode_blob(blob)) == blob
    permanent = swtpm_format.decode_blob(made.blobs[Blob.PERMANENT])
    assert swtpm_format.decode_file(made.files["permall"]) == permanent


def test_swtpm_takes_what_is_encoded_here(lab: Lab) -> None:
    made = make_plain(lab)
    with ControlClient(lab.emulator(SWTPM).control_path) as control:
        for kind, blob in made.blobs.items():
            control.set_state_blob(kind, swtpm_format.encode_blob(swtpm_format.decode_blob(blob)))
        control.init()
        assert control.get_state_blob(Blob.PERMANENT) == made.blobs[Blob.PERMANENT]


def blobs_about(permanent: bytes) -> dict[str, bytes]:
    """Return blobs of a real state, right and wrong in every way that is told apart."""
    inner = tlv(1, permanent)
    return {
        "right": header(tlv(4, inner), flags=4),
        "empty": b"",
        "header alone": header(b"", flags=4),
        "version 1": header(permanent, version=1),
        "version 3": header(tlv(4, inner), flags=4, version=3),
        "no flag": header(tlv(4, inner)),
        "shorter than a header": header(b"", flags=4)[:9],
        "truncated": header(tlv(4, inner), flags=4)[:-1],
        "minimum version 3": header(tlv(4, inner), flags=4, minimum=3),
        "header size 12": header(b"\0\0" + tlv(4, inner), flags=4, size=12),
        "nothing inside": header(tlv(4, b""), flags=4),
        "other tag": header(tlv(9, inner), flags=4),
        "other tag inside": header(tlv(4, tlv(9, permanent)), flags=4),
        "file key": header(tlv(4, tlv(2, permanent)), flags=5),
        "migration key": header(tlv(5, inner), flags=6),
    }


def test_swtpm_answers_the_results_that_errors_carry(lab: Lab) -> None:
    permanent = swtpm_format.decode_blob(make_plain(lab).blobs[Blob.PERMANENT])
    refused = 0
    with ControlClient(lab.emulator(SWTPM).control_path) as control:
        for name, blob in blobs_about(permanent).items():
            body = struct.pack(">III", 0, Blob.PERMANENT, len(blob)) + blob
            result = control.request(Control.SET_STATEBLOB, body)
            try:
                assert swtpm_format.decode_blob(blob) in (b"", permanent), name
            except FormatError as error:
                assert error.result == result, name
                refused += 1
            else:
                assert result == 0, name
    assert refused == 9


@contextmanager
def swtpm_with_key(directory: Path, option: str, key: str) -> Iterator[tuple[Path, Path]]:
    """Run a swtpm that encrypts; give its control socket and its state directory."""
    key_file, state, control = directory / "key", directory / "state", directory / "control"
    key_file.write_text(key)
    state.mkdir()
    arguments = ["--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"]
    arguments += [option, f"file={key_file},mode=aes-{len(key) * 4}-cbc"]
    program = Program("swtpm", ["swtpm", "socket", "--tpm2", *arguments], directory)
    try:
        yield control, state
    finally:
        program.kill()


@pytest.mark.parametrize(("key", "flags"), [("ab" * 16, 0x01), ("ab" * 32, 0x09)])
def test_swtpms_encrypted_files_are_recognised(lab: Lab, key: str, flags: int) -> None:
    with swtpm_with_key(lab.directory, "--key", key) as (control, state):
        made = make(control, state)
    for file in made.files.values():
        assert struct.unpack(">HIH", file[4:12]) == (flags, len(file), 2)
        with pytest.raises(KeyNeeded, match="swtpm's file key"):
            swtpm_format.decode_file(file)


@pytest.mark.parametrize(("key", "flags"), [("ab" * 16, 0x06), ("ab" * 32, 0x16)])
def test_swtpms_encrypted_blobs_are_recognised(lab: Lab, key: str, flags: int) -> None:
    with swtpm_with_key(lab.directory, "--migration-key", key) as (control, state):
        made = make(control, state)
    for blob in made.blobs.values():
        assert struct.unpack(">HIH", blob[4:12]) == (flags, len(blob), 5)
        with pytest.raises(KeyNeeded, match="swtpm's migration key"):
            swtpm_format.decode_blob(blob)
