"""Exports against hostile bytes: what was altered is refused in one line, and nothing is opened.

Each limit is compared before what it limits is used: an export that says more than it has, or has
more than any could have, takes no memory for that.
"""

from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpmd.errors import VtpmdError
from vtpmd.store import export_seal
from vtpmd.store.keys import Key
from vtpmd.wire import export_format
from vtpmd.wire.export_format import (
    DIGEST_BYTES,
    EXPORT_BYTES_MAX,
    ID_BYTES,
    LINK_NUMBER_MAX,
    SALT_BYTES,
    TIME_MAX_S,
    ExportFlag,
    Header,
    Link,
)
from vtpmd.wire.tpm import GENERATION_GIVEN_MAX, StateType, TpmVersion

KEY = Key(bytearray(b"k" * 16))
STATES = {StateType.PERMANENT: b"permanent" * 20, StateType.VOLATILE: b"volatile"}
HEADER = Header(b"e" * 16, b"i" * 16, 7, 1, TpmVersion.TPM_2_0, tuple(STATES))
PLAIN, SEALED = (export_seal.sealed(HEADER, STATES, key) for key in (None, KEY))

headers = st.builds(
    Header,
    export=st.binary(min_size=16, max_size=16),
    identity=st.none() | st.binary(min_size=16, max_size=16).filter(any),
    generation=st.integers(0, GENERATION_GIVEN_MAX),
    time_s=st.integers(0, TIME_MAX_S),
    version=st.sampled_from(TpmVersion),
    kinds=st.sampled_from([(StateType.PERMANENT,), tuple(StateType)]),
    flags=st.just(ExportFlag(0)),
    salt=st.just(bytes(SALT_BYTES)),
    becomes=st.integers(0, GENERATION_GIVEN_MAX),
    aside=st.integers(0, (1 << 32) - 1),
    aside_number=st.integers(0, (1 << 32) - 1),
    is_new=st.booleans(),
    link=st.none()
    | st.builds(
        Link,
        chain=st.binary(min_size=ID_BYTES, max_size=ID_BYTES),
        number=st.integers(1, LINK_NUMBER_MAX),
    ),
)


def read(content: bytes, key: Key | None) -> dict[StateType, bytes]:
    """Read an export, as an import does."""
    return export_seal.opened(export_format.decode(content), key)


@given(headers, st.data(), st.booleans())
def test_round_trip(header: Header, data: st.DataObject, is_sealed: bool) -> None:
    states = {kind: data.draw(st.binary(min_size=1, max_size=300)) for kind in header.kinds}
    key = KEY if is_sealed else None
    content = export_seal.sealed(header, states, key)
    found = export_format.decode(content).header
    assert found._replace(flags=header.flags, salt=header.salt) == header
    assert read(content, key) == states


@given(st.data(), st.booleans(), st.booleans())
@settings(max_examples=400)
def test_what_was_altered_is_refused_in_one_line(
    data: st.DataObject, is_sealed: bool, is_checksum_right: bool
) -> None:
    """Also where who altered it has made the checksum fit: what is sealed with a key still opens
    no more, and what is not says itself what it holds."""
    whole = SEALED if is_sealed else PLAIN
    content = bytearray(whole)
    start = data.draw(st.integers(0, len(content)))
    content[start : start + data.draw(st.integers(0, 60))] = data.draw(st.binary(max_size=60))
    if is_checksum_right:
        content[-DIGEST_BYTES:] = sha256(content[:-DIGEST_BYTES]).digest()
    try:
        states = read(bytes(content), KEY if is_sealed else None)
    except VtpmdError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 300
    else:
        assert bytes(content) == whole or (is_checksum_right and not is_sealed)
        assert set(states) <= set(StateType)


@given(st.data())
def test_every_end_is_refused(data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(SEALED) - 1))
    with pytest.raises(VtpmdError):
        read(SEALED[:length], KEY)


@given(st.binary(max_size=600))
def test_any_bytes_are_refused_in_one_line(content: bytes) -> None:
    for start in (b"", PLAIN[:14], PLAIN[:128]):
        whole = start + content
        with pytest.raises(VtpmdError) as refused:
            read(whole + sha256(whole).digest(), None)
        assert len(str(refused.value).splitlines()) == 1


def test_what_is_longer_than_any_is_refused_before_it_is_looked_at() -> None:
    head = export_format.encode_header(HEADER)
    body = bytes(EXPORT_BYTES_MAX - len(head) - DIGEST_BYTES + 1)
    with pytest.raises(VtpmdError, match="it has more than"):
        export_format.decode(export_format.encode(head, body))


def test_a_length_beyond_what_there_is_takes_no_memory() -> None:
    head = export_format.encode_header(HEADER)
    body = bytearray(export_format.encode_states(head, STATES))
    body[DIGEST_BYTES + 4 : DIGEST_BYTES + 8] = b"\xff\xff\xff\xff"
    with pytest.raises(VtpmdError, match="where the permanent state begins is none"):
        read(export_format.encode(head, bytes(body)), None)


def test_a_body_goes_with_its_own_header_alone() -> None:
    """Also one that age has sealed, which says nothing of a header outside."""
    export = export_format.decode(PLAIN)
    head = export_format.encode_header(HEADER._replace(generation=8))
    with pytest.raises(VtpmdError, match="its body is not that of its header"):
        read(export_format.encode(head, export.body), None)
