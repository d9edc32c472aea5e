"""UNIX sockets of programs that may not have come as far yet."""

import socket
import time
from pathlib import Path

TIMEOUT_S = 30.0  # generous: a 3072-bit RSA key takes libtpms half a second when nothing else runs
POLL_S = 0.005


def connect(path: Path, timeout_s: float = TIMEOUT_S) -> socket.socket:
    """Connect to a UNIX socket, trying again until it is there; TimeoutError when it stays away."""
    deadline = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody listens on {path} after {timeout_s} s") from None
            time.sleep(POLL_S)
        else:
            sock.settimeout(timeout_s)
            return sock
