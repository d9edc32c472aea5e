"""``vtpmd owner``: whose a vTPM is and why; ask the other host, or take the vTPM by hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vtpmd.cli import at_rest
from vtpmd.errors import UsageError, VtpmdError

if TYPE_CHECKING:
    from vtpmd.store.directory import OpenDirectory
    from vtpmd.store.owner import Record, Session
    from vtpmd.store.status import StateStatus

EXIT_STATUS: Final = {"ours": 0, "offered": 6, "moved": 7}

EPILOG: Final = """\
example:
  vtpmd owner /srv/web1-tpm
  vtpmd owner /srv/web1-tpm --ask --tls-creds /etc/pki/vtpmd
  vtpmd owner /srv/web1-tpm --claim

  The first shows what the owner record says, also while a vtpmd serves the directory: "ours" (this
  host may serve the vTPM), "offered" (only if the other host has not taken it) or "moved" (only
  when the other host has let go of it), and what became of the sessions that are remembered.

  --ask asks the other host now. If that has let go of the vTPM, the record says "ours" from then
  on; if it has it, "moved". A vtpmd that runs on the directory asks by itself, again and again:
  then nothing is asked here.

  --claim takes the vTPM without the other host's word, and is for when that is gone for good: also
  that of a host whose lock on shared storage the directory's .lock tells of. If it
  is not, there are two vTPMs with the same keys, which know nothing of what the other one writes:
  PCRs, counters and NV indices then differ from what one of the guests remembers. So it stays in
  the record for ever, as a possible fork: here, in the log of vtpmd run, and in query-status.

  A snapshot that QEMU loads puts the vTPM back in time without an operator's word here: of that the
  restore epoch tells, which is the state's own.

exit status:
  0  the vTPM is this host's
  1  the directory cannot be read or written
  2  the command line was wrong
  3  --claim: the state directory is in use by a vtpmd or swtpm
  5  the owner record cannot be read
  6  the vTPM was offered to another host, which may have taken it
  7  the vTPM is another host's
  8  --ask: the other host did not answer, or does not know; the record is as it was
  9  --claim was refused: there is nothing to claim; the record is as it was
"""


class ClaimRefused(VtpmdError):
    """There is nothing to claim; the record is as it was."""

    exit_status = 9


class Seen(NamedTuple):
    """What there is to be told of a directory."""

    record: Record
    is_in_use: bool
    has_incoming: bool
    state: StateStatus | None  # None: it cannot be read
    answer: str | None = None  # to --ask: released or kept


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "owner",
        help="show whose a vTPM is, ask the other host, or take it by hand",
        description="Show whose a vTPM is, and why; ask the other host, or take the vTPM by hand.",
        epilog=EPILOG,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="state directory")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--ask", action="store_true", help="ask the other host now")
    action.add_argument(
        "--claim", action="store_true", help="take the vTPM without the other host's word"
    )
    parser.add_argument(
        "--tls-creds", metavar="DIR", type=Path, help="certificates to ask with, as for vtpmd run"
    )
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="a peer that may be asked, as for vtpmd run (default: whoever the host's name is "
        "certified for)",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Show, ask or claim; return the exit status. Raises VtpmdError."""
    if options.ask and options.tls_creds is None:
        raise UsageError("--ask needs --tls-creds, the certificates to ask with")
    if not options.ask and (options.tls_creds is not None or options.allow):
        raise UsageError("--tls-creds and --allow are for asking: add --ask")
    if options.claim:
        _claim(options.directory)
    answer = _ask(options) if options.ask else None
    seen = _look(options.directory)._replace(answer=answer)
    at_rest.report(_outcome(options, seen), _lines(options, seen), as_json=options.json)
    return EXIT_STATUS[seen.record.whose]


def _look(path: Path) -> Seen:
    """Read what there is without a lock: who has it may run for months. Raises VtpmdError."""
    from vtpmd.store.directory import look_into
    from vtpmd.store.owner import look

    with look_into(path) as directory:
        has_incoming = directory.exists(directory.names.incoming)
        return Seen(look(directory), directory.is_in_use(), has_incoming, _state_in(directory))


def _state_in(directory: OpenDirectory) -> StateStatus | None:
    """Return what the state says of itself; that it is damaged is vtpmd status's to tell."""
    from vtpmd.store.status import state_of

    try:
        return state_of(directory)
    except VtpmdError:
        return None


