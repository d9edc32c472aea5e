"""Mutual TLS: who gets a connection, in which name, and what is said to whom does not.

Connections are real ones, on loopback. A peer that breaks a rule has a context that does not check
itself; the side that is to notice always has vtpmd's.
"""

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import example, given
from hypothesis import strategies as st

from vtpmd import pki
from vtpmd.daemon import handshakes, peer_server, tls, tls_stream
from vtpmd.daemon.tls import PeerName

DOCS = Path(__file__).resolve().parents[2] / "docs"
NOW = datetime.now(UTC)
DAY = timedelta(days=1)
TODAY = pki.Validity(not_before=NOW - DAY, not_after=NOW + DAY)
PAST = pki.Validity(not_before=NOW - 2 * DAY, not_after=NOW - DAY)
FUTURE = pki.Validity(not_before=NOW + DAY, not_after=NOW + 2 * DAY)
NAMES = ("localhost", "127.0.0.1")
OTHER_ROLE = {"server": "client", "client": "server"}
CONTEXTS = {"server": tls.server_context, "client": tls.client_context}

ALICE = pki.make_authority(TODAY)
MALLORY = pki.make_authority(TODAY)


@dataclass
class Site:
    """A credentials directory whose files a test can spoil."""

    path: Path

    def put(self, role: str, holder: pki.Holder) -> None:
        """Give a side its certificate and key."""
        (self.path / f"{role}-cert.pem").write_bytes(holder.certificate_pem())
        self.put_key(role, holder.key_pem())

    def put_key(self, role: str, content: bytes) -> None:
        """Give a side another key."""
        key = self.path / f"{role}-key.pem"
        key.write_bytes(content)
        key.chmod(0o600)

    def unchecked(self, role: str, *, tls_1_2: bool = False) -> ssl.SSLContext:
        """Return a side's context, made by somebody who does not look at his own certificate."""
        server = role == "server"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.path / "ca-cert.pem")
        context.load_cert_chain(self.path / f"{role}-cert.pem", self.path / f"{role}-key.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        if tls_1_2:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context


def issue(
    role: str,
    names: tuple[str, ...] = NAMES,
    validity: pki.Validity = TODAY,
    authority: pki.Holder = ALICE,
) -> pki.Holder:
    """Return a certificate for one side."""
    return pki.issue_one(authority, names, pki.USAGES[role], validity)


def issue_raw(
    *,
    subject: str | None = None,
    extensions: Sequence[x509.ExtensionType] = (),
    authority: pki.Holder | None = ALICE,
) -> pki.Holder:
    """Return a certificate such as ours never are; without an authority it signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = [] if subject is None else [x509.NameAttribute(NameOID.COMMON_NAME, subject)]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(attributes))
        .issuer_name(authority.certificate.subject if authority else x509.Name(attributes))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(TODAY.not_before)
        .not_valid_after(TODAY.not_after)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    signer = authority.key if authority else key
    return pki.Holder(certificate=builder.sign(signer, hashes.SHA256()), key=key)


@pytest.fixture
def new_site(tmp_path: Path) -> Callable[[], Site]:
    """Make directories in which everything is right."""

    def new() -> Site:
        site = Site(tmp_path / str(len(list(tmp_path.iterdir()))))
        site.path.mkdir()
        (site.path / "ca-cert.pem").write_bytes(ALICE.certificate_pem())
        for role in OTHER_ROLE:
            site.put(role, issue(role))
        return site

    return new


@pytest.fixture
def site(new_site: Callable[[], Site]) -> Site:
    """One directory in which everything is right."""
    return new_site()


Outcome = PeerName | tls.TlsError


async def talk(connection: tls.Connection) -> None:
    """Send a byte, receive the other side's, and close."""
    connection.stream.write(b"!")
    if not (answer := await connection.stream.read()):
        raise EOFError
    assert answer == b"!"


async def outcome(side: Coroutine[Any, Any, tls.Connection]) -> Outcome:
    """Return the name that one side learns, or its error, be it before or after the handshake."""
    try:
        connection = await side
    except tls.TlsError as error:
        return error
    try:
        await talk(connection)
    except (OSError, EOFError) as error:
        return tls.explain(error, "peer.example")
    finally:
        connection.stream.abort()
    return connection.name


def listen() -> socket.socket:
    """Return a socket for asyncio that listens on loopback."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    return listening


async def meet(
    server: ssl.SSLContext,
    client: ssl.SSLContext,
    host: str = "localhost",
    allow_list: list[str] | None = None,
) -> tuple[Outcome, Outcome]:
    """Let two sides connect; return the server's outcome and the client's."""
    with listen() as listening:
        port = listening.getsockname()[1]

        async def accept() -> tls.Connection:
            connection, _ = await asyncio.get_running_loop().sock_accept(listening)
            return await tls.accept(connection, server)

        async with asyncio.timeout(30):
            outcomes = await asyncio.gather(
                outcome(accept()), outcome(tls.connect(host, port, client, allow_list))
            )
    return outcomes[0], outcomes[1]


def run_meeting(*arguments: Any, **options: Any) -> tuple[Outcome, Outcome]:
    return asyncio.run(meet(*arguments, **options))


def assert_one_line(error: object, *parts: str) -> None:
    """Check that an error is one line with these parts in it."""
    assert isinstance(error, tls.TlsError), error
    assert re.fullmatch(r"[ -~]{1,400}", str(error)), str(error)
    for part in parts:
        assert part in str(error)


def assert_refused(error: object) -> None:
    """Check what a side sees that was refused: asyncio may or may not have sent the reason."""
    assert_one_line(error)
    assert re.search("closed the connection|refuses us", str(error)), error


# -- two sides that know each other


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "LOCALHOST"])
def test_each_side_learns_the_others_name(site: Site, host: str) -> None:
    server, client = tls.server_context(site.path), tls.client_context(site.path)
    assert run_meeting(server, client, host) == (PeerName(NAMES, None), PeerName(NAMES, None))


def test_connection_is_tls_1_3_and_cannot_be_resumed(site: Site) -> None:
    """The second half shows that the first could fail: OpenSSL gives tickets by default."""

    async def session(server: ssl.SSLContext) -> tuple[str | None, bool]:
        with listen() as listening:
            port = listening.getsockname()[1]
            serving = asyncio.create_task(serve_one(listening, server))
            connection = await tls.connect("127.0.0.1", port, tls.client_context(site.path))
            await talk(connection)
            await connection.stream.read()
            found = connection.stream.socket
            session = found.session
            assert session is not None
            outcome = found.version(), session.has_ticket
            connection.stream.close()
            await serving
        return outcome

    async def serve_one(listening: socket.socket, server: ssl.SSLContext) -> None:
        accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
        connection = await tls.accept(accepted, server)
        await talk(connection)
        connection.stream.close()

    assert asyncio.run(session(tls.server_context(site.path))) == ("TLSv1.3", False)
    assert asyncio.run(session(site.unchecked("server"))) == ("TLSv1.3", True)


def test_session_keys_are_not_logged_for_an_environment_variable(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Python's default contexts heed SSLKEYLOGFILE."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    run_meeting(tls.server_context(site.path), tls.client_context(site.path))
    assert not (tmp_path / "keys").exists()


# -- certificates that are not good

SPOILED: dict[str, tuple[Callable[[str], pki.Holder], str]] = {
    "expired": (lambda role: issue(role, validity=PAST), "has expired"),
    "not yet valid": (lambda role: issue(role, validity=FUTURE), "is not valid yet"),
    "of another CA": (lambda role: issue(role, authority=MALLORY), "was not issued by a CA in our"),
    "for another use": (lambda role: issue(OTHER_ROLE[role]), "is for another use"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_client_refuses_a_server(new_site: Callable[[], Site], what: str) -> None:
    """The client says what is wrong; the server, that it is not wanted."""
    make, words = SPOILED[what]
    bad, good = new_site(), new_site()
    bad.put("server", make("server"))
    server, client = run_meeting(bad.unchecked("server"), tls.client_context(good.path))
    assert_one_line(client, "the certificate of peer localhost:", words)
    assert_refused(server)


@pytest.mark.parametrize("what", SPOILED)
def test_server_refuses_a_client(new_site: Callable[[], Site], what: str) -> None:
    """The server says what is wrong; the client, that it is not wanted, when it reads."""
    make, words = SPOILED[what]
    bad, good = new_site(), new_site()
    bad.put("client", make("client"))
    server, client = run_meeting(tls.server_context(good.path), bad.unchecked("client"))
    assert_one_line(server, "the certificate of peer 127.0.0.1:", words)
    assert_refused(client)


@pytest.mark.parametrize("role", OTHER_ROLE)
@pytest.mark.parametrize("what", SPOILED)
def test_nobody_starts_with_a_certificate_that_his_peer_refuses(
    site: Site, what: str, role: str
) -> None:
    make, words = SPOILED[what]
    site.put(role, make(role))
    with pytest.raises(tls.CredentialsError) as caught:
        CONTEXTS[role](site.path)
    assert_one_line(caught.value, f"cannot use {site.path}/{role}-cert.pem: it {words}")


def test_client_without_a_certificate_is_refused(site: Site) -> None:
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.load_verify_locations(site.path / "ca-cert.pem")
    server, client = run_meeting(tls.server_context(site.path), anonymous)
    assert_one_line(server, "has shown no certificate")
    assert_refused(client)


def test_refusal_that_the_peer_sends_is_passed_on(site: Site) -> None:
    """Servers other than asyncio's send an alert."""
    (site.path / "ca-cert.pem").write_bytes(MALLORY.certificate_pem())
    stranger = site.unchecked("server")
    (site.path / "ca-cert.pem").write_bytes(ALICE.certificate_pem())

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, pytest.raises(ssl.SSLCertVerificationError):
            stranger.wrap_socket(connection, server_side=True)

    async def refused() -> Outcome:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(30)
            served = asyncio.create_task(asyncio.to_thread(serve, listening))
            context = tls.client_context(site.path)
            connection = await tls.connect("localhost", listening.getsockname()[1], context)
            try:
                await connection.stream.read()
            except OSError as error:
                return tls.explain(error, "localhost:1")
            finally:
                connection.stream.abort()
                await served
        return connection.name

    assert_one_line(asyncio.run(refused()), "peer localhost:1 refuses us: unknown ca;")


# -- revocation


def write_revocations(
    site: Site,
    revoked: list[pki.Holder],
    authority: pki.Holder = ALICE,
    until: datetime = NOW + DAY,
) -> None:
    """Write ca-crl.pem."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(NOW - 2 * DAY)
        .next_update(until)
    )
    for holder in revoked:
        entry = x509.RevokedCertificateBuilder()
        entry = entry.serial_number(holder.certificate.serial_number).revocation_date(NOW - DAY)
        builder = builder.add_revoked_certificate(entry.build())
    signed = builder.sign(authority.key, hashes.SHA256())
    (site.path / "ca-crl.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize("role", OTHER_ROLE)
def test_revoked_certificate_is_refused(new_site: Callable[[], Site], role: str) -> None:
    """By either side, also where QEMU's client would not look."""
    bad, good = new_site(), new_site()
    revoked = issue(role)
    bad.put(role, revoked)
    write_revocations(good, [revoked])
    sides = {role: bad.unchecked(role), OTHER_ROLE[role]: CONTEXTS[OTHER_ROLE[role]](good.path)}
    server, client = run_meeting(sides["server"], sides["client"])
    assert_one_line(client if role == "server" else server, "has been revoked")


def test_certificate_that_is_not_revoked_passes(site: Site) -> None:
    write_revocations(site, [issue("client")])
    server, client = tls.server_context(site.path), tls.client_context(site.path)
    assert run_meeting(server, client) == (PeerName(NAMES, None), PeerName(NAMES, None))


def spoil_revocations(site: Site, what: str) -> None:
    path = site.path / "ca-crl.pem"
    match what:
        case "old":
            write_revocations(site, [], until=NOW - DAY)
        case "of another CA":
            write_revocations(site, [], authority=MALLORY)
        case "garbage":
            path.write_text("garbage")
        case "certificates":
            path.write_bytes(MALLORY.certificate_pem())
        case "link to nowhere":
            path.symlink_to("nowhere")


@pytest.mark.parametrize("role", OTHER_ROLE)
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("old", "our ca-crl.pem has expired"),
        ("of another CA", "our ca-crl.pem is not from the CA that issued it"),
        ("garbage", "ca-crl.pem: it is no PEM file"),
        ("certificates", "ca-crl.pem: it holds other than revocations"),
        ("link to nowhere", "ca-crl.pem: No such file"),
    ],
)
def test_revocations_that_cannot_be_used_are_not_ignored(
    site: Site, what: str, words: str, role: str
) -> None:
    spoil_revocations(site, what)
    with pytest.raises(tls.CredentialsError) as caught:
        CONTEXTS[role](site.path)
    assert_one_line(caught.value, words)


