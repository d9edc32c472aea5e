"""A vtpmd whose disk stands still at a step, for as long as it lives: Python imports this first.

``VTPMD_HELD_AT`` names the step, and ``VTPMD_HELD`` a file that it makes once it has come there. At
"before-the-withdrawal" it goes on LATE_S later.
What is shipped knows nothing of this.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from vtpmd.daemon.incoming import Incoming
from vtpmd.daemon.outgoing import Outgoing
from vtpmd.errors import VtpmdError
from vtpmd.store.incoming import IncomingStates

STEP = os.environ["VTPMD_HELD_AT"]
LATE_S = 0.5


def _come_to(step: str) -> None:
    if step == STEP:
        Path(os.environ["VTPMD_HELD"]).touch()
        while True:
            time.sleep(1)


_note_recorded = Outgoing._note_recorded


async def _held(session: Outgoing, news: asyncio.Future[bytes]) -> VtpmdError | None:
    await asyncio.wait({news})
    _come_to("after-the-record")
    return await _note_recorded(session, news)


_write_until_done = Outgoing._write_until_done


async def _write_late(session: Outgoing, *arguments: Any) -> None:
    if STEP == "before-the-withdrawal":
        await asyncio.sleep(LATE_S)
    await _write_until_done(session, *arguments)


_complete_file, _append = Incoming._complete_file, IncomingStates.append
_completed: list[Incoming] = []  # whose file is to have what a tail has brought


async def _note_completed(session: Incoming) -> None:
    _completed.append(session)
    await _complete_file(session)


def _keep(states: IncomingStates, *arguments: Any) -> None:
    if _completed:
        _come_to("before-what-the-tail-brought")
    _append(states, *arguments)


setattr(Outgoing, "_note_recorded", _held)  # noqa: B010 - a method is not to be assigned to
setattr(Outgoing, "_write_until_done", _write_late)  # noqa: B010
setattr(Incoming, "_complete_file", _note_completed)  # noqa: B010
setattr(IncomingStates, "append", _keep)  # noqa: B010
