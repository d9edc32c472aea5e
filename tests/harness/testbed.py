"""Two hosts on one machine: network namespaces with a vtpmd and a QEMU each, and a link between.

        host a: 10.114.0.1                                   host b: 10.114.0.2
        vtpmd ── QEMU          wire: rate, delay, loss       vtpmd ── QEMU
          └───────┴─── link0 ══════════════════════════ link0 ──┴───────┘

Needs root. Control sockets and monitors are on the file system that both share, so what drives a
testbed needs not be in it. Nothing is left when it is closed, which SIGTERM and SIGHUP have done,
too; what a process that was killed has left, the next testbed removes.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType

from tests.harness import leftovers, migration
from tests.harness.credentials import credentials_for
from tests.harness.emulator import Emulator, Peering, has_ended
from tests.harness.guest import Guest, Machine
from tests.harness.killing import wait_until_unused
from tests.harness.lab import Lab
from tests.harness.management import Management
from tests.harness.monitor_watch import MonitorWatch
from tests.harness.wire import DEVICE, Conditions, Side, Wire
from vtpmd.closing import Closing

ADDRESSES = {Side.A: "10.114.0.1", Side.B: "10.114.0.2"}
PREFIX_BITS = 24
PORT = 4433  # where each vtpmd waits for vTPMs
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
END_TIMEOUT_S = 20.0


class Namespace(Closing):
    """A network namespace, which is removed when it is closed."""

    def __init__(self, side: Side) -> None:
        """Make a namespace with no device but its own loopback. OSError when that fails."""
        self.name = leftovers.own_name(side)
        self.path = Path("/run/netns") / self.name
        leftovers.ip("netns", "add", self.name)

    def close(self) -> None:
        """End what runs in it, and remove it."""
        leftovers.remove_namespace(self.name)

    def configure(self, address: str) -> None:
        """Give the link's device, which has come, an address, and bring up what there is."""
        commands = f"link set lo up\naddr add {address}/{PREFIX_BITS} dev {DEVICE}\n"
        leftovers.ip(
            "-netns", self.name, "-batch", "-", commands=f"{commands}link set {DEVICE} up\n"
        )

    def processes(self) -> list[int]:
        """Return the numbers of the processes that run in it."""
        return [int(number) for number in leftovers.ip("netns", "pids", self.name).split()]


class Host:
    """One of the two: its vtpmd, which runs from the beginning, and its QEMU, if there is one."""

    def __init__(self, side: Side, namespace: Namespace, lab: Lab) -> None:
        """Start vtpmd on a new state directory."""
        self.side = side
        self.address = ADDRESSES[side]
        self.namespace = namespace
        self.lab = lab
        self.state = lab.new_path("state")
        self.guest: Guest | None = None
        self.monitor_path: Path | None = None  # one of QEMU's that nothing uses
        self._watch: MonitorWatch | None = None
        self.longest_blocked_ms = 0  # of all QEMU's monitors that were closed
        self.start_vtpmd()

    @property
    def peer_address(self) -> str:
        """Where the other host's vtpmd finds this one's, for migrate-arm."""
        return f"{self.address}:{PORT}"

    @property
    def is_serving(self) -> bool:
        """Whether vtpmd and its engine live."""
        return self.vtpmd.program.exit_code is None and bool(self.vtpmd.engines())

    def start_vtpmd(self) -> None:
        """Start vtpmd, the first time or again, on the state directory that there is."""
        peering = Peering(
            credentials=credentials_for(self.address),
            allow=tuple(ADDRESSES.values()),
            listens_at=self.address,
            name=self.address,
            port=PORT,
            follows_qemu=True,
        )
        self.vtpmd: Emulator = self.lab.peer(peering, self.state)
        self.manage: Management = self.lab.management(self.vtpmd)

    def restart_vtpmd(self) -> None:
        """Start vtpmd where it has ended, or lost its engine, as a supervisor does.

        An engine that lives is attached to. A QEMU that was connected to another has lost its TPM,
        and is killed.
        """
        if self.vtpmd.program.exit_code is not None and self.vtpmd.engines():
            self.vtpmd.attach()
            self.manage = self.lab.management(self.vtpmd)
            return
        self.close_guest()
        self.vtpmd.kill()
        self.start_vtpmd()

    def start_guest(self, machine: Machine, *arguments: str) -> Guest:
        """Start QEMU, in place of one that was there."""
        self.close_guest()
        monitors = self.lab.new_path("people"), self.lab.new_path("watch")
        words = [word for path in monitors for word in ("-qmp", f"unix:{path},server=on,wait=off")]
        self.guest = self.lab.guest(self.vtpmd, machine, (*arguments, *words))
        self.monitor_path = monitors[0]
        self._watch = MonitorWatch(monitors[1])
        return self.guest

    def boot_guest(self, machine: Machine) -> Guest:
        """Start QEMU with a guest, and wait until that has set up its TPM and used it."""
        guest = self.start_guest(machine)
        guest.wait_for_workload()
        guest.command("setup")
        guest.command("work 30")
        return guest

    def await_guest(self, machine: Machine, *arguments: str) -> Guest:
        """Start a QEMU that waits for a guest to come in."""
        guest = self.start_guest(machine, *migration.INCOMING, *arguments)
        migration.set_capabilities(guest)
        return guest

    def close_guest(self) -> None:
        """End QEMU, if there is one."""
        if self._watch is not None:
            self._watch.close()
            self.longest_blocked_ms = max(self.longest_blocked_ms, self._watch.longest_ms)
            self._watch = None
        if self.guest is not None:
            self.guest.close()
            self.guest = self.monitor_path = None

    def has_guest(self) -> bool:
        """Whether a QEMU lives, with a guest or waiting for one."""
        return self.guest is not None and self.guest.program.exit_code is None

    def close(self) -> None:
        """End QEMU and vtpmd, in order; killed ones have ended already."""
        self.close_guest()
        if self.vtpmd.program.exit_code is None:
            self.vtpmd.stop()
        self.vtpmd.kill()


