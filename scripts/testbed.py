"""Two hosts with a vtpmd and a QEMU each, and a link between them, all on this machine."""

import argparse
import json
import os
import sys
from dataclasses import dataclass

from scripts.testbed_options import parse_arguments
from scripts.testbed_shell import Shell
from tests.harness.saved_guest import MACHINE
from tests.harness.testbed import Testbed
from tests.harness.wire import WireError
from vtpmd.testing.facts import differences
from vtpmd.testing.migration import MigrationFailedError
from vtpmd.testing.moves import Move, move
from vtpmd.testing.workload import WorkloadFailedError

EXIT_GOOD = 0
EXIT_BAD = 1
EXIT_INTERRUPTED = 130

# A person may want to see how a slow link behaves; an interrupt ends the wait.
MOVE_TIMEOUT_S = 3600.0


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
            return COMMANDS[options.command](testbed, options)
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
    moved = move(testbed.a, testbed.b, armed=not options.not_armed, timeout_s=MOVE_TIMEOUT_S)
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
        moved = move(here, there, timeout_s=MOVE_TIMEOUT_S)
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


COMMANDS = {"run": run_once, "shell": run_shell, "pingpong": run_pingpong}


if __name__ == "__main__":
    sys.exit(main())
