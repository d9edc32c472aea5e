"""Mutual TLS 1.3 between two vtpmd: contexts from a credentials directory, and the peer's names.

The directory is QEMU's for tls-creds-x509 (crypto/tlscredsx509.c); docs/peers.md says what is in
it, how names are checked, and what that gives. OpenSSL verifies certificates; this module says in
one line what it found, and which names may speak.

A context is made only when its own certificate passes what a peer with the same CA will check: the
one who can mend it hears of it at the start.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import socket
import ssl
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, NamedTuple

from vtpmd.daemon.limited_log import LimitedLog
from vtpmd.daemon.readiness import Readiness
from vtpmd.daemon.tls_stream import TlsStream, find_dead_flow
from vtpmd.errors import VtpmdError

log = logging.getLogger(__name__)

CA_CERTIFICATE: Final = "ca-cert.pem"
CA_REVOCATIONS: Final = "ca-crl.pem"

# Connection and handshake together. A peer that takes longer is as good as none.
HANDSHAKE_TIMEOUT_S: Final = 10.0
# Files that could not be used and have not changed may be readable by now; to try takes
# milliseconds, in which nothing else is served, and strangers must not bring that about.
CREDENTIALS_RETRY_S: Final = 1.0
# A host has some names. What its certificate has beyond these is not looked at.
NAMES_MAX: Final = 64
COMMON_NAME_LENGTH_MAX: Final = 64  # X.520's ub-common-name
# A private key may be read by its owner and by one group, which the daemon may be running in.
KEY_MODE_MAX: Final = 0o640

# RFC 1123's host names, in lower case; underscores occur. A last label of digits alone would be an
# IPv4 address, or one that was mistyped.
DNS_NAME: Final = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*"
    r"(?![0-9]+\Z)[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
)
# Printable, without the asterisk: a peer brings no wildcard.
COMMON_NAME: Final = re.compile(rf"[ -)+-~]{{1,{COMMON_NAME_LENGTH_MAX}}}")

_NOT_OURS = f"was not issued by a CA in our {CA_CERTIFICATE}"
_OTHER_HOST = "has no alternative name that is the host to connect to; use a name that it has"
# What is wrong with a certificate, by OpenSSL's X509_V_ERR_* (x509_vfy.h).
VERIFY_REASONS: Final = {
    3: f"cannot be checked: our {CA_REVOCATIONS} is not from the CA that issued it",
    7: _NOT_OURS,
    9: "is not valid yet, or its CA is not; compare the clocks of both hosts",
    10: "has expired, or its CA has; issue a new one",
    12: f"cannot be checked: our {CA_REVOCATIONS} has expired; get a new one from the CA",
    18: _NOT_OURS,
    19: _NOT_OURS,
    20: _NOT_OURS,
    21: _NOT_OURS,
    23: "has been revoked",
    26: "is for another use: a server's has the extended key usage serverAuth, a client's "
    "clientAuth",
    62: _OTHER_HOST,
    64: _OTHER_HOST,
}


class TlsError(VtpmdError):
    """Two peers cannot speak to each other."""


class CredentialsError(TlsError):
    """Our own credentials directory cannot be used."""


class HandshakeError(TlsError):
    """A peer was not reached, or one side refused the other's certificate."""


class PeerNotAllowed(TlsError):
    """A peer's certificate is good, but has no name that may speak here."""


class Role(Enum):
    """The side of a connection that a certificate is for; the value is in its files' names."""

    SERVER = "server"
    CLIENT = "client"


class PeerName(NamedTuple):
    """Who a certificate says its holder is; the names are canonical, see canonical_name().

    ``str()`` is for messages: one line, whatever was in the certificate.
    """

    alternative_names: tuple[str, ...]
    common_name: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """The names to go by: the common name counts where there is no alternative name."""
        if self.alternative_names or self.common_name is None:
            return self.alternative_names
        return (self.common_name,)

    def __str__(self) -> str:
        return ", ".join(map(shlex.quote, self.names)) or "without a usable name"


class Connection(NamedTuple):
    """An encrypted stream to a peer whose certificate has been verified."""

    stream: TlsStream
    name: PeerName


def server_context(directory: Path) -> ssl.SSLContext:
    """Return the context of the side that listens. Raises CredentialsError."""
    return _checked_context(directory, Role.SERVER)


def client_context(directory: Path) -> ssl.SSLContext:
    """Return the context of the side that connects. Raises CredentialsError."""
    return _checked_context(directory, Role.CLIENT)


