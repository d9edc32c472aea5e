"""The TPM's user NV memory: indices, persistent objects, and the RAM of orderly indices."""

from __future__ import annotations

from typing import Final

from vtpmd.counted import counted
from vtpmd.inspect import layouts
from vtpmd.inspect.objects import read_slot
from vtpmd.inspect.primitives import nv_type, nv_words, read, read_fields, read_number
from vtpmd.inspect.reader import Order, Reader
from vtpmd.inspect.sections import read_later
from vtpmd.inspect.tree import Node, Types
from vtpmd.inspect.words.handles import HANDLE_TYPE_SHIFT, HT_NV_INDEX, HT_PERSISTENT

ENTRIES_MAX: Final = 4096  # 128 KiB of indices with nothing in them are fewer
INDEX_BYTES_MAX: Final = 64 * 1024  # MAX_NV_INDEX_SIZE is 2048
RAM_BYTES_MAX: Final = 64 * 1024  # RAM_INDEX_SPACE is 512
RAM_HEADER_BYTES: Final = 12  # size, handle, attributes

OWNER_READ, AUTH_READ = 1 << 17, 1 << 18
# What says nothing but how far something has gone.
PUBLIC_TYPES: Final = ("counter", "bits", "extend")


def read_user_nvram(reader: Reader, *, owner_auth_is_empty: bool) -> None:
    """Read USER_NVRAM. Raises Fault.

    The content of an index is a secret unless who knows no authorisation can read it.
    """
    with reader.section("user-nvram", layouts.USER_NVRAM) as version:
        read(reader, "memory-bytes", "UINT64")
        with reader.part("entries", Types.LIST):
            for _ in range(ENTRIES_MAX):
                if reader.peek(4) == bytes(4):
                    break
                _read_entry(reader, owner_auth_is_empty)
            read(reader, "end", "UINT32")
        read(reader, "counter-max", "UINT64")
        read_later(reader, version)


def _read_entry(reader: Reader, owner_auth_is_empty: bool) -> None:
    with reader.part("entry", "NV_ENTRY") as entry:
        read(reader, "entry-bytes", "UINT32")
        handle = read_number(reader, "handle", "TPM_HANDLE")
        entry.name = f"{handle:#010x}"
        kind = handle >> HANDLE_TYPE_SHIFT
        if kind == HT_NV_INDEX:
            _read_index(reader, owner_auth_is_empty)
        elif kind == HT_PERSISTENT:
            read_slot(reader, "slot")
        else:
            what = f"NV memory has an entry of handle {handle:#010x}, of no type that it holds"
            raise reader.fault(what, reader.at - 4)


def _read_index(reader: Reader, owner_auth_is_empty: bool) -> None:
    with reader.section("index", layouts.NV_INDEX) as version:
        public = _read_nv_public(reader)
        auth = read(reader, "auth", "TPM2B_AUTH")
        read_later(reader, version)
    attributes = public.number("attributes") or 0
    n_bytes = reader.count("data-bytes", 4, INDEX_BYTES_MAX)
    if n_bytes:
        is_open = attributes & AUTH_READ and not auth
        is_open = is_open or (attributes & OWNER_READ and owner_auth_is_empty)
        is_secret = not is_open and nv_type(attributes) not in PUBLIC_TYPES
        reader.take("data", n_bytes, "BYTE[]", is_secret=is_secret)


def _read_nv_public(reader: Reader) -> Node:
    with reader.part("public", "TPMS_NV_PUBLIC") as public:
        read_fields(reader, layouts.NV_PUBLIC)
    return public


def read_orderly_ram(reader: Reader) -> None:
    """Read INDEX_ORDERLY_RAM: orderly indices as a permanent state has them. Raises Fault."""
    with reader.section("orderly-ram", layouts.INDEX_ORDERLY_RAM) as version:
        ram_bytes = reader.count("ram-bytes", 4, RAM_BYTES_MAX)
        with reader.part("entries", Types.LIST):
            used = 0
            # Where no other header has room there is none, and no end either.
            while used + RAM_HEADER_BYTES <= ram_bytes:
                if reader.peek(4) == bytes(4):
                    read(reader, "end", "UINT32")
                    break
                used += _read_orderly_entry(reader)
        read_later(reader, version)


def _read_orderly_entry(reader: Reader) -> int:
    with reader.part("entry", "NV_RAM_ENTRY") as entry:
        read(reader, "entry-bytes", "UINT32")
        handle = read_number(reader, "handle", "TPM_HANDLE")
        entry.name = f"{handle:#010x}"
        attributes = read_number(reader, "attributes", "TPMA_NV")
        n_bytes = reader.count("data-bytes", 2, RAM_BYTES_MAX)
        _take_ram_data(reader, attributes, n_bytes)
    return RAM_HEADER_BYTES + n_bytes


def _take_ram_data(reader: Reader, attributes: int, n_bytes: int) -> None:
    if n_bytes:
        is_secret = nv_type(attributes) not in PUBLIC_TYPES
        reader.take("data", n_bytes, "BYTE[]", is_secret=is_secret)


def read_ram_image(reader: Reader, name: str, n_bytes: int) -> None:
    """Read orderly indices as they are in memory, in that machine's order of bytes. Raises Fault.

    A header of size 0 ends them; what is behind it was used before.
    """
    end = reader.at + n_bytes
    with reader.part(name, Types.LIST):
        order = _order(reader.peek(4), n_bytes)
        while end - reader.at >= RAM_HEADER_BYTES and any(reader.peek(4)):
            _read_image_entry(reader, order, end)
        if end > reader.at:
            is_used = any(reader.peek(end - reader.at))
            reader.take("unused", end - reader.at, Types.UNUSED, is_secret=is_used)


def _order(first: bytes, n_bytes: int) -> Order:
    return "little" if int.from_bytes(first, "little") <= n_bytes else "big"


def _read_image_entry(reader: Reader, order: Order, end: int) -> None:
    with reader.part("entry", "NV_RAM_ENTRY") as entry:
        size = reader.number("entry-bytes", 4, "UINT32", None, order)
        if not RAM_HEADER_BYTES <= size <= end - reader.at + 4:
            raise reader.fault(f"an orderly index has {counted(size, 'byte')}", reader.at - 4)
        handle = reader.number("handle", 4, "TPM_HANDLE", None, order)
        entry.name = f"{handle:#010x}"
        attributes = reader.number("attributes", 4, "TPMA_NV", nv_words, order)
        _take_ram_data(reader, attributes, size - RAM_HEADER_BYTES)
