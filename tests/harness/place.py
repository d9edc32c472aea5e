"""A place in which the commands that documents show are run as they are written there."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.harness.fresh_root import ROOT, FreshRoot
from tests.support.commands import Command
from vtpmd.testing.program import Program

TIMEOUT_S = 300  # a compiler's, where other tests run beside it
# What reaches a registry of packages from this machine.
PASSED_ON = re.compile(r"PIP_|.*_proxy$", re.IGNORECASE)
# An installed vtpmd is found behind all else that the system has.
SEARCHED = f"/usr/sbin:/usr/bin:/sbin:/bin:{ROOT / '.venv/bin'}"


class Written:
    """Commands of a document, and which of them nobody has taken yet."""

    def __init__(self, commands: Iterable[Command]) -> None:
        self._commands = list(commands)
        self._taken: set[str] = set()

    @property
    def left(self) -> list[str]:
        """What nobody has taken."""
        return [each.text for each in self._commands if each.text not in self._taken]

    def take(self, beginning: str) -> Command:
        """Return the one command that begins so; it counts as taken, wherever it is written."""
        found = {each.text: each for each in self._commands if each.text.startswith(beginning)}
        assert len(found) == 1, f"{beginning!r} begins {list(found)}; there are {self.left}"
        (command,) = found.values()
        self._taken.add(command.text)
        return command


class Place:
    """A root with the source tree in it, where what is done leaves nothing behind.

    Commands are a shell's, in the source tree. `values` are for what a reader is to fill in.
    """

    def __init__(
        self,
        written: Written,
        directory: Path,
        network: Path | None = None,
        values: Mapping[str, str] | None = None,
    ) -> None:
        """Make it; `directory` is the home directory there, and the same outside."""
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self._values = dict(values or {})
        self.root = FreshRoot(directory, network)
        self._written = written
        self._environment = [f"HOME={directory}", "LC_ALL=C.UTF-8", f"PATH={SEARCHED}"]
        # What this machine has downloaded is there; what is new does not stay.
        self._environment += [f"PIP_CACHE_DIR={Path.home() / '.cache/pip'}"]
        self._environment += [f"{k}={v}" for k, v in os.environ.items() if PASSED_ON.match(k)]
        self._started = 0

    def kill(self) -> None:
        """End it, once nothing runs there any more."""
        self.root.kill()

    def run(self, beginning: str, typed: str = "") -> str:
        """Run the written command that begins so; return what it prints. It is to succeed."""
        return self.shell(self._text(beginning), typed)

    def start(self, beginning: str) -> Program:
        """Start the written command that begins so."""
        return self.launch(self._text(beginning))

    def launch(self, text: str) -> Program:
        """Start a command that is not written."""
        self._started += 1
        directory = self.directory / f"{self._started}"
        directory.mkdir()
        return Program("started", self._words(f"exec {text}"), directory)

    def shell(self, text: str, typed: str = "") -> str:
        """Run a command that is not written, or is with something added; as `run` does."""
        ended = subprocess.run(
            self._words(text),
            input=typed,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        print(text, ended.stdout, ended.stderr, sep="\n")
        assert ended.returncode == 0, f"{text}: {ended.stderr}"
        return ended.stdout

    def _text(self, beginning: str) -> str:
        text = self._written.take(beginning).text
        for name, value in self._values.items():
            text = " ".join(value if word == name else word for word in text.split(" "))
        return text

    def _words(self, text: str) -> list[str]:
        place = ["env", "-i", "-C", str(ROOT), *self._environment]
        return self.root.command(*place, "bash", "-euo", "pipefail", "-c", text)
