"""The types that one node stands for: numbers with their words, and sized bytes.

A layout names a field's type; ``read_fields`` has it read. Sizes are libtpms' largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from vtpmd.inspect.reader import Reader, Words
from vtpmd.inspect.words import attributes, tpm12
from vtpmd.inspect.words.algorithms import ALGORITHMS, CURVES
from vtpmd.inspect.words.commands import COMMANDS
from vtpmd.inspect.words.handles import (
    HANDLE_TYPE_SHIFT,
    HANDLE_TYPES,
    HT_PCR,
    PERMANENT_HANDLES,
)
from vtpmd.moment import TIME_MS_MAX, at_millisecond

# A field's name and type.
Fields = tuple[tuple[str, str], ...]

SU_NONE: Final = 0xFFFF
SU_DA_USED: Final = 0xFFFE
SU_STATE: Final = 1
PRE_STARTUP: Final = 0x8000
STARTUP_LOCALITY_3: Final = 0x4000
SU_MASK: Final = 0xFFFF & ~(PRE_STARTUP | STARTUP_LOCALITY_3)


BytesWords = Callable[[bytes], str]


class Number(NamedTuple):
    """A number of some bytes, and its words."""

    n_bytes: int
    words: Words | None = None


class Sized(NamedTuple):
    """A length, of 16 bits if nothing else is said, and at most so many bytes."""

    bytes_max: int
    is_secret: bool = False
    length_bytes: int = 2
    words: BytesWords | None = None


class Fixed(NamedTuple):
    """So many bytes."""

    n_bytes: int
    is_secret: bool = False


class Flag(NamedTuple):
    """A byte that is true or false."""


def named(names: Mapping[int, str]) -> Words:
    """Return words for numbers that have names."""
    return lambda value: names.get(value, "")


def bits(names: Mapping[int, str]) -> Words:
    """Return words for numbers whose bits have names; those without are numbers."""

    def words(value: int) -> str:
        set_bits = (bit for bit in range(value.bit_length()) if value >> bit & 1)
        return " ".join(names.get(bit, f"bit{bit}") for bit in set_bits)

    return words


def nv_type(value: int) -> str:
    """Return the word for the type that attributes of an NV index say."""
    number = value >> attributes.NV_TYPE_SHIFT & attributes.NV_TYPE_MASK
    return attributes.NV_TYPES.get(number, f"type{number}")


def nv_words(value: int) -> str:
    """Return the words for TPMA_NV."""
    field = attributes.NV_TYPE_MASK << attributes.NV_TYPE_SHIFT
    return f"{nv_type(value)} {bits(attributes.NV)(value & ~field)}".rstrip()


def handle_words(value: int) -> str:
    """Return what a handle is of."""
    kind = value >> HANDLE_TYPE_SHIFT
    if value in PERMANENT_HANDLES:
        return PERMANENT_HANDLES[value]
    if kind == HT_PCR:
        return f"PCR {value}"
    return HANDLE_TYPES.get(kind, "")


def orderly_words(value: int) -> str:
    """Return what is known of the last Shutdown: libtpms' gp.orderlyState."""
    if value == SU_NONE:
        return "not orderly"
    if value == SU_DA_USED:
        return "not orderly, and an authorisation that lockout protects was used"
    words = "orderly, STATE" if value & SU_MASK == SU_STATE else "orderly, CLEAR"
    words += ", DRTM before Startup" if value & PRE_STARTUP else ""
    return words + (", Startup at locality 3" if value & STARTUP_LOCALITY_3 else "")


def time_words(value: int) -> str:
    """Return the time that is so many milliseconds after 1970, if a year has four digits then."""
    return at_millisecond(value) if 0 < value <= TIME_MS_MAX else ""


IMAGE_TYPES: Final = {1: "permanent", 2: "volatile", 3: "savestate"}
SEED_LEVELS: Final = {0: "as in the first versions", 1: "with corrected RSA primes"}


