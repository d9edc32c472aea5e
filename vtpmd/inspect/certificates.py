"""Certificates that lie in NV indices, as EK certificates do: X.509 in DER."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

SEQUENCE: Final = b"\x30\x82"  # with a length of two bytes: no certificate is shorter than 256
HEADER_BYTES: Final = 4
# What a TPM 1.2's have before them: TCG PC Client Specific Implementation Specification 1.21, 7.4.
STORED: Final = bytes.fromhex("1001 00")  # TCG_TAG_PCCLIENT_STORED_CERT, a full one; its size
STORED_BYTES: Final = 5
FULL: Final = bytes.fromhex("1002")  # TCG_TAG_PCCLIENT_FULL_CERT
NAME_LENGTH_MAX: Final = 200  # of a text, for people
CUT: Final = "..."


def certificate_in(data: bytes) -> dict[str, Any] | None:
    """Return what a certificate says with which data begins; None where there is none."""
    found = load(data)
    return None if found is None else found.says


class Loaded(NamedTuple):
    """A certificate, and what it says."""

    certificate: Certificate
    says: dict[str, Any]


def load(data: bytes) -> Loaded | None:
    """Return the certificate with which data begins; None where there is none.

    An index may be larger than its certificate.
    """
    if data.startswith(STORED):
        data = data[STORED_BYTES:].removeprefix(FULL)
    if not data.startswith(SEQUENCE):
        return None
    n_bytes = HEADER_BYTES + int.from_bytes(data[2:HEADER_BYTES], "big")
    from cryptography import x509

    try:
        with warnings.catch_warnings():
            # Of what is not quite as it is to be: the TPM's maker has written it, not its reader.
            warnings.simplefilter("ignore")
            certificate = x509.load_der_x509_certificate(data[:n_bytes])
            says = {
                "bytes": n_bytes,
                "subject": printable(certificate.subject.rfc4514_string()),
                "issuer": printable(certificate.issuer.rfc4514_string()),
                "serial": f"{certificate.serial_number:x}",
                "not-before": certificate.not_valid_before_utc.isoformat(),
                "not-after": certificate.not_valid_after_utc.isoformat(),
                "der": data[:n_bytes].hex(),
            }
    except Exception:  # of any type: its parts are read when they are asked for
        return None
    return Loaded(certificate, says)


def printable(text: str) -> str:
    """Return a text that any terminal can be given, cut to a line."""
    cut = text if len(text) <= NAME_LENGTH_MAX else f"{text[: NAME_LENGTH_MAX - len(CUT)]}{CUT}"
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in cut)
