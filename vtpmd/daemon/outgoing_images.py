"""What a source has captured of its vTPM's state, and what of it the destination has.

Images are compared by identity: one that was captured is sent as it is, and acknowledged as it is.
"""

from __future__ import annotations

from typing import NamedTuple

from vtpmd.core import Store
from vtpmd.core.delta import delta_encode
from vtpmd.core.image import image_digest
from vtpmd.daemon.images import NOTHING, Images
from vtpmd.wire.tpm import StateType


class Records(NamedTuple):
    """What turns one state into another, empty where nothing differs."""

    final: Images
    records: list[bytes]


class OutgoingImages:
    """The images of one session's source."""

    def __init__(self) -> None:
        self.captured = NOTHING  # last; what is newer than what was sent is to be sent
        self.sent = NOTHING
        self._acknowledged = NOTHING
        self._offered: Images | None = None  # by the engine: what its tail ends at
        self.power = 0  # what the guest's last TPM2_Shutdown said by the last capture

    @property
    def is_all_sent(self) -> bool:
        """True if nothing newer was captured than what was sent."""
        return self.captured is self.sent

    @property
    def is_all_acknowledged(self) -> bool:
        """True if the destination has what was sent last."""
        return self._acknowledged is self.sent

    @property
    def is_offered(self) -> bool:
        """True if the engine has offered the tail of what was captured last."""
        return self._offered is self.captured

    def capture(self, store: Store) -> None:
        """Take what the engine has captured into the store."""
        self.captured = Images(store.read(StateType.PERMANENT), store.read(StateType.VOLATILE))

    def note_offered(self) -> None:
        """The engine offers the tail of what was captured last."""
        self._offered = self.captured

    def note_offered_no_more(self) -> None:
        """It does not."""
        self._offered = None

    def to_send(self) -> Records:
        """Return what turns what was sent last into what was captured last.

        The digests that this works out are kept with it.
        """
        images, records = [], []
        for before, after in zip(self.sent, self.captured, strict=True):
            if after.generation == before.generation:
                images.append(before)
                records.append(b"")
                continue
            digested = after._replace(digest=image_digest(after, before))
            images.append(digested)
            records.append(delta_encode(before, digested))
        return Records(Images(*images), records)

    def note_sent(self, records: Records) -> None:
        """They are on their way, from what was sent before."""
        if self.is_offered:
            self._offered = records.final
        self.captured = self.sent = records.final

    def note_acknowledged(self) -> None:
        """The destination has what was sent last."""
        self._acknowledged = self.sent
