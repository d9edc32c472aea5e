"""The management socket with the clients that others wrote, and with other users' processes.

Only root and vtpmd's own user get in: the socket's mode keeps the others out, and where somebody
has changed the mode, what the kernel says of the client's process does.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from vtpmd.daemon.listener import listen
from vtpmd.daemon.management import Argument, Arguments, ManagementServer

TIMEOUT_S = 60.0
ROOT, OWN_USER, OTHER_USER = 0, 65533, 65534

# Waits for a line, connects, says that it has nothing to send, and prints what it gets to read.
CONNECT = """
import socket, sys
sys.stdin.readline()
with socket.socket(socket.AF_UNIX) as client:
    try:
        client.connect(sys.argv[1])
    except OSError as error:
        sys.exit(error.strerror)
    client.shutdown(socket.SHUT_WR)
    with client.makefile() as lines:
        print(lines.read(), end="")
"""


@pytest.fixture
def path() -> Iterator[Path]:
    """Give a socket's path in a directory that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="vtpmd-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory) / "manage"


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[ManagementServer]:
    """Serve until the block is left, which must be within TIMEOUT_S."""

    async def echo(arguments: Arguments) -> object:
        return dict(arguments)

    with listen(path) as listening:
        server = ManagementServer(listening, on_quit=lambda: None)
        server.register("echo", {"to": Argument(str), "port": Argument(int, False)}, echo)
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
            task = group.create_task(server.serve())
            yield server
            task.cancel()


def test_qemu_qmp_is_served(path: Path) -> None:
    async def test() -> None:
        async with serving(path) as server:
            client = QMPClient()
            await client.connect(str(path))
            assert client.greeting is not None
            assert client.greeting.QMP.version["package"] == "vtpmd"
            assert await client.execute("echo", {"to": "ä", "port": 7}) == {"to": "ä", "port": 7}
            with pytest.raises(ExecuteError, match="echo needs the argument 'to'") as raised:
                await client.execute("echo")
            assert raised.value.error_class == "GenericError"
            with pytest.raises(ExecuteError) as raised:
                await client.execute("no-such-command")
            assert raised.value.error_class == "CommandNotFound"
            for number in (1, 2):
                server.broadcast("ROUND", {"number": number})
            events = [await client.events.get() for _ in range(2)]
            assert [event["data"] for event in events] == [{"number": 1}, {"number": 2}]
            await client.disconnect()

    asyncio.run(test())


def test_qmp_shell_is_served(path: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(path):
            shell = await asyncio.create_subprocess_exec(
                Path(sys.executable).with_name("qmp-shell"),
                path,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={"HOME": str(tmp_path)},
            )
            said, _ = await shell.communicate(b"echo to=host:4711 port=3\nquit\n")
            lines = said.decode().splitlines()
            assert "Connected to QEMU 0.1.0" in lines
            assert '(QEMU) {"return": {"to": "host:4711", "port": 3}}' in lines
            assert '(QEMU) {"return": {}}' in lines

    asyncio.run(test())


def start_as(user: int, path: Path) -> subprocess.Popen[str]:
    """Start CONNECT as a user; it waits for :func:`connect`."""
    # Not this interpreter's link to it, which may be where only root can go.
    interpreter = Path(sys.executable).resolve()
    return subprocess.Popen(
        [interpreter, "-I", "-S", "-c", CONNECT, path],
        user=user,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def connect(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """Let a process connect; return the lines it got and what went wrong."""
    out, err = await asyncio.to_thread(process.communicate, "\n", TIMEOUT_S)
    return out.splitlines(), err.strip()


def open_to_all(path: Path) -> None:
    """Let every user connect, as far as the socket's mode goes."""
    path.chmod(0o666)


def test_another_user_is_refused(path: Path) -> None:
    """First by the socket's mode; then, with that open to all, in one line."""

    async def test() -> None:
        async with serving(path):
            assert await connect(start_as(OTHER_USER, path)) == ([], "Permission denied")
            open_to_all(path)
            (line,), error = await connect(start_as(OTHER_USER, path))
            assert f"user {OTHER_USER} may not manage this vtpmd" in line
            assert line.startswith('{"error"')
            assert error == ""
            (line,), _ = await connect(start_as(ROOT, path))
            assert line.startswith('{"QMP"')

    asyncio.run(test())


def test_root_and_vtpmds_own_user_are_served(path: Path) -> None:
    async def test() -> None:
        async with serving(path):
            open_to_all(path)
            users = (ROOT, OWN_USER, OTHER_USER)
            processes = [start_as(user, path) for user in users]
            os.seteuid(OWN_USER)
            try:
                answers = [(await connect(process))[0][0] for process in processes]
            finally:
                os.seteuid(ROOT)
            assert [answer.startswith('{"QMP"') for answer in answers] == [True, True, False]

    asyncio.run(test())
