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

from tests.harness.killing import wait_until_unused
from tests.harness.monitor_watch import MonitorWatch
from tests.harness.wire import DEVICE, Conditions, Side, Wire
from vtpmd.closing import Closing
from vtpmd.testing import host, leftovers, migration
from vtpmd.testing.credentials import credentials_for
from vtpmd.testing.emulator import Peering, has_ended
from vtpmd.testing.guest import Guest, Machine
from vtpmd.testing.lab import Lab
from vtpmd.testing.logged import Logged

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


class Host(host.Host):
    """One of the two, in a network namespace of its own."""

    def __init__(self, side: Side, namespace: Namespace, lab: Lab) -> None:
        """Start vtpmd on a new state directory."""
        self.side = side
        self.address = ADDRESSES[side]
        self.namespace = namespace
        self.monitor_path: Path | None = None  # one of QEMU's that nothing uses
        self._watch: MonitorWatch | None = None
        self.longest_blocked_ms = 0  # of all QEMU's monitors that were closed
        peering = Peering(
            credentials=credentials_for(self.address),
            allow=tuple(ADDRESSES.values()),
            listens_at=self.address,
            name=self.address,
            port=PORT,
            follows_qemu=True,
        )
        super().__init__(side, lab, peering)

    def start_guest(self, machine: Machine, *arguments: str) -> Guest:
        """Start QEMU, in place of one that was there."""
        watched = self.lab.new_path("watch")
        monitor = ("-qmp", f"unix:{watched},server=on,wait=off")
        guest = super().start_guest(machine, *arguments, *monitor)
        self.monitor_path = guest.monitor_path
        self._watch = MonitorWatch(watched)
        return guest

    def listen(self) -> str:
        """Let the QEMU that awaits a guest listen on the link; return the URI for the source's."""
        assert self.guest is not None
        return migration.listen_tcp(self.guest, self.address)

    def close_guest(self) -> None:
        """End QEMU, if there is one."""
        if self._watch is not None:
            self._watch.close()
            self.longest_blocked_ms = max(self.longest_blocked_ms, self._watch.longest_ms)
            self._watch = None
        self.monitor_path = None
        super().close_guest()


class Testbed(Closing, Logged):
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
        return destination.listen() if over_link else host.Host.listen(destination)

    def assert_ends_cleanly(self) -> None:
        """End both QEMU and both vtpmd; check that no process and no lock is left."""
        for each in self.hosts.values():
            each.close()
            wait_until_unused(each.state)
            _assert_no_process(each)

    def logs(self) -> list[tuple[str, str]]:
        """Return a title and the end of the text of each log there is."""
        return [
            (f"host {each.side}: {title}", text)
            for each in self.hosts.values()
            for title, text in each.lab.logs()
        ]


def _start_host(started: ExitStack, side: Side, namespace: Namespace) -> Host:
    namespace.configure(ADDRESSES[side])
    lab = started.enter_context(Lab(namespace.path))
    made = Host(side, namespace, lab)
    started.callback(made.close_guest)
    return made


def _assert_no_process(left: Host) -> None:
    """Check that nothing runs on a host; an engine that has let go of its lock may just end."""
    for process in left.namespace.processes():
        try:
            descriptor = os.pidfd_open(process)
        except ProcessLookupError:
            continue
        is_over = has_ended(descriptor, END_TIMEOUT_S)
        os.close(descriptor)
        assert is_over, f"process {process} is left on host {left.side}"


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
