"""Connections between hosts: encoded frames that are late, in pieces, lost, or silent for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from tests.sim.loop import Process, Scheduler
from vtpmd.daemon.tls import PeerName

# A frame takes this long, as a rule; some take much longer.
LATENCY_S: Final = (0.0001, 0.0003, 0.001, 0.02)
# TCP notices a flow that has gone silent: USER_TIMEOUT_S and some more.
DEAD_S: Final = (5.0, 6.0, 8.0)
# An end of a connection that was reset.
NOTICED_S: Final = (0.0, 0.0001, 0.001, 0.02)


class Stream:
    """One end of a connection; what ``vtpmd.daemon.tls_stream`` is in a daemon."""

    def __init__(self, network: Network, process: Process, *, is_lane: bool = False) -> None:
        self._network = network
        self.process = process
        self.is_lane = is_lane
        self.is_handed_down = False  # to an engine, whose it is then
        self._watcher: Callable[[], None] | None = None
        self.other: Stream | None = None
        self.heard_ns = network.now_ns()
        self._received: list[bytes] = []
        self._ended = False  # by the other side, once all is read
        self._failed = False
        self.closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._arrives_s = 0.0  # when what was written last does

    async def read(self, n_bytes_max: int | None = None) -> bytes:
        """Wait for bytes; none at the end. Raises OSError."""
        while not self.closed:
            self.process.check_alive()
            data = self.read_now(n_bytes_max)
            if data is not None:
                return data
            if self._failed:
                raise ConnectionResetError("the connection is broken")
            self._waiter = self.process.create_future()
            await self._waiter
        return b""

    def read_now(self, n_bytes_max: int | None = None) -> bytes | None:
        """Return bytes that have come, none at the end; None: nothing has."""
        if not self._received:
            return b"" if self._ended and not self._failed else None
        self.heard_ns = self._network.now_ns()
        first = self._received.pop(0)
        if n_bytes_max is not None and len(first) > n_bytes_max:
            self._received.insert(0, first[n_bytes_max:])
        return first[:n_bytes_max]

    @property
    def is_broken(self) -> bool:
        """True once all that came is read, and no more will."""
        return self._failed and not self._received

    def watch(self, watcher: Callable[[], None] | None) -> None:
        """Have somebody called when something comes, and now if something has."""
        self._watcher = watcher
        self._wake()

    async def give_way(self) -> None:
        """Every step of the loop is a turn."""

    def write(self, data: bytes) -> None:
        """Send."""
        self.process.check_alive()
        if not self.closed and not self._failed and data:
            self._network.send(self, data)

    async def drain(self) -> None:
        """All is on its way at once."""

    def close(self) -> None:
        """End the connection; what was written arrives."""
        if not self.closed and self.process.alive:
            self.closed = True
            self._wake()
            self._network.send(self, b"")

    abort = close

    def arrives(self, data: bytes) -> None:
        """Bytes from the other side are here; none are its end."""
        if self._failed or not self.process.alive:
            return
        if data:
            self._received.append(data)
        else:
            self._ended = True
        self._wake()

    def fail(self) -> None:
        """The connection is known to be broken."""
        self._failed = True
        self._wake()

    def _wake(self) -> None:
        if self._watcher is not None and self.process.alive:
            self.process.call_soon(self._watched)
        if self._waiter is not None and not self._waiter.done() and self.process.alive:
            self._waiter.set_result(None)

    def _watched(self) -> None:
        if self._watcher is not None:
            self._watcher()


class PlainSocket:
    """A lane's connection as ``vtpmd.daemon.lane`` has it: what it asks of a socket."""

    def __init__(self, stream: Stream, descriptors: dict[int, Stream]) -> None:
        self.stream = stream
        self._descriptors = descriptors

    def __enter__(self) -> PlainSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return a number that the connection can be handed down by."""
        number = len(self._descriptors)
        self._descriptors[number] = self.stream
        return number

    def setsockopt(self, *_: object) -> None:
        """Nothing to do."""

    def send(self, data: bytes) -> int:
        """Send."""
        self.stream.write(data)
        return len(data)

    def close(self) -> None:
        """Close it, unless it was handed down."""
        if not self.stream.is_handed_down:
            self.stream.close()


class Connection:
    """What ``vtpmd.daemon.tls`` gives: a stream, and who is at its other end."""

    def __init__(self, stream: Stream, name: str) -> None:
        self.stream = stream
        self.name = PeerName((name,), None)


class Network:
    """All connections. ``told`` gets each frame that is sent."""

    def __init__(self, scheduler: Scheduler, told: Callable[[Stream, bytes], None]) -> None:
        self._scheduler = scheduler
        self._rng = scheduler.rng
        self._told = told
        self._held_until_s = 0.0
        self._down_until_s = 0.0
        self._flows: list[Flow] = []

    def now_ns(self) -> int:
        """The clock of ``time.monotonic_ns()``."""
        return int(self._scheduler.now_s * 1e9)

    def connect(
        self, client: Process, server: Process, *, is_lane: bool = False
    ) -> tuple[Stream, Stream]:
        """Make a connection. Raises OSError while the link is down."""
        if self.is_down:
            raise ConnectionRefusedError("no route to host")
        ends = Stream(self, client, is_lane=is_lane), Stream(self, server, is_lane=is_lane)
        ends[0].other, ends[1].other = ends[1], ends[0]
        self._flows = [each for each in self._flows if not each.is_over]
        self._flows.append(Flow(*ends))
        return ends

    @property
    def is_down(self) -> bool:
        """True while no connection can be made."""
        return self._scheduler.now_s < self._down_until_s

    def handshake_s(self) -> float:
        """Return how long it takes to shake hands now."""
        held_s = max(0.0, self._held_until_s - self._scheduler.now_s)
        return held_s + 2 * self._rng.choice(LATENCY_S)

    def send(self, end: Stream, data: bytes) -> None:
        """Have bytes arrive, in order."""
        if data:
            self._told(end, data)
        flow = self._flow_of(end)
        if flow is None or flow.dead:
            return
        at_s = max(self._scheduler.now_s, self._held_until_s) + self._rng.choice(LATENCY_S)
        end._arrives_s = max(end._arrives_s, at_s)
        pieces = [data]
        if len(data) > 1 and self._rng.random() < 0.05:
            middle = self._rng.randrange(1, len(data))
            pieces = [data[:middle], data[middle:]]
        for piece in pieces:
            flow.under_way += 1
            in_s = end._arrives_s - self._scheduler.now_s
            self._scheduler.after(in_s, partial(flow.deliver, end, piece))

    def _flow_of(self, end: Stream) -> Flow | None:
        return next((each for each in self._flows if end in each.ends), None)

    # Faults.

    def cut(self, down_s: float) -> None:
        """Break all connections; of what is under way any part is lost."""
        self._down_until_s = self._scheduler.now_s + down_s
        for flow in self._flows:
            flow.lose_from(self._rng.randrange(flow.under_way + 1))
            self._ends_notice(flow)

    def cut_lanes(self) -> None:
        """Break the lanes alone."""
        for flow in self._flows:
            if flow.ends[0].is_lane:
                flow.lose_from(self._rng.randrange(flow.under_way + 1))
                self._ends_notice(flow)

    def silence(self, for_s: float) -> None:
        """Have nothing arrive for a while; then all does."""
        self._held_until_s = self._scheduler.now_s + for_s

    def kill_flows(self) -> None:
        """Have the connections that there are carry nothing any more; new ones do."""
        for flow in self._flows:
            flow.dead = True
            self._ends_notice(flow, DEAD_S)

    def host_died(self, process: Process) -> None:
        """Break what a dead process had."""
        for flow in self._flows:
            if process in (flow.ends[0].process, flow.ends[1].process):
                flow.lose_from(self._rng.randrange(flow.under_way + 1))
                self._ends_notice(flow)

    def heal(self) -> None:
        """Be a good network from now on."""
        self._held_until_s = self._down_until_s = 0.0

    def _ends_notice(self, flow: Flow, after_s: tuple[float, ...] = NOTICED_S) -> None:
        flow.dead = True
        for end in flow.ends:
            self._scheduler.after(self._rng.choice(after_s), end.fail)


class Flow:
    """One connection, from one end to the other."""

    def __init__(self, client: Stream, server: Stream) -> None:
        self.ends = (client, server)
        self.dead = False
        self.under_way = 0
        self._still: int | None = None  # so many pieces still arrive

    @property
    def is_over(self) -> bool:
        """True if nothing can come of it any more."""
        return all(end.closed or end._failed or not end.process.alive for end in self.ends) and (
            self.under_way == 0
        )

    def lose_from(self, still: int) -> None:
        """Of what is under way only so many pieces still arrive."""
        self._still = still

    def deliver(self, end: Stream, data: bytes) -> None:
        """A piece arrives, unless it was lost."""
        self.under_way -= 1
        if self._still is not None:
            if self._still == 0:
                return
            self._still -= 1
        elif self.dead:
            return
        assert end.other is not None
        end.other.arrives(data)


def frames(data: bytes) -> Any:
    """Return the messages in what a daemon has written at once."""
    from vtpmd.wire import peer

    decoder = peer.Decoder()
    decoder.receive_data(data)
    while (message := decoder.next_message()) is not None:
        yield message
