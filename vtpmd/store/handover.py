"""What a state directory says of moving: whose the vTPM is, and a state on its way in.

    tpm2-00.owner       JSON, for people too: whose the vTPM is, and which generation numbers may
                        have been used; this host's, and none, if there is no such file

    tpm2-00.incoming    the permanent state that a peer has sent (vtpmd/store/incoming.py)

While the guest stands still every microsecond counts: the owner record is made beforehand, kept
open, and then written in place, so that a sync writes no metadata. It is one sector, which disks
write whole.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpmd.core import Image
from vtpmd.store.directory import (
    JOURNAL_NAME,
    StateDirectory,
    StateDirectoryError,
    read_regular_file,
)
from vtpmd.store.in_place import InPlace
from vtpmd.store.incoming import IncomingStates
from vtpmd.store.keys import Key
from vtpmd.wire.control import StateType

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

OWNER_NAME: Final = "tpm2-00.owner"

OWNER_VERSION: Final = 1
OWNER_BYTES: Final = 512
TEXT_LENGTH_MAX: Final = 100

# Of one session: a capture every microsecond would take an hour to use them up.
GENERATIONS_RESERVED: Final = 1 << 32
GENERATION_MAX: Final = (1 << 63) - 1  # csrc/pages.h


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


class _Prepared(NamedTuple):
    """What the record says once the vTPM is another host's, and its bytes."""

    to: str
    record: _Record
    content: bytes


class Handover:
    """The hand-over files of one state directory. All of its methods raise VtpmdError."""

    def __init__(self, directory: StateDirectory, key: Key | None = None) -> None:
        """With a key what holds state is sealed with it, and must be."""
        self._directory = directory
        self._fd = directory.directory_fd
        self._key = key
        self._in_place = InPlace(directory)
        self._incoming = IncomingStates(directory, self._in_place, key)
        self._used = 0
        self._record: _Record | None = None  # what the owner record says, if it is known
        self._prepared: _Prepared | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._waking: Future[None] | None = None

    def close(self) -> None:
        """Close what is kept open; it is opened again when it is needed."""
        self._forget_prepared()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self._in_place.close()

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
        self._forget_prepared()
        known = self._read()
        floor = max(used, self._used, known.generation)
        record = known._replace(handed_over=None, generation=floor + GENERATIONS_RESERVED)
        self._directory.replace(OWNER_NAME, _owner_record(record))
        self._record = record
        self._in_place.keep_open(OWNER_NAME)
        return floor

    def prepare_to_hand_over(self) -> None:
        """Make the thread that expect_hand_over() needs; close() ends it."""
        from concurrent.futures import ThreadPoolExecutor

        self._thread = self._thread or ThreadPoolExecutor(1)
        self._thread.submit(int)  # it starts with its first work

    def expect_hand_over(self, to: str) -> None:
        """Have ready what hand_over() writes, as the guest will wait for it; errors show later.

        A disk that was idle is slow at first. So what the owner record says is written once more,
        in another thread.
        """
        if self._thread is None or self._record is None:
            return
        if self._waking is None or self._waking.done():
            self._prepared = _prepare(to, self._record)
            content = _owner_record(self._record)
            self._waking = self._thread.submit(self._in_place.overwrite, OWNER_NAME, 0, content)

    def hand_over(self, to: str) -> None:
        """Write down durably that the vTPM is another host's."""
        prepared = self._prepared
        if prepared is None or prepared.to != to:
            prepared = _prepare(to, self._record or self._read())
        self._update(prepared.record, prepared.content)

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

    def _update(self, record: _Record, content: bytes | None = None) -> None:
        self._forget_prepared()
        self._record = None  # until it is durable
        content = content or _owner_record(record)
        if self._directory.exists(OWNER_NAME):
            self._in_place.overwrite(OWNER_NAME, 0, content)
        else:
            self._directory.replace(OWNER_NAME, content)
        self._record = record

    def _forget_prepared(self) -> None:
        """Another record comes: wait for the thread, which writes the one before it."""
        self._prepared = None
        if self._waking is not None:
            self._waking.exception()
            self._waking = None

    def _read(self) -> _Record:
        try:
            content = read_regular_file(self._fd, OWNER_NAME)
        except FileNotFoundError:
            return NO_RECORD
        except OSError as error:
            raise self._directory.failed(OWNER_NAME, error) from error
        try:
            return _parse_owner(content)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StateDirectoryError(
                f"{self._directory.path / OWNER_NAME} cannot be read, so whose the vTPM is, is not "
                "known: restore it, or remove it if no other host runs this guest"
            ) from error

    # The destination's side.

    def prepare_to_take(self, session: bytes) -> None:
        """Make the file for a session's states, with nothing in it."""
        self._incoming.make(session)

    def stage(self, record: bytes, state: Image) -> None:
        """Keep a permanent state that is on its way in, durably: the record that ends at it."""
        self._incoming.append(record, state)

    def take(self) -> None:
        """The source has granted the vTPM: what was staged last is its state, durably."""
        self._incoming.grant()

    def finish_taking(self) -> None:
        """The state has its own file now, or is of no use: remove the one for incoming states."""
        self._incoming.remove()

    def granted(self) -> bytes | None:
        """Return the state that recover() would make the vTPM's; nothing is written."""
        found = self._incoming.find()
        return None if found is None else found.state

    def recover(self) -> bool:
        """After a crash: make a state that was granted the vTPM's, and forget one that was not.

        Return True if there was one that was granted. If the TPM has written its own file since,
        that is the newer one. A granted state that cannot be read is an error, and stays as it is.
        """
        found = self._incoming.find()
        if found is None:
            return False
        if found.state is not None:
            # One that is left continues a state that this host had before.
            self._directory.remove(JOURNAL_NAME)
            self._directory.write_state(StateType.PERMANENT, found.state, self._key)
        if found.granted:
            self.reserve_generations(found.generation)
        else:
            self._update(self._read()._replace(declined=found.session.hex()))
        self.finish_taking()
        return found.granted


def _prepare(to: str, known: _Record) -> _Prepared:
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = known._replace(handed_over=HandedOver(to[:TEXT_LENGTH_MAX], at))
    return _Prepared(to, record, _owner_record(record))


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
