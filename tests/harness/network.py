"""Two hosts and a router between them, as network namespaces that nothing can leave behind.

They have no names: descriptors and the threads in them are all that keeps them, so they end with
the test's process, however that ends.
"""

import ctypes
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute

from vtpmd.closing import Closing

CLONE_NEWNET = 0x40000000  # unshare(2)
PREFIX_BITS = 24

Result = TypeVar("Result")


class Namespace(Closing):
    """A network namespace, and one thread in it."""

    def __init__(self) -> None:
        """Make one; OSError if that is not allowed."""
        self._thread = ThreadPoolExecutor(1)
        self.run(_enter_new_network)
        self.descriptor = self.run(os.open, "/proc/thread-self/ns/net", os.O_RDONLY)
        self.run(_set_up, "lo")

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in it: what sockets it makes, are and stay there."""
        return self._thread.submit(function, *arguments).result()

    def close(self) -> None:
        """Wait for the thread, and let go of the namespace."""
        self._thread.shutdown()
        os.close(self.descriptor)


class Network(Closing):
    """Host ``a`` at 10.0.1.1, host ``b`` at 10.0.2.1, and a router that can stop forwarding."""

    def __init__(self) -> None:
        """Make it; OSError unless this is root."""
        self.a, self.b, self._router = Namespace(), Namespace(), Namespace()
        for number, host in enumerate((self.a, self.b), 1):
            self._router.run(_plug_in, number, host.descriptor)
            host.run(_configure, f"host{number}", f"10.0.{number}.1", f"10.0.{number}.254")
        self.forward(True)

    def forward(self, forwarded: bool) -> None:
        """Forward what goes from host to host; or drop all of it, and tell nobody."""
        text = "1" if forwarded else "0"
        # proc/sys/net shows the namespace of the thread that opens it.
        path = Path("/proc/sys/net/ipv4/ip_forward")
        self._router.run(path.write_text, text)

    def close(self) -> None:
        """Take it down."""
        for namespace in (self.a, self.b, self._router):
            namespace.close()


def _enter_new_network() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"cannot have a network of my own: {os.strerror(error)}; run as root")


def _set_up(name: str) -> None:
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=name)[0], state="up")


def _plug_in(number: int, host: int) -> None:
    """Lay a cable from this namespace, the router's, to a host."""
    name, far = f"router{number}", f"host{number}"
    with IPRoute() as route:
        route.link("add", ifname=name, kind="veth", peer={"ifname": far, "net_ns_fd": host})
    _configure(name, f"10.0.{number}.254")


def _configure(name: str, address: str, gateway: str | None = None) -> None:
    with IPRoute() as route:
        index = route.link_lookup(ifname=name)[0]
        route.addr("add", index=index, address=address, prefixlen=PREFIX_BITS)
        route.link("set", index=index, state="up")
        if gateway is not None:
            route.route("add", family=socket.AF_INET, dst="0.0.0.0/0", gateway=gateway)
