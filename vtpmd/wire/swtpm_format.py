"""swtpm's state files and state blobs: what libtpms marshalled, wrapped for disk or for the way.

    file:  header, TLV DATA (state)                              flags 0
    blob:  header, TLV MIGRATION_DATA (TLV DATA (state))         flags MIGRATION_DATA

A TLV LINEAGE may be the last, which swtpm does not look at.

With a key, the TLVs ENCRYPTED_DATA, HMAC and IVEC_ENCRYPTED_DATA stand in place of DATA, and the
flags say so. ``docs/state-format.md`` has the tables. Sources: swtpm's ``swtpm_nvstore.c`` and
``tlv.c``. With a migration key, ENCRYPTED_MIGRATION_DATA, HMAC and IVEC_ENCRYPTED_MIGRATION_DATA
stand in place of MIGRATION_DATA. Version 1 has no TLVs, and its files no header.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

from vtpmd.counted import counted
from vtpmd.errors import VtpmdError
from vtpmd.light_typing import NamedTuple
from vtpmd.wire.swtpm_encryption import (
    IV_BYTES_MAX,
    KEY_SIZES,
    MAC_BYTES,
    PADDING_BYTES_MAX,
    DecryptionError,
    Encrypted,
    decrypt,
    decrypt_old,
    encrypt,
)
from vtpmd.wire.tpm import GENERATION_GIVEN_MAX, Result

VERSION = 2
MINIMUM_VERSION = 1
# Of a file that a journal continues: no swtpm takes it for the state.
MINIMUM_VERSION_CONTINUED = 255

# swtpm's limit for a state blob. libtpms' largest has 143 KB.
BLOB_BYTES_MAX = 512 * 1024

# version, minimum version, header's size, flags, total length
HEADER = Struct(">BBHHI")
# tag, length
TLV = Struct(">HI")
# identity, generation
LINEAGE = Struct(">16sQ")

# What a bare state of a TPM 2.0 begins with, after two bytes of a version: libtpms' magics of its
# permanent and its volatile state (StateMarshal.c).
BARE_MAGIC_AT = 2
BARE_MAGICS = (bytes.fromhex("ab364723"), bytes.fromhex("45637889"))

# What encryption adds: padding, and the TLVs of HMAC and IV.
ENCRYPTION_BYTES_MAX = PADDING_BYTES_MAX + 2 * TLV.size + MAC_BYTES + IV_BYTES_MAX
LINEAGE_BYTES = TLV.size + LINEAGE.size
# What both wraps, a lineage and encryption leave of the control channel's limit: a state that fits
# a file can migrate.
STATE_BYTES_MAX = BLOB_BYTES_MAX - HEADER.size - 2 * TLV.size - ENCRYPTION_BYTES_MAX - LINEAGE_BYTES
FILE_BYTES_MAX = HEADER.size + TLV.size + STATE_BYTES_MAX + ENCRYPTION_BYTES_MAX + LINEAGE_BYTES


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
    SLEEPS = 0x5653
    LINEAGE = 0x5654


class Lineage(NamedTuple):
    """Where the state in a file stands in its vTPM's history; swtpm writes none."""

    identity: bytes  # 16 bytes
    generation: int
    continued: bool = False  # by a journal: the file alone is not the state


class FormatError(VtpmdError):
    """A state file or blob is not one; ``result`` is what the control channel answers."""

    def __init__(self, what: str, result: Result) -> None:
        super().__init__(what)
        self.result = result


class KeyNeeded(FormatError):
    """A state file or blob is encrypted, and there is no key for it."""

    def __init__(self, key: str) -> None:
        option = "--key" if key == "file" else "--migration-key"
        super().__init__(
            f"it is encrypted with swtpm's {key} key: give it with {option}", Result.KEYNOTFOUND
        )


class KeyWrong(FormatError):
    """A state file or blob does not open with the key that was given."""


class NotEncrypted(FormatError):
    """A state file is in the clear, but a key was given: anybody could have written it."""

    def __init__(self) -> None:
        super().__init__("it is not encrypted, but a key was given", Result.FAIL)


