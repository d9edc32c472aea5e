"""What a state directory says of moving: whose the vTPM is, and a state on its way in.

    tpm2-00.owner       JSON, for people too: whose the vTPM is, and which generation numbers may
                        have been used; this host's, and none, if there is no such file

    tpm2-00.incoming    the permanent state that a peer has sent, in two slots that take turns
        Offset          Size      Content
        0               8         magic, "VTPMDIN1"
        8               8         serial of the slot that is the vTPM's state, by the source's Grant
        16              32        SHA-256 of tpm2-00.permall when this file was made
        48              16        session
        4096            278528    slot 0: u64 serial, u32 length, SHA-256 of the state, the state
        282624          278528    slot 1

While the guest stands still every microsecond counts: both files are made beforehand, at their full
size, and then written in place, so that a sync writes no metadata. A slot is valid if its digest
is right; the one in use is never written to. A record is one sector, which disks write whole.
Numbers are big-endian.
"""

from __future__ import annotations

import json
import os
import time
from hashlib import sha256
from struct import Struct
from typing import Final, NamedTuple

from vtpmd.store.directory import (
    JOURNAL_NAME,
    PERMANENT_NAME,
    StateDirectory,
    StateDirectoryError,
    read_regular_file,
)
from vtpmd.wire import swtpm_format

INCOMING_NAME: Final = "tpm2-00.incoming"
OWNER_NAME: Final = "tpm2-00.owner"

OWNER_VERSION: Final = 1
OWNER_BYTES: Final = 512
TEXT_LENGTH_MAX: Final = 100

# Of one session: a capture every microsecond would take an hour to use them up.
GENERATIONS_RESERVED: Final = 1 << 32
GENERATION_MAX: Final = (1 << 63) - 1  # csrc/pages.h

MAGIC: Final = b"VTPMDIN1"
GRANTED: Final = Struct(">Q")
GRANTED_OFFSET: Final = 8
DIGEST_OFFSET: Final = 16
DIGEST_BYTES: Final = 32
SESSION_OFFSET: Final = 48
SESSION_BYTES: Final = 16
SLOTS_OFFSET: Final = 4096
SLOT_HEADER: Final = Struct(">QI32s")
SLOT_BYTES: Final = 278528  # 272 KiB: the store's largest image, and the header
SLOTS: Final = 2
INCOMING_BYTES: Final = SLOTS_OFFSET + SLOTS * SLOT_BYTES


class HandedOver(NamedTuple):
    """The vTPM is another host's."""

    to: str
    at: str  # ISO 8601, UTC


class _Record(NamedTuple):
    """What the owner record says."""

    handed_over: HandedOver | None
    generation: int  # none above it has been used
    declined: str  # the last session whose state was let go of before its Grant came


NO_RECORD: Final = _Record(None, 0, "")


