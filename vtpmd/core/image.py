"""The image of one type of state at one generation, and its limits (``csrc/pages.h``)."""

from __future__ import annotations

from vtpmd._core import ffi, lib
from vtpmd.core.memory import check_error, check_length
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Any

IMAGE_BYTES_MAX: int = lib.IMAGE_BYTES_MAX
IMAGE_TYPES = range(lib.IMAGE_TYPE_MIN, lib.IMAGE_TYPE_MAX + 1)
PAGE_BYTES: int = lib.PAGE_BYTES
GENERATION_MAX: int = lib.GENERATION_MAX
DIGEST_BYTES: int = lib.DIGEST_BYTES
IMAGE_DIGEST_BYTES: int = ffi.sizeof("struct image_digest")


class Image(NamedTuple):
    """The image of one type of state at one generation.

    ``type`` is that of ``enum link_state_type``. Generation 0 is the empty image that a delta
    record of a whole image is for. ``digest`` is what ``image_digest()`` makes of ``data`` where
    that is known, or None; it is believed.
    """

    type: int
    generation: int
    data: bytes
    digest: bytes | None = None

    def __repr__(self) -> str:
        """Say what it is without its content, which is secret."""
        return f"Image(type={self.type}, generation={self.generation}, {len(self.data)} bytes)"


def c_image(image: Image) -> tuple[Any, tuple[Any, ...]]:
    """Return an image for C, and what must be kept for as long as C has it.

    Raises ValueError for one past a limit.
    """
    if len(image.data) > IMAGE_BYTES_MAX or not 0 <= image.generation <= GENERATION_MAX:
        raise ValueError(f"{image!r} is past a limit")
    data, digest = ffi.from_buffer("uint8_t[]", image.data), ffi.NULL
    if image.digest is not None:
        check_length("digest of an image", image.digest, IMAGE_DIGEST_BYTES)
        digest = ffi.from_buffer("struct image_digest *", image.digest)
    made = ffi.new("struct delta_image *", (data, len(image.data), image.generation, digest))
    return made, (data, digest)


def image_digest(image: Image, before: Image | None = None) -> bytes:
    """Return an image's digest (``struct image_digest``): DIGEST_BYTES of all, then the pages'.

    It takes less time if ``before`` has much of the image, and a digest. Raises ValueError for an
    image past a limit, OSError without memory.
    """
    c_before, before_kept = (ffi.NULL, ()) if before is None else c_image(before)
    c_following, kept = c_image(image)
    digest = ffi.new("struct image_digest *")
    check_error(lib.image_digest_compute(c_following, c_before, digest))
    del kept, before_kept
    return bytes(ffi.buffer(digest))


def checked_type(image_type: int) -> int:
    if image_type not in IMAGE_TYPES:
        raise ValueError(f"there is no image type {image_type}")
    return image_type
