"""The C core for Python: the only importer of ``vtpmd._core``.

Ownership: a ``Store`` has C memory, which goes with ``close()``, with its ``with`` block, or with
the object. All else copies what it is given and returns Python objects. Buffers that state or
records went through are overwritten.

Threads: all functions may be called from any thread, a ``Store`` by one at a time.
"""

import os
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, Self

from vtpmd._core import ffi, lib
from vtpmd.closing import Closing
from vtpmd.errors import VtpmdError


class LinkOperation(IntEnum):
    """The operations of the engine link (``csrc/engine/link.cdef.h``)."""

    READY = lib.LINK_READY
    LOAD_STATE = lib.LINK_LOAD_STATE
    SET_DATA_SOCKET = lib.LINK_SET_DATA_SOCKET
    INIT = lib.LINK_INIT
    STOP = lib.LINK_STOP
    GET_ESTABLISHED = lib.LINK_GET_ESTABLISHED
    RESET_ESTABLISHED = lib.LINK_RESET_ESTABLISHED
    SET_LOCALITY = lib.LINK_SET_LOCALITY
    HASH_START = lib.LINK_HASH_START
    HASH_DATA = lib.LINK_HASH_DATA
    HASH_END = lib.LINK_HASH_END
    CANCEL = lib.LINK_CANCEL
    STORE_VOLATILE = lib.LINK_STORE_VOLATILE
    GET_STATE = lib.LINK_GET_STATE
    SET_STATE = lib.LINK_SET_STATE
    SET_BUFFER_SIZE = lib.LINK_SET_BUFFER_SIZE
    GET_INFO = lib.LINK_GET_INFO
    CAPTURE = lib.LINK_CAPTURE
    RETIRE = lib.LINK_RETIRE
    UNRETIRE = lib.LINK_UNRETIRE
    FORGET_STATE = lib.LINK_FORGET_STATE
    RAISE_GENERATION = lib.LINK_RAISE_GENERATION
    STORE_PERMANENT = lib.LINK_STORE_PERMANENT
    SET_BOTH_STATES = lib.LINK_SET_BOTH_STATES
    ADMIT = lib.LINK_ADMIT
    EXPECT = lib.LINK_EXPECT
    SET_JOURNAL = lib.LINK_SET_JOURNAL
    SET_KEY = lib.LINK_SET_KEY
    SET_ANCHOR = lib.LINK_SET_ANCHOR


class LinkLocked(IntEnum):
    """How much of the engine's memory is locked (``enum link_locked``)."""

    NOTHING = lib.LINK_LOCKED_NOTHING
    PRESENT = lib.LINK_LOCKED_PRESENT
    ALL = lib.LINK_LOCKED_ALL


class LinkInit(IntFlag):
    """What the engine starts the TPM from (``enum link_init``)."""

    CAME = lib.LINK_INIT_CAME
    HELD = lib.LINK_INIT_HELD


class LinkRetire(IntEnum):
    """What must not have happened when the engine retires (``enum link_retire``)."""

    UNCHANGED = lib.LINK_RETIRE_UNCHANGED
    UNSERVED = lib.LINK_RETIRE_UNSERVED


class LinkDescriptor(IntEnum):
    """The descriptors that the engine is started with (``enum link_descriptor``)."""

    INPUT = lib.LINK_FD_INPUT
    LIBRARY_LOG = lib.LINK_FD_LIBRARY_LOG
    ERROR = lib.LINK_FD_ERROR
    SOCKET = lib.LINK_FD_SOCKET
    DIRECTORY = lib.LINK_FD_DIRECTORY
    LOCK = lib.LINK_FD_LOCK
    STORE = lib.LINK_FD_STORE


class LinkHeader(NamedTuple):
    """What precedes each payload on the engine link (``struct link_header``)."""

    operation: int
    result: int = 0
    argument: int = 0
    payload_bytes: int = 0


LINK_HEADER_BYTES: int = ffi.sizeof("struct link_header")
LINK_PAYLOAD_BYTES_MAX: int = lib.LINK_PAYLOAD_BYTES_MAX


def pack_link_header(header: LinkHeader) -> bytes:
    """Return the bytes of a header. Raises OverflowError for a field that is no u32."""
    return bytes(ffi.buffer(ffi.new("struct link_header *", tuple(header))))


