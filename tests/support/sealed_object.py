"""A secret that a TPM 2.0 seals, as a disk's key is: kept outside of it, and of use to it alone."""

import struct
from typing import NamedTuple

from tests.support.tpm2 import Algorithm, Reader, Tpm, command, create_primary, password, sized

CREATE, LOAD, UNSEAL = 0x153, 0x157, 0x15E  # TPM_CC
AES, KEYEDHASH, CFB, NIST_P256 = 0x0006, 0x0008, 0x0043, 0x0003
# TPMA_OBJECT: fixedTPM, fixedParent, userWithAuth, noDA; and sensitiveDataOrigin, restricted,
# decrypt.
SEALED_ATTRIBUTES = 0x0452
STORAGE_ATTRIBUTES = SEALED_ATTRIBUTES | 0x0003_0020


class Sealed(NamedTuple):
    """What TPM2_Create gave."""

    private: bytes
    public: bytes


def _storage_template() -> bytes:
    """Marshal the TPMT_PUBLIC of a storage key, which is the same whenever it is made."""
    template = struct.pack(">HHI", Algorithm.ECC, Algorithm.SHA256, STORAGE_ATTRIBUTES) + sized(b"")
    template += struct.pack(">HHH", AES, 128, CFB)
    template += struct.pack(">HHH", Algorithm.NULL, NIST_P256, Algorithm.NULL)
    return template + sized(b"") + sized(b"")


def _storage_key(tpm: Tpm) -> int:
    return Reader(tpm.execute(create_primary(_storage_template()))).unsigned(4)


def seal(tpm: Tpm, secret: bytes) -> Sealed:
    """Seal a secret under the owner's storage key."""
    template = struct.pack(">HHI", KEYEDHASH, Algorithm.SHA256, SEALED_ATTRIBUTES) + sized(b"")
    template += struct.pack(">H", Algorithm.NULL) + sized(b"")
    parameters = sized(sized(b"") + sized(secret)) + sized(template) + sized(b"") + bytes(4)
    parent = _storage_key(tpm)
    built = command(CREATE, handles=[parent], authorizations=[password()], parameters=parameters)
    made = tpm.execute_with_sessions(built)
    tpm.flush(parent)
    return Sealed(made.sized(), made.sized())


def unseal(tpm: Tpm, sealed: Sealed) -> bytes:
    """Return the secret. TpmError: it was sealed by another TPM."""
    parent = _storage_key(tpm)
    parameters = sized(sealed.private) + sized(sealed.public)
    built = command(LOAD, handles=[parent], authorizations=[password()], parameters=parameters)
    try:
        loaded = Reader(tpm.execute(built)).unsigned(4)
    finally:
        tpm.flush(parent)
    built = command(UNSEAL, handles=[loaded], authorizations=[password()])
    secret = tpm.execute_with_sessions(built).sized()
    tpm.flush(loaded)
    return secret
