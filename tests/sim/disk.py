"""A state directory on a disk that loses power, fails and is full; with the real files' bytes.

Each call is durable when it returns. A loss of power in the middle of one leaves the old content or
the new one, of a write in place any number of its sectors. A disk that fails does the same, and
says so: a call that failed may have been done.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from vtpmd.store.directory import StateDirectory, StateDirectoryError
from vtpmd.store.keys import Key
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType, TpmVersion

SECTOR_BYTES: Final = 512


class Power(Protocol):
    """Who decides what happens at a call."""

    def before_write(self, what: str) -> str:
        """Return "done", "fails" or "lost"; raises in a process that is gone."""

    def lose_power(self) -> None:
        """The power is lost now. Raises, where it is lost."""


class Disk:
    """What a host keeps while it is off."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.files: dict[str, bytearray] = {}
        self.opened: list[bytearray] = []  # by descriptor: a file stays what it was under its name


class SimDirectory(StateDirectory):
    """The state directory, and what writes in place: of one process, on a host's disk."""

    def __init__(
        self, disk: Disk, power: Power | None, written: Callable[[str, bool], None]
    ) -> None:
        super().__init__(Path("state"), -1, -1, TpmVersion.TPM_2_0)
        self._disk = disk
        self._power = power
        self._written = written

    def read(self, name: str, bytes_max: int) -> bytes | None:
        content = self._disk.files.get(name)
        return None if content is None else bytes(memoryview(content)[: bytes_max + 1])

    def read_state(self, state_type: StateType, key: Key | None = None) -> bytes | None:
        del key
        content = self._disk.files.get(self.names.state(state_type))
        return None if content is None else swtpm_format.decode_file(bytes(content))

    def exists(self, name: str) -> bool:
        return name in self._disk.files

    def replace(self, name: str, content: bytes) -> None:
        self._change(f"replaces {name}", name, 1, lambda _: self._put(name, content))

    def remove(self, name: str) -> None:
        if name in self._disk.files:
            self._change(f"removes {name}", name, 1, lambda _: self._put(name, None))

    def overwrite(self, name: str, offset: int, content: bytes) -> None:
        if name not in self._disk.files:
            raise StateDirectoryError(f"cannot update {name}: no such file")
        first, last = offset // SECTOR_BYTES, (offset + len(content) - 1) // SECTOR_BYTES

        def write(n_sectors: int) -> None:
            end = min((first + n_sectors) * SECTOR_BYTES, offset + len(content))
            self._disk.files[name][offset:end] = content[: end - offset]

        self._change(f"writes {name} at {offset}", name, 1 + last - first, write)

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Open a file for the engine, which gets the descriptor."""
        if name not in self._disk.files:
            raise StateDirectoryError(f"cannot update {name}: no such file")
        self._disk.opened.append(self._disk.files[name])
        yield len(self._disk.opened) - 1

    def write_sector(self, descriptor: int, content: bytes) -> None:
        """Write to the start of what was opened."""
        file = self._disk.opened[descriptor]

        def write(_: int) -> None:
            file[: len(content)] = content

        self._change("engine writes the owner record", self.names.owner, 1, write)

    def keep_open(self, name: str) -> None:
        """Nothing is kept open."""

    def forget(self, name: str) -> None:
        """Nothing is."""

    def _change(self, what: str, name: str, n_parts: int, do: Callable[[int], None]) -> None:
        """Change a file, which ``do`` does so many parts of: all, if nothing fails."""
        assert self._power is not None, "it is only looked at"
        outcome = self._power.before_write(what)
        n_done = n_parts if outcome == "done" else self._disk.rng.randrange(n_parts + 1)
        if n_done:
            do(n_done)
            self._written(name, outcome == "done")
        if outcome == "lost":
            self._power.lose_power()
        if outcome != "done":
            raise StateDirectoryError(f"cannot update {name}: the disk fails")

    def _put(self, name: str, content: bytes | None) -> None:
        if content is None:
            self._disk.files.pop(name, None)
        else:
            self._disk.files[name] = bytearray(content)
