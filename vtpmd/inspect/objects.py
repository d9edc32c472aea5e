"""Objects as libtpms keeps them: keys, sealed data, and sequences that compute a digest."""

from __future__ import annotations

from typing import Final

from vtpmd.inspect import layouts
from vtpmd.inspect.primitives import read, read_fields, read_number
from vtpmd.inspect.public import read_public, read_sensitive
from vtpmd.inspect.reader import Reader
from vtpmd.inspect.sections import VERSION_WITH_BLOCKS, read_later

OCCUPIED: Final = 1 << 15  # of OBJECT_ATTRIBUTES
HMAC_SEQUENCE, HASH_SEQUENCE, EVENT_SEQUENCE = 1 << 8, 1 << 9, 1 << 10

PRIME_BYTES_MAX: Final = 2048  # of a part of a private exponent
SEQUENCE_STATES_MAX: Final = 16  # an event sequence has one for each PCR bank
HASH_BUFFER_BYTES_MAX: Final = 256  # a block of the hash: SHA-512's has 128
HASH_VALUES_MAX: Final = 16


def read_slot(reader: Reader, name: str) -> int:
    """Read ANY_OBJECT: a slot with an object, a sequence, or nothing; return its attributes.

    Raises Fault.
    """
    with reader.section(name, layouts.ANY_OBJECT) as version:
        attributes = read_number(reader, "slot-attributes", "OBJECT_ATTRIBUTES")
        if attributes & OCCUPIED:
            if attributes & (HMAC_SEQUENCE | HASH_SEQUENCE | EVENT_SEQUENCE):
                _read_sequence(reader, attributes)
            else:
                _read_object(reader)
        read_later(reader, version)
    return attributes


def _read_object(reader: Reader) -> None:
    with reader.section("object", layouts.OBJECT) as version:
        read_public(reader, "public")
        read_sensitive(reader, "sensitive")
        # Up to version 3 it is there for every key; of one that is not RSA it says nothing.
        with reader.block("private-exponent") as is_there:
            if is_there:
                _read_private_exponent(reader)
        read_fields(reader, layouts.OBJECT_NAMES)
        if version >= VERSION_WITH_BLOCKS:
            with reader.block("version-3") as is_there:
                if is_there:
                    read(reader, "seed-level", "SEED_COMPAT_LEVEL")
                    with reader.block("version-4") as is_there_too:
                        if is_there_too:
                            read(reader, "hierarchy", "TPM_HANDLE")


def _read_private_exponent(reader: Reader) -> None:
    with reader.section("exponent", layouts.PRIVATE_EXPONENT) as version:
        for name in ("q", "dp", "dq", "q-inverse"):
            with reader.section(name, layouts.PRIME) as prime_version:
                n_bytes = reader.count("bytes", 2, PRIME_BYTES_MAX)
                reader.take("number", n_bytes, "BIGNUM", is_secret=True)
                read_later(reader, prime_version)
        read_later(reader, version)


def _read_sequence(reader: Reader, attributes: int) -> None:
    with reader.section("sequence", layouts.HASH_OBJECT) as version:
        read_fields(reader, layouts.HASH_OBJECT_HEAD)
        has_states = attributes & HASH_SEQUENCE or (attributes & EVENT_SEQUENCE and version >= 3)
        if has_states:
            count = reader.count("states", 2, SEQUENCE_STATES_MAX)
            for number in range(count):
                _read_hash_state(reader, str(number))
        elif attributes & HMAC_SEQUENCE:
            _read_hash_state(reader, "hmac")
            read(reader, "hmac-key", "TPM2B_HASH_BLOCK")
        read_later(reader, version)


def _read_hash_state(reader: Reader, name: str) -> None:
    with reader.section(name, layouts.HASH_STATE) as version:
        read(reader, "kind", "UINT8")
        algorithm = read_number(reader, "algorithm", "TPM_ALG_ID")
        with reader.section("any", layouts.ANY_HASH_STATE) as any_version:
            if algorithm in layouts.HASH_STATES:
                _read_digest_state(reader, algorithm)
            read_later(reader, any_version)
        read_later(reader, version)


def _read_digest_state(reader: Reader, algorithm: int) -> None:
    """Read what a hash has computed so far: it tells of the message, which may be a secret."""
    section, number_bytes, n_values = layouts.HASH_STATES[algorithm]
    type_ = f"UINT{8 * number_bytes}"
    with reader.section("state", section) as version:
        is_sha1 = section.type.endswith("SHA1")
        if not is_sha1:
            n_values = reader.count("values", 2, HASH_VALUES_MAX)
        reader.take("value", n_values * number_bytes, f"{type_}[]", is_secret=True)
        read(reader, "length-low", type_)
        read(reader, "length-high", type_)
        n_bytes = reader.count("buffer-bytes", 2, HASH_BUFFER_BYTES_MAX)
        reader.take("buffer", n_bytes, "BYTE[]", is_secret=True)
        read(reader, "buffered", "UINT32")
        if not is_sha1:
            read(reader, "digest-bytes", "UINT32")
        read_later(reader, version)
