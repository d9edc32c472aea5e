"""The images of a vTPM, in memory that the engine writes (``csrc/pages.h``)."""

from __future__ import annotations

from vtpmd._core import ffi, lib
from vtpmd.closing import Closing
from vtpmd.core.image import GENERATION_MAX, IMAGE_BYTES_MAX, IMAGE_TYPES, Image, checked_type
from vtpmd.core.memory import allocate, check_error
from vtpmd.errors import VtpmdError
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Any, Self


class StoreError(VtpmdError):
    """The store cannot be read."""


class StoreBusyError(StoreError):
    """An image was being written for as long as it was tried to read it."""


class StoreDamagedError(StoreError):
    """The engine broke a rule of the store: nothing in it can be believed."""


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


def _check_read(result: int) -> None:
    check_error(result)
    if result == lib.STORE_BUSY:
        raise StoreBusyError("the engine keeps writing its state: try again")
    if result == lib.STORE_DAMAGED:
        raise StoreDamagedError("the engine broke its state store: restart the guest")


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
        out, n_bytes = allocate("uint8_t[]", IMAGE_BYTES_MAX), IMAGE_BYTES_MAX
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
        _check_read(lib.store_read(self._open, checked_type(image_type), out, n_bytes, generation))
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
        found = allocate("struct store_changes *")
        _check_read(lib.store_collect(self._open, checked_type(image_type), since, found))
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
        store, image_type = self._open_writable(), checked_type(image_type)
        check_error(lib.store_capture(store, image_type, data, len(data), generation))
        return int(generation[0])

    def raise_generation(self, image_type: int, floor: int) -> None:
        """Make every generation that is still to come larger than ``floor``.

        Raises ValueError when the store is not mapped writable, or for no generation.
        """
        if not 0 <= floor <= GENERATION_MAX:
            raise ValueError(f"{floor} is no generation")
        lib.store_raise_generation(self._open_writable(), checked_type(image_type), floor)

    def _open_writable(self) -> Any:
        if not self._writable:
            raise ValueError("the store is mapped read-only")
        return self._open
