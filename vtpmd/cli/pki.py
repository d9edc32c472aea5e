"""``vtpmd pki``: make certificates for peers, for a test or a site without an authority."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtpmd.pki import Made

DAYS_MAX = 36500  # a century; a certificate's notAfter has a year of four digits

EXIT_STATUS = """\
exit status:
  0  made
  1  the files could not be made, or the authority could not be read
  2  the command line was wrong
  3  a file is there already; nothing was made
"""

INIT_EPILOG = f"""\
example:
  vtpmd pki init /srv/vtpmd-ca

  It makes ca-cert.pem and ca-key.pem there. Who can read the key can speak as any host: keep the
  directory away from hosts, which need no more than what vtpmd pki issue makes.

{EXIT_STATUS}"""

ISSUE_EPILOG = f"""\
example:
  vtpmd pki issue /srv/vtpmd-ca host1.example.org 192.0.2.1 --out host1
  scp -r host1 host1.example.org:/etc/pki/vtpmd

  It makes a directory for one host, for vtpmd's --tls-creds as for QEMU's tls-creds-x509:
  ca-cert.pem, and a certificate and key each for the server and the client. Peers are connected to
  by a NAME that is certified, and allowed by one with --allow.

{EXIT_STATUS}"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "pki",
        help="make certificates for peers",
        description="Make the certificates that peers know each other by, for a test or a small "
        "site.",
        epilog="example:\n  vtpmd pki init /srv/vtpmd-ca\n  vtpmd pki issue /srv/vtpmd-ca host1\n",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    init = _add_action(actions, "init", "make a certificate authority", INIT_EPILOG, days=3650)
    init.add_argument("directory", metavar="DIR", type=Path, help="where; made if new")
    init.set_defaults(command=run_init)
    issue = _add_action(actions, "issue", "make one host's certificates", ISSUE_EPILOG, days=365)
    issue.add_argument("directory", metavar="DIR", type=Path, help="the authority's directory")
    issue.add_argument(
        "names", metavar="NAME", nargs="+", help="DNS name or IP address that peers connect to"
    )
    issue.add_argument(
        "--out", metavar="DIR2", type=Path, help="where; made if new (default: DIR/NAME)"
    )
    issue.set_defaults(command=run_issue)


def run_init(options: argparse.Namespace) -> int:
    """Make an authority; return the exit status. Raises VtpmdError."""
    from vtpmd import pki

    return _report(pki.init(options.directory, options.days), as_json=options.json)


def run_issue(options: argparse.Namespace) -> int:
    """Make a host's credentials directory; return the exit status. Raises VtpmdError."""
    from vtpmd import pki

    out = options.out or options.directory / pki.host_name(options.names[0])
    made = pki.issue(options.directory, options.names, out, options.days)
    return _report(made, as_json=options.json)


def _add_action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    epilog: str,
    *,
    days: int,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=summary,
        description=f"{summary.capitalize()}.",
        epilog=epilog,
    )
    parser.add_argument(
        "--days",
        metavar="N",
        type=_days,
        default=days,
        help="how long they are valid (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")
    return parser


def _report(made: Made, *, as_json: bool) -> int:
    if as_json:
        import json

        report = {
            "files": [str(path) for path in made.files],
            "names": made.names,
            "notAfter": made.not_after.isoformat().replace("+00:00", "Z"),
        }
        print(json.dumps(report, indent=4))
    else:
        for path in made.files:
            print(path)
        print(f"valid until {made.not_after:%Y-%m-%d %H:%M} UTC")
    return 0


def _days(value: str) -> int:
    if not (value.isascii() and value.isdecimal() and 1 <= int(value) <= DAYS_MAX):
        raise argparse.ArgumentTypeError(f"{value!r}: give a number from 1 to {DAYS_MAX}")
    return int(value)
