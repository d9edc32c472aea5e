"""``vtpmd migrate``: move a guest and its vTPM to another host."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtpmd.config import Address, parse_address
from vtpmd.errors import VtpmdError

if TYPE_CHECKING:
    from vtpmd.cli.moving import Order
    from vtpmd.cli.moving_verdict import Report

EXIT_STATUS: Final = {"tail": 0, "failed": 1, "whole-blobs": 4, "unknown": 5, "interrupted": 130}

EPILOG = """\
example:
  vtpmd migrate --manage /run/vtpmd/web1.manage --to host2.example.org:4433 \\
      --qmp /run/web1.qmp --uri tcp:host2.example.org:4444

  At host2, vtpmd run --listen waits for the vTPM, and QEMU with -incoming tcp:0.0.0.0:4444 for the
  guest. Here, vtpmd run has --tls-creds, --manage and --qmp. The --qmp given here is one more
  monitor of the same QEMU, as each serves one client.

  Whatever keeps the vTPM's state from moving beside QEMU's stream is warned about; the stream then
  carries all of it, and the guest moves all the same. Not so when the destination refuses what the
  stream would bring it as well: it has another version, another UUID, no room, or cannot take the
  state. Then the guest stays, unless --whole-blobs is given.

  QEMU's capability return-path is switched on, and stays on: only with it QEMU hears from the
  destination whether that has loaded the guest. So --uri is tcp: or unix:, not exec:, fd: or file:.

  An interrupt (Ctrl-C) cancels QEMU's migration, unless it has completed by then. Progress goes to
  standard error, the report to standard output.

exit status:
  0    the guest has moved: QEMU at the destination has loaded it, and its vTPM runs there; QEMU's
       stream carried a tail
  1    the guest has not moved: QEMU did not begin, or its migration failed, and the vTPM is here
  2    the command line was wrong
  4    the guest has moved: QEMU at the destination has loaded it; its vTPM's whole state was in
       QEMU's stream
  5    not known: the vTPM was granted and nothing was heard of the destination since, or QEMU or
       vtpmd went away in between; the last line says what was seen, and what to look at
  130  interrupted; the guest has not moved
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "migrate",
        help="move a guest and its vTPM to another host",
        description="Have QEMU move a guest to another host, and move its vTPM's state beside "
        "guest memory.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--manage",
        metavar="PATH",
        type=Path,
        required=True,
        help="management socket of the vtpmd that serves the guest",
    )
    parser.add_argument(
        "--to",
        metavar="HOST:PORT",
        type=_address,
        required=True,
        help="where the destination's vtpmd waits",
    )
    parser.add_argument(
        "--qmp",
        metavar="PATH",
        type=Path,
        required=True,
        help="UNIX socket of a QMP monitor of the guest's QEMU",
    )
    parser.add_argument(
        "--uri", required=True, help="where the destination's QEMU waits, as QEMU writes it"
    )
    parser.add_argument(
        "--whole-blobs",
        action="store_true",
        help="let QEMU's stream carry the vTPM's whole state also when the destination has refused "
        "it for a reason that the stream will probably meet, too",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Move the guest; return the exit status."""
    from vtpmd.cli import moving_report
    from vtpmd.cli.moving import Order
    from vtpmd.cli.moving_verdict import Ending, Report

    order = Order(
        manage=options.manage,
        to=options.to,
        qmp=options.qmp,
        uri=options.uri,
        whole_blobs=options.whole_blobs,
    )
    try:
        report = _move(order)
    except VtpmdError as error:
        report = Report(ending=Ending.FAILED, reason=str(error))
    if options.json:
        import json

        print(json.dumps(moving_report.as_json(report), indent=2))
    if report.ending not in (Ending.TAIL, Ending.WHOLE_BLOBS):
        print(f"vtpmd: {moving_report.heading(report)}", file=sys.stderr)
    elif not options.json:
        print(moving_report.text(report))
    return EXIT_STATUS[report.ending.value]


def _move(order: Order) -> Report:
    """Move, shown on standard error. Raises VtpmdError."""
    import asyncio
    import logging
    import signal

    from rich.console import Console

    from vtpmd.cli.moving import move
    from vtpmd.cli.moving_display import Display
    from vtpmd.cli.moving_verdict import Ending, Report

    # What libraries log is for a daemon's log; here errors say it, in a line.
    logging.basicConfig(handlers=[logging.NullHandler()])
    display = Display(Console(stderr=True, highlight=False, soft_wrap=True))

    async def moving() -> Report:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio.run() has made one

        def interrupt() -> None:
            # Once: to undo what was begun takes only so long, and must not be cut short.
            if not task.cancelling():
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, interrupt)
        return await move(order, display.show, display.warn)

    try:
        with display.running():
            return asyncio.run(moving())
    except (asyncio.CancelledError, KeyboardInterrupt):
        return Report(ending=Ending.INTERRUPTED)


def _address(value: str) -> Address:
    try:
        return parse_address(value)
    except VtpmdError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
