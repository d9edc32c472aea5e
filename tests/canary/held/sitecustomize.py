"""A vtpmd whose disk stands still at a step, for as long as it lives: Python imports this first.

Of the owner record that is the thread that writes it; of a last round that has come, all of vtpmd.

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


_foresee, _append = Incoming._foresee, IncomingStates.append
_last: list[Incoming] = []  # whose last round has come


def _is_last(session: Incoming, *arguments: Any) -> bytes:
    _last.append(session)
    return _foresee(session, *arguments)


def _keep(states: IncomingStates, *arguments: Any) -> None:
    if _last:
        _come_to("before-the-last-round")
    _append(states, *arguments)


setattr(OwnerRecord, "offering", _held)  # noqa: B010 - a method is not to be assigned to
setattr(Incoming, "_foresee", _is_last)  # noqa: B010
setattr(IncomingStates, "append", _keep)  # noqa: B010
