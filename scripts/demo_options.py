"""The command line of `scripts/demo`: as a module of its own it needs nothing that is set up."""

import argparse

EPILOG = """\
The guest creates sealed data, keys, NV indices and a session in its TPM, goes on using it while it
is moved, and checks everything before and after. Its TPM's state moves from vtpmd to vtpmd, in
rounds, as with vtpmd migrate; QEMU's stream carries only a tail. Takes well under a minute; needs
no privileges but, the first time, root for scripts/setup.

example:
  scripts/demo
  scripts/demo --json >result.json     progress goes to standard error

exit status:
  0  the guest saw no difference, and QEMU's stream carried a tail
  1  it did, or the stream carried more, or the migration failed
  2  the command line was wrong
"""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; exit with status 2 when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Live-migrate a QEMU guest with a vTPM from one vtpmd to another.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()
