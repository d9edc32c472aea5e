"""The sealed tail: it opens for its session, its VM and as it was, and for nothing else."""

import os

import pytest

from tests.support import tail
from tests.support.tail import Header, Tail, TailCipher, TailError

KEY, UUID, LINEAGE, SESSION = os.urandom(32), *(os.urandom(16) for _ in range(3))
CIPHER = TailCipher(key=KEY, uuid=UUID, lineage=LINEAGE)
TAIL = Tail(Header(SESSION, 1, 2, 3, 4), 1, b"a permanent record", b"a volatile one")
SEALED = CIPHER.seal(TAIL)


def open_it(
    data: bytes,
    key: bytes = KEY,
    uuid: bytes = UUID,
    session: bytes = SESSION,
    lineage: bytes = LINEAGE,
) -> Tail:
    return TailCipher(key=key, uuid=uuid, lineage=lineage).open(data, session)


def test_round_trip() -> None:
    """Also with records that are empty: nothing has changed."""
    assert open_it(SEALED) == TAIL
    unchanged = TAIL._replace(permanent=b"", volatile=b"")
    assert open_it(CIPHER.seal(unchanged)) == unchanged


def test_the_same_tail_is_the_same_bytes_and_no_other_has_its_nonce() -> None:
    """So the destination knows it ahead of time, and the key serves for each tail of a session."""
    assert CIPHER.seal(TAIL) == TailCipher(key=KEY, uuid=UUID, lineage=LINEAGE).seal(TAIL)
    at = slice(tail.HEADER.size - tail.NONCE_BYTES, tail.HEADER.size)
    others = (
        TAIL._replace(power=2),
        TAIL._replace(permanent=b"another record"),
        TAIL._replace(volatile=b""),
        TAIL._replace(header=TAIL.header._replace(volatile_to=5)),
    )
    nonces = {CIPHER.seal(each)[at] for each in (TAIL, *others)}
    assert len(nonces) == len(others) + 1
    assert TailCipher(key=KEY, uuid=LINEAGE, lineage=UUID).seal(TAIL)[at] not in nonces
    assert TailCipher(key=bytes(32), uuid=UUID, lineage=LINEAGE).seal(TAIL)[at] not in nonces


def test_every_altered_byte_is_refused() -> None:
    """Each bit of header, content and tag counts."""
    for offset in range(len(SEALED)):
        for bit in (1, 0x80):
            altered = bytearray(SEALED)
            altered[offset] ^= bit
            with pytest.raises(TailError):
                open_it(bytes(altered))


def test_every_truncation_and_excess_is_refused() -> None:
    """A tail is whole or none."""
    for length in range(len(SEALED)):
        with pytest.raises(TailError):
            open_it(SEALED[:length])
    with pytest.raises(TailError):
        open_it(SEALED + b"\0")
    with pytest.raises(TailError, match="bytes"):
        open_it(SEALED.ljust(tail.TAIL_BYTES_MAX + 1, b"\0"))


def test_tail_that_nobody_would_take_is_not_made() -> None:
    """QEMU's stream carries whole blobs then."""
    room = tail.TAIL_BYTES_MAX - tail.HEADER.size - tail.TAG_BYTES - 9
    largest = Tail(TAIL.header, 0, bytes(room // 2), bytes(room - room // 2))
    assert len(CIPHER.seal(largest)) == tail.TAIL_BYTES_MAX
    with pytest.raises(TailError, match="more than"):
        CIPHER.seal(largest._replace(volatile=largest.volatile + b"x"))


def test_tail_of_another_session_vm_or_key_is_refused() -> None:
    """A replay, and what is meant for another vTPM, each in one clear line."""
    with pytest.raises(TailError, match="another session"):
        open_it(SEALED, session=os.urandom(16))
    with pytest.raises(TailError, match="another VM"):
        open_it(SEALED, uuid=os.urandom(16))
    with pytest.raises(TailError, match="another VM"):
        open_it(SEALED, lineage=os.urandom(16))
    with pytest.raises(TailError, match="altered"):
        open_it(SEALED, key=os.urandom(32))


def test_invariant_12_the_guests_last_word_on_power_comes_with_it() -> None:
    """Each that there is, and no other."""
    for power in range(tail.POWER_MAX + 1):
        assert open_it(CIPHER.seal(TAIL._replace(power=power))).power == power
    with pytest.raises(TailError, match="says 3"):
        open_it(CIPHER.seal(TAIL._replace(power=tail.POWER_MAX + 1)))


def test_tail_of_another_version_is_refused() -> None:
    """The first had no word on power."""
    with pytest.raises(TailError, match="format 1, flags 0x0; this vtpmd knows 3"):
        open_it(SEALED[:8] + b"\0\1" + SEALED[10:])


def test_invariant_7_state_and_key_are_not_shown() -> None:
    """Neither what it is made of nor what it is says them."""
    assert b"a permanent record" not in SEALED
    assert "a permanent record" not in repr(TAIL)


def test_state_blob_is_told_from_a_tail() -> None:
    """swtpm's begins with its version."""
    assert tail.is_tail(SEALED)
    assert not tail.is_tail(b"\2\1\0\x0a\0\4")
    assert not tail.is_tail(b"")
