"""A vTPM's state at one moment, as both sides of a session hold it."""

from __future__ import annotations

from hashlib import sha256
from typing import Final, NamedTuple

from vtpmd.core import Image
from vtpmd.wire.tpm import StateType


class Images(NamedTuple):
    """The images that make up a running TPM's state; a TPM 2.0 has no savestate."""

    permanent: Image
    volatile: Image

    @property
    def generations(self) -> tuple[int, int]:
        """Which state it is."""
        return self.permanent.generation, self.volatile.generation


# What a session begins with at both sides: generation 0 of each.
NOTHING: Final = Images(Image(StateType.PERMANENT, 0, b""), Image(StateType.VOLATILE, 0, b""))


def digest(image: Image) -> bytes:
    """Return an image's SHA-256: the one that is known, or worked out."""
    return image.digest or sha256(image.data).digest()
