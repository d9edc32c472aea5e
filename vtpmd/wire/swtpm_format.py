"""swtpm's state files and state blobs: what libtpms marshalled, wrapped for disk or for the way.

    file:  header, TLV DATA (state) [, TLV LINEAGE]              flags 0
    blob:  header, TLV MIGRATION_DATA (TLV DATA (state))         flags MIGRATION_DATA

``docs/state-format.md`` has the tables. Sources: swtpm's ``swtpm_nvstore.c`` and ``tlv.c``.
Encrypted files and blobs are recognised and refused.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

from vtpmd.errors import VtpmdError
from vtpmd.wire.control import BLOB_BYTES_MAX, Result

VERSION = 2
MINIMUM_VERSION = 1
# Of a file that a journal continues: swtpm must not take it for the state.
MINIMUM_VERSION_CONTINUED = 255

# version, minimum version, header's size, flags, total length
HEADER = Struct(">BBHHI")
# tag, length
TLV = Struct(">HI")

# identity, generation
LINEAGE = Struct(">16sQ")

# What both wraps leave of the control channel's limit: a state that fits a file can migrate.
STATE_BYTES_MAX = BLOB_BYTES_MAX - HEADER.size - 2 * TLV.size
FILE_BYTES_MAX = HEADER.size + TLV.size + STATE_BYTES_MAX + TLV.size + LINEAGE.size


class HeaderFlag(IntFlag):
    """The flags of a header."""

    ENCRYPTED = 0x01
    MIGRATION_ENCRYPTED = 0x02
    MIGRATION_DATA = 0x04
    ENCRYPTED_256BIT_KEY = 0x08
    MIGRATION_256BIT_KEY = 0x10


class Tag(IntEnum):
    """The tags of a TLV."""

    DATA = 1
    ENCRYPTED_DATA = 2
    HMAC = 3
    MIGRATION_DATA = 4
    ENCRYPTED_MIGRATION_DATA = 5
    IVEC_ENCRYPTED_DATA = 6
    IVEC_ENCRYPTED_MIGRATION_DATA = 7
    LINEAGE = 0x5654  # vtpmd's own, behind what swtpm looks at


class Lineage(NamedTuple):
    """Where the state in a file stands in its vTPM's history."""

    identity: bytes
    generation: int
    continued: bool = False  # by a journal: the file alone is not the state


class FormatError(VtpmdError):
    """A state file or blob is not one; ``result`` is what the control channel answers."""

    def __init__(self, what: str, result: Result) -> None:
        super().__init__(what)
        self.result = result


