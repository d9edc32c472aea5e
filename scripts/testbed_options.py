"""The command line of `scripts/testbed`: as a module of its own it needs nothing that is set up."""

import argparse

from scripts.testbed_link import add_link_options, conditions

EPILOG = """\
Each host is a network namespace, 10.114.0.1 and 10.114.0.2; the link copies frames between them,
with the rate, delay, jitter and loss that you ask for. The guest uses its TPM all the time, and
checks what it finds there. Needs root. Nothing is left afterwards, also after an interrupt.

example:
  scripts/testbed run --rate 50mbit --delay 20ms --jitter 2ms --loss 0.1%
  scripts/testbed pingpong -n 50
  scripts/testbed shell --delay 10ms

exit status:
  0    the guest moved, its vTPM beside QEMU's stream (in it, with --not-armed), and it saw no
       difference; of shell: always
  1    it did not, or something failed: the last line says what
  2    the command line was wrong
  130  interrupted
"""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; exit with status 2 when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="scripts/testbed",
        description="Move a guest with a vTPM between two hosts, over a link as you want it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    link = argparse.ArgumentParser(add_help=False)
    add_link_options(link)
    link.add_argument("--seed", type=int, default=0, help="what jitter and loss are drawn from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    run = commands.add_parser("run", parents=[link], help="move a guest once, and report")
    run.add_argument("--not-armed", action="store_true", help="let QEMU carry the vTPM's state")
    run.add_argument("--json", action="store_true", help="print the report as JSON")
    commands.add_parser("shell", parents=[link], help="have the two hosts to play with")
    pingpong = commands.add_parser("pingpong", parents=[link], help="move a guest to and fro")
    pingpong.add_argument("-n", type=int, default=50, metavar="N", help="moves (default: 50)")
    parsed = parser.parse_args()
    try:
        parsed.conditions = conditions(parsed)
    except ValueError as error:
        parser.error(str(error))
    return parsed


if __name__ == "__main__":
    parse_arguments()
