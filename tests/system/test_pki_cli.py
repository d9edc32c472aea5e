"""``vtpmd pki`` as a person runs it, and QEMU's opinion of what it makes.

QEMU's monitor over TLS shows that both ends, GnuTLS there and OpenSSL here, verify each other.
"""

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vtpmd.daemon import tls
from vtpmd.testing.program import Program

QEMU = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-nographic", "-S"]
QEMU += ["-monitor", "none"]
TIMEOUT_S = 60


def vtpmd(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vtpmd", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The credentials directory of a host."""
    assert vtpmd("pki", "init", tmp_path / "ca").returncode == 0
    issued = vtpmd("pki", "issue", tmp_path / "ca", "localhost", "127.0.0.1")
    assert issued.returncode == 0, issued.stderr
    return tmp_path / "ca" / "localhost"


def credentials(directory: Path, endpoint: str) -> list[str]:
    value = f"tls-creds-x509,id=tls0,endpoint={endpoint},dir={directory},verify-peer=yes"
    return ["-object", value]


# -- the command


def test_report_names_what_was_made(tmp_path: Path) -> None:
    made = vtpmd("pki", "init", tmp_path / "ca")
    *paths, validity = made.stdout.splitlines()
    assert paths == [f"{tmp_path}/ca/ca-key.pem", f"{tmp_path}/ca/ca-cert.pem"]
    assert validity.startswith("valid until 2")
    assert made.stderr == ""


def test_report_as_json(tmp_path: Path) -> None:
    vtpmd("pki", "init", tmp_path / "ca")
    options: list[str | Path] = ["--out", tmp_path / "h", "--days", "1", "--json"]
    issued = vtpmd("pki", "issue", tmp_path / "ca", "Host1", "192.0.2.1", *options)
    made = json.loads(issued.stdout)
    assert made["names"] == ["host1", "192.0.2.1"]
    assert made["notAfter"].endswith("Z")
    assert sorted(made) == ["files", "names", "notAfter"]
    assert sorted(map(Path, made["files"])) == sorted((tmp_path / "h").iterdir())


def test_exit_statuses(host: Path) -> None:
    """As --help lists them; each failure is one line."""
    authority = host.parent
    failures: list[tuple[int, list[str | Path]]] = [
        (1, ["issue", authority / "missing", "host1"]),
        (2, ["issue", authority, "*.example.org"]),
        (3, ["issue", authority, "localhost"]),
        (3, ["init", authority]),
    ]
    for status, arguments in failures:
        failed = vtpmd("pki", *arguments)
        assert (failed.returncode, failed.stdout) == (status, "")
        assert failed.stderr.startswith("vtpmd: cannot ")
        assert failed.stderr.count("\n") == 1
    for action in ("init", "issue"):
        text = vtpmd("pki", action, "--help").stdout
        assert f"example:\n  vtpmd pki {action} /" in text
        statuses = text.partition("exit status:\n")[2].splitlines()
        assert [line.split()[0] for line in statuses] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["renew"],
        ["init"],
        ["issue", "ca"],
        ["init", "ca", "--days", "0"],
        ["init", "ca", "--days", "36501"],
        ["issue", "ca", "host1", "--days", "1.5"],
        ["issue", "ca", "host1", "--days", "²"],
    ],
)
def test_wrong_command_lines_are_refused_with_2(arguments: list[str], tmp_path: Path) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "vtpmd", "pki", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert refused.returncode == 2
    assert "usage: vtpmd pki" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_cryptography_is_loaded_by_this_command_alone() -> None:
    """Nor does asking for help load asyncio, which a short command line should not wait for."""
    code = (
        "import sys; from vtpmd.cli.parser import build_parser; build_parser();"
        "print({'cryptography', 'asyncio', 'ssl'} & set(sys.modules))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    )
    assert printed.stdout == "set()\n"


# -- QEMU


def run_qemu(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Start a QEMU and ask it to quit at once."""
    return subprocess.run(
        [*QEMU, "-qmp", "stdio", *arguments],
        input='{"execute": "qmp_capabilities"}{"execute": "quit"}',
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.parametrize("endpoint", ["server", "client"])
def test_qemu_takes_the_directory(host: Path, endpoint: str) -> None:
    ended = run_qemu(credentials(host, endpoint))
    assert ended.returncode == 0, ended.stderr
    assert '"SHUTDOWN"' in ended.stdout


@pytest.mark.parametrize("endpoint", ["server", "client"])
@pytest.mark.parametrize("file", ["ca-cert.pem", "{}-cert.pem", "{}-key.pem"])
def test_qemu_refuses_a_broken_one(host: Path, endpoint: str, file: str) -> None:
    """Shows that the test above could fail. Ours refuses the same directory."""
    (host / file.format(endpoint)).write_text("broken")
    ended = run_qemu(credentials(host, endpoint))
    assert ended.returncode == 1
    assert file.format(endpoint) in ended.stderr
    context = tls.server_context if endpoint == "server" else tls.client_context
    with pytest.raises(tls.CredentialsError, match=file.format(endpoint)):
        context(host)


async def assert_greeted(connection: tls.Connection) -> None:
    """Read the greeting of QEMU's monitor, which comes when QEMU has verified us, and close."""
    greeting = b""
    while not greeting.endswith(b"\n"):
        piece = await connection.stream.read()
        assert piece
        greeting += piece
    assert "QMP" in json.loads(greeting)
    connection.stream.abort()


def monitor(directory: Path, endpoint: str, port: int, options: str) -> list[str]:
    """Return QEMU's arguments for a monitor over TLS."""
    channel = f"socket,id=monitor,host=localhost,port={port},ipv4=on,ipv6=off,tls-creds=tls0"
    monitor = ["-chardev", f"{channel},{options}", "-mon", "chardev=monitor,mode=control"]
    return [*QEMU, *credentials(directory, endpoint), *monitor]


def test_qemu_connects_to_us(host: Path, tmp_path: Path) -> None:
    """It verifies our server's certificate for the host's name, we its client's."""

    async def meet() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setblocking(False)
            arguments = monitor(host, "client", listening.getsockname()[1], "server=off")
            qemu = Program("qemu", arguments, tmp_path)
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    connection, _ = await asyncio.get_running_loop().sock_accept(listening)
                    accepted = await tls.accept(connection, tls.server_context(host))
                    tls.check_allowed(accepted.name, ["127.0.0.1"])
                    await assert_greeted(accepted)
                assert qemu.stop() == 0, qemu.output
            finally:
                qemu.kill()

    asyncio.run(meet())


def test_we_connect_to_qemu(host: Path, tmp_path: Path) -> None:
    """The other way round. QEMU waits with its start until somebody has connected."""

    async def meet() -> None:
        qemu = Program("qemu", monitor(host, "server", 0, "server=on,wait=on"), tmp_path)
        try:
            qemu.wait_for_output(",server=on\n")
            port = int(qemu.output.rpartition(",server=on\n")[0].rpartition(":")[2])
            async with asyncio.timeout(TIMEOUT_S):
                connection = await tls.connect(
                    "localhost", port, tls.client_context(host), ["localhost"]
                )
                await assert_greeted(connection)
            assert qemu.stop() == 0, qemu.output
        finally:
            qemu.kill()

    asyncio.run(meet())
