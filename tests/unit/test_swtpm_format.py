"""swtpm's file and blob format, held against swtpm itself: what it writes, takes and refuses.

Nothing here is a recorded state: each run lets swtpm make its own.
"""

import hashlib
import hmac
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness import versions
from tests.harness.lab import Lab
from tests.support.emulator_client import Blob, Control, ControlClient, ControlError
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.wire import swtpm_encryption, swtpm_format
from vtpmd.wire.swtpm_format import (
    BLOB_BYTES_MAX,
    FILE_BYTES_MAX,
    STATE_BYTES_MAX,
    FormatError,
    KeyNeeded,
    KeyWrong,
    Lineage,
    NotEncrypted,
)
from vtpmd.wire.tpm import GENERATION_GIVEN_MAX, Result

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


@pytest.mark.parametrize("key", [None, bytes(16), bytes(32)])
def test_a_state_of_the_largest_size_fits_file_and_blob(key: bytes | None) -> None:
    state, iv = bytes(STATE_BYTES_MAX), key or b""
    blob = swtpm_format.encode_blob(state, Lineage(b"i" * 16, 7), key=key, iv=iv)
    assert BLOB_BYTES_MAX - 2 * 108 < len(blob) <= BLOB_BYTES_MAX
    assert swtpm_format.decode_blob(blob, key=key) == state
    file = swtpm_format.encode_file(state, key=key, iv=iv)
    assert len(file) <= FILE_BYTES_MAX
    assert swtpm_format.decode_file(file, key=key) == state
    with pytest.raises(FormatError, match="no state has more"):
        swtpm_format.decode_file(bytes(FILE_BYTES_MAX + 1), key=key)


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


def test_invariant_13_a_blob_says_whose_state_it_is() -> None:
    lineage = Lineage(b"i" * 16, 7)
    for key in (None, bytes(32)):
        blob = swtpm_format.encode_blob(STATE, lineage, key=key, iv=b"" if key is None else key)
        assert swtpm_format.read_blob_lineage(blob) == lineage
        assert swtpm_format.decode_blob(blob, key=key) == STATE
    assert swtpm_format.read_blob_lineage(BLOB) is None
    largest = lineage._replace(generation=GENERATION_GIVEN_MAX)
    assert swtpm_format.read_blob_lineage(swtpm_format.encode_blob(STATE, largest)) == largest
    more = largest._replace(generation=largest.generation + 1)
    with pytest.raises(FormatError, match="which is none"):
        swtpm_format.read_blob_lineage(swtpm_format.encode_blob(STATE, more))


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
                newer = versions.swtpm().blob_of_version_3 if name == "version 3" else 0
                assert result == newer, name
    assert refused == 9


KEYS = {"aes-128-cbc": bytes(range(16)), "aes-256-cbc": bytes(range(32))}


def swtpm_with_key(lab: Lab, option: str, mode: str) -> Emulator:
    """Start a swtpm that encrypts with one of KEYS, for its files or on migration."""
    key_file = lab.new_path("key")
    key_file.write_text(KEYS[mode].hex())
    return lab.emulator(SWTPM, options=(option, f"file={key_file},mode={mode}"))


@pytest.mark.parametrize("mode", KEYS)
def test_swtpms_encrypted_files_open_with_their_key(lab: Lab, mode: str) -> None:
    swtpm = swtpm_with_key(lab, "--key", mode)
    made = make(swtpm.control_path, swtpm.state)
    states = {
        name: swtpm_format.decode_file(file, key=KEYS[mode]) for name, file in made.files.items()
    }
    assert states["permall"] == swtpm_format.decode_blob(made.blobs[Blob.PERMANENT])
    for name, file in made.files.items():
        ours = swtpm_format.encode_file(states[name], key=KEYS[mode], iv=KEYS[mode])
        assert len(ours) == len(file)
        assert ours[:16] == file[:16]
        with pytest.raises(KeyNeeded, match="swtpm's file key"):
            swtpm_format.decode_file(file)


