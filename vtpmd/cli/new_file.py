"""A file that a command is told to make: whole or not at all, and never in place of another."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from vtpmd.errors import UsageError, VtpmdError

FILE_MODE = 0o600
# Of file systems that have one name for a file.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class CannotWrite(VtpmdError):
    """It cannot be written; there is none."""


def check_is_new(path: Path) -> None:
    """Raise UsageError if something is there: it is said before anything is done."""
    if os.path.lexists(path):
        raise UsageError(f"{path} is there already: give another name, or remove it")


def make(path: Path, content: bytes) -> None:
    """Make a file, durably; nobody ever finds a part of it. Raises CannotWrite, or UsageError."""
    from vtpmd.store.directory import sync_directory, write_new

    unfinished = path.with_name(f".vtpmd-{os.urandom(8).hex()}.new")
    try:
        try:
            write_new(unfinished, content, FILE_MODE)
            _name(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        try:
            sync_directory(path.parent)
        except OSError:
            path.unlink()
            raise
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}; give another place") from error


def _name(unfinished: Path, path: Path) -> None:
    """Give a file its name, unless something has it. Raises UsageError or OSError."""
    try:
        path.hardlink_to(unfinished)
    except FileExistsError:
        check_is_new(path)
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        check_is_new(path)
        unfinished.rename(path)
