"""A vtpmd whose disk stands still at a step: Python imports this first.

``VTPMD_HELD_AT`` names the step, and ``VTPMD_HELD`` a file that it makes once it has come there; it
goes on when that is removed. At "before-the-withdrawal" it goes on LATE_S later.
What is shipped knows nothing of this.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from vtpmd.core import LinkOperation
from vtpmd.daemon.incoming import Incoming
from vtpmd.daemon.outgoing import Outgoing
from vtpmd.errors import VtpmdError
from vtpmd.store.incoming import IncomingStates
from vtpmd.store.owner import OwnerRecord

STEP = os.environ["VTPMD_HELD_AT"]
LATE_S = 0.5
POLL_S = 0.01


def _come_to(step: str) -> None:
    if step == STEP:
        held = Path(os.environ["VTPMD_HELD"])
        held.touch()
        while held.exists():
            time.sleep(POLL_S)


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


_ask_engine = Incoming._ask_engine
_grant, _take, _remove = IncomingStates.grant, OwnerRecord.take, IncomingStates.remove
_granted: list[IncomingStates] = []  # whose vTPM is this host's from then on


async def _ask(session: Incoming, operation: LinkOperation, *arguments: Any) -> None:
    if operation is LinkOperation.ADMIT:
        _come_to("before-it-is-admitted")
    if operation is LinkOperation.STORE_PERMANENT:
        _come_to("before-its-own-file")
    await _ask_engine(session, operation, *arguments)


def _write_the_grant(states: IncomingStates, used: int) -> None:
    _come_to("before-the-grant-is-written")
    _grant(states, used)
    _granted.append(states)


def _take_over(record: OwnerRecord, session: bytes, used: int) -> int:
    _come_to("before-the-owner-record")
    return _take(record, session, used)


def _remove_what_came(states: IncomingStates) -> None:
    if _granted:
        _come_to("before-what-came-is-removed")
    _remove(states)


setattr(Outgoing, "_note_recorded", _held)  # noqa: B010 - a method is not to be assigned to
setattr(Outgoing, "_write_until_done", _write_late)  # noqa: B010
setattr(Incoming, "_complete_file", _note_completed)  # noqa: B010
setattr(IncomingStates, "append", _keep)  # noqa: B010
setattr(IncomingStates, "grant", _write_the_grant)  # noqa: B010
setattr(IncomingStates, "remove", _remove_what_came)  # noqa: B010
setattr(Incoming, "_ask_engine", _ask)  # noqa: B010
setattr(OwnerRecord, "take", _take_over)  # noqa: B010