@pytest.mark.parametrize("mode", KEYS)
def test_swtpm_takes_encrypted_blobs_and_gives_them(lab: Lab, mode: str) -> None:
    """Without the flag DECRYPTED: that is not what QEMU asks for, but swtpm_ioctl does."""
    key = KEYS[mode]
    state = swtpm_format.decode_blob(make_plain(lab).blobs[Blob.PERMANENT])
    with ControlClient(swtpm_with_key(lab, "--key", mode).control_path) as control:
        blob = swtpm_format.encode_blob(state, key=key, iv=key)
        control.set_state_blob(Blob.PERMANENT, blob)
        control.init()
        given = control.get_state_blob(Blob.PERMANENT, flags=0)
        assert swtpm_format.decode_blob(given, key=key) == state
        assert given[:22] == blob[:22]
        with pytest.raises(KeyNeeded):
            swtpm_format.decode_blob(given)


def encrypted_blobs_about(state: bytes, key: bytes) -> dict[str, bytes]:
    """Return encrypted blobs, right and wrong in every way that is told apart."""
    other = bytes(byte ^ 1 for byte in key)
    inner = swtpm_format.encode_file(state, key=key, iv=bytes(len(key)))[10:]
    encrypted = tlv(2, b"x" * 32)
    flags = 0x05 | (0x08 if len(key) == 32 else 0)
    return {
        "right": header(tlv(4, inner), flags),
        "in the clear": swtpm_format.encode_blob(state),
        "other key": swtpm_format.encode_blob(state, key=other, iv=bytes(len(key))),
        "other length": header(tlv(4, inner), flags ^ 0x08),
        "altered": header(tlv(4, inner[:100] + bytes([inner[100] ^ 1]) + inner[101:]), flags),
        "no HMAC": header(tlv(4, encrypted), flags),
        "nothing encrypted": header(tlv(4, tlv(3, bytes(32))), flags),
        "short HMAC": header(tlv(4, tlv(3, bytes(31)) + encrypted + tlv(6, key)), flags),
        "migration key": header(tlv(5, inner), flags | 0x02),
    }


@pytest.mark.parametrize("mode", KEYS)
def test_swtpm_answers_the_results_that_errors_about_keys_carry(lab: Lab, mode: str) -> None:
    state = swtpm_format.decode_blob(make_plain(lab).blobs[Blob.PERMANENT])
    refused = 0
    with ControlClient(swtpm_with_key(lab, "--key", mode).control_path) as control:
        for name, blob in encrypted_blobs_about(state, KEYS[mode]).items():
            body = struct.pack(">III", 0, Blob.PERMANENT, len(blob)) + blob
            result = control.request(Control.SET_STATEBLOB, body)
            try:
                assert swtpm_format.decode_blob(blob, key=KEYS[mode]) == state, name
            except FormatError as error:
                assert error.result == result, name
                refused += 1
            else:
                assert result == 0, name
    assert refused == 7


@pytest.mark.parametrize("mode", KEYS)
def test_no_altered_byte_of_an_encrypted_file_changes_the_state(mode: str) -> None:
    """It is refused, or read as it was: what in the header means nothing may be altered."""
    key = KEYS[mode]
    file = swtpm_format.encode_file(STATE, key=key, iv=bytes(len(key)))
    read = 0
    for offset in range(len(file)):
        for bit in range(8):
            altered = bytearray(file)
            altered[offset] ^= 1 << bit
            try:
                assert swtpm_format.decode_file(bytes(altered), key=key) == STATE
                assert offset < 6
                read += 1
            except FormatError:
                pass
    assert 0 < read < 32


