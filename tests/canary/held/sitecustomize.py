"""A vtpmd whose record is never said to be written: Python imports this as it starts.

The thread that writes it stands still at a step, for as long as vtpmd lives.

``VTPMD_HELD_AT`` names the step, and ``VTPMD_HELD`` a file that it makes once it has come there.
What is shipped knows nothing of this.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from vtpmd.store.owner import OwnerRecord

STEP = os.environ["VTPMD_HELD_AT"]

_offering = OwnerRecord.offering


def _come_to(step: str) -> None:
    if step == STEP:
        Path(os.environ["VTPMD_HELD"]).touch()
        while True:
            time.sleep(1)


def _held(record: OwnerRecord, session: bytes) -> Callable[[], None]:
    write = _offering(record, session)

    def held() -> None:
        _come_to("before-the-record")
        write()
        _come_to("after-the-record")

    return held


setattr(OwnerRecord, "offering", _held)  # noqa: B010 - a method is not to be assigned to
