"""``vtpmd import``: bring an exported vTPM back."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vtpmd.cli import at_rest, export_options, state_at
from vtpmd.errors import UsageError

if TYPE_CHECKING:
    from vtpmd.inspect.replacement import Replaced
    from vtpmd.store.export_seal import Header
    from vtpmd.store.keys import Key
    from vtpmd.store.libtpms import States

REPLACE: Final = "replace"
IDENTITIES: Final = ("copy", REPLACE)

EPILOG: Final = """\
example:
  vtpmd export /srv/web1-tpm --out web1.vtpm
  vtpmd import web1.vtpm /srv/web2-tpm --identity copy
  vtpmd import web1.vtpm /dev/vg0/web2-tpm --identity copy --linear
  vtpmd import /backup/web1 /srv/web2-tpm --identity copy --at 1207
  vtpmd import template.vtpm /srv/web3-tpm --identity replace

  Makes the state directory of what was exported or backed up. FILE - is standard input. Of a chain
  that vtpmd backup has written FILE is the directory, and the newest backup is taken, or with --at
  the one of that generation; or it is one of the files, with the others beside it. vtpmd verify
  lists them.

  copy: of the same TPM, with the same keys. What it has since forgotten, as an NV index that was
  removed or a PIN's failed tries, is back. Of two copies that run neither knows what the other one
  writes. So a copy begins the next restore epoch of the vTPM: its generations are above all that
  went before, and the owner record says for ever that there may be a fork (vtpmd owner).

  replace: of a new TPM, with other keys, which is no copy. It has the NV indices of the old one
  that are not bound to its identity. A line for each thing says what is kept and what is lost, as
  certificates, persistent objects and authorisations are, and of a TPM 1.2 its owner. Nothing
  unseals there that was sealed by the old TPM: have the recovery keys of encrypted disks at hand.
  The export is only read: import it into a directory of no use first, to see what would be lost.

  A directory that is not empty is refused without --force. With it, what is there gets names that
  end in .before-N, which are printed. Either all of it happens or nothing, also if power is lost;
  an import that was interrupted is finished by the next vtpmd run or fold. The files are the
  user's who imports: be the one that the vTPM is served as. The directory is encrypted with --key,
  and then so must the export be, unless --unsealed is given. The volatile state is left out without
  --volatile: it goes with its guest's memory of that moment. A vTPM with an anchor needs --anchor,
  or vtpmd run refuses the older state. A linear file has no place for an owner record: of the copy
  there only the epoch tells.

exit status:
  0   imported
  1   the file cannot be read, or the directory cannot be written
  2   the command line was wrong
  3   the state directory is in use by a vtpmd or swtpm
  4   the export, or an import that was interrupted, does not open with what was given
  5   the export is damaged, or a link of the chain is missing, or libtpms refuses its state;
      nothing was changed
  8   this host's libtpms is too old for the state; nothing was changed
  9   it is no export, or one of a later version
  10  there is something in the directory, and no --force; nothing was changed
  12  there is no such generation as --at names, or more than one
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "import",
        help="make a state directory of an export or a backup",
        description="Make a state directory of an export or a backup.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="what vtpmd export or backup has written"
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="state directory, not in use")
    parser.add_argument(
        "--identity",
        choices=IDENTITIES,
        required=True,
        help="copy: it is to be the same TPM; replace: a new one, with the NV memory of that",
    )
    parser.add_argument(
        "--force", action="store_true", help="set aside what is in the directory, and keep it"
    )
    parser.add_argument(
        "--linear",
        action="store_true",
        help="DIR is a linear file of swtpm's, or a block device: made new, or empty",
    )
    state_at.add_generation(parser, "--at", "at", "of a chain of backups: the one of this")
    parser.add_argument("--volatile", action="store_true", help="bring the volatile state, too")
    parser.add_argument(
        "--key", metavar="KEY", help="the key to encrypt the state with, as for vtpmd run"
    )
    export_options.add_sealing(parser, "open")
    at_rest.add_anchor(parser)
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Import; return the exit status. Raises VtpmdError."""
    from vtpmd.core import forbid_core_dumps
    from vtpmd.store.importing import open_file

    if options.linear and options.anchor is not None:
        raise UsageError("a vTPM in a linear file has no anchor: leave out --anchor")
    if options.volatile and options.identity == REPLACE:
        raise UsageError("the volatile state goes with the old TPM: leave out --volatile")
    forbid_core_dumps()
    with ExitStack() as stack:
        key = stack.enter_context(at_rest.key_of(options.key))
        seal = stack.enter_context(export_options.seal_of(options, key))
        options_of = {"with_volatile": options.volatile, "at": options.at}
        source, states = open_file(options.file, seal, **options_of)
        left_out = [kind.name.lower() for kind in source.kinds if kind not in states]
        replaced = None
        if options.identity == REPLACE:
            source, states, replaced = _replace(options, source, states)
        import_it = _import_linear if options.linear else _import
        header, kept = import_it(stack, options, source, states, key)
    _report(options, header, kept, left_out, replaced)
    return 0


def _replace(
    options: argparse.Namespace, source: Header, states: States
) -> tuple[Header, States, Replaced]:
    """Return what is imported in place of an export's states. Raises VtpmdError."""
    from vtpmd.inspect.replacement import replace
    from vtpmd.store.importing import of_a_new_tpm

    new = replace(str(options.file), source.version, states)
    return of_a_new_tpm(source), new.states, new


