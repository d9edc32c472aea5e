"""``vtpmd run``: serve one vTPM in the foreground."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

LOG_LEVELS = ("error", "warning", "info", "debug")
NAME_LENGTH_MAX = 64  # it goes into log lines and QEMU's process title

EPILOG = """\
example:
  vtpmd run /srv/web1-tpm

  It prints the arguments to start QEMU with, serves until it is stopped by SIGTERM, SIGINT or by
  QEMU's exit, and keeps the vTPM's state in the directory, in swtpm's format. A directory that
  swtpm made is taken over as it is; swtpm takes over one that vtpmd has stopped with.

exit status:
  0  stopped by a signal, or by QEMU when it ended
  1  the vTPM could not be started, or its engine died
  2  the command line was wrong
  3  the state directory is in use by another vtpmd or swtpm
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "run",
        help="serve one vTPM from a state directory",
        description="Serve one vTPM from a state directory, in the foreground.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="state directory; made if new")
    parser.add_argument(
        "--socket",
        metavar="PATH",
        type=Path,
        help="control socket that QEMU connects to (default: DIR/vtpmd.sock)",
    )
    parser.add_argument(
        "--name", type=_name, help="the guest's name: in log lines and in QEMU's arguments"
    )
    parser.add_argument("--uuid", type=_uuid, help="the guest's UUID: in QEMU's arguments")
    parser.add_argument(
        "--log",
        metavar="level=LEVEL",
        type=_log_level,
        default="level=info",
        help=f"what is written to standard error: {', '.join(LOG_LEVELS)} (default: level=info)",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Serve the vTPM until it is stopped; return the exit status. Raises VtpmdError."""
    from vtpmd.core import forbid_core_dumps
    from vtpmd.daemon import engine_process, listener
    from vtpmd.store.directory import StateDirectory

    forbid_core_dumps()
    path: Path = options.socket or options.directory / "vtpmd.sock"
    with StateDirectory.open(options.directory) as directory:
        states = directory.read_states()
        process = engine_process.spawn(
            directory_fd=directory.directory_fd, lock_fd=directory.lock_fd
        )
        with listener.listen(path) as control:
            print(qemu_arguments(path.absolute(), name=options.name, uuid=options.uuid), flush=True)
            # Imported while the engine starts: asyncio is most of this program's start-up time.
            from vtpmd.daemon import runtime

            return runtime.serve(
                process=process,
                states=states,
                control=control,
                name=options.name,
                log_level=options.log,
            )


def qemu_arguments(socket: Path, *, name: str | None, uuid: str | None) -> str:
    """Return the arguments that make QEMU use the vTPM, as a shell would take them."""
    # In QEMU's option values a comma is written twice.
    value = str(socket).replace(",", ",,")
    words = ["-chardev", f"socket,id=vtpm,path={value}"]
    words += ["-tpmdev", "emulator,id=tpm0,chardev=vtpm"]
    # Not tpm-crb: in QEMU 7.2 that loses the response of a command in flight at switchover.
    words += ["-device", "tpm-tis,tpmdev=tpm0"]
    if name is not None:
        words += ["-name", f"guest={name}"]
    if uuid is not None:
        words += ["-uuid", uuid]
    return " ".join(_quote(word) for word in words)


def _quote(word: str) -> str:
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    return "'" + word.replace("'", "'\"'\"'") + "'"


def _name(value: str) -> str:
    if not re.fullmatch(rf"[A-Za-z0-9_.+:-]{{1,{NAME_LENGTH_MAX}}}", value):
        raise argparse.ArgumentTypeError(
            f"{value!r} is no name: use up to {NAME_LENGTH_MAX} letters, digits and _.+:-"
        )
    return value


def _uuid(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", value):
        raise argparse.ArgumentTypeError(
            f"{value!r} is no UUID, such as 8f2c0d6e-5a5b-4c1e-9d1a-3f0c7d1f2b11"
        )
    return value.lower()


def _log_level(value: str) -> str:
    key, _, level = value.partition("=")
    if key != "level" or level not in LOG_LEVELS:
        known = ", ".join(LOG_LEVELS)
        raise argparse.ArgumentTypeError(f"{value!r}: use level= and one of {known}")
    return level