def _claim(path: Path) -> None:
    from vtpmd.store import holder
    from vtpmd.store.moving import MovingFiles
    from vtpmd.store.owner import Whose

    with at_rest.opened(path, claims=True) as directory:
        owner = MovingFiles(directory).owner
        found, named = holder.look(directory.lock_fd)
        is_held = found in (holder.Found.ELSEWHERE, holder.Found.DAMAGED)
        is_ours = owner.read().whose is Whose.OURS
        if is_ours and not is_held:
            raise ClaimRefused(
                f"{path}: the vTPM is this host's already: there is nothing to claim"
            )
        if directory.exists(directory.names.incoming):
            raise ClaimRefused(
                f"{path} has a state that a peer has sent, and may be this host's by that: do "
                f"`vtpmd fold {path}` first, with its --anchor if there is one, and look again"
            )
        if not is_ours:
            owner.claim()
        if is_held:
            who = "a process that .lock does not name" if named is None else holder.describe(named)
            owner.claim_lock(who)
            holder.write(directory.lock_fd, b"")


def _ask(options: argparse.Namespace) -> str | None:
    """Ask whom the record names; return the answer, or None where nothing was asked.

    Raises VtpmdError.
    """
    from vtpmd.daemon.asking_once import ask_once
    from vtpmd.store.directory import StateDirectoryInUse
    from vtpmd.store.moving import MovingFiles
    from vtpmd.store.owner import Outcome

    try:
        with at_rest.opened(options.directory) as directory:
            owner = MovingFiles(directory).owner
            record = owner.read()
            line = record.find(record.session)
            if line is None or line.outcome is not Outcome.SENT:
                return None
            return ask_once(owner, line, options.tls_creds, tuple(options.allow))
    except StateDirectoryInUse:
        return None


def _outcome(options: argparse.Namespace, seen: Seen) -> dict[str, Any]:
    record = seen.record
    return {
        "directory": str(options.directory),
        "owner": record.whose.value,
        "session": record.session or None,
        "peer": record.peer or None,
        "since": record.since or None,
        "generation": record.generation,
        "restore-epoch": None if seen.state is None else seen.state.epoch,
        "in-use": seen.is_in_use,
        "incoming": seen.has_incoming,
        "answer": seen.answer,
        "sessions": [line._asdict() for line in record.sessions],
        "possible-fork": [fork._asdict() for fork in record.forks],
    }


def _lines(options: argparse.Namespace, seen: Seen) -> list[str]:
    """Say the same for people."""
    record, lines = seen.record, [f"{options.directory}: {whose_text(seen.record)}"]
    if seen.answer is not None:
        lines.append(_ANSWERS[seen.answer])
    elif options.ask:
        lines.append(_why_not_asked(seen))
    if seen.is_in_use:
        lines.append("in use: a vtpmd or swtpm runs on the directory")
    if seen.has_incoming:
        lines.append(INCOMING_TEXT)
    if seen.state is not None and seen.state.epoch:
        lines.append(epoch_line(seen.state))
    return lines + fork_lines(record) + [session_text(line) for line in reversed(record.sessions)]


INCOMING_TEXT: Final = (
    "on its way in: what a peer has sent is there, and is taken up by vtpmd run or vtpmd fold if "
    "the peer has granted it"
)


def epoch_line(state: StateStatus) -> str:
    """Return of which restore epoch a vTPM is: not the first."""
    from vtpmd.store.status import epoch_text

    at_least = "at least " if state.may_be_newer else ""
    return f"restore epoch: {at_least}{epoch_text(state.generation or 0)}"


def fork_lines(record: Record) -> list[str]:
    """Return a line for each time that the vTPM was claimed or imported."""
    from vtpmd.store.owner import fork_text

    return [f"possible fork: {fork_text(fork)}" for fork in record.forks]


def session_text(line: Session) -> str:
    """Return what became of a session, in a line."""
    return (
        f"session {line.session}, {line.at or 'time unknown'}: {_OUTCOMES[line.outcome]} "
        f"{line.peer or 'a peer whose name is not known'}"
    )


def whose_text(record: Record) -> str:
    """Return whose the vTPM is, in a line."""
    since = f"since {record.since}" if record.since else "by default"
    if record.whose == "ours":
        return f"the vTPM is this host's, {since}"
    session = f"{since}, by session {record.session}"
    if record.whose == "offered":
        return (
            f"the vTPM was offered to {record.peer}, {session}: it is this host's only if that has "
            "not taken it"
        )
    return f"the vTPM is another host's, {record.peer}, {session}: until that lets go of it"


_ANSWERS: Final = {
    "released": "answered: the other host has let go of it, and will never serve it",
    "kept": "answered: the other host has it: boot its guest there, or move it here from there",
}

_OUTCOMES: Final = {
    "open": "not ended, with",
    "declined": "not taken, from",
    "released": "given back unused, to",
    "taken": "taken, from",
    "sent": "sent or offered, to",
}


def _why_not_asked(seen: Seen) -> str:
    if seen.record.whose == "ours":
        return "not asked: it is this host's"
    if seen.is_in_use:
        return "not asked: a vtpmd that runs on the directory asks by itself, if it has --tls-creds"
    return "not asked: no address is known, as the vTPM did not leave in a session of this host's"