def selected(raw: bytes) -> list[int]:
    """Return which PCRs a selection has."""
    return [pcr for pcr in range(8 * len(raw)) if raw[pcr // 8] >> pcr % 8 & 1]


def selected_words(raw: bytes) -> str:
    """Say which PCRs a selection has: 0-23, or single ones."""
    pcrs = selected(raw)
    if not pcrs:
        return "none"
    if len(pcrs) > 1 and pcrs == list(range(pcrs[0], pcrs[-1] + 1)):
        return f"{pcrs[0]}-{pcrs[-1]}"
    return ",".join(map(str, pcrs))


PRIMITIVES: Final[Mapping[str, Number | Sized | Fixed | Flag]] = {
    "BOOL": Flag(),
    "UINT8": Number(1),
    "UINT16": Number(2),
    "UINT32": Number(4),
    "UINT64": Number(8),
    "TPM_ALG_ID": Number(2, named(ALGORITHMS)),
    "TPM_ECC_CURVE": Number(2, named(CURVES)),
    "TPM_CC": Number(4, named(COMMANDS)),
    "TPM_HANDLE": Number(4, handle_words),
    "TPM_SU": Number(2, orderly_words),
    "TPMA_OBJECT": Number(4, bits(attributes.OBJECT)),
    "TPMA_NV": Number(4, nv_words),
    "TPMA_SESSION": Number(1, bits(attributes.SESSION)),
    "TPMA_LOCALITY": Number(1, bits(attributes.LOCALITY)),
    "OBJECT_ATTRIBUTES": Number(4, bits(attributes.OBJECT_SLOT)),
    "SESSION_ATTRIBUTES": Number(4, bits(attributes.SESSION_STATE)),
    "SEED_COMPAT_LEVEL": Number(1, named(SEED_LEVELS)),
    "TPM2B_DIGEST": Sized(64),
    "TPM2B_NAME": Sized(68),
    "TPM2B_NONCE": Sized(64),
    "TPM2B_AUTH": Sized(64, is_secret=True),
    "TPM2B_SEED": Sized(64, is_secret=True),
    "TPM2B_PROOF": Sized(64, is_secret=True),
    "TPM2B_HASH_BLOCK": Sized(144, is_secret=True),
    "TPM2B_PUBLIC_KEY_RSA": Sized(2048),
    "TPM2B_ECC_PARAMETER": Sized(128),
    "TPM2B_SENSITIVE_COMPOSITE": Sized(5 * 1024, is_secret=True),
    # A union: of what a session is bound to, the name with the authorisation in it, and of digests
    # that a policy has asked for.
    "SESSION_U1": Sized(68, is_secret=True),
    # A union of an audit digest and a policy digest.
    "SESSION_U2": Sized(64),
    # vtpmd's own.
    "IDENTITY": Fixed(16),
    "SHA256": Fixed(32),
    "AEAD_TAG": Fixed(16),
    "AEAD_NONCE": Fixed(12),
    "IMAGE_TYPE": Number(1, named(IMAGE_TYPES)),
    "TIME_MS": Number(8, time_words),
    "JOURNAL_FLAGS": Number(2, bits({0: "SEALED"})),
    # A TPM 1.2's; of its sizes a buffer's is libtpms' largest command.
    "TPM_SECRET": Fixed(20, is_secret=True),
    "TPM_EK_RESET": Fixed(20, is_secret=True),
    "TPM_DIGEST": Fixed(20),
    "TPM_NONCE": Fixed(20),
    "TPM_COUNTER_LABEL": Fixed(4),
    "AES_KEY": Fixed(16, is_secret=True),
    "DAA_Q": Fixed(26),
    "DAA_SCRATCH": Fixed(256, is_secret=True),
    "DAA_U0": Fixed(128, is_secret=True),
    "DAA_U1": Fixed(138, is_secret=True),
    "SHA1_VALUE": Fixed(20, is_secret=True),
    "SHA1_BUFFER": Fixed(64, is_secret=True),
    "SIZED_BUFFER": Sized(4096, length_bytes=4),
    "SECRET_SIZED_BUFFER": Sized(4096, is_secret=True, length_bytes=4),
    "TPM_PCR_SELECTION": Sized(16, words=selected_words),
    "TPM_LOCALITY_SELECTION": Number(1, bits({bit: str(bit) for bit in range(5)})),
    "TPM12_HANDLE": Number(4, named(tpm12.HANDLES)),
    "TPM_NV_INDEX": Number(4),
    "TPM_ALGORITHM_ID": Number(4, named(tpm12.ALGORITHMS)),
    "TPM_ENC_SCHEME": Number(2, named(tpm12.ENCRYPTION_SCHEMES)),
    "TPM_SIG_SCHEME": Number(2, named(tpm12.SIGNATURE_SCHEMES)),
    "TPM_KEY_USAGE": Number(2, named(tpm12.KEY_USAGES)),
    "TPM_KEY_FLAGS": Number(4, bits(tpm12.KEY_FLAGS)),
    "TPM_KEY_CONTROL": Number(4, bits(tpm12.KEY_CONTROL)),
    "TPM_AUTH_DATA_USAGE": Number(1, named(tpm12.AUTH_USAGES)),
    "TPM_PAYLOAD_TYPE": Number(1, named(tpm12.PAYLOADS)),
    "TPM_PROTOCOL_ID": Number(2, named(tpm12.PROTOCOLS)),
    "TPM_ENT_TYPE": Number(1, named(tpm12.ENTITIES)),
    "TPM_PERMANENT_FLAGS": Number(4, bits(tpm12.PERMANENT_FLAGS)),
    "TPM_FAMILY_FLAGS": Number(4, bits(tpm12.FAMILY_FLAGS)),
    "TPM_TRANSPORT_ATTRIBUTES": Number(4, bits(tpm12.TRANSPORT_ATTRIBUTES)),
    "TPM_TEST_STATE": Number(4, named(tpm12.TEST_STATES)),
    "TPMA12_NV": Number(4, bits(tpm12.NV_ATTRIBUTES)),
}


def read(reader: Reader, name: str, type_: str) -> int | bytes:
    """Read one field of a primitive type. Raises Fault."""
    match PRIMITIVES[type_]:
        case Number(n_bytes, words):
            return reader.number(name, n_bytes, type_, words)
        case Sized(bytes_max, is_secret, length_bytes, sized_words):
            raw = reader.sized(name, bytes_max, type_, is_secret=is_secret, wide=length_bytes)
            if sized_words is not None:
                reader.part_node.children[-1].meaning = sized_words(raw)
            return raw
        case Fixed(n_bytes, is_secret):
            return reader.take(name, n_bytes, type_, is_secret=is_secret)
        case Flag():
            return reader.flag(name)


def read_number(reader: Reader, name: str, type_: str) -> int:
    """Read one field of a type that is a number. Raises Fault."""
    match PRIMITIVES[type_]:
        case Number(n_bytes, words):
            return reader.number(name, n_bytes, type_, words)
        case Flag():
            return reader.flag(name)
        case Sized() | Fixed():
            raise TypeError(f"{type_} is no number")


def read_fields(reader: Reader, fields: Iterable[tuple[str, str]]) -> None:
    """Read the fields of a layout. Raises Fault."""
    for name, type_ in fields:
        read(reader, name, type_)
