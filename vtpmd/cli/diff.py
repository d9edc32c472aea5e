"""``vtpmd diff``: what differs between two of a vTPM's states."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtpmd.cli import at_rest, new_file, page, state_at

if TYPE_CHECKING:
    from vtpmd.inspect.difference import Change
    from vtpmd.inspect.overview import Inspected

EXIT_SAME: Final = 0
EXIT_DIFFERENT: Final = 11

EPILOG: Final = """\
example:
  vtpmd diff /srv/web1-tpm.monday /srv/web1-tpm
  vtpmd diff before.blob after.blob --json
  vtpmd diff /srv/web1-tpm /srv/web1-tpm --from 1207 --to 1210
  vtpmd diff before.blob after.blob --html difference.html

  In the TPM's terms: PCRs that were extended, NV indices that were written and where, keys that
  were added, tries that failed, and by its place in the tree what is none of these. A and B are as
  for vtpmd inspect, and need not be of one kind. Nothing is locked or written, no secret is shown;
  authorisations are compared, too. --html makes a page of it, as vtpmd inspect does.

exit status:
  0   nothing differs
  1   one cannot be read, or the page cannot be written
  2   the command line was wrong, or the page's file is there already
  4   one is encrypted and --key is missing or wrong, or --key is given and it is not
  5   what one is in is damaged
  9   one is no state of a TPM
  11  they differ; what was found was printed, or is on the page
  12  one has no such generation as --from or --to names
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "diff",
        help="show what differs between two states of a vTPM",
        description="Show what differs between two states of a vTPM.",
        epilog=EPILOG,
    )
    parser.add_argument("before", metavar="A", type=Path, help="a state: as vtpmd inspect's PATH")
    parser.add_argument("after", metavar="B", type=Path, help="another")
    state_at.add_keys(parser)
    state_at.add_generation(
        parser, "--from", "before_at", "A as it was at this generation: see vtpmd log"
    )
    state_at.add_generation(parser, "--to", "after_at", "B as it was at this generation")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print the outcome as JSON")
    page.add_argument(how)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Compare; return the exit status. Raises VtpmdError."""
    from vtpmd.inspect.difference import differences, put_back
    from vtpmd.inspect.overview import inspect

    if options.html is not None:
        new_file.check_is_new(options.html)
    before, after = (
        inspect(state_at.opened(path, options, at).check_has_state())
        for path, at in ((options.before, options.before_at), (options.after, options.after_at))
    )
    changes, line = differences(before, after), put_back(before.source, after.source)
    if options.html is not None:
        _make_page(options.html, before, after, changes, line)
        return EXIT_DIFFERENT if changes else EXIT_SAME
    outcome = {
        "a": before.source.path,
        "b": after.source.path,
        "restore-epochs": [before.source.epoch, after.source.epoch],
        "changes": [change._asdict() for change in changes],
    }
    lines = [change.text for change in changes] or ["nothing differs"]
    lines += [] if line is None else [line]
    at_rest.report(outcome, lines, as_json=options.json)
    return EXIT_DIFFERENT if changes else EXIT_SAME


def _make_page(
    path: Path, before: Inspected, after: Inspected, changes: list[Change], line: str | None
) -> None:
    """Make a page of what differs. Raises CannotWrite or UsageError."""
    from vtpmd.inspect.html.difference import difference_page
    from vtpmd.inspect.overview import overview
    from vtpmd.inspect.secrets import Secrets

    known = [overview(each, Secrets(each.parts)) for each in (before, after)]
    page.make(path, difference_page(known[0], known[1], changes, page.now(), line))