def unpack_link_header(data: bytes | bytearray) -> LinkHeader:
    """Return the header that ``data``, LINK_HEADER_BYTES long, holds."""
    if len(data) != LINK_HEADER_BYTES:
        raise ValueError(f"a link header has {LINK_HEADER_BYTES} bytes, not {len(data)}")
    header = ffi.new("struct link_header *")
    ffi.memmove(header, data, LINK_HEADER_BYTES)
    return LinkHeader(header.operation, header.result, header.argument, header.payload_bytes)


def pack_link_journal(identity: bytes, generation: int, secret: bytes | None = None) -> bytearray:
    """Return the payload of SET_JOURNAL: ``struct link_journal``; without a secret, not sealed.

    Overwrite it after use. Raises ValueError for what is no identity, generation or secret.
    """
    _check_length("identity", identity, JOURNAL_IDENTITY_BYTES)
    if secret is not None:
        _check_length("secret", secret, JOURNAL_SECRET_BYTES)
    if not 0 <= generation <= GENERATION_MAX:
        raise ValueError(f"{generation} is no generation")
    fields = (generation, secret is not None, identity, secret or bytes(JOURNAL_SECRET_BYTES))
    journal = ffi.new("struct link_journal *", fields)
    packed = bytearray(ffi.buffer(journal))
    lib.explicit_bzero(journal, ffi.sizeof("struct link_journal"))
    return packed


def pack_link_anchor(identity: bytes, serial: int, generation: int, digest: bytes) -> bytes:
    """Return the payload of LinkOperation.SET_ANCHOR (``struct link_anchor``).

    ``identity`` has 16 bytes, ``digest`` 32. Raises ValueError otherwise, OverflowError for what is
    no u64.
    """
    _check_length("identity", identity, JOURNAL_IDENTITY_BYTES)
    _check_length("digest", digest, DIGEST_BYTES)
    anchor = ffi.new("struct link_anchor *", {"serial": serial, "generation": generation})
    ffi.memmove(anchor.identity, identity, len(identity))
    ffi.memmove(anchor.digest, digest, len(digest))
    return bytes(ffi.buffer(anchor))


def _check_length(name: str, data: bytes, n_bytes: int) -> None:
    if len(data) != n_bytes:
        raise ValueError(f"the {name} has {n_bytes} bytes, not {len(data)}")


def forbid_core_dumps() -> None:
    """Keep this process's memory out of core files and from other processes of its user."""
    if lib.prctl(lib.PR_SET_DUMPABLE, ffi.cast("unsigned long", 0)) != 0:
        raise OSError(ffi.errno, "prctl(PR_SET_DUMPABLE)")


IMAGE_BYTES_MAX: int = lib.IMAGE_BYTES_MAX
IMAGE_TYPES = range(lib.IMAGE_TYPE_MIN, lib.IMAGE_TYPE_MAX + 1)
PAGE_BYTES: int = lib.PAGE_BYTES
GENERATION_MAX: int = lib.GENERATION_MAX
DIGEST_BYTES: int = lib.DIGEST_BYTES
DELTA_RECORD_BYTES_MAX: int = lib.DELTA_RECORD_BYTES_MAX
JOURNAL_BYTES_MAX: int = lib.JOURNAL_BYTES_MAX
JOURNAL_IDENTITY_BYTES: int = lib.JOURNAL_IDENTITY_BYTES
JOURNAL_SECRET_BYTES: int = lib.JOURNAL_SECRET_BYTES
JOURNAL_SECTOR_BYTES: int = lib.JOURNAL_SECTOR_BYTES

# What the buffers are for fills them; setting them to zero first would touch all of their memory.
_allocate = ffi.new_allocator(should_clear_after_alloc=False)


class StoreError(VtpmdError):
    """The store cannot be read."""


class StoreBusyError(StoreError):
    """An image was being written for as long as it was tried to read it."""


class StoreDamagedError(StoreError):
    """The engine broke a rule of the store: nothing in it can be believed."""