class ServerCredentials:
    """The context of the side that listens, made anew when the directory's files have changed.

    A vtpmd cannot be restarted under a guest, and its certificate, its peers' and the list of the
    revoked do not last as long as that.
    """

    def __init__(self, directory: Path) -> None:
        """Read the directory. Raises CredentialsError."""
        self._directory = directory
        self._log = LimitedLog(log, lines_max=1)
        self._versions = self._tried = _versions(directory)
        self._context = server_context(directory)
        self._error = ""
        self._retry_s = 0.0

    def context(self) -> ssl.SSLContext:
        """Return the context for the next handshake, as the files are now.

        Raises CredentialsError if they cannot be used and say something else of whom to trust than
        before: who was revoked must not get in by that. A certificate and a key that do not fit are
        mostly being replaced; if only they have changed, the pair before serves on.
        """
        # Taken first: what changes while it is read is read again for the next handshake.
        versions = _versions(self._directory)
        is_new = versions not in (self._versions, self._tried)
        if is_new or (versions != self._versions and time.monotonic() >= self._retry_s):
            self._read(versions)
        if versions.authorities != self._versions.authorities:
            raise CredentialsError(self._error)
        if versions != self._versions:
            text = f"the certificate and key from before are still used: {self._error}"
            self._log.write(logging.WARNING, text)
        return self._context

    def _read(self, versions: _Versions) -> None:
        self._tried = versions
        try:
            self._context = server_context(self._directory)
        except CredentialsError as error:
            self._error = str(error)
            self._retry_s = time.monotonic() + CREDENTIALS_RETRY_S
        else:
            self._versions = versions
            log.info("the credentials in %s have changed and are read anew", self._directory)


async def connect(
    host: str, port: int, context: ssl.SSLContext, allow_list: Iterable[str] | None = None
) -> Connection:
    """Connect to a peer; its certificate has to be for ``host`` and, if given, for an allowed name.

    In TLS 1.3 this returns before the peer has judged our certificate. If it refuses ours, the
    first read fails or ends; ``explain()`` has the words for that. Raises HandshakeError or
    PeerNotAllowed, and nothing has been sent to the peer then.
    """
    peer = _address(host, port)
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            sock = await connect_without(host, port)
            stream = await TlsStream.handshake(sock, context, host)
        name = _name_at(stream)
    except (OSError, ValueError) as error:
        raise explain(error, peer) from error
    try:
        # OpenSSL has compared them, but lets a wildcard in the certificate match.
        if canonical_name(host) not in name.alternative_names:
            raise HandshakeError(f"the certificate of peer {peer} {_OTHER_HOST}: {name}")
        if allow_list is not None:
            check_allowed(name, allow_list)
    except TlsError:
        stream.abort()
        raise
    return Connection(stream, name)


def accept_until_s() -> float:
    """Return when a peer that connects now must have shaken hands, by the event loop's clock."""
    return asyncio.get_running_loop().time() + HANDSHAKE_TIMEOUT_S


async def first_byte(connection: socket.socket, until_s: float) -> bytes:
    """Return the first byte that a peer says, and leave it to be read; none if it has left.

    Raises HandshakeError.
    """
    readiness = Readiness(connection)
    peer = "that has left"
    try:
        peer = _address(*connection.getpeername()[:2])
        async with asyncio.timeout_at(until_s):
            while True:
                try:
                    return connection.recv(1, socket.MSG_PEEK)
                except BlockingIOError:
                    await readiness.wait()
    except OSError as error:
        raise explain(error, peer) from error
    finally:
        readiness.close()


async def accept(
    connection: socket.socket, context: ssl.SSLContext, until_s: float | None = None
) -> Connection:
    """Shake hands with a peer that has connected, and take over the socket (non-blocking).

    ``until_s`` is accept_until_s() of when it has connected, by default of now. The caller checks
    whether the name is allowed, as it can tell the peer. Raises HandshakeError; the socket is
    closed then.
    """
    peer = "that has left"
    try:
        peer = _address(*connection.getpeername()[:2])
        find_dead_flow(connection)
        async with asyncio.timeout_at(accept_until_s() if until_s is None else until_s):
            stream = await TlsStream.handshake(connection, context, None)
        return Connection(stream, _name_at(stream))
    except (OSError, ValueError) as error:
        connection.close()
        raise explain(error, peer) from error


