"""The sections that permanent and volatile states both have: orderly data, resets, PCRs, the DRBG.

Each function reads one, and raises Fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from typing import Final

from vtpmd.counted import counted
from vtpmd.inspect import layouts
from vtpmd.inspect.primitives import read, read_fields, read_number
from vtpmd.inspect.public import NULL, bank_name
from vtpmd.inspect.reader import Reader
from vtpmd.inspect.tree import Types
from vtpmd.inspect.words.algorithms import DIGEST_BYTES

GROUPS_MAX: Final = 64  # of PCRs with a policy, or an authorisation: libtpms has one of each
STATIC_PCRS_MAX: Final = 64  # that a Shutdown saves: libtpms has 16
BANKS_MAX: Final = 16
SESSIONS_MAX: Final = 1024  # MAX_ACTIVE_SESSIONS is 64
COMMIT_BYTES_MAX: Final = 256  # libtpms has 16
SEED_BYTES_MAX: Final = 256  # of the DRBG: libtpms has 48
LAST_VALUES_MAX: Final = 64  # of the DRBG: libtpms has 4
SLOT_BYTES_SHORT: Final = 1  # of a context array, up to version 3 of STATE_RESET_DATA
SLOT_BYTES: Final = 2

VERSION_WITH_BLOCKS: Final = 2  # from this one on, sections end with a block for later versions
CHECKSUM_BYTES: Final = 20  # libtpms' SHA-1 of what is before it


@contextmanager
def checksummed(reader: Reader) -> Iterator[None]:
    """Read what a checksum follows, and that."""
    with reader.within(max(reader.left - CHECKSUM_BYTES, 0)):
        yield
    checksum = reader.take("checksum", CHECKSUM_BYTES, "SHA1")
    if not has_checksum(reader.before(CHECKSUM_BYTES) + checksum):
        raise reader.fault("its checksum is not that of its bytes", reader.at - CHECKSUM_BYTES)


def has_checksum(state: bytes) -> bool:
    """Return whether a state ends with the checksum of what is before it."""
    digest = sha1(state[:-CHECKSUM_BYTES], usedforsecurity=False).digest()
    return state.endswith(digest)


def end_here(reader: Reader) -> None:
    """Raise Fault unless what is being read ends here."""
    if reader.left:
        raise reader.fault(f"{counted(reader.left, 'byte follows', 'bytes follow')} its end")


def read_orderly(reader: Reader) -> None:
    """Read ORDERLY_DATA: the clock, and the random number generator."""
    with reader.section("orderly-data", layouts.ORDERLY_DATA) as version:
        read(reader, "clock-ms", "UINT64")
        read(reader, "clock-safe", "BOOL")
        _read_drbg(reader)
        with reader.block("self-heal") as is_there:
            if is_there:
                read_fields(reader, layouts.SELF_HEAL_TIMERS)
        read_later(reader, version)


def _read_drbg(reader: Reader) -> None:
    with reader.section("drbg", layouts.DRBG_STATE) as version:
        read(reader, "reseed-counter", "UINT64")
        read(reader, "magic", "UINT32")
        n_bytes = reader.count("seed-bytes", 2, SEED_BYTES_MAX)
        reader.take("seed", n_bytes, "DRBG_SEED", is_secret=True)
        n_values = reader.count("last-values", 2, LAST_VALUES_MAX)
        reader.take("last-value", 4 * n_values, "UINT32[]", is_secret=True)
        read_later(reader, version)


def read_later(reader: Reader, version: int) -> None:
    """Read the block of later versions, which a section has from version 2 on."""
    if version >= VERSION_WITH_BLOCKS:
        reader.later()


def read_state_clear(reader: Reader) -> None:
    """Read STATE_CLEAR_DATA: what a Startup(CLEAR) makes anew."""
    with reader.section("state-clear", layouts.STATE_CLEAR_DATA) as version:
        read_fields(reader, layouts.STATE_CLEAR_HEAD)
        _read_saved_pcrs(reader)
        _read_pcr_auth(reader)
        read_later(reader, version)


def _read_saved_pcrs(reader: Reader) -> None:
    with reader.section("saved-pcrs", layouts.PCR_SAVE) as version:
        n_pcrs = reader.count("pcrs", 2, STATIC_PCRS_MAX)
        for _ in range(BANKS_MAX):
            algorithm = _read_bank_algorithm(reader)
            if algorithm == NULL:
                break
            with reader.part(bank_name(algorithm), Types.LIST):
                _read_bank(reader, algorithm, n_pcrs)
        read_later(reader, version)


def _read_bank_algorithm(reader: Reader) -> int:
    """Read which bank follows; NULL ends them."""
    is_last = reader.peek(2) == NULL.to_bytes(2, "big")
    name = "end" if is_last else f"{bank_name(int.from_bytes(reader.peek(2), 'big'))}-bank"
    return read_number(reader, name, "TPM_ALG_ID")


def _read_bank(reader: Reader, algorithm: int, n_pcrs: int) -> None:
    size = DIGEST_BYTES.get(algorithm)
    if size is None:
        raise reader.fault(f"a PCR bank is of algorithm {algorithm:#06x}, which is no hash")
    n_bytes = read_number(reader, "bytes", "UINT16")
    if n_bytes != n_pcrs * size:
        what = f"{counted(n_pcrs, 'PCR')} of {size} bytes have {counted(n_bytes, 'byte')}"
        raise reader.fault(what, reader.at - 2)
    for pcr in range(n_pcrs):
        reader.take(str(pcr), size, "DIGEST")


def _read_pcr_auth(reader: Reader) -> None:
    with reader.section("pcr-auth", layouts.PCR_AUTHVALUE) as version:
        count = reader.count("groups", 2, GROUPS_MAX)
        for group in range(count):
            read(reader, str(group), "TPM2B_AUTH")
        read_later(reader, version)


def read_state_reset(reader: Reader) -> None:
    """Read STATE_RESET_DATA: what a TPM Reset makes anew."""
    with reader.section("state-reset", layouts.STATE_RESET_DATA) as version:
        read_fields(reader, layouts.STATE_RESET_HEAD)
        count = reader.count("context-slots", 2, SESSIONS_MAX)
        slot_bytes = SLOT_BYTES if version >= 4 else SLOT_BYTES_SHORT
        reader.take("context-array", slot_bytes * count, f"UINT{8 * slot_bytes}[]")
        if version >= 4:
            read(reader, "context-slot-mask", "UINT16")
        read_fields(reader, layouts.STATE_RESET_COUNTS)
        with reader.block("commit") as is_there:
            if is_there:
                read_fields(reader, layouts.COMMIT)
                n_bytes = reader.count("array-bytes", 2, COMMIT_BYTES_MAX)
                reader.take("array", n_bytes, "BYTE[]")
        if version >= 2:
            with reader.block("version-3") as is_there:
                if is_there:
                    read(reader, "null-seed-level", "SEED_COMPAT_LEVEL")
                    reader.later()


def read_pcr_policies(reader: Reader) -> None:
    """Read PCR_POLICY: the policies of the groups of PCRs that have one."""
    with reader.section("policies", layouts.PCR_POLICY) as version:
        count = reader.count("groups", 2, GROUPS_MAX)
        for group in range(count):
            with reader.part(str(group), "PCR_POLICY"):
                read(reader, "algorithm", "TPM_ALG_ID")
                read(reader, "policy", "TPM2B_DIGEST")
        read_later(reader, version)


def read_pcr(reader: Reader, name: str) -> None:
    """Read PCR: one PCR's values, of all banks that libtpms was built with."""
    with reader.section(name, layouts.PCR) as version:
        for _ in range(BANKS_MAX):
            algorithm = _read_bank_algorithm(reader)
            if algorithm == NULL:
                break
            _read_value(reader, algorithm)
        read_later(reader, version)


def _read_value(reader: Reader, algorithm: int) -> None:
    size = DIGEST_BYTES.get(algorithm)
    if size is None:
        raise reader.fault(f"a PCR bank is of algorithm {algorithm:#06x}, which is no hash")
    name = bank_name(algorithm)
    n_bytes = read_number(reader, f"{name}-bytes", "UINT16")
    if n_bytes != size:
        raise reader.fault(f"a {name} digest has {counted(n_bytes, 'byte')}", reader.at - 2)
    reader.take(name, size, "DIGEST")
