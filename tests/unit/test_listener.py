"""The listening socket: its mode, and what stands in its place."""

import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from vtpmd.daemon import listener
from vtpmd.daemon.listener import SocketInUse, listen
from vtpmd.errors import VtpmdError

CONNECTED_TIMEOUT_S = 30.0


def test_socket_is_its_owners_alone_and_gone_afterwards(tmp_path: Path) -> None:
    """Mode 0600, connectable while listening, removed at the end."""
    path = tmp_path / "s"
    with listen(path), socket.socket(socket.AF_UNIX) as client:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        client.connect(str(path))
    assert not path.exists()


def test_socket_that_nobody_serves_is_replaced(tmp_path: Path) -> None:
    """A daemon that was killed leaves its socket; the next one takes the place."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with listen(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_socket_that_is_served_is_left_alone(tmp_path: Path) -> None:
    """A second daemon is refused, and the first goes on."""
    path = tmp_path / "s"
    with listen(path):
        with pytest.raises(SocketInUse, match="another process does"), listen(path):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_of_two_that_begin_at_once_one_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes when the first has bound its socket, and does not listen on it yet."""
    path = tmp_path / "s"
    bind, seconds = listener._bind, []

    def bind_and_be_met(listening: Any, *rest: Any) -> None:
        bind(listening, *rest)
        monkeypatch.setattr(listener, "_bind", bind)
        with pytest.raises(SocketInUse, match="another process"), listen(path):
            pass
        seconds.append(path)

    monkeypatch.setattr(listener, "_bind", bind_and_be_met)
    monkeypatch.setattr(listener, "OTHERS_WAIT_S", 0.0)
    with listen(path) as listening, socket.socket(socket.AF_UNIX) as client:
        assert seconds
        client.connect(str(path))
        listening.settimeout(CONNECTED_TIMEOUT_S)
        listening.accept()[0].close()


def test_file_in_the_sockets_place_is_left_alone(tmp_path: Path) -> None:
    """What is no socket is somebody's file."""
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(VtpmdError, match="cannot listen"), listen(path):
        pass
    assert path.read_text() == "mine"


def test_path_that_leads_nowhere(tmp_path: Path) -> None:
    """One line says why."""
    path = tmp_path / "s"
    path.symlink_to(path)
    with pytest.raises(VtpmdError, match="cannot listen"), listen(path / "s"):
        pass


def test_path_too_long_for_a_socket(tmp_path: Path) -> None:
    """One line says what the limit is."""
    with pytest.raises(VtpmdError, match="at most 107 bytes"), listen(tmp_path / ("x" * 108)):
        pass