def _import(
    stack: ExitStack,
    options: argparse.Namespace,
    source: Header,
    states: States,
    key: Key | None,
) -> tuple[Header, dict[str, str]]:
    """Do it; return the names of what was set aside. Raises VtpmdError."""
    from vtpmd.store import importing, recovery
    from vtpmd.store.anchor import Anchor
    from vtpmd.store.directory import StateDirectory
    from vtpmd.store.moving import MovingFiles

    path, anchor = options.directory, None
    directory = stack.enter_context(StateDirectory.open(path, version=source.version))
    files = MovingFiles(directory, key)
    stack.callback(files.close)
    header = importing.prepare(directory, files, source, states, key, force=options.force)
    identity = header.identity or b""
    if options.anchor is not None:
        is_new = not header.aside
        anchor = stack.enter_context(Anchor.open(options.anchor, path, is_new=is_new))
        if header.is_new and anchor.mark is not None:
            raise UsageError(
                f"anchor {options.anchor} is of the TPM that was there: give an empty file"
            )
        anchor.expect(identity, importing.digest(states))
    importing.commit(directory, header, states, key)
    kept = importing.finish(directory, files, key)
    if anchor is not None:
        anchor.trust(recovery.recover(directory, key).found, identity)
    return header, kept


def _import_linear(
    _: ExitStack,
    options: argparse.Namespace,
    source: Header,
    states: States,
    key: Key | None,
) -> tuple[Header, dict[str, str]]:
    """Do it, for a linear file; return the name of what is kept. Raises VtpmdError or OSError."""
    from vtpmd.store import linear_import

    path = options.directory
    header = linear_import.prepare(path, source, states)
    kept = linear_import.put(path, header, states, key, force=options.force)
    return header, {} if kept is None else {str(path): kept}


def _report(
    options: argparse.Namespace,
    header: Header,
    kept: dict[str, str],
    left_out: list[str],
    replaced: Replaced | None,
) -> None:
    outcome: dict[str, Any] = {
        "directory": str(options.directory),
        **export_options.outcome_of(header),
        "becomes": header.becomes,
        "epoch": header.epoch,
        "left-out": left_out,
        "originals": kept,
    }
    if replaced is None:
        lines = [
            f"{options.directory}: imported generation {header.generation} of the TPM "
            f"{outcome['tpm']}, as generation {header.becomes}, of restore epoch {header.epoch}"
        ]
    else:
        outcome["contents"] = [item.outcome for item in replaced.items]
        lines = [
            f"{options.directory}: made a new TPM {outcome['tpm']}, with what it can have of "
            f"generation {header.generation} of the exported one",
            *(item.line for item in replaced.items),
        ]
    lines += [f"left out: the {kind} state" for kind in left_out]
    lines += [f"kept: {name}, as {original}" for name, original in kept.items()]
    at_rest.report(outcome, lines, as_json=options.json)
