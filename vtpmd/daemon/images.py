"""A vTPM's state at one moment, as both sides of a session hold it."""

from __future__ import annotations

from typing import Final, NamedTuple

from vtpmd.core import Image
from vtpmd.core.delta import delta_apply, delta_inspect
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
# Where neither of the two changes.
NO_RECORDS: Final = [b"", b""]


class ImageChain:
    """Images that records make of others, once somebody needs them."""

    def __init__(self, images: Images) -> None:
        """Begin with images."""
        self.generations = images.generations
        self._images: Images | None = images
        self._before: ImageChain | None = None
        self._records: list[bytes] = []

    def follow(self, records: list[bytes]) -> ImageChain:
        """Return what records, of which each may be empty, make of these. Raises DeltaError.

        What a record says of itself is checked, but not yet that it applies.
        """
        chain = ImageChain(NOTHING)
        chain._images, chain._before, chain._records = None, self, records
        permanent, volatile = (
            delta_inspect(record).to_generation if record else generation
            for generation, record in zip(self.generations, records, strict=True)
        )
        chain.generations = (permanent, volatile)
        return chain

    @property
    def images(self) -> Images:
        """The images. Raises DeltaError for records that do not apply."""
        if self._images is None:
            assert self._before is not None  # noqa: S101 - it has one of both
            self._images = Images(
                *(
                    delta_apply(image, record) if record else image
                    for image, record in zip(self._before.images, self._records, strict=True)
                )
            )
            self._before, self._records = None, []
        return self._images
