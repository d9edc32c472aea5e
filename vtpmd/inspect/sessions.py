"""Authorisation sessions that a TPM has loaded."""

from __future__ import annotations

from typing import Final

from vtpmd.inspect import layouts
from vtpmd.inspect.primitives import read_fields
from vtpmd.inspect.public import read_cipher
from vtpmd.inspect.reader import Reader
from vtpmd.inspect.sections import read_later

EPOCH_BYTES_MAX: Final = 8


def read_session_slot(reader: Reader, name: str) -> None:
    """Read SESSION_SLOT. Raises Fault.

    A free one has no block for later versions.
    """
    with reader.section(name, layouts.SESSION_SLOT) as version:
        if reader.flag("occupied"):
            _read_session(reader)
            read_later(reader, version)


def _read_session(reader: Reader) -> None:
    with reader.section("session", layouts.SESSION) as version:
        read_fields(reader, layouts.SESSION_HEAD)
        read_epoch(reader, "epoch")
        read_fields(reader, layouts.SESSION_COMMAND)
        read_cipher(reader, "symmetric", "TPMT_SYM_DEF")
        read_fields(reader, layouts.SESSION_KEYS)
        read_later(reader, version)


def read_epoch(reader: Reader, name: str) -> None:
    """Read a number that tells one run of the clock from another, and its size. Raises Fault."""
    n_bytes = reader.count(f"{name}-bytes", 1, EPOCH_BYTES_MAX)
    reader.number(name, n_bytes, f"UINT{8 * n_bytes}")
