"""The states of the simulated TPM: small, but really in the images, so that a wrong one is seen."""

from __future__ import annotations

from hashlib import sha256
from struct import Struct
from typing import Final, NamedTuple

_PERMANENT: Final = Struct(">16sQQ")
_VOLATILE: Final = Struct(">16sQ")
# Delta records that are smaller than the image, as a TPM's are.
_FILLING_BYTES: Final = 640


class Permanent(NamedTuple):
    """What a vTPM remembers: of which lineage it is, and the last command that changed it."""

    lineage: bytes
    value: int
    clock: int  # changes without a command, as TPM2_Shutdown does

    def encode(self) -> bytes:
        """Return the image."""
        return _PERMANENT.pack(*self) + sha256(self.lineage).digest() * (_FILLING_BYTES // 32)


class Volatile(NamedTuple):
    """What it knows while it is on, as PCRs: since which start, and how many commands ran."""

    start: bytes
    extends: int

    def encode(self) -> bytes:
        """Return the image."""
        return _VOLATILE.pack(*self) + sha256(self.start).digest() * 8


def permanent(image: bytes) -> Permanent:
    """Return what an image says. Raises ValueError for one that is none."""
    state = Permanent(*_PERMANENT.unpack_from(image))
    if state.encode() != image:
        raise ValueError("no permanent state")
    return state


def volatile(image: bytes) -> Volatile:
    """Likewise."""
    state = Volatile(*_VOLATILE.unpack_from(image))
    if state.encode() != image:
        raise ValueError("no volatile state")
    return state
