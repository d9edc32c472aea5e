"""A child process whose output is kept, and that ends when the test does."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

STOP_TIMEOUT_S = 20.0


class Program:
    """A running program; its standard output and error go to a file.

    It is started through setpriv, which replaces itself with the program: `pid` is the program's,
    and the kernel kills it when the test's process dies without having stopped it.
    """

    def __init__(self, name: str, arguments: Sequence[str | Path], directory: Path) -> None:
        """Start a program; `name` is for people, and names the log in `directory`."""
        self.name = name
        self._log = directory / f"{name}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *map(str, arguments)],
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

    def wait_for_output(self, text: str, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Wait until the program has written `text`; TimeoutError when it does not."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} did not write {text!r}; it wrote: {self.output}")
            time.sleep(0.01)
