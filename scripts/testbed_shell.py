"""The prompt of `scripts/testbed shell`: two hosts, their link, and a guest, to play with."""

import argparse
import cmd
import os
import shlex
import subprocess
import sys
from pathlib import Path

from scripts.testbed_link import add_link_options, conditions
from tests.harness.saved_guest import MACHINE
from tests.harness.testbed import Host, Testbed
from tests.harness.wire import Side, WireError
from vtpmd.testing.migration import MigrationFailedError
from vtpmd.testing.moves import move
from vtpmd.testing.workload import WorkloadFailedError

STREAM_PORT = 4444  # where host b's QEMU waits for a guest


class Shell(cmd.Cmd):
    """Commands on one line each; `help` lists them."""

    prompt = "testbed> "

    def __init__(self, testbed: Testbed) -> None:
        """Have a QEMU at host b wait for the guest, which runs at host a."""
        super().__init__()
        self._testbed = testbed
        waiting = testbed.b.await_guest(MACHINE)
        waiting.qmp("migrate-incoming", uri=f"tcp:{testbed.b.address}:{STREAM_PORT}")
        self.intro = self._introduction()

    def _introduction(self) -> str:
        a, b = self._testbed.a, self._testbed.b
        vtpmd = Path(sys.executable).with_name("vtpmd")
        lines = ["A guest runs at host a; at host b, QEMU waits for it."]
        for host in (a, b):
            lines += [
                "",
                f"host {host.side}, {host.address}",
                f"  network namespace   {host.namespace.name}",
                f"  state directory     {host.state}",
                f"  management socket   {host.vtpmd.manage_path}",
                f"  a monitor of QEMU   {host.monitor_path}",
            ]
        lines += [
            "",
            "To try, here or in another terminal:",
            f"  ip netns exec {a.namespace.name} bash",
            f"  {Path(sys.executable).with_name('qmp-shell')} {a.vtpmd.manage_path}",
            f"  {vtpmd} migrate --manage {a.vtpmd.manage_path} --to {b.peer_address} \\",
            f"      --qmp {a.monitor_path} --uri tcp:{b.address}:{STREAM_PORT}",
            "",
            "`help` lists what can be said here; the end of input or `quit` ends everything.",
        ]
        return "\n".join(lines)

    def onecmd(self, line: str) -> bool:
        """Run a command; what goes wrong is one line."""
        try:
            return super().onecmd(line)
        except (
            MigrationFailedError,
            WorkloadFailedError,
            WireError,
            ValueError,
            LookupError,
            OSError,
            RuntimeError,
            argparse.ArgumentError,
        ) as error:
            self._say(f"that failed: {str(error).strip() or type(error).__name__}")
            return False

    def emptyline(self) -> bool:
        """Do nothing."""
        return False

    def do_a(self, line: str) -> None:
        """a [COMMAND]: run a command, or a shell, in host a."""
        self._run(Side.A, line)

    def do_b(self, line: str) -> None:
        """b [COMMAND]: run a command, or a shell, in host b."""
        self._run(Side.B, line)

    def do_cut(self, _line: str) -> None:
        """cut: take the link's carrier away."""
        self._testbed.wire.cut()

    def do_drop(self, line: str) -> None:
        """drop a|b: lose what goes to that host, and tell nobody."""
        self._testbed.wire.drop(Side(line.strip()))

    def do_restore(self, _line: str) -> None:
        """restore: let everything through again."""
        self._testbed.wire.restore()

    def do_link(self, line: str) -> None:
        """link [--rate 1gbit] [--delay 20ms] [--jitter 2ms] [--loss 0.1%]: change the link."""
        parser = argparse.ArgumentParser("link", add_help=False, exit_on_error=False)
        add_link_options(parser)
        self._testbed.wire.set(conditions(parser.parse_args(shlex.split(line))))

    def do_count(self, _line: str) -> None:
        """count: say how many frames got through, and how many did not."""
        for side, count in self._testbed.wire.count().items():
            self._say(f"to {side}: {count.forwarded} got through, {count.dropped} did not")

    def do_status(self, _line: str) -> None:
        """status: say what runs where."""
        for host in self._testbed.hosts.values():
            vtpmd = "runs" if host.vtpmd.program.exit_code is None else "has ended"
            self._say(f"host {host.side}: vtpmd {vtpmd}, QEMU: {_status(host)}")

    def do_move(self, _line: str) -> None:
        """move: move the guest, and its vTPM beside it, to the host where it is not."""
        here, there = self._testbed.a, self._testbed.b
        if _status(here) != "running":
            here, there = there, here
        moved = move(here, there)
        here.close_guest()
        how = "with a tail" if moved.has_tail else f"whole: {moved.session['reason']}"
        self._say(f"the guest is at host {there.side} now, its vTPM went {how}")

    def do_restart(self, line: str) -> None:
        """restart a|b: start that host's vtpmd again; its QEMU has lost its TPM, and is killed."""
        self._testbed.hosts[Side(line.strip())].restart_vtpmd()

    def do_check(self, _line: str) -> None:
        """check: let the guest check its TPM, and say what it found."""
        for host in self._testbed.hosts.values():
            if host.guest is not None and _status(host) == "running":
                for name, value in host.guest.check().items():
                    self._say(f"{name}: {value}")
                return
        self._say("no guest runs")

    def do_quit(self, _line: str) -> bool:
        """quit: end everything."""
        return True

    def do_EOF(self, _line: str) -> bool:
        """End everything."""
        return True

    def _run(self, side: Side, line: str) -> None:
        namespace = self._testbed.hosts[side].namespace.path
        command = shlex.split(line) or [os.environ.get("SHELL", "/bin/sh")]
        subprocess.run(["nsenter", f"--net={namespace}", *command], check=False)

    def _say(self, text: str) -> None:
        print(text, file=self.stdout)


def _status(host: Host) -> str:
    """Return a guest's run state."""
    return host.guest.status if host.guest is not None and host.has_guest() else "none"
