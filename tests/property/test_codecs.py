"""C's codec of state blobs does what Python's does, byte for byte."""

import hashlib
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpmd._core import ffi, lib
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_encryption import encrypt
from vtpmd.wire.swtpm_format import FormatError

CORPUS = Path(__file__).resolve().parents[1] / "fuzz" / "corpus"
EACH = [None, bytes(range(16)), bytes(range(32))]


def c_key(key: bytes | None) -> Any:
    """Return a key for C."""
    return ffi.NULL if key is None else ffi.new("struct cipher_key *", (len(key), key))


class Keys(NamedTuple):
    """What a blob may be encrypted with."""

    file: bytes | None
    migration: bytes | None = None


KEYS = [Keys(file, migration) for file in EACH for migration in EACH]


def encode_in_c(state: bytes, keys: Keys) -> bytes:
    """Have C wrap a state."""
    wrapped = ffi.gc(ffi.new("struct swtpm_wrapped *"), lib.swtpm_wrapped_deinit)
    buffer = ffi.from_buffer("uint8_t[]", state)
    key = c_key(keys.file)
    assert not lib.swtpm_wrap(lib.SWTPM_BLOB, key, buffer, len(state), ffi.NULL, wrapped)
    if keys.migration is not None:
        assert not lib.swtpm_seal_blob(wrapped, c_key(keys.migration))
    pieces = ffi.new("struct iovec[]", lib.SWTPM_PIECES)
    lib.swtpm_wrapped_pieces(wrapped, pieces)
    return b"".join(bytes(ffi.buffer(each.iov_base, each.iov_len)) for each in pieces)


def decode_in_c(blob: bytes, encrypted: bool, keys: Keys) -> bytes | int:
    """Have C unwrap a blob; return the state, or the result that it is refused with."""
    content = ffi.gc(ffi.new("struct blob_content *"), lib.blob_content_deinit)
    buffer = ffi.from_buffer("uint8_t[]", blob)
    each = [c_key(key) for key in keys]
    c_keys = ffi.new("struct blob_keys *", each)
    refusal = lib.blob_decode(buffer, len(blob), encrypted, c_keys, content)
    assert refusal >= 0
    if refusal:
        return int(lib.blob_result(refusal))
    return bytes(ffi.buffer(content.state, content.state_bytes)) if content.state else b""


def decode_in_python(blob: bytes, encrypted: bool, keys: Keys) -> bytes | int:
    """Do the same with Python's codec, which tells state and lineage apart."""
    try:
        state = swtpm_format.decode_blob(
            blob, encrypted=encrypted, key=keys.file, migration_key=keys.migration
        )
        if blob:
            swtpm_format.read_blob_lineage(blob)
        return state
    except FormatError as error:
        return int(error.result)


@given(st.binary(max_size=100), st.sampled_from(KEYS))
def test_each_takes_the_blobs_of_the_other(state: bytes, keys: Keys) -> None:
    ours = swtpm_format.encode_blob(
        state, key=keys.file, iv=bytes(32), migration_key=keys.migration
    )
    theirs = encode_in_c(state, keys)
    assert len(ours) == len(theirs)
    assert ours == theirs or keys != Keys(None)
    assert decode_in_c(ours, False, keys) == decode_in_python(theirs, False, keys) == state


def encrypt_old(state: bytes, key: bytes) -> bytes:
    """Encrypt as version 1 of the format does."""
    data = hashlib.sha256(state).digest() + state
    return encrypt(data, key=key, iv=bytes(len(key))).ciphertext


@given(st.binary(max_size=100), st.sampled_from(KEYS), st.sampled_from(KEYS), st.integers(0))
def test_blobs_of_version_1_are_taken_alike(
    state: bytes, keys: Keys, other: Keys, place: int
) -> None:
    body = state if keys.file is None else encrypt_old(state, keys.file)
    if keys.migration is not None:
        body = encrypt_old(body, keys.migration)
    flags = (keys.file is not None) | 2 * (keys.migration is not None) | 4
    blob = struct.pack(">BBHHI", 1, 1, 10, flags, 10 + len(body)) + body
    assert decode_in_c(blob, False, keys) == decode_in_python(blob, False, keys) == state
    altered = bytearray(blob)
    altered[place // 8 % len(blob)] ^= 1 << place % 8
    for tried, opened_with in ((blob, other), (bytes(altered), keys)):
        given_by_c = decode_in_c(tried, False, opened_with)
        assert given_by_c == decode_in_python(tried, False, opened_with)


def tlv(tag: int, data: bytes) -> bytes:
    """Write a TLV."""
    return struct.pack(">HI", tag, len(data)) + data


tlvs = st.lists(
    st.builds(
        tlv,
        st.sampled_from([1, 1, 2, 3, 4, 5, 6, 7, 9, 0x5654]),
        st.sampled_from([0, 15, 16, 31, 32]).map(bytes) | st.binary(max_size=8),
    ),
    max_size=4,
).map(b"".join)
headers = st.tuples(
    st.sampled_from([2, 2, 2, 1, 3]),
    st.sampled_from([1, 1, 1, 2, 3, 255]),
    st.sampled_from([10, 10, 10, 12]),
    st.integers(0, 31) | st.just(0x8004),
    st.sampled_from([0, 0, 0, 1, -1]),
)


wrapped = st.builds(
    lambda tag, inner, more: tlv(tag, inner) + more, st.sampled_from([4, 4, 5]), tlvs, tlvs
)
bodies = wrapped | tlvs | st.binary(max_size=9)


@given(
    headers,
    bodies,
    st.booleans(),
    st.sampled_from(KEYS),
)
def test_blobs_of_all_kinds_are_taken_and_refused_alike(
    header: tuple[int, int, int, int, int], body: bytes, encrypted: bool, keys: Keys
) -> None:
    *first, flags, off = header
    blob = struct.pack(">BBHHI", *first, flags, 10 + len(body) + off) + body
    assert decode_in_c(blob, encrypted, keys) == decode_in_python(blob, encrypted, keys)


@given(st.binary(max_size=40), st.sampled_from(KEYS), st.sampled_from(KEYS), st.integers(0, 2**20))
def test_altered_blobs_are_taken_and_refused_alike(
    state: bytes, keys: Keys, other: Keys, place: int
) -> None:
    blob = bytearray(encode_in_c(state, keys))
    blob[place // 8 % len(blob)] ^= 1 << place % 8
    for altered in (bytes(blob), bytes(blob[: place % len(blob)])):
        for opened_with in (keys, other):
            given_by_c = decode_in_c(altered, False, opened_with)
            assert given_by_c == decode_in_python(altered, False, opened_with)


BLOBS = sorted((CORPUS / "blob").glob("decode_*"))


@pytest.mark.parametrize("path", BLOBS, ids=lambda path: path.name)
def test_the_corpus_of_blobs_is_taken_and_refused_alike(path: Path) -> None:
    blob = path.read_bytes().removeprefix(b"d")[1:]
    for encrypted in (False, True):
        for keys in KEYS:
            outcome = decode_in_c(blob, encrypted, keys)
            assert outcome == decode_in_python(blob, encrypted, keys)