# -- the directory


def put_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def put_directory(path: Path) -> None:
    path.unlink()
    path.mkdir(0o600)


@pytest.mark.parametrize("role", OTHER_ROLE)
@pytest.mark.parametrize("file", ["ca-cert.pem", "{}-cert.pem", "{}-key.pem"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, "No such file or directory; make a credentials directory with vtpmd pki"),
        (lambda path: path.write_bytes(b""), "cannot use"),
        (lambda path: path.write_bytes(path.read_bytes()[:99]), "cannot use"),
        (lambda path: path.write_bytes(os.urandom(300)), "cannot use"),
        (put_fifo, "it is not a regular file"),
        (put_directory, "it is not a regular file"),
    ],
    ids=["missing", "empty", "cut", "garbage", "a FIFO", "a directory"],
)
def test_file_that_cannot_be_used_is_named(
    site: Site, role: str, file: str, spoil: Callable[[Path], object], words: str
) -> None:
    path = site.path / file.format(role)
    spoil(path)
    with pytest.raises(tls.CredentialsError) as caught:
        CONTEXTS[role](site.path)
    assert_one_line(caught.value, f"{path}: ", words)


@pytest.mark.parametrize("role", OTHER_ROLE)
def test_other_sides_files_are_not_needed(site: Site, role: str) -> None:
    for path in site.path.glob(f"{OTHER_ROLE[role]}-*.pem"):
        path.unlink()
    CONTEXTS[role](site.path)


