"""A TPM 1.2's keys, as libtpms keeps them: TPM_KEY and TPM_KEY12, with what is private in clear."""

from __future__ import annotations

from typing import Final

from vtpmd.inspect.primitives import read, read_fields, read_number
from vtpmd.inspect.reader import Reader
from vtpmd.inspect.tpm12 import layouts
from vtpmd.inspect.tpm12.structures import exactly, read_structure, read_tag
from vtpmd.inspect.words.tpm12 import ALGORITHMS

RSA: Final = 0x01
STRUCTURE_BYTES_MAX: Final = 4096  # of parameters, a PCR info, a private part: libtpms' buffer


def read_key(reader: Reader, name: str, *, is_endorsement: bool = False) -> None:
    """Read a key as TPM_Key_StoreClear() writes it. Raises Fault."""
    with reader.part(name, "TPM_KEY") as key:
        is_12 = reader.peek(1) == b"\0"
        if is_12:
            key.type = "TPM_KEY12"
            read_tag(reader, layouts.KEY12)
            read(reader, "fill", "UINT16")
        else:
            reader.take("version", 4, "TPM_STRUCT_VER")
        read_fields(reader, layouts.KEY_HEAD)
        read_parameters(reader)
        if not is_endorsement:
            _read_pcr_info(reader, is_12)
        read(reader, "public-key", "SIZED_BUFFER")
        with exactly(reader, "private", STRUCTURE_BYTES_MAX) as is_there:
            if is_there:
                _read_private(reader, is_endorsement)


def _read_private(reader: Reader, is_endorsement: bool) -> None:
    with reader.part("private", "TPM_STORE_ASYMKEY"):
        if not is_endorsement:
            read_fields(reader, layouts.PRIVATE_HEAD)
        read_fields(reader, layouts.PRIVATE_TAIL)


def read_parameters(reader: Reader) -> None:
    """Read TPM_KEY_PARMS. Raises Fault."""
    with reader.part("parameters", "TPM_KEY_PARMS"):
        algorithm = read_number(reader, "algorithm", "TPM_ALGORITHM_ID")
        read_fields(reader, layouts.KEY_PARAMETERS_HEAD[1:])
        with exactly(reader, "details", STRUCTURE_BYTES_MAX) as is_there:
            if not is_there:
                return
            if algorithm != RSA:
                word = ALGORITHMS.get(algorithm, f"{algorithm:#x}")
                raise reader.fault(f"a key of {word} has no parameters that are known")
            read_fields(reader, layouts.RSA_PARAMETERS)


def read_public_key(reader: Reader, name: str) -> None:
    """Read a TPM_PUBKEY. Raises Fault."""
    with reader.part(name, "TPM_PUBKEY"):
        read_parameters(reader)
        read(reader, "public-key", "SIZED_BUFFER")


def _read_pcr_info(reader: Reader, is_12: bool) -> None:
    with exactly(reader, "pcr-info", STRUCTURE_BYTES_MAX) as is_there:
        if is_there and is_12:
            tag, fields = layouts.PCR_INFO_LONG, layouts.PCR_INFO_LONG_FIELDS
            read_structure(reader, "pcr-info", tag, fields)
        elif is_there:
            with reader.part("pcr-info", "TPM_PCR_INFO"):
                read_fields(reader, layouts.PCR_INFO)


def read_key_entry(reader: Reader, name: str) -> None:
    """Read a key that has a handle. Raises Fault."""
    with reader.part(name, "TPM_KEY_HANDLE_ENTRY") as entry:
        handle = read_number(reader, "handle", "TPM12_HANDLE")
        entry.name = f"{handle:#010x}"
        read_key(reader, "key")
        read_fields(reader, layouts.KEY_ENTRY_TAIL)
