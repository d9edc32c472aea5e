"""Journals written apart from the code under test, by the tables of docs/journal-format.md."""

import hashlib
import struct
from collections.abc import Sequence
from itertools import pairwise

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tests.support.image_digest import whole_digest
from vtpmd.core import Image
from vtpmd.core.delta import crc32c, delta_encode
from vtpmd.wire.tpm import EPOCH_GENERATIONS

SECTOR = 512
PAGE_SECTORS = 8
PART = SECTOR - 16
FILE_BYTES = 64 * 1024
HEADER = struct.Struct(">8sHHHH16s32sQII32s")


def digest(data: bytes) -> bytes:
    """Return a SHA-256."""
    return hashlib.sha256(data).digest()


def nonce(number: int) -> bytes:
    """Return the nonce of a record, or of the header: 0."""
    return number.to_bytes(12, "big")


def write_journal(
    images: Sequence[bytes],
    *,
    identity: bytes = bytes(16),
    salt: bytes = b"s" * 32,
    first_generation: int = 1,
    restored: int | None = None,
    secret: bytes | None = None,
    version: int = 2,
    times: Sequence[int] = (),
) -> bytearray:
    """Return a journal that continues the first image, with a record for each one after it.

    ``restored`` is which of them a restore epoch begins with; ``times`` are those of the records,
    in milliseconds since 1970, or none.
    """
    aead, is_first = None, version == 1
    if secret is not None:
        key = HKDF(algorithm=SHA256(), length=32, salt=salt, info=b"vtpmd journal 1")
        aead = AESGCM(key.derive(secret))
    base = images[0]
    head = HEADER.pack(
        b"VTPMJRNL",
        version,
        128,
        0,
        0 if aead is None else 1,
        identity,
        salt,
        first_generation,
        len(base),
        FILE_BYTES,
        digest(base) if is_first else whole_digest(base),
    )
    seal = bytes(16) if aead is None else aead.encrypt(nonce(0), b"", head)
    head = (head + seal).ljust(508, b"\0")
    file = bytearray(head + crc32c(head).to_bytes(4, "big"))
    link = digest(bytes(file))
    for number, (before, after) in enumerate(pairwise(images), start=1):
        was, now = (_generation(first_generation, restored, at) for at in (number - 1, number))
        delta = delta_encode(Image(1, was, before), Image(1, now, after))
        if times:
            delta = dated(delta, times[number - 1])
        if is_first:
            delta = _of_first_version(delta, before, after)
        content, link = _content(aead, number, link, delta)
        file += _record(len(file) // SECTOR, number, content)
    return file.ljust(FILE_BYTES, b"\0")


def _generation(first: int, restored: int | None, at: int) -> int:
    return first + at + (0 if restored is None or at < restored else EPOCH_GENERATIONS)


def dated(delta: bytes, ms: int) -> bytes:
    """Return a delta record without a time as one that has it."""
    head = delta[:6] + struct.pack(">HH", 112, 1) + delta[10:104] + ms.to_bytes(8, "big")
    checked = head + delta[104:-4]
    return checked + crc32c(checked).to_bytes(4, "big")


def _of_first_version(delta: bytes, before: bytes, after: bytes) -> bytes:
    """Return a delta record as version 1 has it."""
    head = delta[:4] + b"\1" + delta[5:40] + digest(before) + digest(after)
    checked = head + delta[len(head) : -4]
    return checked + crc32c(checked).to_bytes(4, "big")


def _content(aead: AESGCM | None, number: int, link: bytes, delta: bytes) -> tuple[bytes, bytes]:
    """Return a record's content, and its link."""
    length = len(delta).to_bytes(4, "big")
    if aead is None:
        link = digest(link + length + delta)
    else:
        sealed = aead.encrypt(nonce(number), delta, link + length)
        delta, link = sealed[:-16], sealed[-16:] + bytes(16)
    return length + link + delta, link


def _record(sector: int, number: int, content: bytes) -> bytes:
    """Return a record's sectors, and the empty ones before them; `sector` is the next free one."""
    n_sectors = -(-len(content) // PART)
    in_page = sector % PAGE_SECTORS
    empty = PAGE_SECTORS - in_page if in_page + n_sectors > PAGE_SECTORS >= n_sectors else 0
    record = bytearray(empty * SECTOR)
    for index in range(n_sectors):
        part = content[index * PART : (index + 1) * PART].ljust(PART, b"\0")
        frame = struct.pack(">HHQ", index, n_sectors, number) + part
        record += crc32c(frame).to_bytes(4, "big") + frame
    return bytes(record)
