"""A small certificate authority: for a test, or a site that has none.

It makes directories as vtpmd and QEMU's tls-creds-x509 read them (docs/peers.md). Imported by
``vtpmd pki`` alone: ``cryptography`` takes its time to load.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vtpmd.daemon.tls import CA_CERTIFICATE, COMMON_NAME_LENGTH_MAX, canonical_name
from vtpmd.errors import VtpmdError

CA_KEY: Final = "ca-key.pem"
# The clock of the host that reads a certificate may be behind ours.
CLOCK_SKEW: Final = timedelta(hours=1)

KEY_MODE: Final = 0o600
CERTIFICATE_MODE: Final = 0o644
DIRECTORY_MODE: Final = 0o700

USAGES: Final = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
}


class PkiError(VtpmdError):
    """A certificate authority or a certificate cannot be made."""


class BadName(PkiError):
    """What was given as a host's name is none."""

    exit_status = 2


class FileInTheWay(PkiError):
    """A file that would be made is there already; nothing was changed."""

    exit_status = 3


class File(NamedTuple):
    """A file to be made; not for printing, the content may be a private key."""

    path: Path
    mode: int
    content: bytes

    def __repr__(self) -> str:
        """Leave the content out."""
        return f"File({self.path})"


@dataclass(frozen=True, kw_only=True)
class Made:
    """What was made: the files, the names that are certified, and until when."""

    files: tuple[Path, ...]
    names: tuple[str, ...]
    not_after: datetime


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def not_after(self) -> datetime:
        """Until when the certificate is good."""
        # Debian 12's cryptography has the time without its zone only, the newest only with it.
        if hasattr(self.certificate, "not_valid_after_utc"):
            return self.certificate.not_valid_after_utc
        return self.certificate.not_valid_after.replace(tzinfo=UTC)

    def belong_together(self) -> bool:
        """Whether the certificate is for the key."""
        kind = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        certified = self.certificate.public_key()
        return certified.public_bytes(*kind) == self.key.public_key().public_bytes(*kind)

    def certificate_pem(self) -> bytes:
        """Return the certificate as a file has it."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        """Return the private key as a file has it, unencrypted: GnuTLS and OpenSSL read it."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


@dataclass(frozen=True, kw_only=True)
class Validity:
    """The time in which a certificate is good."""

    not_before: datetime
    not_after: datetime

    @classmethod
    def days(cls, days: int) -> Validity:
        """Return a validity from now on; it starts a little earlier, for slow clocks."""
        now = datetime.now(UTC).replace(microsecond=0)
        return cls(not_before=now - CLOCK_SKEW, not_after=now + timedelta(days=days))


def init(directory: Path, days: int) -> Made:
    """Make an authority: its key and its certificate. Raises PkiError or FileInTheWay."""
    authority = make_authority(Validity.days(days))
    files = (
        File(directory / CA_KEY, KEY_MODE, authority.key_pem()),
        File(directory / CA_CERTIFICATE, CERTIFICATE_MODE, authority.certificate_pem()),
    )
    _write(directory, files)
    return _made(files, (), authority)


def issue(directory: Path, names: Sequence[str], out: Path, days: int) -> Made:
    """Make a credentials directory for a host, with the authority in another directory.

    ``names`` are those that peers connect to. Raises PkiError or FileInTheWay.
    """
    known = tuple(dict.fromkeys(host_name(name) for name in names))
    authority = read_authority(directory)
    validity = Validity.days(days)
    if validity.not_after > authority.not_after:
        raise PkiError(
            f"cannot issue for {days} days: the authority in {directory} ends on "
            f"{authority.not_after:%Y-%m-%d}; give fewer with --days"
        )
    holders = {role: issue_one(authority, known, usage, validity) for role, usage in USAGES.items()}
    files = [
        file
        for role, holder in holders.items()
        for file in (
            File(out / f"{role}-key.pem", KEY_MODE, holder.key_pem()),
            File(out / f"{role}-cert.pem", CERTIFICATE_MODE, holder.certificate_pem()),
        )
    ]
    # The last, as nobody takes a directory without it for complete.
    files.append(File(out / CA_CERTIFICATE, CERTIFICATE_MODE, authority.certificate_pem()))
    _write(out, files)
    return _made(files, known, holders["server"])


