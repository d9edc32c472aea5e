"""``vtpmd rekey``: change, add or remove the key of a state directory."""

from __future__ import annotations

import argparse

from vtpmd.cli import at_rest

EPILOG = f"""\
example:
  openssl rand -hex 32 > web1.key
  vtpmd rekey /srv/web1-tpm --new-key file=web1.key,mode=aes-256-cbc

  It folds the journal, then replaces the state files one by one. If it is interrupted, run it again
  with the same options: a file that has the new key already stays as it is. What names the present
  key, if there is one, is --key. Disks may keep what was in the old files, under the old key or
  none. A vTPM with an anchor needs --anchor, as for vtpmd fold.

exit status:
  0  every state file has the new key
  1  the directory cannot be read or written
{at_rest.EXIT_IN_USE_AND_KEY}\
  5  what is there is damaged: nothing was changed, see vtpmd recover
  6  the directory has fallen behind the anchor: nothing was changed
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = at_rest.new_parser(
        commands, "rekey", "change, add or remove a state directory's key", EPILOG
    )
    at_rest.add_anchor(parser)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--new-key", metavar="KEY", help="the key to encrypt the state with")
    wanted.add_argument("--no-key", action="store_true", help="keep the state in the clear")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Change the key; return the exit status. Raises VtpmdError."""
    from vtpmd.store.rekeying import rekey

    with (
        at_rest.opened(options.directory) as directory,
        at_rest.key_of(options.key) as old,
        at_rest.key_of(options.new_key, "--new-key") as new,
    ):
        changed = rekey(directory, old, new, options.anchor)
    lines = [f"{options.directory / name}: has the new key" for name in changed]
    if options.no_key:
        lines = [f"{options.directory / name}: is in the clear" for name in changed]
    outcome = {"directory": str(options.directory), "changed": changed}
    nothing = [f"{options.directory}: there is nothing to change"]
    at_rest.report(outcome, lines or nothing, as_json=options.json)
    return 0
