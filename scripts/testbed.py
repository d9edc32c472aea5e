"""Two hosts with a vtpmd and a QEMU each, and a link between them, all on this machine."""

import argparse
import json
import os
import sys
from dataclasses import dataclass

from scripts.testbed_link import add_link_options, conditions
from scripts.testbed_shell import Shell
from tests.harness.facts import differences
from tests.harness.guest import WorkloadFailedError
from tests.harness.migration import MigrationFailedError
from tests.harness.moves import Move, move
from tests.harness.saved_guest import MACHINE
from tests.harness.testbed import Testbed
from tests.harness.wire import WireError

EXIT_GOOD = 0
EXIT_BAD = 1
EXIT_INTERRUPTED = 130

# A person may want to see how a slow link behaves; an interrupt ends the wait.
MOVE_TIMEOUT_S = 3600.0

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


class TestbedError(Exception):
    """A line for people."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A move, and what the guest and the link saw of it."""

    move: Move
    differences: list[str]
    blocked_ms: int  # the longest that QEMU's monitor, of either side, did not answer
    dropped_frames: int

    def is_good(self, *, armed: bool) -> bool:
        """Whether all went as was asked."""
        return not self.differences and self.move.has_tail == armed

    def as_json(self) -> dict[str, object]:
        """Return it as what JSON can say."""
        guest = self.move.guest
        return {
            "differences": self.differences,
            "total-ms": guest.total_ms,
            "downtime-ms": guest.downtime_ms,
            "ram-bytes": guest.ram_bytes,
            "passes": guest.passes,
            "session": self.move.session,
            "monitor-blocked-ms": self.blocked_ms,
            "dropped-frames": self.dropped_frames,
        }


def main() -> int:
    """Run a command; return the exit status."""
    options = parse_arguments()
    try:
        if os.geteuid() != 0:
            raise TestbedError("network namespaces need root: run this as root")
        with Testbed(options.conditions, seed=options.seed) as testbed:
            status: int = options.command(testbed, options)
            return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (
        TestbedError,
        MigrationFailedError,
        WorkloadFailedError,
        WireError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:
        print(f"testbed: {str(error).strip() or type(error).__name__}", file=sys.stderr)
        return EXIT_BAD


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", parents=[link], help="move a guest once, and report")
    run.add_argument("--not-armed", action="store_true", help="let QEMU carry the vTPM's state")
    run.add_argument("--json", action="store_true", help="print the report as JSON")
    run.set_defaults(command=run_once)
    shell = commands.add_parser("shell", parents=[link], help="have the two hosts to play with")
    shell.set_defaults(command=run_shell)
    pingpong = commands.add_parser("pingpong", parents=[link], help="move a guest to and fro")
    pingpong.add_argument("-n", type=int, default=50, metavar="N", help="moves (default: 50)")
    pingpong.set_defaults(command=run_pingpong)
    parsed = parser.parse_args()
    try:
        parsed.conditions = conditions(parsed)
    except ValueError as error:
        parser.error(str(error))
    return parsed


def say(text: str) -> None:
    """Tell a person what happens now."""
    print(f"testbed: {text}", file=sys.stderr)


def run_once(testbed: Testbed, options: argparse.Namespace) -> int:
    """Move a guest once, and print a report."""
    say("booting a guest at host a")
    guest = testbed.a.boot_guest(MACHINE)
    before = guest.check()
    guest.command("start mixed")
    say("moving it to host b")
    moved = move(
        testbed, testbed.a, testbed.b, armed=not options.not_armed, timeout_s=MOVE_TIMEOUT_S
    )
    arrived = testbed.b.guest
    assert arrived is not None
    arrived.command("stop")
    found = differences(before, arrived.check(), worked=True)
    dropped = sum(count.dropped for count in testbed.wire.count().values())
    testbed.assert_ends_cleanly()
    outcome = Outcome(
        move=moved,
        differences=found,
        blocked_ms=max(host.longest_blocked_ms for host in testbed.hosts.values()),
        dropped_frames=dropped,
    )
    print(json.dumps(outcome.as_json(), indent=2) if options.json else report(outcome))
    return EXIT_GOOD if outcome.is_good(armed=not options.not_armed) else EXIT_BAD


def report(outcome: Outcome) -> str:
    """Return a report for people."""
    guest, session = outcome.move.guest, outcome.move.session
    rows = [
        ("guest memory", f"{guest.ram_bytes:,} bytes in {guest.passes} passes"),
        ("QEMU's total time", f"{guest.total_ms} ms"),
        ("QEMU's downtime", f"{guest.downtime_ms} ms"),
        ("QEMU's monitor blocked", f"{outcome.blocked_ms} ms at most"),
        ("frames that the link dropped", f"{outcome.dropped_frames:,}"),
    ]
    if session["state"] != "none":
        rounds = f"{session['round-bytes']:,} bytes in {session['rounds-sent']} rounds"
        rows.append(("vTPM, beside QEMU's stream", rounds))
    if outcome.move.has_tail:
        rows.append(("vTPM, in QEMU's stream", f"{session['tail-bytes']} bytes, the sealed tail"))
        phases = session["phases-us"].items()
        rows += [(name, f"{duration_us / 1000:.3f} ms") for name, duration_us in phases]
    elif session["state"] != "none":
        rows.append(("vTPM, in QEMU's stream", f"all of it: {session['reason']}"))
    else:
        rows.append(("vTPM, in QEMU's stream", "all of it, as asked"))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    seen = outcome.differences or ["The guest saw no difference."]
    return "\n".join(["The guest has moved.", *lines, *seen])


def run_pingpong(testbed: Testbed, options: argparse.Namespace) -> int:
    """Move a guest to and fro, and print a line for each move."""
    say("booting a guest at host a")
    here, there = testbed.a, testbed.b
    guest = here.boot_guest(MACHINE)
    before = guest.check()
    guest.command("start mixed")
    for hop in range(1, options.n + 1):
        moved = move(testbed, here, there, timeout_s=MOVE_TIMEOUT_S)
        how = f"a tail of {moved.session['tail-bytes']} bytes"
        if not moved.has_tail:
            how = f"whole blobs: {moved.session['reason']}"
        print(f"{hop:4}  {here.side} to {there.side}  {moved.guest.total_ms} ms, {how}")
        if not moved.has_tail:
            raise TestbedError(f"move {hop} took whole blobs: {moved.session['reason']}")
        here.close_guest()
        here, there = there, here
    arrived = here.guest
    assert arrived is not None
    arrived.command("stop")
    found = differences(before, arrived.check(), worked=True)
    print("\n".join(found or ["The guest saw no difference."]))
    return EXIT_BAD if found else EXIT_GOOD


def run_shell(testbed: Testbed, _options: argparse.Namespace) -> int:
    """Give a person the two hosts until they have enough."""
    say("booting a guest at host a")
    testbed.a.boot_guest(MACHINE)
    Shell(testbed).cmdloop()
    return EXIT_GOOD


if __name__ == "__main__":
    sys.exit(main())
