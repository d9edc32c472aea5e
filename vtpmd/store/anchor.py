"""The anchor: a small file in a second place, which says how far a vTPM's permanent state has come.

A directory that was put back as a whole, state and journal alike, cannot be told from the inside.
The engine writes the anchor after each commit and before its response (``csrc/anchor.h`` has the
format); this opens and begins it, and refuses a directory that has fallen behind it:

       directory             anchor             verdict
    1  anything              not begun          begin it
    2  no state              has seen none      start
    3  no state              has seen one       refuse: fallen behind
    4  what it has seen      there              start
    5  what it expected      there              start: the crash came between file and anchor
    6  another identity      there              refuse: another vTPM's anchor
    7  a later generation    there              start: the crash came between journal and anchor
    8  anything else         there              refuse: fallen behind

The first row that fits decides. A generation counts only if a journal says it: what stands beside
the state in its file is not sealed. So a file that takes another's place is announced before. What
has come in place of the state may have brought its identity: the state itself says more than that.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple, Self

from vtpmd.closing import Closing
from vtpmd.core.delta import crc32c
from vtpmd.errors import UsageError
from vtpmd.store.directory import StateDirectoryError, lock_file, sync_directory

MAGIC: Final = b"VTPMANCH"
VERSION: Final = 1
SLOT: Final = Struct(">8sHH4x16sQQ32s32s396x")
CHECKSUM: Final = Struct(">I")
SLOT_BYTES: Final = 512
SLOT_STRIDE: Final = 4096
SLOTS: Final = 2
ANCHOR_BYTES: Final = SLOTS * SLOT_STRIDE
FILE_MODE: Final = 0o640
NO_DIGEST: Final = bytes(32)
NO_IDENTITY: Final = bytes(16)


class FallenBehind(StateDirectoryError):
    """A state directory holds less than the anchor says that there was."""

    exit_status = 6

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what = what


class Mark(NamedTuple):
    """How far a vTPM's permanent state has come."""

    identity: bytes  # 16 bytes
    generation: int
    digest: bytes  # SHA-256, or NO_DIGEST before there is a state
    expected: bytes = NO_DIGEST  # of what may be there instead, as it was being written


class Found(NamedTuple):
    """What a state directory holds, as its recovery says."""

    identity: bytes | None  # of the vTPM, where it is known
    digest: bytes | None  # of the permanent state; None: there is none
    generation: int | None  # of that, where a journal says it


