"""The workload of vtpmd/testing/guest_image, spoken to over the guest's second serial line."""

import secrets
import socket
from collections.abc import Callable

from vtpmd.testing.facts import Facts, verify_signature

BOOT_TIMEOUT_S = 90.0  # boots in 1.6 s; two cores may have more to do than two guests
COMMAND_TIMEOUT_S = 60.0


class WorkloadFailedError(Exception):
    """The workload answered `fail`: the guest saw a difference, or an error from its TPM."""


class Workload:
    """A connection to the workload."""

    def __init__(self, sock: socket.socket, said_by_qemu: Callable[[], str]) -> None:
        """`said_by_qemu` is for the error when QEMU closes the line."""
        self._socket = sock
        self._said_by_qemu = said_by_qemu
        self._pending = b""

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def wait_until_ready(self) -> None:
        """Wait until the guest has booted and the workload says that it is ready."""
        if (line := self._receive_line(BOOT_TIMEOUT_S)) != "ready":
            raise WorkloadFailedError(f"the workload began with {line!r}")

    def command(self, line: str) -> Facts:
        """Send the workload a command; return the facts in its answer.

        WorkloadFailedError when it answers `fail`, TimeoutError when it does not answer, and
        ConnectionError when QEMU ends meanwhile.
        """
        self.send(line)
        return self.receive(line)

    def send(self, line: str) -> None:
        """Send a command."""
        self._socket.sendall(line.encode() + b"\n")

    def receive(self, line: str) -> Facts:
        """Return the facts in the answer to that command; raises as `command` does."""
        facts: Facts = {}
        while (answer := self._receive_line(COMMAND_TIMEOUT_S)) != "ok":
            kind, _, rest = answer.partition(" ")
            if kind != "fact":
                raise WorkloadFailedError(f"{line}: {answer}")
            name, _, value = rest.partition(" ")
            facts[name] = value
        return facts

    def check(self) -> Facts:
        """Let the workload check everything; return what it found.

        A nonce goes in and the signature over it is verified here, so that an old answer, or one
        of another key, does not pass.
        """
        nonce = secrets.token_hex(16)
        facts = self.command(f"check {nonce}")
        verify_signature(facts, nonce)
        return facts

    def _receive_line(self, timeout_s: float) -> str:
        self._socket.settimeout(timeout_s)
        while b"\n" not in self._pending:
            received = self._socket.recv(4096)
            if not received:
                raise ConnectionError(
                    f"QEMU closed the serial line; it said {self._said_by_qemu()}"
                )
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode(errors="replace")
