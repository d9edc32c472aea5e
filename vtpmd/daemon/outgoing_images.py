"""What a source has captured of its vTPM's state, what of it the destination has, and the tail.

Images are compared by identity: one that was captured is sent as it is, and acknowledged as it is.
"""

from __future__ import annotations

from typing import NamedTuple

from vtpmd.core import Store
from vtpmd.core.delta import delta_encode
from vtpmd.core.image import DIGEST_BYTES, image_digest
from vtpmd.daemon.images import NO_RECORDS, NOTHING, Images
from vtpmd.errors import VtpmdError
from vtpmd.migration import tail
from vtpmd.migration.tail import TailCipher
from vtpmd.wire.tpm import StateType


class Records(NamedTuple):
    """What turns one state into another, empty where nothing differs."""

    base: Images
    final: Images
    records: list[bytes]


class Sealed(NamedTuple):
    """A tail, and the digests of the images that it ends at."""

    permanent_digest: bytes
    volatile_digest: bytes
    tail: bytes


class _Ahead(NamedTuple):
    """A tail that was made before it is asked for."""

    generations: tuple[int, int]
    power: int
    sealed: Sealed


class OutgoingImages:
    """The images of one session's source."""

    def __init__(self, session: bytes) -> None:
        self._session = session
        self._cipher: TailCipher | None = None
        self.captured = NOTHING  # last; what is newer than what was sent is to be sent
        self.sent = NOTHING
        self._acknowledged = NOTHING
        self._last = Records(NOTHING, NOTHING, NO_RECORDS)  # of the round that was sent last
        self._ahead: _Ahead | None = None
        self.power = 0  # what the guest's last TPM2_Shutdown said by the last capture

    def seal_with(self, cipher: TailCipher) -> None:
        """Have something to seal tails with."""
        self._cipher = cipher

    @property
    def is_all_sent(self) -> bool:
        """True if nothing newer was captured than what was sent."""
        return self.captured is self.sent

    @property
    def is_all_acknowledged(self) -> bool:
        """True if the destination has what was sent last."""
        return self._acknowledged is self.sent

    def capture(self, store: Store) -> None:
        """Take what the engine has captured into the store."""
        self.captured = Images(store.read(StateType.PERMANENT), store.read(StateType.VOLATILE))

    def to_send(self) -> Records:
        """Return what turns what was sent last into what was captured last."""
        return _encode(self.sent, self.captured)

    def note_sent(self, records: Records) -> None:
        """They are on their way, from what was sent before."""
        self.captured = self.sent = records.final
        self._last = records

    def note_acknowledged(self) -> None:
        """The destination has what was sent last."""
        self._acknowledged = self.sent

    def to_seal(self) -> Records:
        """Return what turns what the destination has acknowledged into what was captured last."""
        last, base, final = self._last, self._acknowledged, self.captured
        is_last = last.base is base and last.final is final
        return last if is_last else _encode(base, final)

    def seal(self, whole: Records) -> Sealed:
        """Return the tail of these records. Raises VtpmdError for one that is too large."""
        ahead = self._ahead
        wanted = (whole.final.generations, self.power)
        if ahead is not None and ahead[:2] == wanted:
            return ahead.sealed
        sealed = self._seal(whole)
        self._ahead = _Ahead(*wanted, sealed)
        return sealed

    def seal_ahead(self) -> None:
        """Make the tail of a guest that does nothing more. Raises VtpmdError."""
        nothing_more = self._seal(Records(self.sent, self.sent, NO_RECORDS))
        self._ahead = _Ahead(self.sent.generations, self.power, nothing_more)

    def _seal(self, whole: Records) -> Sealed:
        base, final, records = whole
        header = tail.Header.between(self._session, base.generations, final.generations)
        assert self._cipher is not None  # noqa: S101 - made before a base was sent
        try:
            sealed = self._cipher.seal(tail.Tail(header, self.power, *records))
        except tail.TailError as error:
            raise VtpmdError(str(error)) from None
        permanent, volatile = (image.digest or image_digest(image) for image in final)
        return Sealed(permanent[:DIGEST_BYTES], volatile[:DIGEST_BYTES], sealed)


def _encode(base: Images, following: Images) -> Records:
    """Encode what turns one state into the other.

    The digests that this works out are kept with it.
    """
    images, records = [], []
    for before, after in zip(base, following, strict=True):
        if after.generation == before.generation:
            images.append(before)
            records.append(b"")
            continue
        digested = after._replace(digest=image_digest(after, before))
        images.append(digested)
        records.append(delta_encode(before, digested))
    return Records(base, Images(*images), records)
