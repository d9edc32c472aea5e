"""Files of a state directory that are written in place, while a guest waits for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from vtpmd.store.directory import StateDirectory


class InPlace:
    """Writes into files that are there already, and keeps open which it is told to."""

    def __init__(self, directory: StateDirectory) -> None:
        self._directory = directory
        self._fd = directory.directory_fd
        self._opened: dict[str, int] = {}

    def keep_open(self, name: str) -> None:
        """Open a file for the writes that come. Raises StateDirectoryError."""
        self.forget(name)
        try:
            self._opened[name] = self._open(name)
        except OSError as error:
            raise self._directory.failed(name, error) from error

    def overwrite(self, name: str, offset: int, content: bytes) -> None:
        """Write into a file, durably. Raises StateDirectoryError."""
        kept = self._is_kept_open(name)
        try:
            fd = self._opened[name] if kept else self._open(name)
            try:
                if os.pwrite(fd, content, offset) != len(content):
                    raise OSError(0, "short write")
                os.fdatasync(fd)
            finally:
                if not kept:
                    os.close(fd)
        except OSError as error:
            raise self._directory.failed(name, error) from error

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Open a file for somebody else to write into. Raises StateDirectoryError."""
        try:
            fd = self._open(name)
        except OSError as error:
            raise self._directory.failed(name, error) from error
        try:
            yield fd
        finally:
            os.close(fd)

    def forget(self, name: str) -> None:
        """Close a file that is kept open; it is opened again when it is needed."""
        if (fd := self._opened.pop(name, None)) is not None:
            os.close(fd)

    def close(self) -> None:
        """Forget all files."""
        for name in list(self._opened):
            self.forget(name)

    def _open(self, name: str) -> int:
        return os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)

    def _is_kept_open(self, name: str) -> bool:
        """Return whether a file is open, and still the one with that name: people remove some."""
        try:
            there = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
            return os.path.samestat(os.fstat(self._opened[name]), there)
        except (KeyError, OSError):
            return False
