"""How an export is sealed, and opened, as the command line says it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtpmd.moment import at_second

if TYPE_CHECKING:
    from vtpmd.store.export_seal import Header, Seal
    from vtpmd.store.exporting import Taken
    from vtpmd.store.keys import Key


def add_sealing(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add what an export is sealed or opened with: ``verb`` says which."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--seal-key",
        metavar="KEY",
        help=f"{verb} the export with this key, of the same forms, in place of --key's",
    )
    how.add_argument(
        "--passphrase-file",
        metavar="PATH",
        type=Path,
        help=f"{verb} it with age, by the passphrase in this file",
    )
    if verb == "seal":
        how.add_argument(
            "--recipient",
            metavar="AGE1",
            action="append",
            default=[],
            help="seal it with age, to this X25519 public key; may be repeated",
        )
    else:
        how.add_argument(
            "--age-key",
            metavar="PATH",
            type=Path,
            help="open it with age, by a secret key in this file, which age-keygen has written",
        )
    how.add_argument(
        "--unsealed", action="store_true", help="it is not sealed, although there is a --key"
    )


@contextmanager
def seal_of(options: argparse.Namespace, key: Key | None) -> Iterator[Seal]:
    """Yield what the options say; a key is overwritten at the end. Raises VtpmdError."""
    from vtpmd.store.export_seal import Age, read_secret, secret_keys
    from vtpmd.store.keys import parse_key_source, read_key

    names = tuple(getattr(options, "recipient", ()))
    age_key = getattr(options, "age_key", None)
    if options.seal_key is not None:
        with read_key(parse_key_source(options.seal_key, "--seal-key")) as seal_key:
            yield seal_key
    elif options.passphrase_file is not None:
        yield Age(passphrase=read_secret(options.passphrase_file, "--passphrase-file"))
    elif age_key is not None:
        yield Age(names=secret_keys(read_secret(age_key, "--age-key")))
    elif names:
        yield Age(names=names)
    else:
        yield None if options.unsealed else key


def warnings(path: Path, taken: Taken) -> list[str]:
    """Return what is to be known of who else may have what was exported, a line each."""
    record = taken.record
    if record is None and not (path.is_file() or path.is_block_device()):
        return ["warning: whose the vTPM is, is not known: its owner record cannot be read"]
    if record is None or record.is_ours:
        return []
    from vtpmd.cli.owner import whose_text

    return [f"warning: it may have gone on elsewhere: {whose_text(record)}"]


def outcome_of(header: Header) -> dict[str, Any]:
    """Return what is in an export, as JSON has it."""
    return {
        "export": header.export.hex(),
        "tpm": header.version.facts.word,
        "identity": None if header.identity is None else header.identity.hex(),
        "generation": header.generation,
        "states": [kind.name.lower() for kind in header.kinds],
        "sealed": header.sealing,
        "made": at_second(header.time_s),
    }
