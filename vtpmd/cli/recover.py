"""``vtpmd recover``: show what a damaged state directory holds, and restore it when told to."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vtpmd.cli import at_rest
from vtpmd.counted import counted

if TYPE_CHECKING:
    from vtpmd.store.salvage import Salvage

EXIT_RIGHT: Final = 0
EXIT_DAMAGED: Final = 5
EXIT_BEHIND: Final = 6
EXIT_LOST: Final = 7

EPILOG = f"""\
example:
  vtpmd recover /srv/web1-tpm
  vtpmd recover /srv/web1-tpm --restore

  The first shows what is wrong, where, and what could be restored; it changes nothing. The second
  restores that, and keeps what was there in files of other names, which it prints: an older state
  may have lost keys, or bring back ones that the guest has revoked. With --anchor it compares with
  that, too, and --restore then makes the anchor trust what was restored.

exit status:
  0  nothing is wrong, or it was restored
  1  the directory cannot be read or written
{at_rest.EXIT_IN_USE_AND_KEY}\
  5  something is damaged; what could be restored was shown
  6  the directory has fallen behind the anchor
  7  something is damaged, and nothing can be restored
  8  nothing is wrong, but this host's libtpms is too old for the state
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = at_rest.new_parser(
        commands, "recover", "show what a damaged state directory holds, and restore it", EPILOG
    )
    parser.add_argument("--restore", action="store_true", help="do it, and keep the originals")
    at_rest.add_anchor(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Show or restore; return the exit status. Raises VtpmdError."""
    from vtpmd.store import salvage
    from vtpmd.store.anchor import NO_IDENTITY, Anchor
    from vtpmd.store.directory import StateDirectoryError
    from vtpmd.store.moving import MovingFiles
    from vtpmd.store.status import unsettled

    with ExitStack() as stack:
        directory = stack.enter_context(at_rest.opened(options.directory))
        key = stack.enter_context(at_rest.key_of(options.key))
        if MovingFiles(directory, key).granted() is not None:
            raise StateDirectoryError(
                f"{options.directory} has a state that was granted to this host, newer than what "
                f"could be restored: take it up with `vtpmd fold {options.directory}`, and its "
                "--anchor if there is one"
            )
        for why in unsettled(directory, is_served=False):
            raise StateDirectoryError(why)
        found = salvage.assess(directory, key)
        anchor, behind = None, None
        if options.anchor is not None:
            anchor = stack.enter_context(
                Anchor.open(options.anchor, options.directory, is_new=False)
            )
            behind = salvage.behind(anchor, found)
        kept: dict[str, str] | None = None
        if options.restore and found.can_restore and (found.problems or behind):
            kept = salvage.restore(directory, found, key)
            if anchor is not None:
                before = NO_IDENTITY if anchor.mark is None else anchor.mark.identity
                anchor.trust(found.examined.found, found.examined.identity or before)
    _report(options, found, behind, kept)
    if kept is not None or not (found.problems or behind):
        return EXIT_RIGHT
    if not found.problems:
        return EXIT_BEHIND
    return EXIT_DAMAGED if found.can_restore else EXIT_LOST


def _report(
    options: argparse.Namespace,
    found: Salvage,
    behind: str | None,
    kept: dict[str, str] | None,
) -> None:
    recovery = found.examined.recovery
    problems = [*found.problems, *([] if behind is None else [behind])]
    outcome: dict[str, Any] = {
        "directory": str(options.directory),
        "verdict": recovery.letter,
        "offset": recovery.offset if recovery.fault else None,
        "problems": problems,
        "generation": found.examined.found.generation,
        "commits": recovery.applied,
        "can-restore": found.can_restore,
        "lost": found.lost,
        "restored": kept is not None,
        "originals": kept or {},
    }
    at_rest.report(outcome, _lines(options.directory, outcome), as_json=options.json)


def _lines(directory: Path, outcome: dict[str, Any]) -> list[str]:
    """Say the same for people."""
    generation = outcome["generation"]
    state = "the checkpoint" if generation is None else f"generation {generation}"
    if outcome["commits"]:
        n_commits = outcome["commits"]
        state += f", with {counted(n_commits, 'commit')} of the journal"
    if not outcome["problems"]:
        return [f"{directory}: nothing is wrong; vtpmd run starts from {state}"]
    lines = list(outcome["problems"])
    if outcome["restored"]:
        lines.append(f"restored: {state}")
        lines += [f"lost: {what}" for what in outcome["lost"]]
        originals = outcome["originals"].items()
        return lines + [f"kept: {name}, as {original}" for name, original in originals]
    if not outcome["can-restore"]:
        return [*lines, "nothing can be restored: take the directory from a backup"]
    lines.append(f"could be restored: {state}")
    lines += [f"would be lost: {what}" for what in outcome["lost"]]
    return [*lines, "nothing was changed: add --restore to do it"]
