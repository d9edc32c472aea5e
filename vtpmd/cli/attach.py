"""``vtpmd attach``: look after a vTPM whose engine runs already."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vtpmd.cli.arguments import DAEMON_ARGUMENTS, KEY_ARGUMENT, add_arguments
from vtpmd.cli.run import check_credentials, config_of, listen_for

if TYPE_CHECKING:
    from contextlib import ExitStack

    from vtpmd.store.keys import Key

EPILOG = """\
example:
  vtpmd attach /srv/web1-tpm --listen :4433 --tls-creds /etc/pki/vtpmd --allow host2

  A vTPM that vtpmd run has started is served by its engine, a process of its own. A vtpmd beside
  it moves it; that may die, be stopped, upgraded and started again, and no guest notices. This is
  how it is started again, for the engine of any vtpmd run, also of an earlier version: with the
  options for moving that this had, or others. A session whose guest still runs falls back to whole
  blobs; one that had come further is settled, as the other host knows it.

  SIGTERM and SIGINT end this vtpmd alone, after its sessions: the engine serves on. The vTPM is
  stopped by a signal to its engine, or to the vtpmd run that has started it, or by QEMU.

exit status:
  0  detached by a signal; or the vTPM was stopped
  1  there is no engine, it has died, is of a later version, or could not be attached to
  2  the command line was wrong
  3  another vtpmd looks after the directory, or does not end with --take-over
  4  the state is encrypted and --key is missing or wrong, or it is not encrypted and --key is given
  5  the owner record, or a state on its way in, is damaged
  7  the vTPM was stopped, but swtpm cannot take the directory yet: see vtpmd fold
  9  the vTPM was stopped, and its directory, or what is in it, was removed meanwhile
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "attach",
        help="look after a vTPM that is served already",
        description="Look after a vTPM whose engine runs, in the foreground.",
        epilog=EPILOG,
    )
    parser.add_argument("directory", metavar="DIR", help="state directory of the vTPM")
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="end the vtpmd that looks after it now, as one that hangs, by SIGKILL",
    )
    add_arguments(parser, KEY_ARGUMENT | DAEMON_ARGUMENTS)
    parser.set_defaults(command=attach)


def attach(options: argparse.Namespace) -> int:
    """Attach to the engine; return the exit status. Raises VtpmdError."""
    from contextlib import ExitStack

    from vtpmd.core import forbid_core_dumps
    from vtpmd.daemon import runtime, signals
    from vtpmd.store.daemon_lock import look_after
    from vtpmd.store.directory import look_into

    config = config_of(options)
    forbid_core_dumps()
    check_credentials(config)
    with ExitStack() as stack:
        directory = stack.enter_context(look_into(options.directory))
        place = directory.directory_fd, directory.path
        key = _key(stack, options.key)
        stack.enter_context(look_after(*place, take_over=options.take_over))
        # From the sockets on there is something to put in order; until then a signal ends it.
        signals.hold()
        management, peers = listen_for(stack, config)
        resources = runtime.Resources(*place, key, peers, management, child=None)
        return runtime.serve(resources, config)


def _key(stack: ExitStack, source: str | None) -> Key | None:
    from vtpmd.store.keys import parse_key_source, read_key

    return None if source is None else stack.enter_context(read_key(parse_key_source(source)))