class DeltaRefusal(IntEnum):
    """Why a delta record was refused (``enum delta_refusal``)."""

    SHORT = lib.DELTA_SHORT
    NO_RECORD = lib.DELTA_NO_RECORD
    VERSION_UNKNOWN = lib.DELTA_VERSION_UNKNOWN
    FLAG_UNKNOWN = lib.DELTA_FLAG_UNKNOWN
    HEADER_WRONG = lib.DELTA_HEADER_WRONG
    LENGTH_WRONG = lib.DELTA_LENGTH_WRONG
    CHECKSUM_WRONG = lib.DELTA_CHECKSUM_WRONG
    LIMIT_BROKEN = lib.DELTA_LIMIT_BROKEN
    OTHER_TYPE = lib.DELTA_OTHER_TYPE
    OTHER_BASE = lib.DELTA_OTHER_BASE
    BASE_DIFFERS = lib.DELTA_BASE_DIFFERS
    OPERATION_WRONG = lib.DELTA_OPERATION_WRONG
    RESULT_DIFFERS = lib.DELTA_RESULT_DIFFERS


class DeltaError(VtpmdError):
    """A delta record was refused, and nothing was changed."""

    TEXT = "a delta record was refused: {}"

    def __init__(self, refusal: DeltaRefusal, reason: str) -> None:
        super().__init__(self.TEXT.format(reason))
        self.refusal = refusal


class DeltaInvalidError(DeltaError):
    """What was given is no valid record: it was damaged, or its sender is wrong."""

    TEXT = "a delta record is damaged: {}; have it sent again"


class DeltaUnsupportedError(DeltaError):
    """The record is of a later version."""

    TEXT = "a delta record is of a later version: {}; update vtpmd on this host"


class DeltaMismatchError(DeltaError):
    """The record is valid, but not for this image."""

    TEXT = "a delta record does not fit: {}; begin again with the whole image"


_REFUSALS: dict[DeltaRefusal, tuple[type[DeltaError], str]] = {
    DeltaRefusal.SHORT: (DeltaInvalidError, "it ends before its header does"),
    DeltaRefusal.NO_RECORD: (DeltaInvalidError, "it does not begin as a record does"),
    DeltaRefusal.VERSION_UNKNOWN: (DeltaUnsupportedError, "its version is unknown"),
    DeltaRefusal.FLAG_UNKNOWN: (DeltaUnsupportedError, "an incompatible flag is unknown"),
    DeltaRefusal.HEADER_WRONG: (DeltaInvalidError, "its header cannot have that size"),
    DeltaRefusal.LENGTH_WRONG: (DeltaInvalidError, "its length is not what its header says"),
    DeltaRefusal.CHECKSUM_WRONG: (DeltaInvalidError, "its checksum is wrong"),
    DeltaRefusal.LIMIT_BROKEN: (DeltaInvalidError, "a number in its header is past a limit"),
    DeltaRefusal.OTHER_TYPE: (DeltaMismatchError, "it is for another type of state"),
    DeltaRefusal.OTHER_BASE: (DeltaMismatchError, "it is for another generation or length"),
    DeltaRefusal.BASE_DIFFERS: (DeltaMismatchError, "it is for an image of other content"),
    DeltaRefusal.OPERATION_WRONG: (DeltaInvalidError, "an operation is wrong"),
    DeltaRefusal.RESULT_DIFFERS: (DeltaInvalidError, "it makes what its digest is not of"),
}


class Image(NamedTuple):
    """The image of one type of state at one generation.

    ``type`` is that of ``enum link_state_type``. Generation 0 is the empty image that a delta
    record of a whole image is for. ``digest`` is the SHA-256 of ``data`` where it is known, or
    None; it is believed.
    """

    type: int
    generation: int
    data: bytes
    digest: bytes | None = None

    def __repr__(self) -> str:
        """Say what it is without its content, which is secret."""
        return f"Image(type={self.type}, generation={self.generation}, {len(self.data)} bytes)"


class DeltaHeader(NamedTuple):
    """What a delta record says of itself (``struct delta_header``, docs/delta-format.md)."""

    type: int
    from_generation: int
    to_generation: int
    base_bytes: int
    result_bytes: int
    operations_bytes: int
    base_digest: bytes
    result_digest: bytes
    compatible_flags: int


class StoreRange(NamedTuple):
    """Where pages of an image changed, in bytes."""

    offset: int
    n_bytes: int


