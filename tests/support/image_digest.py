"""Digests of images, worked out apart from the code under test, by docs/delta-format.md."""

from hashlib import sha256

PAGE_BYTES = 4096
PAGES_MAX = 64


def image_digest(data: bytes) -> bytes:
    """Return the digest of an image, and those of its pages after it."""
    starts = range(0, len(data), PAGE_BYTES)
    pages = b"".join(sha256(data[start : start + PAGE_BYTES]).digest() for start in starts)
    return sha256(pages).digest() + pages.ljust(PAGES_MAX * 32, b"\0")


def whole_digest(data: bytes) -> bytes:
    """Return what stands for all of an image."""
    return image_digest(data)[:32]