def test_authority_has_to_be_one(site: Site) -> None:
    """A certificate that is no CA's in ca-cert.pem would be trusted for itself."""
    with (site.path / "ca-cert.pem").open("ab") as file:
        file.write(issue("client").certificate_pem())
    with pytest.raises(tls.CredentialsError) as caught:
        tls.server_context(site.path)
    assert_one_line(caught.value, "ca-cert.pem: it holds other than CA certificates")


def test_authority_that_has_expired_is_noticed(site: Site) -> None:
    authority = pki.make_authority(PAST)
    (site.path / "ca-cert.pem").write_bytes(authority.certificate_pem())
    site.put("server", issue("server", authority=authority))
    with pytest.raises(tls.CredentialsError) as caught:
        tls.server_context(site.path)
    assert_one_line(caught.value, "has expired, or its CA has")


def test_intermediate_authority_comes_with_the_certificate(new_site: Callable[[], Site]) -> None:
    """The other side has to know no more than the one at the top."""
    is_ca = x509.BasicConstraints(ca=True, path_length=None)
    top = issue_raw(subject="top", extensions=[is_ca], authority=None)
    middle = issue_raw(subject="middle", extensions=[is_ca], authority=top)
    sites = new_site(), new_site()
    for site, role in zip(sites, OTHER_ROLE, strict=True):
        (site.path / "ca-cert.pem").write_bytes(top.certificate_pem())
        names = [raw_names(b"localhost")]
        site.put(role, issue_raw(extensions=names, authority=middle))
        with (site.path / f"{role}-cert.pem").open("ab") as file:
            file.write(middle.certificate_pem())
    contexts = tls.server_context(sites[0].path), tls.client_context(sites[1].path)
    assert run_meeting(*contexts) == (PeerName(("localhost",), None),) * 2