class StoreChanges(NamedTuple):
    """What changed in an image since another generation."""

    generation: int
    image_bytes: int
    n_bytes: int
    ranges: list[StoreRange]


def check_error(result: int) -> None:
    """Raise OSError for a negative result of the C core, which is an errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def _check_read(result: int) -> None:
    check_error(result)
    if result == lib.STORE_BUSY:
        raise StoreBusyError("the engine keeps writing its state: try again")
    if result == lib.STORE_DAMAGED:
        raise StoreDamagedError("the engine broke its state store: restart the guest")


def _check_delta(result: int) -> None:
    check_error(result)
    if result > 0:
        kind, reason = _REFUSALS[DeltaRefusal(result)]
        raise kind(DeltaRefusal(result), reason)


def _checked_type(image_type: int) -> int:
    if image_type not in IMAGE_TYPES:
        raise ValueError(f"there is no image type {image_type}")
    return image_type


class Store(Closing):
    """The images of one vTPM in memory that the engine writes and vtpmd reads.

    Make it with ``create`` or ``map``; close it, or use it in a ``with`` block. After that every
    method raises ValueError. What is read was checked against the limits of ``csrc/pages.h``, and
    its generation is not lower than one that was read before. StoreError is raised otherwise.
    """

    def __init__(self, store: Any, *, writable: bool) -> None:
        self._store = ffi.gc(store, lib.store_free)
        self._writable = writable
        self._generations = dict.fromkeys(IMAGE_TYPES, 0)

    @classmethod
    def create(cls) -> Self:
        """Make an empty store, mapped read-only; ``fd`` is for the engine. Raises OSError."""
        out = ffi.new("struct store **")
        check_error(lib.store_new(out))
        return cls(out[0], writable=False)

    @classmethod
    def map(cls, fd: int, *, writable: bool = False) -> Self:
        """Map the store behind ``fd``, which stays the caller's. Raises OSError.

        Its errno is EBADMSG when it is no store of this version. One process maps it writable.
        """
        out = ffi.new("struct store **")
        check_error(lib.store_map(out, fd, writable))
        return cls(out[0], writable=writable)

    def close(self) -> None:
        """Unmap the store, and close its descriptor if it was made here. May be repeated."""
        if self._store is not None:
            ffi.release(self._store)
            self._store = None

    @property
    def _open(self) -> Any:
        if self._store is None:
            raise ValueError("the store is closed")
        return self._store

    @property
    def fd(self) -> int:
        """The memfd of a store that was made here, which belongs to the store; else -1."""
        return int(lib.store_fd(self._open))

    def read(self, image_type: int) -> Image:
        """Return a copy of an image. Raises StoreError."""
        out, n_bytes = _allocate("uint8_t[]", IMAGE_BYTES_MAX), IMAGE_BYTES_MAX
        try:
            n_bytes = self._read_into(image_type, out)
            data = bytes(ffi.buffer(out, n_bytes))
        finally:
            lib.explicit_bzero(out, n_bytes)
        return Image(image_type, self._generations[image_type], data)

    def generation(self, image_type: int) -> int:
        """Return the generation of an image. Raises StoreError."""
        self._read_into(image_type, ffi.NULL)
        return self._generations[image_type]

    def _read_into(self, image_type: int, out: Any) -> int:
        n_bytes, generation = ffi.new("size_t *"), ffi.new("uint64_t *")
        _check_read(lib.store_read(self._open, _checked_type(image_type), out, n_bytes, generation))
        self._advance(image_type, generation[0])
        return int(n_bytes[0])

    def _advance(self, image_type: int, generation: int) -> None:
        if generation < self._generations[image_type]:
            _check_read(lib.STORE_DAMAGED)
        self._generations[image_type] = generation

    def changes(self, image_type: int, since: int) -> StoreChanges:
        """Return the pages of an image that changed after generation ``since``.

        Raises StoreError.
        """
        found = _allocate("struct store_changes *")
        _check_read(lib.store_collect(self._open, _checked_type(image_type), since, found))
        self._advance(image_type, found.generation)
        ranges = [
            StoreRange(each.offset, each.n_bytes) for each in found.ranges[0 : found.n_ranges]
        ]
        return StoreChanges(found.generation, found.image_bytes, found.n_bytes, ranges)

    def capture(self, image_type: int, data: bytes) -> int:
        """Take an image, as the engine does, and return its generation: a new one if it changed.

        Raises ValueError when the store is not mapped writable, OSError when the image is larger
        than IMAGE_BYTES_MAX (EMSGSIZE) or generations have run out (EOVERFLOW).
        """
        generation = ffi.new("uint64_t *")
        store, image_type = self._open_writable(), _checked_type(image_type)
        check_error(lib.store_capture(store, image_type, data, len(data), generation))
        return int(generation[0])

    def raise_generation(self, image_type: int, floor: int) -> None:
        """Make every generation that is still to come larger than ``floor``.

        Raises ValueError when the store is not mapped writable, or for no generation.
        """
        if not 0 <= floor <= GENERATION_MAX:
            raise ValueError(f"{floor} is no generation")
        lib.store_raise_generation(self._open_writable(), _checked_type(image_type), floor)

    def _open_writable(self) -> Any:
        if not self._writable:
            raise ValueError("the store is mapped read-only")
        return self._open


def _c_image(image: Image) -> tuple[Any, tuple[Any, ...]]:
    """Return an image for C, and what must be kept for as long as C has it."""
    if len(image.data) > IMAGE_BYTES_MAX or not 0 <= image.generation <= GENERATION_MAX:
        raise ValueError(f"{image!r} is past a limit")
    if image.digest is not None and len(image.digest) != DIGEST_BYTES:
        raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(image.digest)}")
    data = ffi.from_buffer("uint8_t[]", image.data)
    digest = ffi.NULL if image.digest is None else ffi.from_buffer("uint8_t[]", image.digest)
    c_image = ffi.new("struct delta_image *", (data, len(image.data), image.generation, digest))
    return c_image, (data, digest)


def delta_encode(base: Image, following: Image) -> bytes:
    """Return the delta record that turns ``base`` into ``following``, an image of the same type.

    ``Image(type, 0, b"")`` as the base makes a record of the whole image. Raises ValueError for
    images of different types or past a limit, or when the generation of ``following`` is not the
    higher one.
    """
    if base.type != _checked_type(following.type) or base.generation >= following.generation:
        raise ValueError(f"{following!r} does not follow {base!r}")
    if base.generation == 0 and base.data:
        raise ValueError("the image of generation 0 is empty")
    c_base, base_kept = _c_image(base)
    c_following, following_kept = _c_image(following)
    record = _allocate("uint8_t[]", DELTA_RECORD_BYTES_MAX)
    n_bytes = ffi.new("size_t *", DELTA_RECORD_BYTES_MAX)
    try:
        check_error(lib.delta_encode(base.type, c_base, c_following, record, n_bytes))
        return bytes(ffi.buffer(record, n_bytes[0]))
    finally:
        lib.explicit_bzero(record, n_bytes[0])
        del base_kept, following_kept


def delta_apply(base: Image, record: bytes) -> Image:
    """Return the image, its digest included, that a delta record makes of ``base``.

    Nothing in the record is trusted. Raises DeltaError, whose subclasses say whether the record is
    invalid, of a later version, or for another image.
    """
    c_base, kept = _c_image(base)
    header = ffi.new("struct delta_header *")
    result = _allocate("uint8_t[]", IMAGE_BYTES_MAX)
    _check_delta(
        lib.delta_apply(_checked_type(base.type), c_base, record, len(record), result, header)
    )
    del kept
    try:
        data = bytes(ffi.buffer(result, header.result_bytes))
    finally:
        lib.explicit_bzero(result, header.result_bytes)
    return Image(base.type, header.to_generation, data, bytes(header.result_digest))


def delta_inspect(record: bytes) -> DeltaHeader:
    """Return the header of a delta record, all of it checked but the operations.

    Raises DeltaInvalidError or DeltaUnsupportedError.
    """
    header = ffi.new("struct delta_header *")
    _check_delta(lib.delta_inspect(record, len(record), header))
    return DeltaHeader(
        type=header.type,
        from_generation=header.from_generation,
        to_generation=header.to_generation,
        base_bytes=header.base_bytes,
        result_bytes=header.result_bytes,
        operations_bytes=header.operations_bytes,
        base_digest=bytes(header.base_digest),
        result_digest=bytes(header.result_digest),
        compatible_flags=header.compatible_flags,
    )


class JournalFault(IntEnum):
    """What is wrong with a journal in rows E, F and K (``enum journal_fault``)."""

    NONE = lib.JOURNAL_FAULT_NONE
    LENGTH = lib.JOURNAL_FAULT_LENGTH
    MAGIC = lib.JOURNAL_FAULT_MAGIC
    CHECKSUM = lib.JOURNAL_FAULT_CHECKSUM
    VERSION = lib.JOURNAL_FAULT_VERSION
    FLAG = lib.JOURNAL_FAULT_FLAG
    HEADER = lib.JOURNAL_FAULT_HEADER
    SECTOR = lib.JOURNAL_FAULT_SECTOR
    ORDER = lib.JOURNAL_FAULT_ORDER
    GAP = lib.JOURNAL_FAULT_GAP
    RECORD = lib.JOURNAL_FAULT_RECORD
    LINK = lib.JOURNAL_FAULT_LINK
    DELTA = lib.JOURNAL_FAULT_DELTA
    OTHER_BASE = lib.JOURNAL_FAULT_OTHER_BASE


class Recovery(NamedTuple):
    """What a state directory holds, by the table in ``csrc/journal_recover.c``.

    ``letter`` is its row, ``fault`` says more of rows E, F and K, and ``offset`` is where in the
    journal. ``image`` is the permanent state that the vTPM may start from, or, if ``may_start`` is
    false, what was right before the fault; None if there is none. Its generation is 0 where only
    the checkpoint says what it is. ``records`` counts those that are right, ``applied`` those of
    them that the checkpoint did not have; ``used_bytes`` ends with the journal's last byte that is
    not zero.
    """

    letter: str
    fault: JournalFault
    may_start: bool
    offset: int
    image: Image | None
    records: int
    applied: int
    used_bytes: int


def journal_recover(
    checkpoint: bytes | None,
    journal: bytes | None,
    *,
    continued: bool = False,
    identity: bytes | None = None,
    secret: bytes | None = None,
) -> Recovery:
    """Decide what a checkpoint's image and a journal's file are together; None is one that is not.

    ``continued`` is what the checkpoint says of itself, ``identity`` the one that the journal must
    have, and ``secret`` what it must be sealed with, or None for one that must not be sealed.
    Nothing in the files is trusted. Raises OSError without memory.
    """
    evidence = ffi.new("struct journal_evidence *", {"continued": continued})
    kept = []
    for name, data in (("checkpoint", checkpoint), ("journal", journal)):
        if data is not None:
            # Of no bytes cffi would make a pointer to none.
            kept.append(ffi.from_buffer("uint8_t[]", data or b"\0"))
            setattr(evidence, name, kept[-1])
            setattr(evidence, f"{name}_bytes", len(data))
    for name, data, n_bytes in (
        ("identity", identity, JOURNAL_IDENTITY_BYTES),
        ("secret", secret, JOURNAL_SECRET_BYTES),
    ):
        if data is not None:
            _check_length(name, data, n_bytes)
            kept.append(ffi.from_buffer("uint8_t[]", data))
            setattr(evidence, name, kept[-1])
    image, found = _allocate("uint8_t[]", IMAGE_BYTES_MAX), ffi.new("struct journal_recovery *")
    check_error(lib.journal_recover(evidence, image, found))
    return _recovery(found, image, checkpoint)


def _recovery(found: Any, image: Any, checkpoint: bytes | None) -> Recovery:
    letter = chr(found.verdict)
    recovered = None
    if found.has_image:
        data = bytes(ffi.buffer(image, found.image_bytes))
        recovered = Image(IMAGE_TYPES[0], found.generation, data, bytes(found.digest))
        lib.explicit_bzero(image, found.image_bytes)
    elif letter in "BC" and checkpoint is not None:
        recovered = Image(IMAGE_TYPES[0], 0, checkpoint)
    return Recovery(
        letter=letter,
        fault=JournalFault(found.fault),
        may_start=lib.journal_may_start(found),
        offset=found.offset,
        image=recovered,
        records=found.n_records,
        applied=found.n_applied,
        used_bytes=found.used_bytes,
    )


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of ``data``: it finds accidents (``csrc/crc32c.h``)."""
    return int(lib.crc32c(data, len(data)))