class Testbed(Closing):
    """The two hosts and the wire between them."""

    __test__ = False  # pytest takes it for a test by its name

    def __init__(self, conditions: Conditions | None = None, *, seed: int = 0) -> None:
        """Make namespaces and link, and start a vtpmd in each; `seed` is for jitter and loss.

        OSError when the namespaces cannot be made, RuntimeError when a program does not start.
        """
        leftovers.remove()
        self._ending = ExitStack()
        with ExitStack() as started:
            started.enter_context(_ended_by_signals())
            namespaces = {side: started.enter_context(closing(Namespace(side))) for side in Side}
            self._lab = started.enter_context(Lab())
            paths = (namespaces[Side.A].path, namespaces[Side.B].path)
            self.wire = started.enter_context(Wire(self._lab.directory, *paths, seed))
            self.hosts = {
                side: _start_host(started, side, namespace)
                for side, namespace in namespaces.items()
            }
            self.wire.set(conditions or Conditions())
            self._ending = started.pop_all()

    @property
    def a(self) -> Host:
        """The host that guests begin at."""
        return self.hosts[Side.A]

    @property
    def b(self) -> Host:
        """The host that they go to."""
        return self.hosts[Side.B]

    def close(self) -> None:
        """End everything, by process number, and remove namespaces and files."""
        self._ending.close()

    def listen(self, destination: Host, *, over_link: bool = True) -> str:
        """Let a QEMU wait for the other's stream; return the URI for the source."""
        guest = destination.guest
        assert guest is not None
        if over_link:
            return migration.listen_tcp(guest, destination.address)
        return migration.listen_unix(guest, self._lab.new_path("stream"))

    def assert_ends_cleanly(self) -> None:
        """End both QEMU and both vtpmd; check that no process and no lock is left."""
        for host in self.hosts.values():
            host.close()
            wait_until_unused(host.state)
            _assert_no_process(host)

    def logs(self) -> list[tuple[str, str]]:
        """Return a title and the end of the text of each log there is."""
        return [
            (f"host {host.side}: {title}", text)
            for host in self.hosts.values()
            for title, text in host.lab.logs()
        ]


def _start_host(started: ExitStack, side: Side, namespace: Namespace) -> Host:
    namespace.configure(ADDRESSES[side])
    lab = started.enter_context(Lab(namespace.path))
    host = Host(side, namespace, lab)
    started.callback(host.close_guest)
    return host


def _assert_no_process(host: Host) -> None:
    """Check that nothing runs on a host; an engine that has let go of its lock may just end."""
    for process in host.namespace.processes():
        try:
            descriptor = os.pidfd_open(process)
        except ProcessLookupError:
            continue
        is_over = has_ended(descriptor, END_TIMEOUT_S)
        os.close(descriptor)
        assert is_over, f"process {process} is left on host {host.side}"


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have signals that would end the process raise KeyboardInterrupt, so that it tidies up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is told of signals
        return
    before = {number: signal.signal(number, interrupt) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