def encode_file(
    state: bytes | bytearray,
    lineage: Lineage | None = None,
    *,
    key: bytes | bytearray | None = None,
    iv: bytes = b"",
) -> bytes:
    """Return the file that holds a state, as libtpms marshalled it.

    With a ``key`` of 16 or 32 bytes it is encrypted; ``iv`` then has as many random bytes.
    """
    flags, body = _wrap(state, key, iv)
    is_continued = lineage is not None and lineage.continued
    minimum = MINIMUM_VERSION_CONTINUED if is_continued else MINIMUM_VERSION
    return _with_header(flags, body + _lineage_tlv(lineage), minimum)


def read_lineage(data: bytes) -> Lineage | None:
    """Return the lineage that a file has, or None if it is another program's.

    Raises FormatError.
    """
    if not _starts_with_header(data):
        return None
    version, _, body = _split_header(data, continued=True)
    is_continued = data[1] == MINIMUM_VERSION_CONTINUED
    found = _find_lineage(version, body)
    if found is None and is_continued:
        raise FormatError("a journal continues it, but not which", Result.BAD_PARAMETER)
    return None if found is None else found._replace(continued=is_continued)


def _lineage_tlv(lineage: Lineage | None) -> bytes:
    """Return the TLV of a lineage; nothing without one."""
    if lineage is None:
        return b""
    return _tlv(Tag.LINEAGE, LINEAGE.pack(lineage.identity, lineage.generation))


def _find_lineage(version: int, body: bytes) -> Lineage | None:
    """Return what a lineage's TLV holds; None without one."""
    if version < VERSION:
        return None
    try:
        found = _find(body, Tag.LINEAGE, skipped=tuple(_ENCRYPTED))
    except FormatError:
        return None
    return Lineage(*LINEAGE.unpack(found)) if len(found) == LINEAGE.size else None


def decode_file(data: bytes, *, key: bytes | bytearray | None = None) -> bytes:
    """Return the state that a file holds.

    A file whose header is not there is of version 1: bare state, which libtpms will check, or
    encrypted as that version did. With a ``key`` the file must be encrypted with it, as swtpm
    demands, too. Raises KeyNeeded, KeyWrong, NotEncrypted or FormatError.
    """
    if len(data) > FILE_BYTES_MAX:
        what = f"it has {len(data)} bytes; no state has more than {FILE_BYTES_MAX}"
        raise FormatError(what, Result.BAD_PARAMETER)
    if not _starts_with_header(data):
        version, flags, body = 1, 0, data
    else:
        version, flags, body = _split_header(data, continued=True)
    if key is not None:
        if not _is_encrypted(version, flags, body):
            raise NotEncrypted
        state = _decrypt(body, version, flags, key, _STATE)
    elif flags & HeaderFlag.ENCRYPTED:
        raise KeyNeeded("file")
    else:
        state = body if version < VERSION else _find(body, Tag.DATA)
    if not state:
        raise FormatError("it is empty", Result.BAD_PARAMETER)
    return state


def encode_blob(
    state: bytes | bytearray,
    lineage: Lineage | None = None,
    *,
    key: bytes | bytearray | None = None,
    iv: bytes = b"",
    migration_key: bytes | bytearray | None = None,
) -> bytes:
    """Return the blob that carries a state; ``key`` and ``iv`` are as for a file.

    With a ``migration_key`` there is an ``iv`` that is as long.
    """
    flags, inner = _wrap(state, key, iv[: len(key or b"")])
    flags |= HeaderFlag.MIGRATION_DATA
    if migration_key is None:
        body = _tlv(Tag.MIGRATION_DATA, inner)
    else:
        flags |= _MIGRATION.flags(migration_key)
        body = _seal(inner, migration_key, iv[: len(migration_key)], _MIGRATION)
    return _with_header(flags, body + _lineage_tlv(lineage))


def read_blob_lineage(data: bytes) -> Lineage | None:
    """Return the lineage that a blob has, or None if it is another program's.

    Raises FormatError.
    """
    version, _, body = _split_header(data)
    found = _find_lineage(version, body)
    if found is not None and found.generation > GENERATION_GIVEN_MAX:
        what = f"it is of generation {found.generation}, which is none"
        raise FormatError(what, Result.BAD_PARAMETER)
    return found


