"""The listener of a running vtpmd, and flows that die without a word.

A vtpmd cannot be restarted under its guest, and a source's Reclaim depends on this port: so what
strangers do, what runs out, and what is replaced in the credentials directory must keep no peer out
that should get in, and let nobody in who should not.
"""

import asyncio
import errno
import resource
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from tests.harness.fake_peer import connect, hello
from tests.harness.handover import Host, make_host
from tests.harness.lab import Lab
from tests.harness.network import Network
from vtpmd import pki
from vtpmd.daemon import handshakes, tls
from vtpmd.daemon.tls_stream import TlsStream
from vtpmd.testing.credentials import HOST, authority, credentials
from vtpmd.testing.emulator import Peering
from vtpmd.wire import peer

WAIT_TIMEOUT_S = 60.0
SESSION = bytes(range(peer.SESSION_BYTES))
N_RECLAIMS = 30
N_HOPS = 100
N_IDLE = 800
POLL_S = 0.01


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def directory(lab: Lab) -> Path:
    """Return a credentials directory that a test may change."""
    return Path(shutil.copytree(credentials(), lab.new_path("credentials")))


@pytest.fixture
def host(lab: Lab, directory: Path) -> Host:
    """Start a vtpmd with that directory."""
    return make_host(lab, Peering(credentials=directory))


def is_welcome(host: Host) -> bool:
    """Connect as a source; return True if that is welcome, False if the connection ends."""
    try:
        stream = connect(host.vtpmd.port, credentials())
    except OSError:
        return False
    try:
        stream.send(hello())
        stream.receive(peer.Welcome)
    except (OSError, AssertionError):
        return False
    finally:
        stream.close()
    return True


def reclaim(host: Host) -> None:
    """Ask for a session that nobody knows."""
    stream = connect(host.vtpmd.port, credentials())
    try:
        stream.send(peer.Reclaim(SESSION))
        stream.receive(peer.Unknown)
    finally:
        stream.close()


@contextmanager
def idle_connections(host: Host, n: int) -> Iterator[None]:
    """Hold connections that say nothing; those that vtpmd closes count as well."""
    with ExitStack() as stack:
        for _ in range(n):
            sock = socket.create_connection((HOST, host.vtpmd.port), WAIT_TIMEOUT_S)
            stack.enter_context(sock)
        yield


# -- strangers


def test_idle_connections_keep_no_peer_out(host: Host) -> None:
    """More than would end by their time limit while the peer waits."""
    with idle_connections(host, N_IDLE):
        reclaim(host)
        assert is_welcome(host)


def test_reclaim_gets_through_while_idle_connections_are_opened(host: Host) -> None:
    """From another address, as fast as that can."""
    enough, n_opened = threading.Event(), 0

    def open_them() -> None:
        nonlocal n_opened
        opened: list[socket.socket] = []
        while not enough.is_set():
            with ExitStack() as stack:
                for _ in range(handshakes.HANDSHAKES_MAX):
                    sock = socket.create_connection(
                        (HOST, host.vtpmd.port), WAIT_TIMEOUT_S, ("127.0.0.2", 0)
                    )
                    opened.append(stack.enter_context(sock))
                    n_opened += 1
                    if enough.is_set():
                        return

    flood = threading.Thread(target=open_them)
    flood.start()
    try:
        for _ in range(N_RECLAIMS):
            reclaim(host)
    finally:
        enough.set()
        flood.join()
    assert n_opened > N_RECLAIMS


def test_hundred_sources_that_come_and_go_leave_nothing_behind(host: Host) -> None:
    """No descriptor, and no slot."""
    assert host.vtpmd.port
    before = count_descriptors(host)
    for _ in range(N_HOPS):
        assert is_welcome(host)
    deadline_s = time.monotonic() + WAIT_TIMEOUT_S
    while (left := count_descriptors(host)) != before and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    assert left == before


def count_descriptors(host: Host) -> int:
    """Return how many descriptors vtpmd has."""
    return len(list(Path(f"/proc/{host.vtpmd.program.pid}/fd").iterdir()))


# -- what runs out


def test_listener_survives_the_want_of_descriptors(host: Host) -> None:
    assert is_welcome(host)
    pid = host.vtpmd.program.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    with idle_connections(host, highest + 2):
        host.vtpmd.program.wait_for_output("cannot accept on the peers' socket: Too many open")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert is_welcome(host)
    assert sum("cannot accept" in line for line in host.log) == 1


# -- credentials that are replaced


def revoke(directory: Path, *revoked: Path) -> None:
    """Put a ca-crl.pem in place that revokes these certificates."""
    holder = pki.read_authority(authority().directory)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(holder.certificate.subject)
        .last_update(now - timedelta(hours=1))
        .next_update(now + timedelta(days=1))
    )
    for path in revoked:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
        builder = builder.add_revoked_certificate(entry.revocation_date(now).build())
    signed = builder.sign(holder.key, hashes.SHA256())
    other = directory / "ca-crl.pem.new"
    other.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    other.replace(directory / "ca-crl.pem")


def test_revocation_shuts_out_at_once(host: Host, directory: Path) -> None:
    assert is_welcome(host)
    revoke(directory, credentials() / "client-cert.pem")
    assert not is_welcome(host)
    host.vtpmd.program.wait_for_output("has been revoked")
    revoke(directory)
    assert is_welcome(host)


def test_list_that_cannot_be_read_shuts_everybody_out(host: Host, directory: Path) -> None:
    (directory / "ca-crl.pem").write_text("half of it")
    assert not is_welcome(host)
    host.vtpmd.program.wait_for_output("ca-crl.pem: it is no PEM file")
    (directory / "ca-crl.pem").unlink()
    assert is_welcome(host)


def test_renewed_certificate_is_shown_when_its_key_has_come(host: Host, directory: Path) -> None:
    renewed = authority().issue_until(datetime.now(UTC) + timedelta(days=1))
    shutil.copy(renewed / "server-cert.pem", directory)
    assert is_welcome(host)
    host.vtpmd.program.wait_for_output("the certificate and key from before are still used")
    shutil.copy(renewed / "server-key.pem", directory)
    assert is_welcome(host)
    host.vtpmd.program.wait_for_output("have changed and are read anew")


# -- flows that die


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


def test_flow_that_dies_in_silence_is_found(network: Network) -> None:
    """On either side: while it is idle, with something unacknowledged, and while it connects."""
    address = "10.0.2.1"
    listening = network.b.run(socket.create_server, (address, 0))
    listening.setblocking(False)
    server = tls.ServerCredentials(authority().issue(address))
    port = listening.getsockname()[1]

    async def connected() -> tuple[TlsStream, TlsStream]:
        connecting = asyncio.create_task(tls.connect(address, port, client))
        accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
        serving = await tls.accept(accepted, server.context())
        return (await connecting).stream, serving.stream

    async def ends(stream: TlsStream) -> None:
        with suppress(TimeoutError):  # it may also look like an end: see find_dead_flow()
            assert await stream.read() == b""
        stream.abort()

    async def does_not_connect() -> None:
        with pytest.raises(tls.HandshakeError, match="did not answer in time") as caught:
            await tls.connect(address, port, client)
        # It is the kernel's, which leaves time for a host's other address.
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ETIMEDOUT

    async def die() -> None:
        async with asyncio.timeout(WAIT_TIMEOUT_S):
            idle, sending = await connected(), await connected()
            network.forward(False)
            for stream in sending:
                stream.write(b"never acknowledged")
            await asyncio.gather(*map(ends, (*idle, *sending)), does_not_connect())

    client = tls.client_context(credentials())
    with listening:
        network.a.run(asyncio.run, die())
