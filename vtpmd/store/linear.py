"""A linear file, or block device, that has the states of one TPM, and nothing beside it.

The engine writes it (``csrc/linear.h``): here it is opened, locked, and read at the start. What a
state directory has more of, as the owner record and the journal, has no place in it: such a vTPM
moves by QEMU's own migration alone.
"""

from __future__ import annotations

import errno
import os
import stat

from vtpmd.closing import Closing
from vtpmd.core import JOURNAL_IDENTITY_BYTES as IDENTITY_BYTES
from vtpmd.core.linear import LINEAR_HEADER_BYTES, LinearExtent, LinearFault, linear_decode
from vtpmd.errors import VtpmdError
from vtpmd.light_typing import TYPE_CHECKING
from vtpmd.store.directory import ASK_IT, FILE_MODE, is_socket, lock_file
from vtpmd.store.libtpms import check_level
from vtpmd.store.start import Start
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType, TpmVersion

if TYPE_CHECKING:
    from vtpmd.store.keys import Key

# Of what has no header: with anything else in as much it is not empty. What others put on a device
# begins well before.
EMPTY_BYTES = 4 * 1024 * 1024
FAULTS: dict[LinearFault, str] = {
    LinearFault.MAGIC: "it is not empty, and no linear file of swtpm's: something else is in it",
    LinearFault.VERSION: "it is a linear file of a later version",
    LinearFault.SLOTS: "it has states of more than one TPM",
    LinearFault.SECTION: "its header is damaged: a state in it is not in the file",
    LinearFault.OVERLAP: "its header is damaged: two states in it overlap",
}
REMEDY = "restore it from a backup, or give another one"
# What to do about a state that does not go with the key.
KEY_REMEDIES: dict[type[Exception], str] = {
    swtpm_format.KeyNeeded: "it is as it was",
    swtpm_format.KeyWrong: "give the right key, or restore it from a backup",
    swtpm_format.NotEncrypted: "leave out --key",
}


class LinearFileError(VtpmdError):
    """A linear file cannot be used."""


class LinearFile(Closing):
    """A linear file that is open; who uses it may be writing meanwhile."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.header = b""  # as it was read last

    @classmethod
    def look_into(cls, path: str) -> LinearFile:
        """Open one that is there, to read. Raises LinearFileError or OSError."""
        return cls(path, _open(path, os.O_RDONLY))

    @classmethod
    def open(cls, path: str, mode: int | None = None, *, lock: bool = True) -> LinearFile:
        """Open and lock one, which is made if it is not there; give it the ``mode``, if it is one.

        With ``lock`` false it is another's meanwhile, and to be locked before it is used. Raises
        StateDirectoryInUse, LinearFileError or OSError.
        """
        fd = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            if mode is not None:
                os.fchmod(fd, mode)
            if lock:
                lock_file(f"state file {path}", fd)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd)

    def close(self) -> None:
        """Close it; the lock stays for as long as the engine has its copy."""
        os.close(self.fd)

    def extents(self) -> dict[StateType, LinearExtent]:
        """Return where there is a state. Raises LinearFileError or OSError."""
        file_bytes = os.lseek(self.fd, 0, os.SEEK_END)
        header = os.pread(self.fd, LINEAR_HEADER_BYTES, 0)
        self.header = header.ljust(LINEAR_HEADER_BYTES, b"\0")
        fault, extents = linear_decode(header, file_bytes)
        if fault is LinearFault.MAGIC and self._is_empty(file_bytes):
            return {}
        if fault is not LinearFault.NOTHING:
            raise LinearFileError(
                f"cannot use {self.path}: {FAULTS[fault]}; nothing was written: {REMEDY}"
            )
        found = zip(StateType, extents, strict=True)
        return {kind: extent for kind, extent in found if extent.n_bytes > 0}

    def start(self, version: TpmVersion, key: Key | None) -> Start:
        """Return what a vTPM of a version starts from; the file does not say which it is.

        Raises LinearFileError or OSError.
        """
        files = {kind: self._read(kind, extent) for kind, extent in self.extents().items()}
        states = {kind: self._decode(kind, content, key) for kind, content in files.items()}
        lineage = self._lineage(files.get(StateType.PERMANENT))
        if lineage is not None and lineage.continued:
            raise self._refusal(
                StateType.PERMANENT,
                "a journal continues it, in the state directory that it was copied from",
                "stop the vTPM there, or `vtpmd fold` it, and copy it again",
            )
        check_level(self.path, version, states)
        generation = 0 if lineage is None else lineage.generation
        return Start(
            version=version,
            states=states,
            took_up=False,
            fenced=False,
            identity=os.urandom(IDENTITY_BYTES) if lineage is None else lineage.identity,
            is_known=lineage is not None,
            generation=generation,
            loaded=generation,
            changes=0,
            keeps_journal=False,
        )

    def _is_empty(self, file_bytes: int) -> bool:
        content = os.pread(self.fd, min(file_bytes, EMPTY_BYTES), 0)
        return not content.strip(b"\0")

    def _read(self, kind: StateType, extent: LinearExtent) -> bytes:
        content = os.pread(self.fd, extent.n_bytes, extent.offset)
        if len(content) < extent.n_bytes:
            raise self._refusal(kind, "the file is shorter than before", "start again")
        return content

    def _decode(self, kind: StateType, content: bytes, key: Key | None) -> bytes:
        try:
            return swtpm_format.decode_file(content, key=None if key is None else key.material)
        except swtpm_format.FormatError as error:
            remedy = KEY_REMEDIES.get(type(error), REMEDY)
            raise self._refusal(kind, str(error), remedy) from error

    def _lineage(self, permanent: bytes | None) -> swtpm_format.Lineage | None:
        try:
            return None if permanent is None else swtpm_format.read_lineage(permanent)
        except swtpm_format.FormatError as error:
            raise self._refusal(StateType.PERMANENT, str(error), REMEDY) from error

    def _refusal(self, kind: StateType, why: str, remedy: str) -> LinearFileError:
        name = kind.name.lower()
        return LinearFileError(f"cannot read the {name} state in {self.path}: {why}; {remedy}")


def _open(path: str, flags: int) -> int:
    """Open a file or block device. Raises LinearFileError or OSError."""
    if is_socket(path):
        raise LinearFileError(f"cannot use {path}: it is a socket; {ASK_IT}")
    flags |= os.O_CLOEXEC | os.O_NONBLOCK  # without which a FIFO would be waited for
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW, FILE_MODE)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        # Of devices many names are links, as those of logical volumes.
        fd = os.open(path, flags & ~os.O_CREAT)
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            os.close(fd)
            raise
    if not _is_file_or_device(fd):
        os.close(fd)
        raise LinearFileError(
            f"cannot use {path}: it is no file or block device; give another one, or a directory "
            "with --tpmstate dir="
        )
    return fd


def _is_file_or_device(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)