def host_name(text: str) -> str:
    """Return a name in the form that certificates get. Raises BadName."""
    name = canonical_name(text)
    if name is None or len(name) > COMMON_NAME_LENGTH_MAX:
        raise BadName(
            f"cannot certify {text!r}: give a DNS name or an IP address of at most "
            f"{COMMON_NAME_LENGTH_MAX} characters, without wildcard"
        )
    return name


def make_authority(validity: Validity) -> Holder:
    """Return a new authority, which signs itself and certificates of hosts, no other authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # Two authorities of one name could not be told apart in messages.
    subject = _common_name(f"vtpmd CA {serial & 0xFFFFFFFF:08x}")
    usage = x509.KeyUsage(**{**_NO_USAGE, "key_cert_sign": True, "crl_sign": True})
    certificate = (
        _builder(subject, key, validity, serial)
        .issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return Holder(certificate=certificate, key=key)


def issue_one(
    authority: Holder, names: Sequence[str], usage: x509.ObjectIdentifier, validity: Validity
) -> Holder:
    """Return a new certificate for names that ``host_name()`` has passed, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer_key = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    certificate = (
        _builder(_common_name(names[0]), key, validity, x509.random_serial_number())
        .issuer_name(authority.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # Not critical: QEMU without its commit 3995fc238e (before 10.2) refuses a critical one that
        # lacks keyEncipherment, which RFC 8813 forbids for a key on a curve.
        .add_extension(x509.KeyUsage(**{**_NO_USAGE, "digital_signature": True}), critical=False)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(n) for n in names]), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key.value), False
        )
        .sign(authority.key, hashes.SHA256())
    )
    return Holder(certificate=certificate, key=key)


def read_authority(directory: Path) -> Holder:
    """Read what ``init()`` has made. Raises PkiError, which never quotes the key."""
    try:
        certificate = x509.load_pem_x509_certificate((directory / CA_CERTIFICATE).read_bytes())
        key = serialization.load_pem_private_key((directory / CA_KEY).read_bytes(), password=None)
    except OSError as error:
        raise PkiError(
            f"cannot read the authority's {error.filename}: {error.strerror}; "
            f"make one with vtpmd pki init {directory}"
        ) from error
    except (ValueError, TypeError):
        raise PkiError(
            f"cannot use the authority in {directory}: {CA_CERTIFICATE} or {CA_KEY} is damaged or "
            "encrypted; restore the two from a backup"
        ) from None
    if isinstance(key, ec.EllipticCurvePrivateKey):
        authority = Holder(certificate=certificate, key=key)
        if authority.belong_together():
            return authority
    raise PkiError(
        f"cannot use the authority in {directory}: {CA_CERTIFICATE} and {CA_KEY} are not from "
        "one vtpmd pki init; restore the two that belong together"
    )


_NO_USAGE: Final = dict.fromkeys(
    (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ),
    False,
)


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePrivateKey, validity: Validity, serial: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(validity.not_before)
        .not_valid_after(validity.not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ip_address(name))
    return x509.DNSName(name)


def _made(files: Iterable[File], names: tuple[str, ...], holder: Holder) -> Made:
    return Made(
        files=tuple(file.path for file in files),
        names=names,
        not_after=holder.not_after,
    )


def _write(directory: Path, files: Sequence[File]) -> None:
    """Make every file, durably, or none. Raises PkiError or FileInTheWay."""
    made: list[Path] = []
    try:
        directory.mkdir(DIRECTORY_MODE, exist_ok=True)
        for file in files:
            # With its mode from the start, and never through a link or over another file.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(file.path, flags, file.mode)
            made.append(file.path)
            with os.fdopen(fd, "wb") as stream:
                stream.write(file.content)
                stream.flush()
                os.fsync(fd)
        _sync_directory(directory)
    except OSError as error:
        for path in made:
            path.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise FileInTheWay(
                f"cannot make {error.filename}: it is there already; move it, or give another place"
            ) from error
        raise PkiError(f"cannot make {error.filename or directory}: {error.strerror}") from error


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