def _name_at(stream: TlsStream) -> PeerName:
    try:
        return peer_name(stream.socket)
    except ValueError:  # names in it are no text
        stream.abort()
        raise


async def connect_without(host: str, port: int) -> socket.socket:
    """Connect, without TLS, to the first address of a host that takes it.

    Raises the last one's OSError.
    """
    loop = asyncio.get_running_loop()
    failure = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            find_dead_flow(sock)
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


def canonical_name(text: str) -> str | None:
    """Return a DNS name in lower case or an address as ipaddress writes it; None if it is neither.

    ASCII only: a Kelvin sign is no k. A wildcard is no name, an address with a scope is none.
    """
    with suppress(ValueError):
        address = str(ip_address(text))
        return address if "%" not in address else None
    return text.lower() if text.isascii() and DNS_NAME.fullmatch(text.lower()) else None


def peer_name(tls: ssl.SSLSocket | ssl.SSLObject) -> PeerName:
    """Return the names in the certificate of a finished handshake's peer; malformed ones are not.

    The certificate has been verified, but what a CA signs is not always well-formed.
    """
    certificate: dict[str, Any] = tls.getpeercert() or {}
    written = certificate.get("subjectAltName", ())
    names = [canonical_name(v) for k, v in written if k in ("DNS", "IP Address")]
    subject = [pair for part in certificate.get("subject", ()) for pair in part]
    common = [v for k, v in subject if k == "commonName" and COMMON_NAME.fullmatch(v)]
    return PeerName(
        alternative_names=tuple(name for name in names[:NAMES_MAX] if name is not None),
        # Alternative names that cannot be used are no reason to fall back to what they replace.
        common_name=(canonical_name(common[0]) or common[0]) if common and not written else None,
    )


def check_allowed(name: PeerName, allow_list: Iterable[str]) -> None:
    """Raise PeerNotAllowed unless one of the peer's names is on the list.

    An entry is a DNS name, an address or a common name, and matches it alone; or ``*.DOMAIN``,
    which matches a DNS name of one more label. Letters match in either case.
    """
    entries = list(allow_list)
    if any(_matches(entry, known) for entry in entries for known in name.names):
        return
    advice = "issue it a certificate with an alternative name"
    if name.names:
        advice = f"if it should be, add --allow {shlex.quote(name.names[0])}"
    raise PeerNotAllowed(f"peer {name} is not allowed here; {advice}")


def explain(error: Exception, peer: str) -> HandshakeError:
    """Return what a person should read when a connection failed, on either side.

    ``peer`` is the other side's address. ``error`` is what a stream or a handshake raised.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return HandshakeError(f"the certificate of peer {peer} {_verify_reason(error)}")
    if isinstance(error, ssl.SSLError):
        reason = error.reason or "UNKNOWN"
        if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return HandshakeError(f"peer {peer} has shown no certificate; it needs a client's")
        _, is_alert, alert = reason.partition("ALERT_")
        if is_alert:
            return HandshakeError(f"peer {peer} refuses us: {_words(alert)}; its log may say more")
        return HandshakeError(f"peer {peer} does not speak our TLS 1.3: {_words(reason)}")
    if isinstance(error, ConnectionRefusedError):
        return HandshakeError(f"nobody listens at {peer}; start vtpmd there with --listen")
    if isinstance(error, TimeoutError):
        return HandshakeError(f"peer {peer} did not answer in time; is it a vtpmd?")
    if isinstance(error, ConnectionError | EOFError):
        return HandshakeError(
            f"peer {peer} closed the connection; its log says whether it refuses us"
        )
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return HandshakeError(f"no connection with peer {peer}: {reason}")


def _matches(entry: str, name: str) -> bool:
    wildcard, domain = entry[:2] == "*.", entry[2:].lower()
    if wildcard and DNS_NAME.fullmatch(domain) and DNS_NAME.fullmatch(name):
        return name.partition(".")[2] == domain
    return name == (canonical_name(entry) or entry)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _words(reason: str) -> str:
    return reason.replace("_", " ").lower()


def _verify_reason(error: ssl.SSLCertVerificationError) -> str:
    return VERIFY_REASONS.get(error.verify_code, f"is refused: {error.verify_message}")


class _Versions(NamedTuple):
    """What tells one content of a directory's files from another, without reading them."""

    authorities: tuple[tuple[int, ...], ...]
    server: tuple[tuple[int, ...], ...]


