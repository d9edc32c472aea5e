"""What a TPM 1.2 has in memory: libtpms' volatile state, and what TPM_SaveState keeps of it."""

from __future__ import annotations

from typing import Final

from vtpmd.inspect.primitives import read, read_fields
from vtpmd.inspect.reader import Reader
from vtpmd.inspect.sections import checksummed, end_here
from vtpmd.inspect.tpm12 import layouts
from vtpmd.inspect.tpm12.keys import read_key_entry
from vtpmd.inspect.tpm12.permanent import KEYS_MAX, NV_ENTRIES_MAX
from vtpmd.inspect.tpm12.structures import (
    read_delegate_public,
    read_list,
    read_structure,
    structure,
)

PCRS: Final = 24
PCRS_SAVED: Final = 16  # the others can be reset, and are not saved
SESSIONS_MAX: Final = 256  # of a kind: libtpms has 16
SAVED_SESSIONS: Final = 128  # as libtpms is built
RESPONSE_BYTES_MAX: Final = 4096


def read_volatile(reader: Reader) -> None:
    """Read a volatile state, and the checksum behind it. Raises Fault."""
    with checksummed(reader), structure(reader, "volatile-all", layouts.VOLATILE_ALL):
        read_structure(reader, "parameters", layouts.PARAMETERS, layouts.PARAMETERS_FIELDS)
        with structure(reader, "stclear-flags-version", layouts.STCLEAR_FLAGS_VERSION):
            pass
        _read_stclear_flags(reader)
        read_structure(reader, "stany-flags", layouts.STANY_FLAGS, layouts.STANY_FLAGS_FIELDS)
        _read_stclear_data(reader, PCRS)
        with structure(reader, "stany-data", layouts.STANY_DATA):
            read_structure(reader, "ticks", layouts.CURRENT_TICKS, layouts.TICKS)
        _read_keys(reader)
        for name in ("sha1-thread", "hash-interface"):
            _read_sha1_context(reader, name)
        read(reader, "transport-handle", "TPM12_HANDLE")
        read(reader, "test-state", "TPM_TEST_STATE")
        _read_nv_locks(reader)
        end_here(reader)


def read_savestate(reader: Reader) -> None:
    """Read a saved state, and the checksum behind it. Raises Fault."""
    with checksummed(reader), reader.part("saved", "SAVE_STATE"):
        _read_stclear_data(reader, PCRS_SAVED)
        _read_stclear_flags(reader)
        _read_keys(reader)
        _read_nv_locks(reader)
        end_here(reader)


def _read_stclear_flags(reader: Reader) -> None:
    flags = (layouts.STCLEAR_FLAGS, layouts.STCLEAR_FLAGS_FIELDS)
    read_structure(reader, "stclear-flags", *flags)


def _read_stclear_data(reader: Reader, n_pcrs: int) -> None:
    with structure(reader, "stclear-data", layouts.STCLEAR_DATA) as tag:
        read_fields(reader, layouts.STCLEAR_DATA_HEAD)
        read_list(reader, "pcrs", n_pcrs, _read_pcr)
        read_fields(reader, layouts.STCLEAR_DATA_MIDDLE)
        for name, read_one in (
            ("authorisation-sessions", _read_session),
            ("transport-sessions", _read_transport),
            ("daa-sessions", _read_daa),
        ):
            count = reader.count(f"{name}-count", 4, SESSIONS_MAX)
            read_list(reader, name, count, read_one)
        read_fields(reader, layouts.STCLEAR_DATA_TAIL)
        read_list(reader, "context-list", SAVED_SESSIONS, _read_number)
        read(reader, "audit-digest", "TPM_DIGEST")
        if tag == layouts.STCLEAR_WITH_RESPONSE:
            n_bytes = reader.count("response-bytes", 4, RESPONSE_BYTES_MAX)
            reader.take("response", n_bytes, "BYTE[]", is_secret=True)
            read(reader, "response-count", "UINT32")


def _read_pcr(reader: Reader, name: str) -> None:
    read(reader, name, "TPM_DIGEST")


def _read_number(reader: Reader, name: str) -> None:
    read(reader, name, "UINT32")


def _read_session(reader: Reader, name: str) -> None:
    with reader.part(name, "TPM_AUTH_SESSION_DATA"):
        read_fields(reader, layouts.AUTH_SESSION)
        read_delegate_public(reader, "delegation")


def _read_transport(reader: Reader, name: str) -> None:
    with structure(reader, name, layouts.TRANSPORT_INTERNAL):
        read(reader, "auth", "TPM_SECRET")
        public = (layouts.TRANSPORT_PUBLIC, layouts.TRANSPORT_PUBLIC_FIELDS)
        read_structure(reader, "public", *public)
        read_fields(reader, layouts.TRANSPORT_TAIL)


def _read_daa(reader: Reader, name: str) -> None:
    with reader.part(name, "TPM_DAA_SESSION_DATA"):
        read_structure(reader, "issuer", layouts.DAA_ISSUER, layouts.DAA_ISSUER_FIELDS)
        read_structure(reader, "tpm", layouts.DAA_TPM, layouts.DAA_TPM_FIELDS)
        read_structure(reader, "context", layouts.DAA_CONTEXT, layouts.DAA_CONTEXT_FIELDS)
        with reader.part("join", "TPM_DAA_JOINDATA"):
            read_fields(reader, layouts.DAA_JOIN)
        read(reader, "handle", "TPM12_HANDLE")


def _read_keys(reader: Reader) -> None:
    with structure(reader, "loaded-keys", layouts.KEY_ENTRIES):
        read_list(reader, "keys", reader.count("count", 4, KEYS_MAX), read_key_entry)


def _read_sha1_context(reader: Reader, name: str) -> None:
    """Read what a hash has computed so far: it tells of the message, which may be a secret."""
    with reader.part(name, "SHA1_CONTEXT"):
        if read(reader, "present", "BOOL"):
            read_structure(reader, "context", layouts.SHA1_CONTEXT, layouts.SHA1_CONTEXT_FIELDS)


def _read_nv_locks(reader: Reader) -> None:
    """Read which indices are locked until the next start; they are in the order of the others."""
    with structure(reader, "nv-locks", layouts.NV_LOCKS):
        count = reader.count("count", 4, NV_ENTRIES_MAX)
        read_list(reader, "locks", count, _read_lock)


def _read_lock(reader: Reader, name: str) -> None:
    with reader.part(name, "NV_LOCK"):
        read_fields(reader, layouts.NV_LOCK)