class Handover:
    """The hand-over files of one state directory. All of its methods raise VtpmdError."""

    def __init__(self, directory: StateDirectory) -> None:
        self._directory = directory
        self._fd = directory.directory_fd
        self._serial = 0
        self._used = 0

    # The source's side.

    def generation_used(self, used: int) -> int:
        """Return what all generations of this run must be above; ``used`` is the last one known."""
        self._used = max(used, self._read().generation)
        return self._used

    def reserve_generations(self, used: int) -> int:
        """Make sure that no generation is used twice, here or elsewhere, also after a crash.

        ``used`` is the highest that another host, or this one, is known to have used. Return what
        all that come in this session must be above. The record is made anew, to be overwritten.
        """
        floor = max(used, self._used, self._read().generation)
        record = self._read()._replace(handed_over=None, generation=floor + GENERATIONS_RESERVED)
        self._directory.replace(OWNER_NAME, _owner_record(record))
        return floor

    def hand_over(self, to: str) -> None:
        """Write down durably that the vTPM is another host's."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._update(self._read()._replace(handed_over=HandedOver(to[:TEXT_LENGTH_MAX], at)))

    def strike_out(self) -> None:
        """Write down durably that the vTPM is this host's."""
        if self._directory.exists(OWNER_NAME):
            self._update(self._read()._replace(handed_over=None))

    def read_owner(self) -> HandedOver | None:
        """Return whose the vTPM is, or None if it is this host's.

        A record that cannot be read is an error: whose the vTPM is, is not known then.
        """
        return self._read().handed_over

    def has_declined(self, session: bytes) -> bool:
        """Return whether a session's state was let go of before its Grant came."""
        return self._read().declined == session.hex()

    def _update(self, record: _Record) -> None:
        if self._directory.exists(OWNER_NAME):
            self._overwrite(OWNER_NAME, 0, _owner_record(record))
        else:
            self._directory.replace(OWNER_NAME, _owner_record(record))

    def _read(self) -> _Record:
        try:
            content = read_regular_file(self._fd, OWNER_NAME)
        except FileNotFoundError:
            return NO_RECORD
        except OSError as error:
            raise self._directory.update_failed(OWNER_NAME, error) from error
        try:
            return _parse_owner(content)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StateDirectoryError(
                f"{self._directory.path / OWNER_NAME} cannot be read, so whose the vTPM is, is not "
                "known: restore it, or remove it if no other host runs this guest"
            ) from error

    # The destination's side.

    def prepare_to_take(self, session: bytes) -> None:
        """Make the file for a session's states, with nothing in it.

        Not beside a journal, which there is only if what the last TPM changed could not be folded:
        that would happen later, and seem to be newer than what comes.
        """
        if self._directory.exists(JOURNAL_NAME):
            raise StateDirectoryError(
                f"{self._directory.path / JOURNAL_NAME} is still there: make room or repair the "
                "file system, and restart vtpmd"
            )
        self._serial = 0
        head = MAGIC + GRANTED.pack(0) + self._permanent_digest() + session
        self._directory.replace(INCOMING_NAME, head.ljust(INCOMING_BYTES, b"\0"))

    def stage(self, state: bytes) -> None:
        """Keep a permanent state that is on its way in, durably, beside the last one."""
        header = SLOT_HEADER.pack(self._serial + 1, len(state), sha256(state).digest())
        if len(header) + len(state) > SLOT_BYTES:
            raise StateDirectoryError(f"a state of {len(state)} bytes is too large to be kept")
        self._serial += 1
        slot = self._serial % SLOTS
        self._overwrite(INCOMING_NAME, SLOTS_OFFSET + slot * SLOT_BYTES, header + state)

    def take(self) -> None:
        """The source has granted the vTPM: what was staged last is its state, durably."""
        self._overwrite(INCOMING_NAME, GRANTED_OFFSET, GRANTED.pack(self._serial))

    def finish_taking(self) -> None:
        """The state has its own file now, or is of no use: remove the one for incoming states."""
        self._directory.remove(INCOMING_NAME)

    def recover(self) -> bool:
        """After a crash: make a state that was granted the vTPM's, and forget one that was not.

        Return True if there was one that was granted. If the TPM has written its own file since,
        that is the newer one. A granted state that cannot be read is an error, and stays as it is.
        """
        try:
            content = read_regular_file(self._fd, INCOMING_NAME, INCOMING_BYTES)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._directory.update_failed(INCOMING_NAME, error) from error
        (granted,) = GRANTED.unpack_from(content.ljust(SLOTS_OFFSET, b"\0"), GRANTED_OFFSET)
        made_with = content[DIGEST_OFFSET : DIGEST_OFFSET + DIGEST_BYTES]
        if granted and made_with == self._permanent_digest():
            state = _slot(content, granted)
            if state is None or not content.startswith(MAGIC):
                raise StateDirectoryError(
                    f"{self._directory.path / INCOMING_NAME} has the vTPM's only state, and is "
                    "damaged: restore it from a copy"
                )
            self._directory.replace(PERMANENT_NAME, swtpm_format.encode_file(state))
        if granted:
            self.strike_out()
        else:
            session = content[SESSION_OFFSET : SESSION_OFFSET + SESSION_BYTES]
            self._update(self._read()._replace(declined=session.hex()))
        self.finish_taking()
        return bool(granted)

    def _permanent_digest(self) -> bytes:
        try:
            return sha256(read_regular_file(self._fd, PERMANENT_NAME)).digest()
        except FileNotFoundError:
            return bytes(DIGEST_BYTES)
        except OSError as error:
            raise self._directory.update_failed(PERMANENT_NAME, error) from error

    def _overwrite(self, name: str, offset: int, content: bytes) -> None:
        try:
            fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
            try:
                if os.pwrite(fd, content, offset) != len(content):
                    raise OSError(0, "short write")
                os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise self._directory.update_failed(name, error) from error


def _owner_record(record: _Record) -> bytes:
    moved = None if record.handed_over is None else record.handed_over._asdict()
    content = {
        "version": OWNER_VERSION,
        "handed-over": moved,
        "generation": record.generation,
        "declined": record.declined,
    }
    return json.dumps(content).encode().ljust(OWNER_BYTES - 1) + b"\n"


def _parse_owner(content: bytes) -> _Record:
    if len(content) > OWNER_BYTES:
        raise ValueError("it is too long")
    record = json.loads(content)
    if record["version"] != OWNER_VERSION:
        raise ValueError("it is of another version")
    moved, generation = record["handed-over"], record["generation"]
    declined = str(record["declined"])
    if type(generation) is not int or not 0 <= generation <= GENERATION_MAX:
        raise ValueError("the generation is none")
    if moved is None:
        return _Record(None, generation, declined)
    owner = HandedOver(str(moved["to"]), str(moved["at"]))
    if any(len(text) > TEXT_LENGTH_MAX or not text.isprintable() for text in owner):
        raise ValueError("a text in it is none")
    return _Record(owner, generation, declined)


def _slot(content: bytes, serial: int) -> bytes | None:
    """Return the state in the slot with a serial, or None unless it is there and whole."""
    start = SLOTS_OFFSET + serial % SLOTS * SLOT_BYTES
    slot = content[start : start + SLOT_BYTES]
    if len(slot) < SLOT_HEADER.size:
        return None
    found, length, digest = SLOT_HEADER.unpack_from(slot)
    state = slot[SLOT_HEADER.size : SLOT_HEADER.size + length]
    whole = found == serial and len(state) == length and sha256(state).digest() == digest
    return state if whole else None