@pytest.mark.parametrize(
    ("mode", "good"),
    [(0o600, True), (0o400, True), (0o640, True), (0o660, False), (0o644, False), (0o604, False)],
)
def test_key_that_others_may_read_is_refused(site: Site, mode: int, good: bool) -> None:
    key = site.path / "server-key.pem"
    key.chmod(mode)
    if good:
        tls.server_context(site.path)
        return
    with pytest.raises(tls.CredentialsError) as caught:
        tls.server_context(site.path)
    assert_one_line(caught.value, f"{key}: others may access it (mode 0{mode:o})", "chmod 600")


def encrypted(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _key: issue("server").key_pem(), "it is not that of server-cert.pem"),
        (encrypted, "it is encrypted or no PEM private key"),
    ],
    ids=["another's", "encrypted"],
)
def test_key_that_cannot_be_used_is_named_and_not_shown(
    site: Site, make: Callable[[ec.EllipticCurvePrivateKey], bytes], words: str
) -> None:
    """Nor does anybody ask for a password on a terminal."""
    holder = issue("server")
    site.put("server", holder)
    content = make(holder.key)
    site.put_key("server", content)
    with pytest.raises(tls.CredentialsError) as caught:
        tls.server_context(site.path)
    assert_one_line(caught.value, f"{site.path}/server-key.pem: ", words)
    assert not any(line in str(caught.value) for line in content.decode().splitlines())


