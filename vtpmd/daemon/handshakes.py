"""Connections of which it is not known yet whether a peer has made them.

Anybody who reaches the port can open them and say nothing. They have a limit of their own, and when
that is reached the oldest goes: a peer needs some round trips, so the oldest is mostly no peer's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

# A descriptor and some ten kilobytes each: a quarter of the 1024 that a process usually has.
HANDSHAKES_MAX: Final = 256
# Of one network(): half, so that others hold theirs while it opens them as fast as it can.
HANDSHAKES_PER_NETWORK_MAX: Final = 128

# A host with IPv6 has at least all addresses of a /64 (RFC 4291, 2.5.4).
_HOST_BITS: Final = 64

Network = IPv4Address | int


class Handshakes:
    """The tasks that wait for a peer to say who it is, oldest first."""

    def __init__(self) -> None:
        self._networks: dict[asyncio.Task[object], Network] = {}

    def enter(self, address: str) -> bool:
        """Count the current task as one until leave(); return True if another had to go for it.

        The one that goes is cancelled: the oldest of its own network if that has too many, else
        of the network that has the most.
        """
        own = network(address)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine calls this
        crowded = self._crowded(own)
        if crowded is not None:
            oldest = next(task for task, of in self._networks.items() if of == crowded)
            del self._networks[oldest]
            oldest.cancel()
        self._networks[task] = own
        return crowded is not None

    def leave(self) -> None:
        """Count the current task no more: its peer is known, or it ends. May be repeated."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - as above
        self._networks.pop(task, None)

    def _crowded(self, own: Network) -> Network | None:
        """Return the network that has to make room for one more of ``own``, None if there is."""
        counts = Counter(self._networks.values())
        if counts[own] >= HANDSHAKES_PER_NETWORK_MAX:
            return own
        if len(self._networks) < HANDSHAKES_MAX:
            return None
        # Of equals the one that was counted first, which has the oldest.
        return counts.most_common(1)[0][0]


def network(address: str) -> Network:
    """Return what one host can have many addresses of: an IPv6 network, but one IPv4 address."""
    ip = ip_address(address)
    return int(ip) >> _HOST_BITS if isinstance(ip, IPv6Address) else ip