class KeyNeeded(FormatError):
    """A state file or blob is encrypted."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"it is encrypted with swtpm's {key} key, which vtpmd cannot use; have swtpm write it "
            "without that key",
            Result.KEYNOTFOUND,
        )


def encode_file(state: bytes | bytearray, lineage: Lineage | None = None) -> bytes:
    """Return the file that holds a state, as libtpms marshalled it."""
    body = _tlv(Tag.DATA, state)
    if lineage is None:
        return _with_header(0, body)
    body += _tlv(Tag.LINEAGE, LINEAGE.pack(lineage.identity, lineage.generation))
    minimum = MINIMUM_VERSION_CONTINUED if lineage.continued else MINIMUM_VERSION
    return _with_header(0, body, minimum)


def decode_file(data: bytes) -> bytes:
    """Return the state that a file holds.

    A file whose header is not there is of version 1: bare state, which libtpms will check. Raises
    KeyNeeded or FormatError.
    """
    if len(data) > FILE_BYTES_MAX:
        what = f"it has {len(data)} bytes; no state has more than {FILE_BYTES_MAX}"
        raise FormatError(what, Result.BAD_PARAMETER)
    if not _starts_with_header(data):
        state = data
    else:
        version, flags, body = _split_header(data, may_be_continued=True)
        if flags & HeaderFlag.ENCRYPTED:
            raise KeyNeeded("file")
        state = body if version < VERSION else _find(body, Tag.DATA)
    if not state:
        raise FormatError("it is empty", Result.BAD_PARAMETER)
    return state


def read_lineage(data: bytes) -> Lineage | None:
    """Return the lineage that a file has, or None if it is another program's.

    Raises FormatError.
    """
    if not _starts_with_header(data):
        return None
    version, _, body = _split_header(data, may_be_continued=True)
    continued = data[1] == MINIMUM_VERSION_CONTINUED
    found = None if version < VERSION else _find_lineage(body)
    if found is None:
        if continued:
            raise FormatError("a journal continues it, but not which", Result.BAD_PARAMETER)
        return None
    identity, generation = LINEAGE.unpack(found)
    return Lineage(identity, generation, continued)


def encode_blob(state: bytes | bytearray) -> bytes:
    """Return the blob that carries a state, as libtpms marshalled it."""
    return _with_header(HeaderFlag.MIGRATION_DATA, _tlv(Tag.MIGRATION_DATA, _tlv(Tag.DATA, state)))


def decode_blob(data: bytes, *, encrypted: bool = False) -> bytes:
    """Return the state that a blob carries: empty if the blob is, or is a header alone.

    ``encrypted`` is what the client says of it, with StateFlag.ENCRYPTED. Raises KeyNeeded or
    FormatError, with the result that swtpm gives for the same blob.
    """
    if not data:
        return b""
    version, flags, body = _split_header(data)
    if not body:
        return b""
    if flags & HeaderFlag.MIGRATION_ENCRYPTED:
        raise KeyNeeded("migration")
    if encrypted or flags & HeaderFlag.ENCRYPTED:
        raise KeyNeeded("file")
    if version < VERSION:
        return body
    return _find(_find(body, Tag.MIGRATION_DATA), Tag.DATA)


def _with_header(flags: int, body: bytes, minimum: int = MINIMUM_VERSION) -> bytes:
    total_bytes = HEADER.size + len(body)
    return HEADER.pack(VERSION, minimum, HEADER.size, flags, total_bytes) + body


def _tlv(tag: Tag, data: bytes | bytearray) -> bytes:
    return TLV.pack(tag, len(data)) + data


def _starts_with_header(data: bytes) -> bool:
    # Of a bare state these two bytes are the first of libtpms' magic, which no header's size is:
    # so a header that is there but damaged is told from none.
    return data[2:4] == HEADER.size.to_bytes(2, "big")


def _split_header(data: bytes, *, may_be_continued: bool = False) -> tuple[int, int, bytes]:
    """Return the version, the flags and what follows the header."""
    if len(data) < HEADER.size:
        what = f"it has {len(data)} bytes; a header has {HEADER.size}"
        raise FormatError(what, Result.BAD_PARAMETER)
    version, minimum_version, header_bytes, flags, total_bytes = HEADER.unpack_from(data)
    if total_bytes != len(data):
        what = f"it has {len(data)} bytes, but its header says {total_bytes}"
        raise FormatError(what, Result.BAD_PARAMETER)
    continued = may_be_continued and minimum_version == MINIMUM_VERSION_CONTINUED
    if minimum_version > VERSION and not continued:
        what = f"it needs format version {minimum_version}; vtpmd knows {VERSION}"
        raise FormatError(what, Result.BAD_VERSION)
    if header_bytes != HEADER.size:
        what = f"its header has {header_bytes} bytes, not {HEADER.size}"
        raise FormatError(what, Result.BAD_DATASIZE)
    return version, flags, data[HEADER.size :]


_ENCRYPTED = {Tag.ENCRYPTED_DATA: "file", Tag.ENCRYPTED_MIGRATION_DATA: "migration"}


def _find(data: bytes, wanted: Tag) -> bytes:
    """Return the data of the first TLV with a tag; others before it are skipped."""
    offset = 0
    while offset + TLV.size <= len(data):
        tag, length = TLV.unpack_from(data, offset)
        offset += TLV.size
        if length > len(data) - offset:
            what = f"its TLV {tag} announces {length} bytes; {len(data) - offset} are left"
            raise FormatError(what, Result.FAIL)
        if tag == wanted:
            return data[offset : offset + length]
        if tag in _ENCRYPTED:
            raise KeyNeeded(_ENCRYPTED[tag])
        offset += length
    raise FormatError(f"it has no TLV {wanted.value} ({wanted.name})", Result.FAIL)


def _find_lineage(data: bytes) -> bytes | None:
    """Return the data of the lineage, of the right length, or None: what is behind is not ours."""
    offset = 0
    while offset + TLV.size <= len(data):
        tag, length = TLV.unpack_from(data, offset)
        found = data[offset + TLV.size : offset + TLV.size + length]
        if tag == Tag.LINEAGE and len(found) == length == LINEAGE.size:
            return found
        offset += TLV.size + length
    return None
