"""Delta records (``csrc/delta.h``, docs/delta-format.md)."""

from enum import IntEnum
from typing import NamedTuple

from vtpmd._core import ffi, lib
from vtpmd.core.image import IMAGE_BYTES_MAX, Image, c_image, checked_type
from vtpmd.core.memory import allocate, check_error
from vtpmd.errors import VtpmdError

DELTA_RECORD_BYTES_MAX: int = lib.DELTA_RECORD_BYTES_MAX


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
    """The record is of another version."""

    TEXT = "a delta record is of another version: {}; have the same vtpmd on both hosts"


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
    time_ms: int | None = None  # since 1970 (UTC), of a dated record


def _check_delta(result: int) -> None:
    check_error(result)
    if result > 0:
        kind, reason = _REFUSALS[DeltaRefusal(result)]
        raise kind(DeltaRefusal(result), reason)


def delta_encode(base: Image, following: Image) -> bytes:
    """Return the delta record that turns ``base`` into ``following``, an image of the same type.

    ``Image(type, 0, b"")`` as the base makes a record of the whole image. Raises ValueError for
    images of different types or past a limit, or when the generation of ``following`` is not the
    higher one.
    """
    if base.type != checked_type(following.type) or base.generation >= following.generation:
        raise ValueError(f"{following!r} does not follow {base!r}")
    if base.generation == 0 and base.data:
        raise ValueError("the image of generation 0 is empty")
    c_base, base_kept = c_image(base)
    c_following, following_kept = c_image(following)
    record = allocate("uint8_t[]", DELTA_RECORD_BYTES_MAX)
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
    c_base, kept = c_image(base)
    header, digest = ffi.new("struct delta_header *"), ffi.new("struct image_digest *")
    result = allocate("uint8_t[]", IMAGE_BYTES_MAX)
    image_type = checked_type(base.type)
    _check_delta(lib.delta_apply(image_type, c_base, record, len(record), result, header, digest))
    del kept
    try:
        data = bytes(ffi.buffer(result, header.result_bytes))
    finally:
        lib.explicit_bzero(result, header.result_bytes)
    return Image(base.type, header.to_generation, data, bytes(ffi.buffer(digest)))


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
        time_ms=header.time_ms or None,
    )


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of ``data``: it finds accidents (``csrc/crc32c.h``)."""
    return int(lib.crc32c(data, len(data)))
