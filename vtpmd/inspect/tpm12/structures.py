"""What a TPM 1.2's states have in common: tags, lengths of 32 bits, PCRs, NV permissions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vtpmd.inspect.primitives import Fields, read, read_fields, read_number
from vtpmd.inspect.reader import Reader
from vtpmd.inspect.sections import end_here
from vtpmd.inspect.tpm12 import layouts
from vtpmd.inspect.tpm12.layouts import Tag
from vtpmd.inspect.tree import Node, Types


def read_tag(reader: Reader, tag: Tag) -> int:
    """Read what a structure begins with, and return it. Raises Fault for anything else."""
    number = read_number(reader, "tag", "UINT16")
    if number in tag.numbers:
        return number
    is_newer = tag.is_version and number > tag.numbers[-1]
    if is_newer:
        what = f"{tag.type} is of version {number}, a later one than is known here"
    else:
        what = f"no {tag.type} begins here: its tag is {number:#06x}"
    raise reader.fault(what, reader.at - 2, is_newer=is_newer)


@contextmanager
def structure(reader: Reader, name: str, tag: Tag) -> Iterator[int]:
    """Read a structure that begins with a tag, which is given. Raises Fault."""
    with reader.part(name, tag.type):
        yield read_tag(reader, tag)


def read_structure(reader: Reader, name: str, tag: Tag, fields: Fields) -> None:
    """Read a structure that has a tag and these fields. Raises Fault."""
    with structure(reader, name, tag):
        read_fields(reader, fields)


@contextmanager
def exactly(reader: Reader, name: str, bytes_max: int) -> Iterator[bool]:
    """Read a length of 32 bits, and what has it, if it is not 0: that is given.

    A fault in it costs the rest of it alone.
    """
    n_bytes = reader.count(f"{name}-bytes", 4, min(bytes_max, max(reader.left - 4, 0)))
    with reader.within(n_bytes):
        yield n_bytes > 0
        end_here(reader)


def read_list(
    reader: Reader, name: str, count: int, read_one: Callable[[Reader, str], None]
) -> Node:
    """Read so many of something, one after the other; each is called by its number."""
    with reader.part(name, Types.LIST) as found:
        for number in range(count):
            read_one(reader, str(number))
    return found


def read_pcr_info(reader: Reader, name: str, *, has_unused_digest: bool = True) -> None:
    """Read TPM_PCR_INFO_SHORT: what PCRs have to be for something. Raises Fault."""
    with reader.part(name, "TPM_PCR_INFO_SHORT"):
        selection = read(reader, "selection", "TPM_PCR_SELECTION")
        read(reader, "locality-at-release", "TPM_LOCALITY_SELECTION")
        is_used = isinstance(selection, bytes) and any(selection)
        if is_used or has_unused_digest:
            read(reader, "digest-at-release", "TPM_DIGEST")


def read_delegate_public(reader: Reader, name: str) -> None:
    """Read TPM_DELEGATE_PUBLIC. Raises Fault."""
    with structure(reader, name, layouts.DELEGATE_PUBLIC):
        read(reader, "label", "UINT8")
        read_pcr_info(reader, "pcr-info")
        read_structure(reader, "permissions", layouts.DELEGATIONS, layouts.DELEGATIONS_FIELDS)
        read_fields(reader, layouts.DELEGATE_PUBLIC_TAIL)
