"""What an attestation service enrols of a TPM: its endorsement keys and its certificates.

Where they lie is the TCG's: EK Credential Profile 2.6, 2.2.1.4 and 2.2.1.5 (NV indices), TCG
Registry of Reserved TPM 2.0 Handles (persistent objects). A key that is not persistent is not in a
state: the TPM makes it of its seed, and the certificate has its public part. A TPM 1.2's has one
endorsement key, and it is in the state.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, Final, NamedTuple

from vtpmd.errors import VtpmdError
from vtpmd.inspect import contents
from vtpmd.inspect.certificates import Loaded, load
from vtpmd.inspect.overview import Inspected
from vtpmd.inspect.tpm12.overview import nv_entries
from vtpmd.inspect.tree import Node
from vtpmd.inspect.words.handles import HT_NV_INDEX, HT_PERSISTENT
from vtpmd.wire.tpm import TpmVersion

ENDORSEMENT_KEYS: Final = range(0x8101_0000, 0x8102_0000)
# Of NV indices.
CERTIFICATES: Final = {
    "EK": range(0x01C0_0000, 0x01C0_8000),
    "platform": range(0x01C0_8000, 0x01C1_0000),
}
EXPONENT: Final = 65537  # where a key says 0, or of a TPM 1.2's nothing
# A TPM 1.2's NV indices (TPM Main, part 2, 19.1.2), with the bit of what its maker defines or not.
CERTIFICATES_12: Final = {
    "EK": (0x0000_F000, 0x1000_F000),
    "platform": (0x0000_F002, 0x1000_F002),
}
EK_12: Final = "0x40000006"


class NothingToEnrol(VtpmdError):
    """A TPM has no endorsement key that is persistent, and no certificate."""

    exit_status = 10


class Key(NamedTuple):
    """An endorsement key."""

    handle: str
    type: str  # RSA 2048, ECC NIST_P384
    name: str  # the TPM's, as hexadecimal digits
    pem: str  # SubjectPublicKeyInfo


class Certificate(NamedTuple):
    """A certificate that lies in an NV index."""

    handle: str
    kind: str  # EK or platform
    key: str | None  # the handle of the endorsement key that it is of
    says: dict[str, Any]
    pem: str


class Identity(NamedTuple):
    """What there is to be enrolled."""

    keys: list[Key]
    certificates: list[Certificate]


def identity_of(found: Inspected) -> Identity:
    """Return what a TPM is enrolled by. Raises NothingToEnrol."""
    is_12 = found.source.tpm is TpmVersion.TPM_1_2
    keys = _key_of_a_tpm_12(found) if is_12 else _persistent_keys(found)
    by_public = {key.pem: key.handle for key in keys}
    if is_12:
        nv = found.permanent.find("permanent-all", "nv")
        entries = [] if nv is None else list(nv_entries(nv))
    else:
        entries = list(contents.entries(found.permanent, HT_NV_INDEX))
    kinds = CERTIFICATES_12 if is_12 else CERTIFICATES
    certificates = [
        each for entry in entries if (each := _certificate(entry, by_public, kinds)) is not None
    ]
    if not keys and not certificates:
        raise NothingToEnrol(
            f"{found.source.path}: no endorsement key is persistent, and no certificate lies in NV "
            "memory; make them: swtpm_setup --create-ek-cert --create-platform-cert"
        )
    return Identity(keys, certificates)


def _persistent_keys(found: Inspected) -> list[Key]:
    return [
        key
        for entry in contents.entries(found.permanent, HT_PERSISTENT)
        if (entry.number("handle") or 0) in ENDORSEMENT_KEYS and (key := key_in(entry)) is not None
    ]


def _key_of_a_tpm_12(found: Inspected) -> list[Key]:
    """Return its endorsement key, if any; the name is the TPM's digest of the public part."""
    key = found.permanent.find("permanent-all", "permanent-data", "endorsement-key")
    pem = None if key is None else pem_of_a_tpm_12(key)
    if key is None or pem is None:
        return []
    type_ = f"RSA {key.number('parameters', 'key-bits')}"
    return [Key(EK_12, type_, key.content("private", "public-data-digest").hex(), pem)]


def pem_of_a_tpm_12(key: Node) -> str | None:
    """Return the public part of a TPM 1.2's key, as PEM; None for one that is not there."""
    modulus = int.from_bytes(key.content("public-key"), "big")
    exponent = int.from_bytes(key.content("parameters", "exponent"), "big")
    return _rsa_pem(modulus, exponent)


def key_in(entry: Node) -> Key | None:
    """Return an object that is a key with a public part; None for any other."""
    entity = entry.find("slot", "object") or entry
    public = entity.find("public") or entity
    parameters = public.find("parameters") or public
    pem = (
        _rsa(public, parameters) if public.find("unique", "x") is None else _ecc(public, parameters)
    )
    if pem is None:
        return None
    size = str(parameters.number("key-bits") or "") or parameters.words("curve")
    name = entity.content("name").hex()
    return Key(entry.name, f"{public.words('type')} {size}", name, pem)


def _rsa(public: Node, parameters: Node) -> str | None:
    exponent = parameters.number("exponent")
    if exponent is None:
        return None
    return _rsa_pem(int.from_bytes(public.content("unique"), "big"), exponent)


def _rsa_pem(modulus: int, exponent: int) -> str | None:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

    try:
        return _pem(RSAPublicNumbers(exponent or EXPONENT, modulus).public_key())
    except ValueError:  # no key: a state may be altered
        return None


def _ecc(public: Node, parameters: Node) -> str | None:
    from cryptography.hazmat.primitives.asymmetric import ec

    curves: dict[str, type[ec.EllipticCurve]] = {
        "NIST_P256": ec.SECP256R1,
        "NIST_P384": ec.SECP384R1,
        "NIST_P521": ec.SECP521R1,
    }
    curve = curves.get(parameters.words("curve"))
    x, y = (int.from_bytes(public.content("unique", each), "big") for each in ("x", "y"))
    if curve is None:
        return None
    try:
        return _pem(ec.EllipticCurvePublicNumbers(x, y, curve()).public_key())
    except ValueError:
        return None


def _pem(key: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode("ascii")


def _certificate(
    entry: Node, by_public: dict[str, str], kinds: Mapping[str, Container[int]] = CERTIFICATES
) -> Certificate | None:
    handle = entry.number("handle") or entry.number("public", "index") or 0
    data = entry.at("data")
    kind = next((kind for kind, handles in kinds.items() if handle in handles), None)
    found = load(data) if kind is not None and isinstance(data, bytes) else None
    if kind is None or found is None:
        return None
    from cryptography.hazmat.primitives.serialization import Encoding

    key = by_public.get(certified_key(found))
    pem = found.certificate.public_bytes(Encoding.PEM).decode("ascii")
    return Certificate(entry.name, kind, key, found.says, pem)


def certified_key(found: Loaded) -> str:
    """Return the public key of a certificate, as PEM; nothing for one of an unknown kind."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return _pem(found.certificate.public_key())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return ""
