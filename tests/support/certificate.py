"""A certificate of a public key whose private part nobody here has."""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID


def certificate_of(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> bytes:
    """Return a certificate of a key, in DER, by an issuer that is made for it."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a key of a TPM")])
    now = datetime.now(UTC)
    times = now - timedelta(days=1), now + timedelta(days=1)
    made = x509.CertificateBuilder(name, name, key, 1, *times)
    return made.sign(ec.generate_private_key(ec.SECP256R1()), SHA256()).public_bytes(Encoding.DER)
