"""UNIX sockets, as a client has them."""

import socket
from pathlib import Path


def connect(path: Path) -> socket.socket:
    """Connect, at the first try. ConnectionRefusedError where nobody listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock
