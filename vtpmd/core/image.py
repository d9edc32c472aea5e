"""The image of one type of state at one generation, and its limits (``csrc/pages.h``)."""

from __future__ import annotations

from vtpmd._core import lib
from vtpmd.light_typing import NamedTuple

IMAGE_BYTES_MAX: int = lib.IMAGE_BYTES_MAX
IMAGE_TYPES = range(lib.IMAGE_TYPE_MIN, lib.IMAGE_TYPE_MAX + 1)
PAGE_BYTES: int = lib.PAGE_BYTES
GENERATION_MAX: int = lib.GENERATION_MAX
DIGEST_BYTES: int = lib.DIGEST_BYTES


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


def checked_type(image_type: int) -> int:
    if image_type not in IMAGE_TYPES:
        raise ValueError(f"there is no image type {image_type}")
    return image_type
