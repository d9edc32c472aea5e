"""swtpm's encryption of a state: AES-CBC, then HMAC-SHA256 over ciphertext and IV, under one key.

The key has 16 or 32 bytes. The padding is PKCS#7's, but to a multiple of the key's length, and the
IV is as long as the key: AES uses its first 16 bytes, the HMAC covers all of them. One of 16 bytes
is taken with any key, as swtpm means to write no more than those. Sources: swtpm's ``swtpm_aes.c``
and ``swtpm_nvstore.c``, its pull request 1150; ``csrc/cipher.c`` does the same for the engine.

``cryptography`` and ``hmac`` are imported when a key is used: most vTPMs have none.
"""

from __future__ import annotations

from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Final

    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.modes import CBC

KEY_SIZES: Final = (16, 32)  # bytes: AES-128, AES-256
MAC_BYTES: Final = 32
DIGEST_BYTES: Final = 32
IV_BYTES_MAX: Final = max(KEY_SIZES)
PADDING_BYTES_MAX: Final = max(KEY_SIZES)
AES_BLOCK_BYTES: Final = 16


class DecryptionError(Exception):
    """What was to be decrypted was altered, or the key is another one."""


class Encrypted(NamedTuple):
    """An encrypted state, as its three TLVs carry it."""

    ciphertext: bytes
    mac: bytes
    iv: bytes


def encrypt(data: bytes | bytearray, *, key: bytes | bytearray, iv: bytes) -> Encrypted:
    """Encrypt ``data``; ``iv`` is random, never used before, and as long as the key."""
    import hmac

    if len(key) not in KEY_SIZES or len(iv) != len(key):
        raise ValueError(f"a key of {len(key)} bytes, an IV of {len(iv)}")
    padding = len(key) - len(data) % len(key)
    encryptor = _cipher(key, iv).encryptor()
    ciphertext = encryptor.update(b"".join((data, bytes([padding]) * padding)))
    ciphertext += encryptor.finalize()
    return Encrypted(ciphertext, hmac.digest(key, ciphertext + iv, "sha256"), iv)


def decrypt(encrypted: Encrypted, *, key: bytes | bytearray) -> bytes:
    """Return what was encrypted. Raises DecryptionError; the MAC is checked before all else."""
    import hmac

    ciphertext, mac, iv = encrypted
    expected = hmac.digest(key, ciphertext + iv, "sha256")
    # Without the lengths, what ends the ciphertext and what begins the IV could be moved about.
    if len(iv) not in (AES_BLOCK_BYTES, len(key)) or not hmac.compare_digest(mac, expected):
        raise DecryptionError
    if not ciphertext or len(ciphertext) % len(key):
        raise DecryptionError
    return _decrypt(ciphertext, key, iv)


def decrypt_old(ciphertext: bytes, *, key: bytes | bytearray) -> bytes:
    """Return what version 1 of swtpm's format encrypts: SHA-256 and data, under an IV of zeros.

    Raises DecryptionError.
    """
    import hashlib
    import hmac

    if not ciphertext or len(ciphertext) % len(key):
        raise DecryptionError
    opened = _decrypt(ciphertext, key, bytes(AES_BLOCK_BYTES))
    digest, data = opened[:DIGEST_BYTES], opened[DIGEST_BYTES:]
    if not hmac.compare_digest(digest, hashlib.sha256(data).digest()):
        raise DecryptionError
    return data


def _decrypt(ciphertext: bytes, key: bytes | bytearray, iv: bytes) -> bytes:
    decryptor = _cipher(key, iv).decryptor()
    padded = decryptor.update(ciphertext) + decryptor.finalize()
    padding = padded[-1]
    if not 1 <= padding <= len(key) or padded[-padding:] != bytes([padding]) * padding:
        raise DecryptionError
    return padded[:-padding]


def _cipher(key: bytes | bytearray, iv: bytes) -> Cipher[CBC]:
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CBC

    return Cipher(AES(key), CBC(iv[:AES_BLOCK_BYTES]))
