"""Certificates that lie in NV indices: found with what is behind them, and nothing else taken."""

from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from vtpmd.inspect.certificates import NAME_LENGTH_MAX, certificate_in, printable


@pytest.fixture(scope="module")
def certificate() -> bytes:
    """Give one whose subject a terminal must not be given."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an EK\x1b[2J")])
    made = x509.CertificateBuilder(
        name, name, key.public_key(), 0xE4, datetime(2026, 1, 1, tzinfo=UTC),
        datetime(2036, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    return made.sign(key, SHA256()).public_bytes(Encoding.DER)


@pytest.mark.parametrize("behind", [b"", b"\xff" * 500])
def test_a_certificate_is_found_with_what_is_behind_it(certificate: bytes, behind: bytes) -> None:
    found = certificate_in(certificate + behind)
    assert found is not None
    assert found["bytes"] == len(certificate)
    assert found["der"] == certificate.hex()
    assert found["subject"] == "CN=an EK?[2J"
    assert found["serial"] == "e4"
    assert found["not-after"] == "2036-01-01T00:00:00+00:00"


@pytest.mark.parametrize("full", [b"\x10\x02", b""])
def test_a_certificate_is_found_as_a_tpm_12_stores_it(certificate: bytes, full: bytes) -> None:
    head = b"\x10\x01\0" + (len(full) + len(certificate)).to_bytes(2, "big")
    found = certificate_in(head + full + certificate + b"\xff" * 99)
    assert found is not None
    assert found["der"] == certificate.hex()


@pytest.mark.parametrize(
    "data", [b"", b"\x10\x01\0", b"\x30\x82", b"\x30\x82\xff\xff", b"0\x82\x01\x00" * 99]
)
def test_what_is_none_is_none(data: bytes) -> None:
    assert certificate_in(data) is None


def test_an_altered_one_ends_with_a_result(certificate: bytes) -> None:
    for at in range(len(certificate)):
        certificate_in(certificate[:at] + bytes([certificate[at] ^ 0xFF]) + certificate[at + 1 :])


def test_what_people_are_shown_is_one_line_of_a_terminal() -> None:
    assert printable("a\nb\x00c\u202e") == "a?b?c?"
    assert len(printable("x" * 1000)) == NAME_LENGTH_MAX
    assert printable("x" * 1000).endswith("x...")
    assert printable("x" * NAME_LENGTH_MAX) == "x" * NAME_LENGTH_MAX