@pytest.mark.parametrize("mode", KEYS)
def test_no_other_key_opens_an_encrypted_file(mode: str) -> None:
    key = KEYS[mode]
    file = swtpm_format.encode_file(STATE, key=key, iv=bytes(len(key)))
    for offset in range(len(key)):
        other = key[:offset] + bytes([key[offset] ^ 0x80]) + key[offset + 1 :]
        with pytest.raises(KeyWrong, match="does not open with this key"):
            swtpm_format.decode_file(file, key=other)
    (length,) = {16, 32} - {len(key)}
    with pytest.raises(KeyWrong, match=f"{8 * len(key)} bits; the one given has {8 * length}"):
        swtpm_format.decode_file(file, key=bytes(length))


BARE = bytes.fromhex("0004ab364723") + STATE  # as libtpms begins a permanent state


@pytest.mark.parametrize(
    "file", [BARE, FILE, header(BARE, version=1), header(BARE, version=1, flags=1), header(b"")]
)
def test_with_a_key_no_file_in_the_clear_is_taken(file: bytes) -> None:
    """As swtpm has it: else who can write to the disk could replace the TPM."""
    with pytest.raises(NotEncrypted):
        swtpm_format.decode_file(file, key=bytes(16))


@pytest.mark.parametrize("key", [bytes(range(16)), bytes(range(32))], ids=len)
def test_encrypted_files_of_version_1_are_read(key: bytes) -> None:
    data = hashlib.sha256(BARE).digest() + BARE
    body = swtpm_encryption.encrypt(data, key=key, iv=bytes(len(key))).ciphertext
    for file in (body, header(body, version=1), header(body, version=1, flags=1)):
        assert swtpm_format.decode_file(file, key=key) == BARE
        with pytest.raises(KeyWrong):
            swtpm_format.decode_file(file, key=key[::-1])
        with pytest.raises(FormatError):
            swtpm_format.decode_file(file[:-1], key=key)


@pytest.mark.parametrize("mode", KEYS)
def test_swtpm_takes_no_file_in_the_clear_with_a_key(lab: Lab, mode: str) -> None:
    """The same is held of swtpm itself, as vtpmd does it for that reason."""
    swtpm = swtpm_with_key(lab, "--key", mode)
    (swtpm.state / "tpm2-00.permall").write_bytes(make_plain(lab).files["permall"])
    with ControlClient(swtpm.control_path) as control, pytest.raises(ControlError):
        control.init()


def test_ciphertext_and_iv_cannot_change_places() -> None:
    """The HMAC does not cover their lengths: what is one's end could become the other's begin."""
    for key in KEYS.values():
        encrypted = swtpm_encryption.encrypt(STATE, key=key, iv=bytes(len(key)))
        both = encrypted.ciphertext + encrypted.iv
        for cut in range(len(both) + 1):
            moved = encrypted._replace(ciphertext=both[:cut], iv=both[cut:])
            if moved != encrypted:
                with pytest.raises(swtpm_encryption.DecryptionError):
                    swtpm_encryption.decrypt(moved, key=key)


def test_an_iv_of_one_block_is_taken_with_any_key() -> None:
    """swtpm means to write no longer one."""
    for key in KEYS.values():
        encrypted = swtpm_encryption.encrypt(STATE, key=key, iv=bytes(len(key)))
        short = bytes(16)
        mac = hmac.digest(key, encrypted.ciphertext + short, "sha256")
        short_iv = swtpm_encryption.Encrypted(encrypted.ciphertext, mac, short)
        assert swtpm_encryption.decrypt(short_iv, key=key) == STATE


@pytest.mark.parametrize(("mode", "flags"), [("aes-128-cbc", 0x06), ("aes-256-cbc", 0x16)])
def test_swtpms_blobs_for_the_migration_key_are_recognised(lab: Lab, mode: str, flags: int) -> None:
    swtpm = swtpm_with_key(lab, "--migration-key", mode)
    for blob in make(swtpm.control_path, swtpm.state).blobs.values():
        assert struct.unpack(">HIH", blob[4:12]) == (flags, len(blob), 5)
        with pytest.raises(KeyNeeded, match="swtpm's migration key"):
            swtpm_format.decode_blob(blob)