class Anchor(Closing):
    """An open anchor, locked against others; the engine has its descriptor, too, and writes it."""

    def __init__(self, path: Path, fd: int, slots: bytes) -> None:
        self.path = path
        self.fd = fd
        found = [_decode(slots[n * SLOT_STRIDE :][:SLOT_BYTES]) for n in range(SLOTS)]
        self._is_begun = any(slots)
        if self._is_begun and not any(found):
            raise StateDirectoryError(
                f"anchor {path} is damaged: restore it, or empty the file to trust the state "
                "directory as it is"
            )
        newest = max((slot for slot in found if slot), default=None)
        self.serial = 0 if newest is None else newest[0]
        self.mark = None if newest is None else newest[1]

    @classmethod
    def open(cls, path: Path, directory: Path, *, is_new: bool) -> Self:
        """Open and lock an anchor; make it if the state directory ``is_new``, with nothing in it.

        An empty file is an anchor that has not begun. One that is not there, for a vTPM that is, is
        refused: it is more likely that what should hold it has not been mounted. Raises UsageError,
        StateDirectoryInUse or StateDirectoryError.
        """
        if path.resolve().is_relative_to(directory.resolve()):
            raise UsageError(f"anchor {path} is in the state directory: put it on another disk")
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(path, flags | (os.O_CREAT if is_new else 0), FILE_MODE)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError(errno.EINVAL, "it is not a regular file")
                lock_file(f"anchor {path}", fd)
                return cls(path, fd, os.pread(fd, ANCHOR_BYTES, 0))
            except BaseException:
                os.close(fd)
                raise
        except FileNotFoundError:
            raise StateDirectoryError(
                f"there is no anchor {path}: mount what holds it, or make an empty file to trust "
                "the state directory as it is"
            ) from None
        except OSError as error:
            raise _failed(path, error) from error

    def close(self) -> None:
        """Close the file; the lock stays for as long as the engine has its copy."""
        os.close(self.fd)

    @property
    def generation(self) -> int:
        """The last one that was seen; 0 before it has begun."""
        return 0 if self.mark is None else self.mark.generation

    @property
    def digest(self) -> bytes:
        """That of the state that was seen last; NO_DIGEST before there was one."""
        return NO_DIGEST if self.mark is None else self.mark.digest

    def has_seen(self, digest: bytes) -> bool:
        """Return whether a state is the one that was seen last, or was expected then."""
        return self.mark is not None and digest in (self.mark.digest, self.mark.expected)

    def check(self, found: Found) -> None:
        """Compare with what a directory holds.

        Raises StateDirectoryError for another vTPM's anchor, or FallenBehind.
        """
        mark = self.mark
        if mark is None or (found.digest is None and mark.digest == NO_DIGEST):
            return
        if found.digest is not None:
            if self.has_seen(found.digest):
                return
            if found.identity not in (None, mark.identity):
                raise StateDirectoryError(
                    f"anchor {self.path} is another vTPM's: give this one its own, or restore the "
                    "state directory"
                )
            if found.generation is not None and found.generation > mark.generation:
                return
        holds = "nothing" if found.digest is None else "an older or another state"
        raise FallenBehind(
            f"the state directory holds {holds}, but anchor {self.path} has seen generation "
            f"{mark.generation}: it was put back",
            "restore what is newer, or see `vtpmd recover`",
        )

    def expect(self, identity: bytes, digest: bytes) -> None:
        """Write down that a state, of the vTPM of this identity, is about to take the place of all.

        Raises StateDirectoryError.
        """
        mark = self.mark or Mark(identity, 0, NO_DIGEST)
        self.write(mark._replace(identity=identity, expected=digest))

    def trust(self, found: Found, identity: bytes) -> None:
        """Write down what a directory holds, with the vTPM's identity, unless that stands there.

        The generation grows. Raises StateDirectoryError.
        """
        mark = self.mark
        digest = NO_DIGEST if found.digest is None else found.digest
        if mark is not None and mark == Mark(identity, mark.generation, digest):
            return
        self.write(Mark(identity, max(found.generation or 0, self.generation + 1), digest))

    def write(self, mark: Mark) -> None:
        """Say durably how far the state has come. Raises StateDirectoryError."""
        try:
            if not self._is_begun:
                _write(self.fd, bytes(ANCHOR_BYTES), 0)
                os.fsync(self.fd)
                sync_directory(self.path.parent)
            serial = self.serial + 1
            _write(self.fd, _encode(serial, mark), serial % SLOTS * SLOT_STRIDE)
            os.fdatasync(self.fd)
        except OSError as error:
            raise _failed(self.path, error) from error
        self._is_begun, self.serial, self.mark = True, serial, mark


def _encode(serial: int, mark: Mark) -> bytes:
    identity, generation, digest, expected = mark
    content = SLOT.pack(MAGIC, VERSION, 0, identity, serial, generation, digest, expected)
    return content + CHECKSUM.pack(crc32c(content))


def _decode(slot: bytes) -> tuple[int, Mark] | None:
    """Return what a slot says, after its serial, or None unless it is whole."""
    content, checksum = slot[: SLOT.size], slot[SLOT.size :]
    if checksum != CHECKSUM.pack(crc32c(content)):
        return None
    magic, version, flags, identity, serial, *state = SLOT.unpack(content)
    if (magic, version, flags) != (MAGIC, VERSION, 0):
        return None
    return serial, Mark(identity, *state)


def _write(fd: int, content: bytes, offset: int) -> None:
    if os.pwrite(fd, content, offset) != len(content):
        raise OSError(errno.ENOSPC, "short write")


def _failed(path: Path, error: OSError) -> StateDirectoryError:
    return StateDirectoryError(
        f"cannot use anchor {path}: {error.strerror}; give one that this user may write to"
    )
