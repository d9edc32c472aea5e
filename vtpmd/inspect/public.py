"""Public and sensitive areas of objects, selections of PCRs (TPM 2.0 Library, part 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vtpmd.inspect.layouts import OBJECT_PUBLIC_HEAD, SENSITIVE
from vtpmd.inspect.primitives import read, read_fields, read_number, selected, selected_words
from vtpmd.inspect.reader import Reader
from vtpmd.inspect.tree import Node
from vtpmd.inspect.words.algorithms import ALGORITHMS

SELECTIONS_MAX: Final = 16  # libtpms' HASH_COUNT is 4
SELECTION_BYTES_MAX: Final = 8

ERROR, RSA, KEYEDHASH, XOR, NULL = 0x0000, 0x0001, 0x0008, 0x000A, 0x0010
HMAC, RSAES, ECDAA, ECC, SYMCIPHER = 0x0005, 0x0015, 0x001A, 0x0023, 0x0025
TYPES: Final = (RSA, KEYEDHASH, ECC, SYMCIPHER)
# The schemes of keys that say a hash: TPMU_ASYM_SCHEME and TPMU_KDF_SCHEME.
HASH_SCHEMES: Final = {0x0007, 0x0014, *range(0x0016, 0x001E), 0x0020, 0x0021, 0x0022}
# The ciphers that have a key's size and a mode: TPMU_SYM_KEY_BITS.
CIPHERS: Final = {0x0003, 0x0006, 0x0013, 0x0026}


def read_public(reader: Reader, name: str) -> int:
    """Read a TPMT_PUBLIC; return its type. Raises Fault."""
    with reader.part(name, "TPMT_PUBLIC"):
        type_ = read_number(reader, "type", "TPM_ALG_ID")
        if type_ not in _PARAMETERS:
            raise reader.fault(f"an object's type is {type_:#06x}, which is none", reader.at - 2)
        read_fields(reader, OBJECT_PUBLIC_HEAD)
        with reader.part("parameters", "TPMU_PUBLIC_PARMS"):
            _PARAMETERS[type_](reader)
        _read_unique(reader, type_)
    return type_


def _read_unique(reader: Reader, type_: int) -> None:
    if type_ == ECC:
        with reader.part("unique", "TPMS_ECC_POINT"):
            read(reader, "x", "TPM2B_ECC_PARAMETER")
            read(reader, "y", "TPM2B_ECC_PARAMETER")
        return
    read(reader, "unique", "TPM2B_PUBLIC_KEY_RSA" if type_ == RSA else "TPM2B_DIGEST")


def _read_rsa(reader: Reader) -> None:
    read_cipher(reader, "symmetric", "TPMT_SYM_DEF_OBJECT")
    _read_scheme(reader, "scheme", "TPMT_RSA_SCHEME")
    read(reader, "key-bits", "UINT16")
    read(reader, "exponent", "UINT32")


def _read_ecc(reader: Reader) -> None:
    read_cipher(reader, "symmetric", "TPMT_SYM_DEF_OBJECT")
    _read_scheme(reader, "scheme", "TPMT_ECC_SCHEME")
    read(reader, "curve", "TPM_ECC_CURVE")
    _read_scheme(reader, "kdf", "TPMT_KDF_SCHEME")


def _read_symcipher(reader: Reader) -> None:
    read_cipher(reader, "symmetric", "TPMT_SYM_DEF_OBJECT")


def _read_keyedhash(reader: Reader) -> None:
    with reader.part("scheme", "TPMT_KEYEDHASH_SCHEME"):
        scheme = read_number(reader, "scheme", "TPM_ALG_ID")
        if scheme in (HMAC, XOR):
            read(reader, "hash", "TPM_ALG_ID")
        elif scheme != NULL:
            raise reader.fault(f"a keyed hash has scheme {scheme:#06x}", reader.at - 2)
        if scheme == XOR:
            read(reader, "kdf", "TPM_ALG_ID")


_PARAMETERS: Final[dict[int, Callable[[Reader], None]]] = {
    RSA: _read_rsa,
    ECC: _read_ecc,
    KEYEDHASH: _read_keyedhash,
    SYMCIPHER: _read_symcipher,
}


def _read_scheme(reader: Reader, name: str, type_: str) -> None:
    with reader.part(name, type_):
        scheme = read_number(reader, "scheme", "TPM_ALG_ID")
        if scheme in HASH_SCHEMES:
            read(reader, "hash", "TPM_ALG_ID")
        elif scheme not in (NULL, RSAES):
            raise reader.fault(f"a key has scheme {scheme:#06x}", reader.at - 2)
        if scheme == ECDAA:
            read(reader, "count", "UINT16")


def read_cipher(reader: Reader, name: str, type_: str) -> None:
    """Read a TPMT_SYM_DEF or a TPMT_SYM_DEF_OBJECT, which are alike. Raises Fault."""
    with reader.part(name, type_):
        cipher = read_number(reader, "algorithm", "TPM_ALG_ID")
        if cipher in CIPHERS:
            read(reader, "key-bits", "UINT16")
            read(reader, "mode", "TPM_ALG_ID")
        elif cipher == XOR:
            read(reader, "hash", "TPM_ALG_ID")
        elif cipher != NULL:
            raise reader.fault(f"a cipher is {cipher:#06x}, which is none", reader.at - 2)


def read_sensitive(reader: Reader, name: str) -> int:
    """Read a TPMT_SENSITIVE as libtpms keeps it; return its type. Raises Fault.

    Of an object that has a public area alone it is there, too, and empty.
    """
    with reader.part(name, "TPMT_SENSITIVE"):
        type_ = read_number(reader, "type", "TPM_ALG_ID")
        if type_ not in (*TYPES, ERROR):
            raise reader.fault(f"a sensitive area's type is {type_:#06x}", reader.at - 2)
        read_fields(reader, SENSITIVE)
        if type_ != ERROR:
            read(reader, "sensitive", "TPM2B_SENSITIVE_COMPOSITE")
    return type_


def read_selections(reader: Reader, name: str) -> None:
    """Read a TPML_PCR_SELECTION. Raises Fault."""
    with reader.part(name, "TPML_PCR_SELECTION"):
        count = reader.count("count", 4, SELECTIONS_MAX)
        for _ in range(count):
            # The algorithm is the selection's name, which is known once it is read.
            with reader.part("", "TPMS_PCR_SELECTION") as selection:
                algorithm = read_number(reader, "hash", "TPM_ALG_ID")
                n_bytes = reader.count("select-bytes", 1, SELECTION_BYTES_MAX)
                raw = reader.take("select", n_bytes, "BYTE")
                selection.name = bank_name(algorithm)
                selection.children[-1].meaning = selected_words(raw)


def bank_name(algorithm: int) -> str:
    """Return what a PCR bank is called."""
    return ALGORITHMS.get(algorithm, f"{algorithm:#06x}").lower()


def banks_of(selections: Node | None) -> dict[str, list[int]]:
    """Return the PCRs of each bank in a TPML_PCR_SELECTION; none of those that are off."""
    nodes = [] if selections is None else selections.children
    found = {node.name: selected(node.content("select")) for node in nodes if node.children}
    return {name: pcrs for name, pcrs in found.items() if pcrs}


def banks_words(banks: dict[str, list[int]]) -> str:
    """Say which PCRs of which banks these are."""
    words = []
    for bank, pcrs in banks.items():
        raw = sum(1 << pcr for pcr in pcrs).to_bytes(SELECTION_BYTES_MAX, "little")
        words.append(f"{bank} {selected_words(raw)}")
    return ", ".join(words) or "none"
