"""``vtpmd status``: what there is to be told of a vTPM, served or not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vtpmd.cli import at_rest
from vtpmd.counted import counted

if TYPE_CHECKING:
    from vtpmd.store.status import StateStatus, Status

EXIT_SHOWN: Final = 0
EXIT_PROBLEMS: Final = 5
SESSIONS_SHOWN: Final = 5  # JSON has all that are remembered, as has vtpmd owner

EPILOG: Final = """\
example:
  vtpmd status /srv/web1-tpm
  vtpmd status --manage /run/web1.manage

  The first reads the state directory, whether the vTPM is served or not: which vTPM it is, how far
  its state has come (its generation), whose it is and what became of the last sessions, who serves
  it, and whether its state is encrypted and has a journal. It changes nothing, takes no lock and
  needs no key: of an encrypted vTPM's journal it cannot tell how far that has come. Which processes
  serve a vTPM of another user's only root gets to know.

  The second asks a vtpmd on its management socket: also how QEMU is followed, and for the last
  session.

exit status:
  0  it was shown
  1  the directory cannot be read, or vtpmd cannot be asked
  2  the command line was wrong
  5  something in the directory is damaged, or cannot be read; what could be told was shown
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "status",
        help="show which vTPM it is, whose, and who serves it",
        description="Show which vTPM it is, how far its state has come, whose it is, and who "
        "serves it.",
        epilog=EPILOG,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("directory", metavar="DIR", nargs="?", type=Path, help="state directory")
    what.add_argument(
        "--manage", metavar="PATH", type=Path, help="ask the vtpmd that has this management socket"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Show; return the exit status. Raises VtpmdError."""
    if options.manage is not None:
        from vtpmd.cli import status_asked

        answers = status_asked.ask(options.manage)
        outcome = {"manage": str(options.manage), **answers._asdict()}
        lines = status_asked.lines(options.manage, answers)
        at_rest.report(outcome, lines, as_json=options.json)
        return EXIT_SHOWN
    status = _look(options.directory)
    outcome = _outcome(options.directory, status)
    at_rest.report(outcome, _lines(options.directory, status), as_json=options.json)
    return EXIT_PROBLEMS if status.problems else EXIT_SHOWN


def _look(path: Path) -> Status:
    """Read what there is without a lock: who has it may run for months. Raises VtpmdError."""
    from vtpmd.core import forbid_core_dumps
    from vtpmd.store.directory import look_into
    from vtpmd.store.status import status_of

    forbid_core_dumps()
    with look_into(path) as directory:
        return status_of(directory)


def _outcome(path: Path, status: Status) -> dict[str, Any]:
    record = status.record
    outcome = {
        "directory": str(path),
        "tpm": None if status.version is None else status.version.facts.word,
        **_state_outcome(status.state),
        "incoming": status.has_incoming,
        "served": status.is_served,
        "held-by": status.held_by,
        "served-by": [holder._asdict() for holder in status.holders],
        "problems": status.problems,
    }
    if record is None:
        owner = dict.fromkeys(("owner", "session", "peer", "since", "sessions", "possible-fork"))
        return outcome | owner
    return outcome | {
        "owner": record.whose.value,
        "session": record.session or None,
        "peer": record.peer or None,
        "since": record.since or None,
        "sessions": [line._asdict() for line in record.sessions],
        "possible-fork": [fork._asdict() for fork in record.forks],
    }


def _state_outcome(state: StateStatus | None) -> dict[str, Any]:
    if state is None:
        members = ("state", "encrypted", "identity", "generation", "may-be-newer", "journal")
        return dict.fromkeys(members)
    return {
        "state": state.is_there,
        "encrypted": state.is_encrypted,
        "identity": None if state.identity is None else state.identity.hex(),
        "generation": state.generation,
        "may-be-newer": state.may_be_newer,
        "journal": state.has_journal,
    }


def _lines(path: Path, status: Status) -> list[str]:
    """Say the same for people."""
    from vtpmd.cli.owner import INCOMING_TEXT, fork_lines, session_text, whose_text

    record = status.record
    whose = "whose the vTPM is, is not known" if record is None else whose_text(record)
    lines = [
        f"{path}: {whose}",
        *([] if status.version is None else [f"TPM: {status.version.facts.word}"]),
        f"served: {_served_text(status)}",
        *_state_lines(status),
    ]
    if status.has_incoming:
        lines.append(INCOMING_TEXT)
    if record is not None:
        lines += fork_lines(record)
        last = record.sessions[-SESSIONS_SHOWN:]
        lines += [session_text(line) for line in reversed(last)]
        if len(record.sessions) > len(last):
            n_others = len(record.sessions) - len(last)
            lines.append(f"and {counted(n_others, 'session')} before: vtpmd owner {path}")
    return lines + [f"problem: {problem}" for problem in status.problems]


def _served_text(status: Status) -> str:
    if status.held_by is not None:
        return f"by {status.held_by}, as .lock has it"
    if status.is_served is None:
        return "not known"
    if not status.is_served:
        return "no"
    if not status.holders:
        return "yes; by which process, only root or the user that it runs as can tell"
    names = [f"{each.program} (process {each.pid})" for each in status.holders]
    return f"yes, by {', '.join(names)}"


def _state_lines(status: Status) -> list[str]:
    from vtpmd.cli.owner import epoch_line

    state = status.state
    if state is None:
        return ["state: not known"]
    journal = "journal: none"
    if state.has_journal:
        folder = "vtpmd, from time to time" if status.is_served else "vtpmd run or vtpmd fold"
        journal = f"journal: there is one, which is folded by {folder}"
    if not state.is_there:
        return ["state: none yet", *([journal] if state.has_journal else [])]
    lines = [f"state: {'encrypted' if state.is_encrypted else 'not encrypted'}"]
    if state.identity is not None:
        lines.append(f"identity: {state.identity.hex()}")
        at_least = "at least " if state.may_be_newer else ""
        lines.append(f"generation: {at_least}{state.generation}")
        if state.epoch:
            lines.append(epoch_line(state))
    elif state.problem is None:
        lines.append("identity: none yet; it gets one at the first change under vtpmd")
    return [*lines, journal]