# -- who is no vtpmd, or not there


async def serve_bytes(content: bytes, client: ssl.SSLContext) -> Outcome:
    """Connect to a server that says these bytes, whatever it is sent, and then waits."""
    with listen() as listening:
        port = listening.getsockname()[1]
        side = asyncio.create_task(outcome(tls.connect("127.0.0.1", port, client)))
        connection, _ = await asyncio.get_running_loop().sock_accept(listening)
        with connection:
            await asyncio.get_running_loop().sock_sendall(connection, content)
            return await side


def test_peer_that_speaks_no_tls(site: Site) -> None:
    error = asyncio.run(serve_bytes(b"HTTP/1.1 400 Bad\r\n\r\n", tls.client_context(site.path)))
    assert_one_line(error, "does not speak our TLS 1.3: wrong version number")


def test_client_that_speaks_tls_1_2_only(site: Site) -> None:
    client = site.unchecked("client", tls_1_2=True)
    server, _ = run_meeting(tls.server_context(site.path), client)
    assert_one_line(server, "does not speak our TLS 1.3: unsupported protocol")


def test_server_that_speaks_tls_1_2_only(site: Site) -> None:
    server = site.unchecked("server", tls_1_2=True)
    _, client = run_meeting(server, tls.client_context(site.path))
    assert_refused(client)


