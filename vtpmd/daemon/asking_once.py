"""Ask another host whose a vTPM is, once, for an operator, while no vtpmd serves the directory."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from pathlib import Path

from vtpmd.config import parse_address
from vtpmd.daemon.asking import ask
from vtpmd.daemon.outgoing import Peer
from vtpmd.errors import VtpmdError
from vtpmd.migration.states import ImpossibleEvent, check_session
from vtpmd.store.owner import OwnerRecord, Session
from vtpmd.wire import peer


class Answer(StrEnum):
    """What the other host says."""

    RELEASED = "released"  # it has let go of the vTPM, for ever
    KEPT = "kept"  # it has it


class Unanswered(VtpmdError):
    """The other host has not said whose the vTPM is; the record is as it was."""

    exit_status = 8


def ask_once(
    owner: OwnerRecord, line: Session, credentials: Path, allowed: tuple[str, ...]
) -> Answer:
    """Ask whom a session was sent to, and write down what the answer means. Raises VtpmdError."""
    session = bytes.fromhex(line.session)
    try:
        to = Peer(*parse_address(line.peer), credentials, allowed)
        answer = asyncio.run(ask(to, peer.Ask(session)))
        check_session(answer, session)
    except (VtpmdError, ImpossibleEvent) as error:
        raise Unanswered(f"{error}: whose the vTPM is, is not known; ask again") from error
    match answer:
        case peer.Released():
            owner.release(session)
            return Answer.RELEASED
        case peer.Kept():
            owner.confirm(session)
            return Answer.KEPT
        case peer.Refuse(text=text):
            raise Unanswered(f"{to} does not say whose the vTPM is: {text}")
    raise Unanswered(
        f"{to} does not know of the session {line.session}: it serves another vTPM, or its state "
        "directory was removed; ask where that is, or see vtpmd owner --help on --claim"
    )
