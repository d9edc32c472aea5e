"""The small authority: what its certificates say, and that it never overwrites or leaves half."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vtpmd import pki
from vtpmd.daemon import tls

FILES = ["ca-cert.pem", "client-cert.pem", "client-key.pem", "server-cert.pem", "server-key.pem"]
NAMES = ["Host1.example.org", "192.0.2.1", "2001:DB8::1", "host1.example.org"]


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """An authority's directory."""
    pki.init(tmp_path / "ca", days=100)
    return tmp_path / "ca"


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_authority_signs_hosts_and_nothing_else(authority: Path) -> None:
    made = certificate(authority / "ca-cert.pem")
    constraints = made.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    usage = made.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign and not usage.digital_signature
    assert isinstance(made.public_key(), ec.EllipticCurvePublicKey)


@pytest.mark.parametrize(
    ("role", "usage"),
    [("server", ExtendedKeyUsageOID.SERVER_AUTH), ("client", ExtendedKeyUsageOID.CLIENT_AUTH)],
)
def test_certificate_says_who_and_what_for(
    authority: Path, role: str, usage: x509.ObjectIdentifier
) -> None:
    out = authority / "host1"
    made = pki.issue(authority, NAMES, out, days=30)
    issued = certificate(out / f"{role}-cert.pem")
    issued.verify_directly_issued_by(certificate(authority / "ca-cert.pem"))
    extensions = issued.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert made.names == ("host1.example.org", "192.0.2.1", "2001:db8::1")
    assert names.get_values_for_type(x509.DNSName) == ["host1.example.org"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == list(made.names[1:])
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    key_usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert key_usage.value.digital_signature and not key_usage.value.key_encipherment
    assert not key_usage.critical, "QEMU before 10.2 refuses it then"
    subject = issued.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert [attribute.value for attribute in subject] == ["host1.example.org"]
    key = serialization.load_pem_private_key((out / f"{role}-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"
    assert key.public_key() == issued.public_key()


def test_certificates_have_their_own_keys_and_random_numbers(authority: Path) -> None:
    made = [
        certificate(path)
        for name in ("a", "b")
        for path in pki.issue(authority, [name], authority / name, days=30).files
        if path.name in ("server-cert.pem", "client-cert.pem")
    ]
    assert len({issued.serial_number for issued in made}) == 4
    assert len({x509.SubjectKeyIdentifier.from_public_key(c.public_key()) for c in made}) == 4
    assert all(issued.serial_number.bit_length() > 64 for issued in made)


def test_validity_starts_before_now_and_lasts_as_told(authority: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    made = pki.issue(authority, ["a"], authority / "a", days=30)
    after = datetime.now(UTC)
    issued = certificate(authority / "a" / "server-cert.pem")
    assert issued.not_valid_after_utc == made.not_after
    assert before <= made.not_after - timedelta(days=30) <= after
    assert issued.not_valid_before_utc == made.not_after - timedelta(days=30) - pki.CLOCK_SKEW


def test_directory_is_what_both_sides_need(authority: Path) -> None:
    made = pki.issue(authority, ["host1"], authority / "host1", days=30)
    assert sorted(path.name for path in made.files) == FILES
    assert sorted(content(authority / "host1")) == FILES
    tls.server_context(authority / "host1")
    tls.client_context(authority / "host1")


def test_keys_are_their_owners_alone(authority: Path) -> None:
    pki.issue(authority, ["host1"], authority / "host1", days=30)
    assert mode(authority) == mode(authority / "host1") == 0o700
    keys = [*authority.glob("*-key.pem"), *authority.glob("host1/*-key.pem")]
    assert [mode(key) for key in keys] == [0o600] * 3


@pytest.mark.parametrize("file", ["ca-key.pem", "ca-cert.pem"])
def test_authority_is_not_overwritten(authority: Path, file: str) -> None:
    """Nor is the other file made anew, which would not fit the first."""
    (authority / file).rename(authority.parent / file)
    before = content(authority)
    with pytest.raises(pki.FileInTheWay, match="it is there already; move it"):
        pki.init(authority, days=100)
    assert content(authority) == before


@pytest.mark.parametrize("file", FILES)
def test_credentials_are_not_overwritten(authority: Path, file: str) -> None:
    """One file that is there, be it a link to nowhere, and none is made."""
    out = authority / "host1"
    out.mkdir()
    (out / file).symlink_to("nowhere")
    with pytest.raises(pki.FileInTheWay, match=f"{file}: it is there already; move it"):
        pki.issue(authority, ["host1"], out, days=30)
    assert [path.name for path in out.iterdir()] == [file]
    assert not (out / "nowhere").exists()


def test_file_in_the_directorys_place_is_left_alone(authority: Path) -> None:
    (authority / "host1").write_text("mine")
    with pytest.raises(pki.FileInTheWay, match="host1: it is there already"):
        pki.issue(authority, ["host1"], authority / "host1", days=30)
    assert (authority / "host1").read_text() == "mine"


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(pki.PkiError, match=r"cannot make .*/a/b: No such file or directory"):
        pki.init(tmp_path / "a" / "b", days=1)


@pytest.mark.parametrize(
    "name",
    ["", "*", "*.example.org", "a b", "a\nb", "a..b", "-a", "256.0.0.1", "::1%lo", "é", "x" * 65],
)
def test_what_is_no_hosts_name_is_not_certified(authority: Path, name: str) -> None:
    with pytest.raises(pki.BadName, match="give a DNS name or an IP address") as caught:
        pki.issue(authority, ["host1", name], authority / "host1", days=30)
    assert "\n" not in str(caught.value)
    assert not (authority / "host1").exists()


def test_host_does_not_outlive_its_authority(authority: Path) -> None:
    with pytest.raises(
        pki.PkiError, match=r"the authority in .* ends on .*; give fewer with --days"
    ):
        pki.issue(authority, ["host1"], authority / "host1", days=101)


@pytest.mark.parametrize("file", ["ca-key.pem", "ca-cert.pem"])
@pytest.mark.parametrize("spoilt", [None, b"", b"garbage", b"-----BEGIN EC PRIVATE KEY-----\n"])
def test_authority_that_cannot_be_read(authority: Path, file: str, spoilt: bytes | None) -> None:
    (authority / file).unlink()
    if spoilt is not None:
        (authority / file).write_bytes(spoilt)
    words = "make one with vtpmd pki init" if spoilt is None else "is damaged or encrypted"
    with pytest.raises(pki.PkiError, match=words):
        pki.issue(authority, ["host1"], authority / "host1", days=30)


def test_authority_of_two_halves(authority: Path, tmp_path: Path) -> None:
    pki.init(tmp_path / "other", days=100)
    (tmp_path / "other" / "ca-key.pem").rename(authority / "ca-key.pem")
    with pytest.raises(pki.PkiError, match="are not from one vtpmd pki init"):
        pki.issue(authority, ["host1"], authority / "host1", days=30)


def test_encrypted_authority_is_refused(authority: Path) -> None:
    key = serialization.load_pem_private_key((authority / "ca-key.pem").read_bytes(), None)
    (authority / "ca-key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    with pytest.raises(pki.PkiError, match="is damaged or encrypted"):
        pki.issue(authority, ["host1"], authority / "host1", days=30)


def test_keys_do_not_show_in_what_is_printed(authority: Path) -> None:
    """A traceback prints what functions were called with."""
    holder = pki.read_authority(authority)
    pem = holder.key_pem()
    file = pki.File(authority / "ca-key.pem", 0o600, pem)
    secret = pem.decode().splitlines()[1]
    for shown in (repr(holder), repr(file), f"{file}", f"{[file]}"):
        assert secret not in shown
