"""The permanent state that a peer has sent: durable, until it has its own file.

    tpm2-00.incoming
        Offset  Size     Content
        0       8        magic, "VTPMDIN3", or "VTPMDIN4": sealed
        8       8        serial of the entry that ends at the vTPM's state, by the source's Grant
        16      32       SHA-256 of tpm2-00.permall when this file was made
        48      16       session
        64      16       lineage: the identity of the vTPM
        80      8        the highest generation that the source has used, by its Grant
        88      32       sealed: random bytes, which the file's keys are derived with
        120     32       sealed: HMAC-SHA256 of the bytes before
        4096    1048576  entries, each at a multiple of 512: u64 serial, u32 length, delta record

An entry continues the last one before it that ends at the generation that it begins at; one from
generation 0 is a whole state. The last but one is continued when the source has not heard that the
last one had arrived. Serials rise by one. Numbers are big-endian. In a sealed file an entry holds
12 bytes of nonce and AES-256-GCM of the record, with the serial as associated data
(vtpmd/store/sealing.py).

While the guest stands still every microsecond counts: the file is made beforehand, at its full
size, and then written in place, so that a sync writes no metadata.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import sha256
from hmac import compare_digest
from struct import Struct
from typing import Final, NamedTuple

from vtpmd.core import Image
from vtpmd.core.delta import DeltaError, delta_apply, delta_encode, delta_inspect
from vtpmd.store.directory import StateDirectoryError, StateKeyError
from vtpmd.store.keys import Key
from vtpmd.store.owner import GENERATION_MAX, GENERATIONS_RESERVED, Directory, InPlace
from vtpmd.store.sealing import MAC_BYTES, SALT_BYTES, SealBroken, Sealing
from vtpmd.wire.swtpm_format import FILE_BYTES_MAX
from vtpmd.wire.tpm import StateType

MAGIC: Final = b"VTPMDIN3"
MAGIC_SEALED: Final = b"VTPMDIN4"
HEAD: Final = Struct(">8sQ32s16s16sQ32s")  # what a sealed file's HMAC covers
DIGEST_BYTES: Final = 32
SERIAL: Final = Struct(">Q")
ENTRY_HEADER: Final = Struct(">QI")
ENTRY_ALIGNMENT: Final = 512
ENTRIES_OFFSET: Final = 4096
ENTRIES_BYTES: Final = 1 << 20  # a whole state, and two thousand rounds or more
INCOMING_BYTES: Final = ENTRIES_OFFSET + ENTRIES_BYTES

NO_STATE: Final = Image(StateType.PERMANENT, 0, b"")


class Damaged(Exception):
    """The entries do not lead to the state that was granted."""


class _Head(NamedTuple):
    """What the file says of itself."""

    magic: bytes
    granted: int  # 0: nothing is
    made_with: bytes  # SHA-256 of the permanent state's file
    session: bytes
    lineage: bytes
    used: int  # the highest generation, once it is granted
    salt: bytes


class Found(NamedTuple):
    """What a session has left behind."""

    session: bytes
    lineage: bytes  # the identity of the vTPM
    granted: bool
    generation: int  # of the state that was granted
    used: int  # the highest generation of any state that the source is known to have used
    state: bytes | None  # granted, and the TPM has not written its own file since


class Resumed(NamedTuple):
    """A session that is gone on with."""

    session: bytes
    lineage: bytes  # the identity of the vTPM
    granted: bool  # as far as the disk knows
    used: int  # no generation above it has been used


class IncomingStates:
    """The file of one session at a time. Its methods raise StateDirectoryError."""

    def __init__(self, directory: Directory, in_place: InPlace, key: Key | None) -> None:
        """With a key the file is sealed with it, and must be."""
        self._directory = directory
        self._name = directory.names.incoming
        self._in_place = in_place
        self._key = key
        self._head: _Head | None = None
        self._sealing: Sealing | None = None
        self._serial = 0
        self._end = ENTRIES_OFFSET
        self._ends_at = {NO_STATE.generation}  # which generations a record can continue

    def make(self, session: bytes, lineage: bytes) -> None:
        """Make the file for a session of the vTPM of this identity, with nothing in it."""
        magic, salt = MAGIC, bytes(SALT_BYTES)
        if self._key is not None:
            magic, salt = MAGIC_SEALED, os.urandom(SALT_BYTES)
            self._sealing = Sealing(self._key, salt)
        self._head = _Head(magic, 0, self._permanent_digest(), session, lineage, 0, salt)
        self._end, self._ends_at = ENTRIES_OFFSET, {NO_STATE.generation}
        content = _encode_head(self._head, self._sealing)
        self._directory.replace(self._name, content.ljust(INCOMING_BYTES, b"\0"))
        self._in_place.keep_open(self._name)

    def append(self, record: bytes, state: Callable[[], Image]) -> None:
        """Make a state durable: the record that ends at it, or all of it.

        All, where there is no room, or where the record continues what is not in the file; only
        then ``state`` is called.
        """
        if self._head is None:
            raise ValueError("there is no session to take from")
        header = delta_inspect(record)
        continues = header.from_generation in self._ends_at
        entry = self._entry(record)
        if not continues or self._end + len(entry) > INCOMING_BYTES:
            self.make(self._head.session, self._head.lineage)
            entry = self._entry(delta_encode(NO_STATE, state()))
        self._in_place.overwrite(self._name, self._end, entry)
        self._serial += 1
        self._end += len(entry)
        self._ends_at.add(header.to_generation)

    def complete(self, state: Image) -> None:
        """Have the file be of this state alone, durably: it may not have taken it before."""
        if self._head is None:
            raise ValueError("there is no session to go on with")
        self.make(self._head.session, self._head.lineage)
        self.append(delta_encode(NO_STATE, state), lambda: state)

    def grant(self, used: int) -> None:
        """Write down that what was appended last is the vTPM's state.

        ``used`` is the highest generation of any state that the source has used.
        """
        if self._head is None:
            raise ValueError("there is no session to take from")
        granted = self._head._replace(granted=self._serial, used=used)
        self._in_place.overwrite(self._name, 0, _encode_head(granted, self._sealing))

    def remove(self) -> None:
        """Remove the file: the state has its own, or is of no use."""
        self._in_place.forget(self._name)
        self._directory.remove(self._name)

    def find(self) -> Found | None:
        """Return what a crash has left, or None. What is damaged is an error, and stays."""
        content = self._directory.read(self._name, INCOMING_BYTES)
        if content is None:
            return None
        head, sealing = self._open_head(content)
        nothing = Found(head.session, head.lineage, bool(head.granted), 0, head.used, None)
        if not head.granted:
            return nothing
        is_only_state = head.made_with == self._permanent_digest()
        try:
            if head.magic not in (MAGIC, MAGIC_SEALED):
                raise Damaged
            image = _replay(_records(content, head.granted, sealing))
        except (Damaged, DeltaError, SealBroken) as error:
            if not is_only_state:
                return nothing
            raise StateDirectoryError(
                f"{self._name} has the vTPM's only state, and is damaged: restore it from a copy"
            ) from error
        return nothing._replace(
            generation=image.generation,
            used=max(image.generation, head.used),
            state=image.data if is_only_state else None,
        )

    def resume(self) -> Resumed:
        """Have grant() and remove() go on with the file of another vtpmd, which has died.

        Its last entry is the state that the engine was started from, if it was; before a Grant it
        may be one that is of no use.
        """
        content = self._directory.read(self._name, INCOMING_BYTES)
        if content is None:
            raise ValueError("there is no session to go on with")
        self._head, self._sealing = self._open_head(content)
        self._serial = self._head.granted or _last_serial(content)
        try:
            records = _records(content, self._serial, self._sealing)
            if self._head.granted:
                _replay(records)
            generation = delta_inspect(records[-1]).to_generation if records else 0
        except (Damaged, DeltaError, SealBroken) as error:
            raise StateDirectoryError(
                f"{self._name} is damaged: start the vTPM again, from what else there is"
            ) from error
        self._in_place.keep_open(self._name)
        # Those of the volatile state are not in the file; all were reserved by then.
        used = self._head.used or min(generation + GENERATIONS_RESERVED, GENERATION_MAX)
        return Resumed(self._head.session, self._head.lineage, bool(self._head.granted), used)

    def _entry(self, record: bytes) -> bytes:
        serial = self._serial + 1
        if self._sealing is not None:
            record = self._sealing.seal(record, SERIAL.pack(serial))
        entry = ENTRY_HEADER.pack(serial, len(record)) + record
        return entry.ljust(_aligned(len(entry)), b"\0")

    def _open_head(self, content: bytes) -> tuple[_Head, Sealing | None]:
        """Return what the file says, and what opens its entries."""
        head = _Head(*HEAD.unpack(content[: HEAD.size].ljust(HEAD.size, b"\0")))
        is_sealed = head.magic == MAGIC_SEALED
        if is_sealed != (self._key is not None):
            what = (
                "is sealed: give its key with --key"
                if is_sealed
                else "is not sealed: leave out --key"
            )
            raise StateKeyError(f"{self._name} {what}")
        if self._key is None:
            return head, None
        sealing = Sealing(self._key, head.salt)
        mac = content[HEAD.size : HEAD.size + MAC_BYTES]
        if not compare_digest(mac, sealing.mac(content[: HEAD.size])):
            raise StateKeyError(
                f"{self._name} does not open with this key: the key is another one, or the file "
                "was altered; give the right key, or restore it"
            )
        return head, sealing

    def _permanent_digest(self) -> bytes:
        content = self._directory.read(self._directory.names.permanent, FILE_BYTES_MAX)
        return bytes(DIGEST_BYTES) if content is None else sha256(content).digest()


def _encode_head(head: _Head, sealing: Sealing | None) -> bytes:
    content = HEAD.pack(*head)
    return content if sealing is None else content + sealing.mac(content)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT


def _records(content: bytes, last: int, sealing: Sealing | None) -> list[bytes]:
    """Return the records up to a serial, in order. Raises Damaged or SealBroken."""
    records: list[bytes] = []
    offset, serial = ENTRIES_OFFSET, 0
    while serial != last:
        if offset + ENTRY_HEADER.size > len(content):
            raise Damaged
        found, length = ENTRY_HEADER.unpack_from(content, offset)
        begin = offset + ENTRY_HEADER.size
        record = content[begin : begin + length]
        if len(record) != length or (serial and found != serial + 1):
            raise Damaged
        records.append(record if sealing is None else sealing.open(record, SERIAL.pack(found)))
        serial = found
        offset += _aligned(ENTRY_HEADER.size + length)
    return records


def _last_serial(content: bytes) -> int:
    """Return the serial of the last entry; 0: there is none."""
    offset, serial = ENTRIES_OFFSET, 0
    while offset + ENTRY_HEADER.size <= len(content):
        found, length = ENTRY_HEADER.unpack_from(content, offset)
        if found == 0 or (serial and found != serial + 1):
            break
        serial = found
        offset += _aligned(ENTRY_HEADER.size + length)
    return serial


def _replay(records: list[bytes]) -> Image:
    """Return the state that the last record ends at. Raises Damaged or DeltaError."""
    chain: list[bytes] = []
    wanted = delta_inspect(records[-1]).to_generation
    for record in reversed(records):
        header = delta_inspect(record)
        if header.to_generation == wanted:
            chain.append(record)
            wanted = header.from_generation
    if wanted != NO_STATE.generation:
        raise Damaged
    state = NO_STATE
    for record in reversed(chain):
        state = delta_apply(state, record)
    return state