def test_peer_that_does_not_answer(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT_S", 0.1)
    error = asyncio.run(serve_bytes(b"", tls.client_context(site.path)))
    assert_one_line(error, "did not answer in time")


def test_client_that_says_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT_S", 0.1)

    async def wait() -> Outcome:
        with listen() as listening, socket.create_connection(listening.getsockname()):
            connection, _ = await asyncio.get_running_loop().sock_accept(listening)
            return await outcome(tls.accept(connection, tls.server_context(site.path)))

    assert_one_line(asyncio.run(wait()), "did not answer in time")


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1", "nobody listens at 127.0.0.1:"),
        ("host.invalid", "no connection with peer host.invalid:"),
        ("", "no connection with peer"),
        (".", "no connection with peer"),
        ("x" * 64, "no connection with peer"),
    ],
)
def test_host_that_is_not_there(site: Site, host: str, words: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        context = tls.client_context(site.path)
        side = tls.connect(host, unused.getsockname()[1], context)
        assert_one_line(asyncio.run(outcome(side)), words)


# -- names


@pytest.mark.parametrize("names", [("host2.example.org",), ("localhost.example.org", "127.0.0.2")])
def test_server_has_to_be_the_host(site: Site, names: tuple[str, ...]) -> None:
    site.put("server", issue("server", names))
    server, client = tls.server_context(site.path), tls.client_context(site.path)
    for host in NAMES:
        assert_one_line(
            run_meeting(server, client, host)[1], "has no alternative name that is the host"
        )


def test_servers_common_name_does_not_make_it_the_host(site: Site) -> None:
    """It is enough for an allow-list, see below."""
    for extensions in ([], [raw_names(b"host2")]):
        site.put("server", issue_raw(subject="localhost", extensions=extensions))
        client = tls.client_context(site.path)
        result = run_meeting(site.unchecked("server"), client)[1]
        assert isinstance(result, tls.HandshakeError)


def test_servers_wildcard_does_not_make_it_the_host(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL lets it pass."""
    holder = pki.issue_one(ALICE, ("*.example.org", "host2"), pki.USAGES["server"], TODAY)
    site.put("server", holder)
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda _, *rest, **more: resolve("127.0.0.1", *rest, **more)
    )
    server, client = tls.server_context(site.path), tls.client_context(site.path)
    result = run_meeting(server, client, "host1.example.org")[1]
    assert_one_line(result, "has no alternative name that is the host", ": host2")


def test_client_heeds_its_allow_list(site: Site) -> None:
    """Besides the host's name, and before it sends anything."""
    server, client = tls.server_context(site.path), tls.client_context(site.path)
    assert run_meeting(server, client, allow_list=["localhost"])[1] == PeerName(NAMES, None)
    for allow_list in ([], ["host2"]):
        error = run_meeting(server, client, allow_list=allow_list)[1]
        assert isinstance(error, tls.PeerNotAllowed)
        assert_one_line(error, "peer localhost, 127.0.0.1 is not allowed", "add --allow localhost")


def raw_names(*values: bytes) -> x509.UnrecognizedExtension:
    """Return alternative names of type dNSName with any bytes."""
    names = b"".join(b"\x82" + bytes([len(value)]) + value for value in values)
    return x509.UnrecognizedExtension(
        x509.SubjectAlternativeName.oid, b"\x30" + bytes([len(names)]) + names
    )


@pytest.mark.parametrize(
    ("subject", "san", "names"),
    [
        ("host1", None, ("host1",)),
        ("Web Host 1", None, ("Web Host 1",)),
        ("HOST1.Example.org", None, ("host1.example.org",)),
        ("*.example.org", None, ()),
        ("a\nb", None, ()),
        ("\u212aelvin", None, ()),
        (None, None, ()),
        ("host1", raw_names(b"host2"), ("host2",)),
        ("host1", raw_names(b"*.example.org"), ()),
        ("host1", raw_names(b""), ()),
        (
            None,
            raw_names(b"HOST2.example.ORG", b"*.x.org", b"host3"),
            ("host2.example.org", "host3"),
        ),
        (None, raw_names(b"host1\0.example.org", b"a\nb", b"a b", b"a..b", b"host4"), ("host4",)),
        (None, raw_names(b"::1%\n", b"host5"), ("host5",)),
        (None, raw_names(b"127.0.0.1", b"127.0.1", b"-a", b"a-", b"host5."), ("127.0.0.1",)),
        (None, raw_names("\u212aelvin".encode(), "h\u00f6st".encode(), b"host6"), ("host6",)),
    ],
)
def test_names_in_a_certificate(
    site: Site, subject: str | None, san: x509.ExtensionType | None, names: tuple[str, ...]
) -> None:
    """What is no host's name is left out; a common name counts only without alternative names."""
    site.put("client", issue_raw(subject=subject, extensions=[san] if san else []))
    server = run_meeting(tls.server_context(site.path), site.unchecked("client"))[0]
    assert isinstance(server, PeerName)
    assert server.names == names
    assert re.fullmatch(r"[ -~]+", str(server))


def test_addresses_in_a_certificate(site: Site) -> None:
    site.put("client", issue("client", ("::1", "2001:db8::a", "192.0.2.1")))
    server = run_meeting(tls.server_context(site.path), tls.client_context(site.path))[0]
    assert server == PeerName(("::1", "2001:db8::a", "192.0.2.1"), None)


def test_only_some_names_are_looked_at(site: Site) -> None:
    names = tuple(f"host{number}" for number in range(tls.NAMES_MAX + 1))
    site.put("client", issue("client", names))
    server = run_meeting(tls.server_context(site.path), tls.client_context(site.path))[0]
    assert server == PeerName(names[:-1], None)


def test_names_that_are_no_text_end_the_connection(site: Site) -> None:
    """Python decodes them before anybody can look."""
    site.put("client", issue_raw(extensions=[raw_names(b"\xff\xfe")]))
    server = run_meeting(tls.server_context(site.path), site.unchecked("client"))[0]
    assert_one_line(server, "no connection with peer")


HOST = PeerName(("host1.example.org", "192.0.2.1", "2001:db8::1"), None)


@pytest.mark.parametrize(
    "allow_list",
    [
        ["host1.example.org"],
        ["HOST1.example.ORG"],
        ["192.0.2.1"],
        ["2001:DB8:0::1"],
        ["*.example.org"],
        ["*.Example.Org"],
        ["host2", "host1.example.org"],
    ],
)
def test_allowed(allow_list: list[str]) -> None:
    tls.check_allowed(HOST, allow_list)


@pytest.mark.parametrize(
    "allow_list",
    [
        [],
        [""],
        ["*"],
        ["*."],
        ["*.org"],
        ["*.*.org"],
        ["*.0.2.1"],
        ["*.host1.example.org"],
        ["host*.example.org"],
        [".example.org"],
        ["example.org"],
        ["host1"],
        ["host1.example.org."],
        ["192.0.2.2", "2001:db8::2"],
    ],
)
def test_not_allowed(allow_list: list[str]) -> None:
    with pytest.raises(tls.PeerNotAllowed) as caught:
        tls.check_allowed(HOST, allow_list)
    assert_one_line(
        caught.value, "peer host1.example.org, 192.0.2.1", "add --allow host1.example.org"
    )


def test_common_name_on_the_list() -> None:
    """As it is in the certificate; for a shell, when it is in an error."""
    name = PeerName((), "Web Host 1")
    tls.check_allowed(name, ["Web Host 1"])
    with pytest.raises(tls.PeerNotAllowed, match="add --allow 'Web Host 1'"):
        tls.check_allowed(name, ["Web Host 2", "*.Host 1"])


@pytest.mark.parametrize("allow_list", [[], [""], ["*"]])
def test_nobody_without_a_name_is_allowed(allow_list: list[str]) -> None:
    with pytest.raises(tls.PeerNotAllowed, match=r"without a usable name .* issue it"):
        tls.check_allowed(PeerName((), None), allow_list)


@given(st.text(max_size=80) | st.from_regex(r"[a-zA-Z0-9.*:_-]{1,80}", fullmatch=True))
@example("::1%$(reboot)\n")
@example("fe80::1%eth0")
def test_canonical_name_is_stable_and_plain(text: str) -> None:
    """Python takes an address with any scope behind it."""
    name = tls.canonical_name(text)
    if name is not None:
        assert tls.canonical_name(name) == name
        assert re.fullmatch(r"[a-z0-9._:-]+", name)


# -- a listener whose files change


def served(credentials: tls.ServerCredentials, site: Site) -> Outcome:
    """Return what the listener says of a client with this site's certificate."""
    return run_meeting(credentials.context(), site.unchecked("client"))[0]


def shown_certificate(credentials: tls.ServerCredentials, site: Site) -> int:
    """Return the serial number of the certificate that the listener shows."""

    async def show() -> bytes:
        with listen() as listening:
            accepting = asyncio.create_task(
                asyncio.to_thread(
                    ssl.get_server_certificate,
                    listening.getsockname()[:2],
                    ca_certs=str(site.path / "ca-cert.pem"),
                )
            )
            connection, _ = await asyncio.get_running_loop().sock_accept(listening)
            with pytest.raises(tls.HandshakeError):
                await tls.accept(connection, credentials.context())
            return (await accepting).encode()

    return x509.load_pem_x509_certificate(asyncio.run(show())).serial_number


def replace(path: Path, content: bytes) -> None:
    """Replace a file by another one of the same size and time, as rsync may."""
    status = path.stat()
    other = path.with_suffix(".new")
    other.write_bytes(content.ljust(status.st_size, b"\n"))
    other.chmod(status.st_mode)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def test_context_is_made_anew_only_for_changed_files(site: Site) -> None:
    credentials = tls.ServerCredentials(site.path)
    context = credentials.context()
    (site.path / "notes.txt").write_text("of no concern")
    assert credentials.context() is context
    (site.path / "server-key.pem").chmod(0o640)
    assert credentials.context() is not context


def test_listener_refuses_who_has_been_revoked_since_it_started(site: Site) -> None:
    """With a list that is new, with one in its place, and no more once that is removed."""
    credentials, client = tls.ServerCredentials(site.path), issue("client")
    site.put("client", client)
    known = PeerName(NAMES, None)
    assert served(credentials, site) == known
    write_revocations(site, [])
    assert served(credentials, site) == known
    path = site.path / "ca-crl.pem"
    padded = path.read_bytes() + b"\n" * 400
    path.write_bytes(padded)
    assert served(credentials, site) == known
    write_revocations(site, [client])
    revoking = path.read_bytes()
    path.write_bytes(padded)
    assert served(credentials, site) == known
    replace(path, revoking)
    assert_one_line(served(credentials, site), "has been revoked")
    path.unlink()
    assert served(credentials, site) == known


def test_listener_trusts_another_authority_when_it_is_told_so(site: Site) -> None:
    credentials = tls.ServerCredentials(site.path)
    for role in OTHER_ROLE:
        site.put(role, issue(role, authority=MALLORY))
    replace(site.path / "ca-cert.pem", MALLORY.certificate_pem())
    assert served(credentials, site) == PeerName(NAMES, None)
    site.put("client", issue("client"))
    assert_one_line(served(credentials, site), "was not issued by a CA in our")


@pytest.mark.parametrize("what", ["garbage", "certificates", "link to nowhere"])
def test_listener_refuses_all_while_it_cannot_know_who_is_revoked(site: Site, what: str) -> None:
    """Also what it has let in before: an unreadable list may revoke anybody."""
    credentials = tls.ServerCredentials(site.path)
    spoil_revocations(site, what)
    for _ in range(2):
        with pytest.raises(tls.CredentialsError, match=r"ca-crl\.pem"):
            credentials.context()
    (site.path / "ca-crl.pem").unlink()
    assert served(credentials, site) == PeerName(NAMES, None)


def test_listener_refuses_all_while_its_directory_is_away(site: Site) -> None:
    credentials = tls.ServerCredentials(site.path)
    away = site.path.rename(site.path.with_name("away"))
    with pytest.raises(tls.CredentialsError, match="cannot read"):
        credentials.context()
    away.rename(site.path)
    assert served(credentials, site) == PeerName(NAMES, None)


def test_listener_shows_a_renewed_certificate_once_its_key_fits(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """In between it shows the old one, whose key is in no file any more or not yet, and says so."""
    old, new = issue("server"), issue("server")
    site.put("server", old)
    credentials = tls.ServerCredentials(site.path)
    (site.path / "server-cert.pem").write_bytes(new.certificate_pem())
    for _ in range(3):
        assert shown_certificate(credentials, site) == old.certificate.serial_number
    lines = [record.getMessage() for record in caplog.records if record.name == tls.log.name]
    assert len(lines) == 1
    assert re.search("from before are still used: cannot use private key .* not that of", lines[0])
    site.put("server", new)
    assert shown_certificate(credentials, site) == new.certificate.serial_number


def test_half_a_pair_does_not_keep_a_revocation_from_being_seen(site: Site) -> None:
    credentials = tls.ServerCredentials(site.path)
    (site.path / "server-cert.pem").write_bytes(issue("server").certificate_pem())
    credentials.context()
    write_revocations(site, [])
    with pytest.raises(tls.CredentialsError, match="is not that of"):
        credentials.context()


# -- the document


def test_document_has_the_limits_of_the_code() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (\w+) \|", (DOCS / "peers.md").read_text(), re.MULTILINE)
    assert rows == [
        ("HANDSHAKE_TIMEOUT_S", f"{tls.HANDSHAKE_TIMEOUT_S:.0f}"),
        ("HELLO_TIMEOUT_S", f"{peer_server.HELLO_TIMEOUT_S:.0f}"),
        ("HANDSHAKES_MAX", f"{handshakes.HANDSHAKES_MAX}"),
        ("HANDSHAKES_PER_NETWORK_MAX", f"{handshakes.HANDSHAKES_PER_NETWORK_MAX}"),
        ("PEERS_MAX", f"{peer_server.PEERS_MAX}"),
        ("RECLAIMS_MAX", f"{peer_server.RECLAIMS_MAX}"),
        ("LOG_LINES_MAX", f"{peer_server.LOG_LINES_MAX}"),
        ("KEEPALIVE_IDLE_S", f"{tls_stream.KEEPALIVE_IDLE_S}"),
        ("KEEPALIVE_INTERVAL_S", f"{tls_stream.KEEPALIVE_INTERVAL_S}"),
        ("KEEPALIVE_COUNT", f"{tls_stream.KEEPALIVE_COUNT}"),
        ("USER_TIMEOUT_S", f"{tls_stream.USER_TIMEOUT_S}"),
        ("NAMES_MAX", f"{tls.NAMES_MAX}"),
        ("COMMON_NAME_LENGTH_MAX", f"{tls.COMMON_NAME_LENGTH_MAX}"),
        ("KEY_MODE_MAX", f"0{tls.KEY_MODE_MAX:o}"),
    ]
