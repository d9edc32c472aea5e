"""``vtpmd identity``: what an attestation service enrols of a vTPM."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, Final

from vtpmd.cli import state_at

if TYPE_CHECKING:
    from vtpmd.inspect.identity import Certificate, Identity
    from vtpmd.inspect.source import Source

EXIT_PRINTED: Final = 0

EPILOG: Final = """\
example:
  vtpmd identity /srv/web1-tpm
  vtpmd identity /srv/web1-tpm --json
  vtpmd identity /srv/web1-tpm | openssl x509 -noout -subject

  Prints the public part of each endorsement key that is persistent, with its TPM name, and the EK
  and platform certificates that lie in NV memory, as PEM; what each is stands above it, after a #.
  PATH is as for vtpmd inspect: a state directory, served or not, or a file. Nothing is locked or
  written. That the TPM has the private part, an attestation service finds out by asking it.

exit status:
  0   they were printed
  1   it cannot be read
  2   the command line was wrong
  4   the state is encrypted and --key is missing or wrong, or --key is given and it is not
  5   what it is in is damaged
  9   it is no state of a TPM
  10  there is neither such a key nor a certificate
  12  it has no such generation as --at names
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "identity",
        help="print a vTPM's endorsement keys and certificates",
        description="Print a vTPM's endorsement keys and certificates.",
        epilog=EPILOG,
    )
    state_at.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print; return the exit status. Raises VtpmdError."""
    from vtpmd.inspect.identity import identity_of
    from vtpmd.inspect.overview import inspect

    source = state_at.opened(options.path, options, options.at)
    identity = identity_of(inspect(source.check_has_state()))
    if options.json:
        print(json.dumps(_all_of(source, identity)))
    else:
        for key in identity.keys:
            print(f"# EK {key.handle}, {key.type}, name {key.name}\n{key.pem}", end="")
        for each in identity.certificates:
            print(f"# {_line(each)}\n{each.pem}", end="")
    return EXIT_PRINTED


def _line(each: Certificate) -> str:
    key = f" of {each.key}" if each.key else ""
    says = each.says
    return (
        f"{each.kind} certificate {each.handle}{key}: {says['subject'] or '(no subject)'}; issued "
        f"by {says['issuer']}, serial {says['serial']}, until {says['not-after']}"
    )


def _all_of(source: Source, identity: Identity) -> dict[str, Any]:
    return {
        "path": source.path,
        "identity": None if source.lineage is None else source.lineage.identity.hex(),
        "keys": [key._asdict() for key in identity.keys],
        "certificates": [
            {
                "handle": each.handle,
                "kind": each.kind,
                "key": each.key,
                **{
                    name: value for name, value in each.says.items() if name not in ("der", "bytes")
                },
                "pem": each.pem,
            }
            for each in identity.certificates
        ],
    }
