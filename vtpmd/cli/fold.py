"""``vtpmd fold``: fold a journal into the checkpoint."""

from __future__ import annotations

import argparse

from vtpmd.cli import at_rest
from vtpmd.counted import counted

EPILOG = f"""\
example:
  vtpmd fold /srv/web1-tpm

  After vtpmd was killed or the host lost power, it writes what tpm2-00.journal has added into
  tpm2-00.permall and removes the journal (of a TPM 1.2 their names begin with tpm-00): the
  directory is one that swtpm can use. vtpmd run does the same when it starts, and a clean stop
  leaves nothing to fold, but where the vTPM was handed over, or saved with its guest, and not used
  since. A vTPM with an anchor needs --anchor: vtpmd run may refuse what that has not heard of.

exit status:
  0  folded, or there was nothing to fold
  1  the directory cannot be read or written
{at_rest.EXIT_IN_USE_AND_KEY}\
  5  what is there is damaged: nothing was changed, see vtpmd recover
  6  the directory has fallen behind the anchor: nothing was changed
  8  this host's libtpms is too old for the state, which is as it was
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = at_rest.new_parser(
        commands, "fold", "fold a state directory's journal into its checkpoint", EPILOG
    )
    at_rest.add_anchor(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Fold; return the exit status. Raises VtpmdError."""
    from vtpmd.store.libtpms import check
    from vtpmd.store.moving import MovingFiles
    from vtpmd.store.start import anchor_of, fold

    with at_rest.opened(options.directory) as directory, at_rest.key_of(options.key) as key:
        files = MovingFiles(directory, key)
        with anchor_of(options.anchor, directory, files, key) as anchor:
            taken_up, examined, _ = fold(directory, files, key, anchor, check)
    found = examined.recovery
    outcome = {
        "directory": str(options.directory),
        "folded": examined.has_journal,
        "records": found.applied,
        "generation": examined.found.generation,
        "taken-up": taken_up,
    }
    lines = []
    if taken_up:
        lines.append(f"{options.directory}: took up the state that had been granted to this host")
    if examined.has_journal:
        lines.append(
            f"{options.directory}: folded {counted(found.applied, 'commit')} into the checkpoint, "
            f"up to generation {outcome['generation']}"
        )
    else:
        lines.append(f"{options.directory}: there is no journal to fold")
    at_rest.report(outcome, lines, as_json=options.json)
    return 0
