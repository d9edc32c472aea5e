"""The sealed tail: what QEMU's own stream carries in place of the permanent blob.

    Offset  Size  Field
    0       8     magic, "VTPMTAIL"
    8       2     version, 3
    10      2     incompatible flags, 0
    12      16    session
    28      8     permanent: generation that the destination has acknowledged
    36      8     permanent: generation that the tail makes of it
    44      8     volatile: generation that the destination has acknowledged
    52      8     volatile: generation that the tail makes of it
    60      12    nonce
    72      …     AES-256-GCM of: u8 power, u32 length and delta record (permanent), the same
                  (volatile)
    end-16  16    its tag

All numbers are big-endian. A length of 0 means that the image has not changed; power is what the
guest's last TPM2_Shutdown said (0: none since its TPM2_Startup, 1: CLEAR, 2: STATE). Associated
data are bytes 0 to 71, the VM's uuid and the vTPM's lineage: a tail of another session, another
vTPM or other generations does not open. The key is made for the session and sent over TLS.

The nonce is the beginning of an HMAC-SHA256 of all that is sealed and associated, with a key that
is derived from the session's: two tails have one nonce only if they are the same tail. So both
sides make the same bytes of the same tail, and the destination knows ahead of time the tail that
says that it has all.
"""

from __future__ import annotations

import hmac
from struct import Struct
from typing import Final, NamedTuple

MAGIC: Final = b"VTPMTAIL"
VERSION: Final = 3
HEADER: Final = Struct(">8sHH16sQQQQ12s")
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
POWER_MAX: Final = 2  # enum link_shutdown of csrc/engine/link.cdef.h
# Two images of the largest size, each sent whole, and their headers.
TAIL_BYTES_MAX: Final = 512 * 1024

_LENGTH: Final = Struct(">I")
_NONCE_LABEL: Final = b"vtpmd tail nonce"


class TailError(Exception):
    """A tail that does not open, in words for a person. Nothing of it has been used."""


class Header(NamedTuple):
    """What a tail says in the clear, and what seals its content."""

    session: bytes
    permanent_from: int
    permanent_to: int
    volatile_from: int
    volatile_to: int

    @classmethod
    def between(cls, session: bytes, before: tuple[int, int], after: tuple[int, int]) -> Header:
        """Return that of a tail from some generations, permanent and volatile, to others."""
        return cls(session, before[0], after[0], before[1], after[1])


class Tail(NamedTuple):
    """What changed since the destination's last acknowledgement."""

    header: Header
    power: int
    permanent: bytes  # delta record; empty: unchanged
    volatile: bytes

    def __repr__(self) -> str:
        """Leave the state out."""
        return f"Tail({self.header!r}, <{len(self.permanent)}+{len(self.volatile)} bytes>)"


def is_tail(blob: bytes) -> bool:
    """Tell a tail from a state blob: swtpm's begins with a version below ten."""
    return blob.startswith(MAGIC)


class TailCipher:
    """Seals and opens the tail of one session, of one vTPM.

    It is made before the guest stands still, as that takes longer than using it.
    """

    def __init__(self, *, key: bytes, uuid: bytes, lineage: bytes) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._whose = uuid + lineage
        self._nonce_key = hmac.digest(key, _NONCE_LABEL, "sha256")
        self._cipher = AESGCM(key)
        self._forged: type[Exception] = InvalidTag
        # Code is fetched when it runs first: with another key, as a nonce serves once.
        other, nonce = AESGCM(bytes(len(key))), bytes(NONCE_BYTES)
        other.decrypt(nonce, other.encrypt(nonce, b"", nonce), nonce)

    def seal(self, tail: Tail) -> bytes:
        """Return the bytes of a tail. Raises TailError for one that nobody would take."""
        content = bytes([tail.power]) + b"".join(
            _LENGTH.pack(len(record)) + record for record in (tail.permanent, tail.volatile)
        )
        n_bytes = HEADER.size + len(content) + TAG_BYTES
        if n_bytes > TAIL_BYTES_MAX:
            raise TailError(f"the tail would have {n_bytes} bytes, more than {TAIL_BYTES_MAX}")
        head = HEADER.pack(MAGIC, VERSION, 0, *tail.header, bytes(NONCE_BYTES))
        mac = hmac.digest(self._nonce_key, head + self._whose + content, "sha256")
        head = head[:-NONCE_BYTES] + mac[:NONCE_BYTES]
        return head + self._cipher.encrypt(mac[:NONCE_BYTES], content, head + self._whose)

    def open(self, data: bytes, session: bytes) -> Tail:
        """Return the tail that ``data`` is. Raises TailError; then nothing in it may be used."""
        if not HEADER.size + TAG_BYTES <= len(data) <= TAIL_BYTES_MAX:
            raise TailError(f"the tail has {len(data)} bytes: it was cut, or is none")
        magic, version, flags, *fields, nonce = HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION or flags:
            raise TailError(
                f"the tail is of format {version}, flags {flags:#x}; this vtpmd knows {VERSION}, 0"
            )
        header = Header(*fields)
        if header.session != session:
            raise TailError("the tail is of another session: it is an old one, or another vTPM's")
        head = data[: HEADER.size]
        try:
            content = self._cipher.decrypt(nonce, data[HEADER.size :], head + self._whose)
        except self._forged:
            raise TailError("the tail was altered on its way, or is for another VM") from None
        permanent, rest = _take_record(content[1:])
        volatile, rest = _take_record(rest)
        if rest:
            raise TailError(f"the tail has {len(rest)} bytes more than its records")
        if content[0] > POWER_MAX:
            raise TailError(f"the tail says {content[0]} of the guest's last TPM2_Shutdown")
        return Tail(header, content[0], permanent, volatile)


def _take_record(content: bytes) -> tuple[bytes, bytes]:
    if len(content) < _LENGTH.size:
        raise TailError("the tail ends before its records do")
    (length,) = _LENGTH.unpack_from(content)
    end = _LENGTH.size + length
    if length > len(content) - _LENGTH.size:
        raise TailError("the tail ends before its records do")
    return content[_LENGTH.size : end], content[end:]