def decode_blob(
    data: bytes,
    *,
    encrypted: bool = False,
    key: bytes | bytearray | None = None,
    migration_key: bytes | bytearray | None = None,
) -> bytes:
    """Return the state that a blob carries: empty if the blob is, or is a header alone.

    ``encrypted`` is what the client says of it, with StateFlag.ENCRYPTED. A blob in the clear is
    taken with keys, too: it comes from QEMU, not from the disk. Raises KeyNeeded, KeyWrong or
    FormatError, with the result that swtpm gives for the same blob.
    """
    if not data:
        return b""
    version, flags, body = _split_header(data)
    if not body:
        return b""
    if flags & HeaderFlag.MIGRATION_ENCRYPTED and migration_key is None:
        raise KeyNeeded("migration")
    encrypted = encrypted or bool(flags & HeaderFlag.ENCRYPTED)
    if encrypted and key is None:
        raise KeyNeeded("file")
    if flags & HeaderFlag.MIGRATION_ENCRYPTED and migration_key is not None:
        inner = _decrypt(body, version, flags, migration_key, _MIGRATION)
    else:
        inner = _plain(body, version, Tag.MIGRATION_DATA)
    if encrypted and key is not None:
        return _decrypt(inner, version, flags, key, _STATE)
    return _plain(inner, version, Tag.DATA)


def _plain(data: bytes, version: int, tag: Tag) -> bytes:
    return data if version < VERSION else _find(data, tag)


def _wrap(state: bytes | bytearray, key: bytes | bytearray | None, iv: bytes) -> tuple[int, bytes]:
    """Return the flags for a state, and its TLVs."""
    if key is None:
        return 0, _tlv(Tag.DATA, state)
    return _STATE.flags(key), _seal(state, key, iv, _STATE)


class _Sealing(NamedTuple):
    """How something is encrypted."""

    data: Tag
    iv: Tag
    flag: HeaderFlag
    flag_256bit_key: HeaderFlag
    skipped: tuple[Tag, ...]  # the encrypted TLVs that may be before its HMAC and IV

    def flags(self, key: bytes | bytearray) -> int:
        return self.flag | (self.flag_256bit_key if len(key) == max(KEY_SIZES) else 0)


_STATE = _Sealing(
    *(Tag.ENCRYPTED_DATA, Tag.IVEC_ENCRYPTED_DATA),
    *(HeaderFlag.ENCRYPTED, HeaderFlag.ENCRYPTED_256BIT_KEY),
    (Tag.ENCRYPTED_DATA,),
)
_MIGRATION = _Sealing(
    *(Tag.ENCRYPTED_MIGRATION_DATA, Tag.IVEC_ENCRYPTED_MIGRATION_DATA),
    *(HeaderFlag.MIGRATION_ENCRYPTED, HeaderFlag.MIGRATION_256BIT_KEY),
    (Tag.ENCRYPTED_DATA, Tag.ENCRYPTED_MIGRATION_DATA),
)


def _seal(data: bytes | bytearray, key: bytes | bytearray, iv: bytes, sealing: _Sealing) -> bytes:
    encrypted = encrypt(data, key=key, iv=iv)
    tags = (sealing.data, Tag.HMAC, sealing.iv)
    return b"".join(_tlv(tag, each) for tag, each in zip(tags, encrypted, strict=True))


def _is_encrypted(version: int, flags: int, body: bytes) -> bool:
    if version < VERSION:
        return not body[BARE_MAGIC_AT:].startswith(BARE_MAGICS)
    # The flag is not authenticated: the tag of the first TLV says it, too.
    tag = int.from_bytes(body[:2], "big")
    return bool(flags & HeaderFlag.ENCRYPTED) or tag == Tag.ENCRYPTED_DATA