def _versions(directory: Path) -> _Versions:
    names = ((CA_CERTIFICATE, CA_REVOCATIONS), ("server-cert.pem", "server-key.pem"))
    return _Versions(*(tuple(_version(directory / name) for name in pair) for pair in names))


def _version(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError as error:
        # A link to nowhere is not a file that is not there: see _load_authorities().
        return (error.errno or 0, os.path.lexists(path))
    # The time of the last change of mode or owner, too, which nobody can set back.
    times = status.st_mtime_ns, status.st_ctime_ns
    return (status.st_dev, status.st_ino, status.st_size, *times)


def _checked_context(directory: Path, role: Role) -> ssl.SSLContext:
    context = _new_context(role)
    _load_authorities(context, directory)
    _load_certificate(context, directory, role)
    _check_own_certificate(directory, role)
    return context


def _new_context(role: Role) -> ssl.SSLContext:
    if role is Role.SERVER:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # No tickets, no resumption: every connection proves anew who is there.
        context.num_tickets = 0
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.hostname_checks_common_name = False
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load_authorities(context: ssl.SSLContext, directory: Path) -> None:
    authorities, revocations = directory / CA_CERTIFICATE, directory / CA_REVOCATIONS
    _load_pem(context, authorities)
    stats = context.cert_store_stats()
    if stats["x509_ca"] == 0 or stats["x509_ca"] != stats["x509"] or stats["crl"]:
        raise CredentialsError(f"cannot use {authorities}: it holds other than CA certificates")
    # Also when it is a link to nowhere: revocations must not go unseen.
    if os.path.lexists(revocations):
        _load_pem(context, revocations)
        if context.cert_store_stats()["x509"] != stats["x509"]:
            raise CredentialsError(f"cannot use {revocations}: it holds other than revocations")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load_certificate(context: ssl.SSLContext, directory: Path, role: Role) -> None:
    certificate = directory / f"{role.value}-cert.pem"
    key = directory / f"{role.value}-key.pem"
    # OpenSSL does not say in which of the two a fault is: try the certificate by itself.
    _load_pem(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate)
    mode = _readable_mode(key)
    if mode & ~KEY_MODE_MAX:
        raise CredentialsError(
            f"cannot use private key {key}: others may access it (mode {mode:04o}); "
            "do chmod 600, and issue a new one if they may have read it"
        )
    try:
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CredentialsError(
                f"cannot use private key {key}: it is not that of {certificate.name}; "
                "put the two files that belong together there"
            ) from None
        raise CredentialsError(
            f"cannot use private key {key}: it is encrypted or no PEM private key; "
            "give one that needs no password"
        ) from None


def _load_pem(context: ssl.SSLContext, path: Path) -> None:
    _readable_mode(path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise CredentialsError(
            f"cannot use {path}: it is no PEM file of what it should hold"
        ) from None


def _readable_mode(path: Path) -> int:
    """Return a readable regular file's mode, and wait for no FIFO. Raises CredentialsError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CredentialsError(
            f"cannot read {path}: {error.strerror}; make a credentials directory with "
            "vtpmd pki issue, or give another one with --tls-creds"
        ) from error
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if not stat.S_ISREG(status.st_mode):
        raise CredentialsError(f"cannot read {path}: it is not a regular file")
    return stat.S_IMODE(status.st_mode)


def _check_own_certificate(directory: Path, role: Role) -> None:
    """Shake hands with ourselves, in memory, so that OpenSSL judges as at the peer's."""
    verifier_role = Role.CLIENT if role is Role.SERVER else Role.SERVER
    presenter, verifier = _new_context(role), _new_context(verifier_role)
    presenter.check_hostname = verifier.check_hostname = False
    presenter.verify_mode = ssl.CERT_NONE
    _load_authorities(verifier, directory)
    for context in (presenter, verifier):  # as a server, the verifier has to show one too
        _load_certificate(context, directory, role)
    contexts = {role: presenter, verifier_role: verifier}
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts[Role.CLIENT].wrap_bio(to_client, to_server)
    server = contexts[Role.SERVER].wrap_bio(to_server, to_client, server_side=True)
    certificate = directory / f"{role.value}-cert.pem"
    try:
        for side in (client, server, client, server):  # hello; hello to Finished; Finished
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        raise CredentialsError(f"cannot use {certificate}: it {_verify_reason(error)}") from None
    except ssl.SSLError as error:
        raise CredentialsError(
            f"cannot use {certificate}: {_words(error.reason or 'no TLS 1.3')}; issue a new one"
        ) from None
