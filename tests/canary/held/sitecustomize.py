"""A vtpmd whose disk stands still at a step, for as long as it lives: Python imports this first.

Of the owner record that is the thread that writes it; of what a tail has brought, all of vtpmd.

``VTPMD_HELD_AT`` names the step, and ``VTPMD_HELD`` a file that it makes once it has come there.
What is shipped knows nothing of this.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtpmd.daemon.incoming import Incoming
from vtpmd.store.incoming import IncomingStates
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


_complete_file, _append = Incoming._complete_file, IncomingStates.append
_completed: list[Incoming] = []  # whose file is to have what a tail has brought


async def _note_completed(session: Incoming) -> None:
    _completed.append(session)
    await _complete_file(session)


def _keep(states: IncomingStates, *arguments: Any) -> None:
    if _completed:
        _come_to("before-what-the-tail-brought")
    _append(states, *arguments)


setattr(OwnerRecord, "offering", _held)  # noqa: B010 - a method is not to be assigned to
setattr(Incoming, "_complete_file", _note_completed)  # noqa: B010
setattr(IncomingStates, "append", _keep)  # noqa: B010
