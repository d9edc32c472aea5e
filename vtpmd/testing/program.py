"""A child process whose output is kept, and that ends when the test does."""

import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from vtpmd.testing.sockets import connect

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.1


class Program:
    """A running program; its standard output and error go to a file.

    It is started through setpriv, which replaces itself with the program: `pid` is the program's,
    and the kernel kills it when the test's process dies without having stopped it.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str | Path],
        directory: Path,
        network: Path | None = None,
    ) -> None:
        """Start a program; `name` is for people, and names the log in `directory`.

        `network` is the network namespace to start it in, by default that of the test.
        """
        self.name = name
        self._log = directory / f"{name}.log"
        # nsenter, too, replaces itself.
        enter = [] if network is None else ["nsenter", f"--net={network}"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*enter, "setpriv", "--pdeathsig", "KILL", "--", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        """The process's number, also after it has ended."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, None while it runs, minus the signal's number when one ended it."""
        return self._process.poll()

    @property
    def name_of_process(self) -> str:
        """What the kernel calls the process: it may have become another program."""
        return Path(f"/proc/{self.pid}/comm").read_text().removesuffix("\n")

    @property
    def output(self) -> str:
        """What the program has written to standard output and error so far."""
        return self._log.read_text(errors="replace")

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for the program to end by itself; return its exit code."""
        return self._process.wait(timeout_s)

    def stop(self) -> int:
        """End the program with SIGTERM; return its exit code. TimeoutExpired when it does not."""
        self._process.terminate()
        return self.wait()

    def kill(self) -> None:
        """End the program with SIGKILL, as a crash does; nothing happens when it has ended."""
        self._process.kill()
        self._process.wait()

    def children(self) -> list[int]:
        """Return the numbers of the processes that the program's first thread has started."""
        return [
            int(child)
            for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        ]

    def connect(self, path: Path, timeout_s: float = START_TIMEOUT_S) -> socket.socket:
        """Connect to a UNIX socket of the program's as soon as it is there.

        RuntimeError with the program's output when it ends before, TimeoutError when it is late.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return connect(path, POLL_S)
            except TimeoutError:
                self.raise_if_ended()
                if time.monotonic() > deadline:
                    raise

    def accept(self, listener: socket.socket, timeout_s: float = START_TIMEOUT_S) -> socket.socket:
        """Accept the program's connection; raises as `connect` does."""
        deadline = time.monotonic() + timeout_s
        listener.settimeout(POLL_S)
        while True:
            try:
                return listener.accept()[0]
            except TimeoutError:
                self.raise_if_ended()
                if time.monotonic() > deadline:
                    raise

    def raise_if_ended(self) -> None:
        """Raise RuntimeError with the program's output when it has ended."""
        if self.exit_code is not None:
            raise RuntimeError(f"{self.name} ended with status {self.exit_code}: {self.output}")

    def wait_for_output(self, text: str, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Wait until the program has written `text`; TimeoutError when it does not."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} did not write {text!r}; it wrote: {self.output}")
            time.sleep(0.01)