def _decrypt(
    body: bytes, version: int, flags: int, key: bytes | bytearray, sealing: _Sealing
) -> bytes:
    try:
        if version < VERSION:
            return decrypt_old(body, key=key)
        return decrypt(_find_encrypted(body, flags, key, sealing), key=key)
    except DecryptionError:
        what = "it does not open with this key: the key is another one, or it was altered"
        raise KeyWrong(what, Result.DECRYPT_ERROR) from None


def _find_encrypted(
    body: bytes, flags: int, key: bytes | bytearray, sealing: _Sealing
) -> Encrypted:
    key_bytes = max(KEY_SIZES) if flags & sealing.flag_256bit_key else min(KEY_SIZES)
    if len(key) != key_bytes:
        what = f"it is encrypted with a key of {8 * key_bytes} bits; the one given has "
        raise KeyWrong(f"{what}{8 * len(key)}", Result.BAD_KEY_PROPERTY)
    mac = _find(body, Tag.HMAC, skipped=sealing.skipped)
    if len(mac) != MAC_BYTES:
        raise FormatError(f"its HMAC has {counted(len(mac), 'byte')}, not {MAC_BYTES}", Result.FAIL)
    ciphertext = _find(body, sealing.data)
    return Encrypted(ciphertext, mac, _find(body, sealing.iv, skipped=sealing.skipped))


def _with_header(flags: int, body: bytes, minimum_version: int = MINIMUM_VERSION) -> bytes:
    total_bytes = HEADER.size + len(body)
    return HEADER.pack(VERSION, minimum_version, HEADER.size, flags, total_bytes) + body


def _tlv(tag: Tag, data: bytes | bytearray) -> bytes:
    return TLV.pack(tag, len(data)) + data


def _starts_with_header(data: bytes) -> bool:
    # Of a bare state these two bytes are the first of libtpms' magic, which no header's size is:
    # so a header that is there but damaged is told from none.
    return data[2:4] == HEADER.size.to_bytes(2, "big")


def _split_header(data: bytes, *, continued: bool = False) -> tuple[int, int, bytes]:
    """Return the version, the flags and what follows the header.

    It may be that of a file which a journal has ``continued``.
    """
    if len(data) < HEADER.size:
        what = f"it has {counted(len(data), 'byte')}; a header has {HEADER.size}"
        raise FormatError(what, Result.BAD_PARAMETER)
    version, minimum_version, header_bytes, flags, total_bytes = HEADER.unpack_from(data)
    if total_bytes != len(data):
        what = f"it has {len(data)} bytes, but its header says {total_bytes}"
        raise FormatError(what, Result.BAD_PARAMETER)
    if minimum_version > VERSION and not (
        continued and minimum_version == MINIMUM_VERSION_CONTINUED
    ):
        what = f"it needs format version {minimum_version}; vtpmd knows {VERSION}"
        raise FormatError(what, Result.BAD_VERSION)
    if header_bytes != HEADER.size:
        what = f"its header has {counted(header_bytes, 'byte')}, not {HEADER.size}"
        raise FormatError(what, Result.BAD_DATASIZE)
    return version, flags, data[HEADER.size :]


_ENCRYPTED = {Tag.ENCRYPTED_DATA: "file", Tag.ENCRYPTED_MIGRATION_DATA: "migration"}


def _find(data: bytes, wanted: Tag, skipped: tuple[Tag, ...] = ()) -> bytes:
    """Return the data of the first TLV with a tag; others before it are skipped.

    One that is encrypted is not, unless it is ``skipped``: it says which key is needed.
    """
    offset = 0
    while offset + TLV.size <= len(data):
        tag, length = TLV.unpack_from(data, offset)
        offset += TLV.size
        if length > len(data) - offset:
            left = counted(len(data) - offset, "is left", "are left")
            what = f"its TLV {tag} announces {counted(length, 'byte')}; {left}"
            raise FormatError(what, Result.FAIL)
        if tag == wanted:
            return data[offset : offset + length]
        if tag in _ENCRYPTED and tag not in skipped:
            raise KeyNeeded(_ENCRYPTED[tag])
        offset += length
    raise FormatError(f"it has no TLV {wanted.value} ({wanted.name})", Result.FAIL)
