"""``vtpmd inspect``: what is inside a vTPM's state."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any, Final

from vtpmd.cli import new_file, page, state_at
from vtpmd.errors import UsageError

if TYPE_CHECKING:
    from vtpmd.inspect.directories import History
    from vtpmd.inspect.overview import Inspected
    from vtpmd.inspect.secrets import Secrets
    from vtpmd.inspect.tree import Node

EXIT_SHOWN: Final = 0
EXIT_DAMAGED: Final = 5
EXIT_TOO_NEW: Final = 8
SECTIONS_NAMED: Final = 12  # where there is none of the name that was given

EPILOG: Final = """\
example:
  vtpmd inspect /srv/web1-tpm
  vtpmd inspect /srv/web1-tpm --tree
  vtpmd inspect web1.blob --json
  vtpmd inspect /srv/web1-tpm --section user-nvram
  vtpmd inspect /srv/web1-tpm --html web1.html

  What is at a path is found out by what is in it: a state directory, with its journal, whether it
  is served or not; a state file or state blob of swtpm's; a linear file; a state as libtpms
  marshals it; an export; a migration of QEMU's to a file, or its savevm in a disk image. The TPM
  may be a 2.0 or a 1.2. Of a journal, a delta record, an owner record or a tail that is alone it
  shows what that says. Nothing is locked or written.

  Secrets (seeds, proofs, authorisations, private keys, what cannot be read without a password) are
  shown as their length and a fingerprint: equal ones of one TPM have the same. --show-secrets
  shows them. JSON's keys are in docs/inspect.md.

  --html makes a page of it, for a browser: a map of NV memory, PCRs, objects, and of a directory
  its history, as vtpmd log has it. The page is one file that needs no other, fetches nothing and
  runs nothing. The file is made anew, and never replaced; only who owns it may read it.

exit status:
  0   it was shown, and all of it is decoded
  1   it cannot be read, or the page cannot be written
  2   the command line was wrong, there is no such section, or the page's file is there already
  4   the state is encrypted and --key is missing or wrong, or --key is given and it is not
  5   something is damaged; what could be decoded was shown, then what is wrong, from the first on
  8   nothing is wrong, but a later libtpms has written it; what is known was shown
  9   it is no state of a TPM
  12  it has no such generation as --at names
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "inspect",
        help="show what is inside a vTPM's state",
        description="Show what is inside a vTPM's state.",
        epilog=EPILOG,
    )
    state_at.add_arguments(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--tree", action="store_true", help="show every byte, with its place")
    how.add_argument("--json", action="store_true", help="print all of it as JSON")
    page.add_argument(how)
    parser.add_argument(
        "--section", metavar="NAME", help="show this part of the tree, such as user-nvram"
    )
    parser.add_argument("--show-secrets", action="store_true", help="show secrets, too")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Show; return the exit status. Raises VtpmdError."""
    from vtpmd.inspect.overview import inspect
    from vtpmd.inspect.secrets import Secrets

    if options.html is not None:
        _check_page(options)
    source, history = state_at.opened_with_history(options.path, options, options.at)
    found = inspect(source)
    if options.show_secrets:
        warning = "secrets follow: who reads them can be this TPM"
        print(f"vtpmd: warning: {warning}", file=sys.stderr)
    secrets = Secrets(found.parts, are_shown=options.show_secrets)
    if options.section is not None:
        _show_section(options, found, secrets)
    elif options.html is not None:
        _make_page(options, found, secrets, history)
    elif options.json:
        print(json.dumps(_all_of(found, secrets)))
    elif options.tree:
        _show_tree(found, secrets)
    else:
        _show_screen(found, secrets)
    return _status(found)


def _check_page(options: argparse.Namespace) -> None:
    """Raise UsageError for a page that cannot be made."""
    if options.section is not None:
        raise UsageError("a page has all sections: leave out --section, or --html")
    new_file.check_is_new(options.html)


def _make_page(
    options: argparse.Namespace, found: Inspected, secrets: Secrets, history: History | None
) -> None:
    """Make the page. Raises CannotWrite or UsageError."""
    from vtpmd.inspect.history import commits
    from vtpmd.inspect.html.state import state_page
    from vtpmd.inspect.html.timeline import COMMITS_MAX
    from vtpmd.inspect.overview import overview

    told = None if history is None else list(commits(history, COMMITS_MAX))
    known = overview(found, secrets)
    content = state_page(known, told, page.now(), has_secrets=options.show_secrets)
    page.make(options.html, content)


def _all_of(found: Inspected, secrets: Secrets) -> dict[str, Any]:
    from vtpmd.inspect.overview import overview
    from vtpmd.inspect.report_json import node_json

    known = overview(found, secrets)
    for decoded in found.parts:
        place = known["record"] if decoded.kind is None else known["states"][decoded.name]
        place["tree"] = node_json(decoded.root, secrets)
    return known


def _show_screen(found: Inspected, secrets: Secrets) -> None:
    from vtpmd.inspect.overview import overview
    from vtpmd.inspect.screen import screen

    print("\n".join(screen(overview(found, secrets))))


def _show_tree(found: Inspected, secrets: Secrets) -> None:
    from vtpmd.inspect.tree_text import fault_lines, tree_lines

    print(" offset length")
    for decoded in found.parts:
        print("\n".join(tree_lines(decoded.root, secrets)))
    for problem in found.source.problems:
        print(problem)
    for decoded in found.parts:
        print("\n".join(fault_lines(decoded)))


def _show_section(options: argparse.Namespace, found: Inspected, secrets: Secrets) -> None:
    """Show the parts of a name. Raises UsageError."""
    from vtpmd.inspect.report_json import node_json
    from vtpmd.inspect.tree_text import sections, tree_lines

    nodes: list[tuple[str, Node]] = []
    for decoded in found.parts:
        nodes += sections(decoded.root, options.section)
    if not nodes:
        raise UsageError(
            f"no part of {options.path} is called {options.section!r}: give one such as "
            f"{', '.join(_some_names(found))}, or see --tree"
        )
    if options.json:
        print(json.dumps([{"path": path, **node_json(node, secrets)} for path, node in nodes]))
        return
    for path, node in nodes:
        print(f"{path}:")
        print("\n".join(tree_lines(node, secrets)))


def _some_names(found: Inspected) -> list[str]:
    """Return the names of the largest parts."""
    parts = [
        node
        for decoded in found.parts
        for top in decoded.root.children
        for node in top.children
        if node.children
    ]
    parts.sort(key=lambda node: -node.length)
    return sorted({node.name for node in parts[:SECTIONS_NAMED]})


def _status(found: Inspected) -> int:
    faulty = [decoded for decoded in found.parts if decoded.faults]
    if found.source.problems or any(not decoded.is_newer for decoded in faulty):
        return EXIT_DAMAGED
    unknown = any(each.root.unknown_bytes() for each in found.parts)
    return EXIT_TOO_NEW if faulty or unknown else EXIT_SHOWN
