"""What seals a file of vtpmd's own that holds state: two keys, made for that one file.

Both are derived from the directory's key and the file's 32 random bytes (HKDF-SHA256): one for
AES-256-GCM, one for HMAC-SHA256 over what stays readable. A nonce is 12 random bytes; one file gets
some thousands at most, far below the 2^32 after which two of a key's could meet.
"""

from __future__ import annotations

import hmac
import os
from typing import Final

from vtpmd.store.keys import INFO_INCOMING, INFO_INCOMING_HEAD, Key

SALT_BYTES: Final = 32
MAC_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16


class SealBroken(Exception):
    """What was sealed was altered, or is of another file or place in it."""


class Sealing:
    """The keys of one file for incoming states."""

    def __init__(self, key: Key, salt: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._mac_key = key.derive(INFO_INCOMING_HEAD, salt)
        self._cipher = AESGCM(key.derive(INFO_INCOMING, salt))

    def mac(self, head: bytes) -> bytes:
        """Return what shows that ``head`` is as it was written."""
        return hmac.digest(self._mac_key, head, "sha256")

    def seal(self, state: bytes, place: bytes) -> bytes:
        """Return a state, sealed so that it opens at no other ``place``."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, state, place)

    def open(self, sealed: bytes, place: bytes) -> bytes:
        """Return what was sealed for a place. Raises SealBroken."""
        from cryptography.exceptions import InvalidTag

        if len(sealed) < NONCE_BYTES + TAG_BYTES:
            raise SealBroken
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], place)
        except InvalidTag:
            raise SealBroken from None
