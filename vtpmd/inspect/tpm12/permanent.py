"""libtpms' permanent state of a TPM 1.2: what TPM_PermanentAll_Store() writes."""

from __future__ import annotations

from typing import Final

from vtpmd.inspect.primitives import read, read_fields, read_number
from vtpmd.inspect.reader import Reader
from vtpmd.inspect.sections import checksummed, end_here
from vtpmd.inspect.tpm12 import layouts
from vtpmd.inspect.tpm12.keys import read_key, read_key_entry, read_public_key
from vtpmd.inspect.tpm12.structures import (
    read_delegate_public,
    read_list,
    read_pcr_info,
    read_structure,
    read_tag,
    structure,
)
from vtpmd.inspect.tree import Node
from vtpmd.inspect.words.tpm12 import NV_ATTRIBUTES, ORDINALS

# As libtpms is built (its configure.ac); the volatile state says so, too, and it takes no other.
COUNTERS: Final = 8
FAMILIES: Final = 16
DELEGATIONS: Final = 4
ORDINAL_BYTES: Final = 32  # a bit for each ordinal
KEYS_MAX: Final = 64  # TPM_KEY_HANDLES is 3
NV_ENTRIES_MAX: Final = 4096  # an entry has some 60 bytes, and the whole state less than 100000
NV_DATA_BYTES_MAX: Final = 128 * 1024  # TPM_MAX_NV_SPACE is 100000
GPIO: Final = range(0x0001_1600, 0x0001_1700)  # an index that has no memory

_BITS: Final = {name: 1 << bit for bit, name in NV_ATTRIBUTES.items()}
OWNER_READ, AUTH_READ = _BITS["OWNERREAD"], _BITS["AUTHREAD"]


def read_permanent(reader: Reader) -> None:
    """Read a permanent state, and the checksum behind it. Raises Fault."""
    with checksummed(reader), structure(reader, "permanent-all", layouts.PERMANENT_ALL):
        owner_auth_is_empty = _read_data(reader)
        with structure(reader, "permanent-flags", layouts.PERMANENT_FLAGS):
            read(reader, "flags", "TPM_PERMANENT_FLAGS")
        with structure(reader, "owner-evict-keys", layouts.OWNER_EVICT_KEYS):
            read_list(reader, "keys", reader.count("count", 2, KEYS_MAX), read_key_entry)
        _read_nv(reader, owner_auth_is_empty)
        end_here(reader)


def _read_data(reader: Reader) -> bool:
    """Read TPM_PERMANENT_DATA; return whether there is an owner, of the well-known secret.

    Raises Fault.
    """
    with structure(reader, "permanent-data", layouts.PERMANENT_DATA):
        data = reader.part_node
        read_fields(reader, layouts.PERMANENT_DATA_HEAD)
        if read(reader, "has-maintenance-key", "BOOL"):
            read_public_key(reader, "maintenance-key")
        read_key(reader, "endorsement-key", is_endorsement=True)
        read_key(reader, "srk")
        for name in ("context-key", "delegate-key"):
            _read_symmetric_key(reader, name)
        _read_counter(reader, "audit-counter")
        read_list(reader, "counters", COUNTERS, _read_counter)
        _read_ordinals(reader)
        read_list(reader, "families", FAMILIES, _read_family)
        read_list(reader, "delegations", DELEGATIONS, _read_delegation)
        read_fields(reader, layouts.PERMANENT_DATA_TAIL)
        _read_symmetric_key(reader, "daa-blob-key")
    return bool(data.at("owner-installed")) and not any(data.content("owner-auth"))


def _read_symmetric_key(reader: Reader, name: str) -> None:
    with reader.part(name, "TPM_SYMMETRIC_KEY_DATA"):
        read_fields(reader, layouts.SYMMETRIC_KEY)


def _read_counter(reader: Reader, name: str) -> None:
    read_structure(reader, name, layouts.COUNTER_VALUE, layouts.COUNTER)


def _read_ordinals(reader: Reader) -> None:
    raw = reader.take("audited-ordinals", ORDINAL_BYTES, "ORDINALS")
    set_bits = [bit for bit in range(8 * ORDINAL_BYTES) if raw[bit // 8] >> bit % 8 & 1]
    reader.part_node.children[-1].meaning = " ".join(
        ORDINALS.get(bit, f"{bit:#04x}") for bit in set_bits
    )


def _read_family(reader: Reader, name: str) -> None:
    with reader.part(name, "TPM_FAMILY_TABLE_ENTRY"):
        read_fields(reader, layouts.FAMILY)


def _read_delegation(reader: Reader, name: str) -> None:
    with structure(reader, name, layouts.DELEGATE_ROW):
        read_delegate_public(reader, "public")
        read_fields(reader, layouts.DELEGATE_ROW_TAIL)


def _read_nv(reader: Reader, owner_auth_is_empty: bool) -> None:
    with structure(reader, "nv", layouts.NV_ENTRIES) as version:
        has_unused_digests = version < layouts.NV_WITHOUT_UNUSED_DIGESTS
        for _ in range(reader.count("count", 4, NV_ENTRIES_MAX)):
            _read_index(reader, has_unused_digests, owner_auth_is_empty)


def _read_index(reader: Reader, has_unused_digests: bool, owner_auth_is_empty: bool) -> None:
    """Read an index. Its content is a secret unless who knows no secret can read it."""
    with reader.part("entry", layouts.NV_DATA_SENSITIVE.type) as entry:
        read_tag(reader, layouts.NV_DATA_SENSITIVE)
        public = _read_public(reader, has_unused_digests, entry)
        auth = read(reader, "auth", "TPM_SECRET")
        n_bytes = public.number("data-size") or 0
        if public.number("index") in GPIO or not n_bytes:
            return
        attributes = public.number("permission", "attributes") or 0
        is_open = not attributes & (OWNER_READ | AUTH_READ)
        is_open = is_open or bool(attributes & OWNER_READ and owner_auth_is_empty)
        is_open = is_open or bool(attributes & AUTH_READ and auth == bytes(20))
        reader.take("data", n_bytes, "BYTE[]", is_secret=not is_open)


def _read_public(reader: Reader, has_unused_digests: bool, entry: Node) -> Node:
    with structure(reader, "public", layouts.NV_DATA_PUBLIC):
        public = reader.part_node
        index = read_number(reader, "index", "TPM_NV_INDEX")
        entry.name = f"{index:#010x}"
        for name in ("pcr-read", "pcr-write"):
            read_pcr_info(reader, name, has_unused_digest=has_unused_digests)
        with structure(reader, "permission", layouts.NV_ATTRIBUTES):
            read(reader, "attributes", "TPMA12_NV")
        read_fields(reader, layouts.NV_PUBLIC_TAIL)
        reader.count("data-size", 4, NV_DATA_BYTES_MAX)
    return public
