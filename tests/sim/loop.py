"""Event loops without a machine below: time passes when nobody has anything left to do.

Each process of the simulated hosts has a loop of its own, so that it dies as a whole: what a dead
one still had to do is never done. Its callbacks run in bursts, as an event loop's do; which process
comes next is the seed's choice.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

# More than any burst needs: a process that never waits would stop the clock.
BURST_MAX: Final = 5000


class PowerLoss(BaseException):
    """The process that this is raised in is gone; nothing there may take it for a failure."""


class Livelock(Exception):
    """A process does not come to an end of what it has to do."""


class Scheduler:
    """The clock, and the processes of all hosts."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now_s = 1000.0
        self.failures: list[str] = []  # what no process may do
        self._processes: list[Process] = []
        self._every: list[Process] = []
        self._timers: list[tuple[float, int, asyncio.Handle | Callable[[], None], Any]] = []
        self._numbers = itertools.count()

    def process(self, name: str, host: Any = None) -> Process:
        """Start a process."""
        process = Process(self, name, host)  # type: ignore[abstract] # all that is needed is there
        self._processes.append(process)
        self._every.append(process)
        return process

    def close(self) -> None:
        """End all that is still under way, when nobody looks any more."""
        for process in self._every:
            process.close()

    def after(self, delay_s: float, do: Callable[[], None]) -> None:
        """Have something happen that is no process's doing."""
        heapq.heappush(self._timers, (self.now_s + delay_s, next(self._numbers), do, None))

    def add_timer(self, when_s: float, handle: asyncio.Handle, process: Process) -> None:
        """Have a process's callback run at a time."""
        heapq.heappush(self._timers, (when_s, next(self._numbers), handle, process))

    def step(self) -> bool:
        """Run one burst, or let time pass until something is due; return False if nothing is."""
        ready = [each for each in self._processes if each.ready and each.can_run]
        if not ready:
            return self._let_time_pass()
        chosen = ready[0] if len(ready) == 1 else self.rng.choice(ready)
        chosen.run_burst()
        return True

    def _let_time_pass(self) -> bool:
        while self._timers:
            when_s, _, what, process = heapq.heappop(self._timers)
            if process is None:
                self.now_s = max(self.now_s, when_s)
                what()  # type: ignore[operator]
                return True
            if process.alive and not what.cancelled():  # type: ignore[union-attr]
                self.now_s = max(self.now_s, when_s)
                process.ready.append(what)
                return True
        return False


class _Task(asyncio.Task[Any]):
    """A task whose place in a set is the same in each run."""

    _numbers = itertools.count()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._number = next(self._numbers)
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


class Process(asyncio.AbstractEventLoop):
    """One process: an event loop, for as long as it is alive."""

    def __init__(self, scheduler: Scheduler, name: str, host: Any) -> None:
        self.name = name
        self.host = host
        self.alive = True
        self.stopped_until_s = 0.0
        self.ready: deque[asyncio.Handle] = deque()
        self._scheduler = scheduler
        self._tasks: list[_Task] = []

    @property
    def rng(self) -> random.Random:
        """The seed's choices."""
        return self._scheduler.rng

    @property
    def can_run(self) -> bool:
        """True unless it is gone, or somebody has stopped it."""
        return self.alive and self._scheduler.now_s >= self.stopped_until_s

    def pause(self, for_s: float) -> None:
        """Let it do nothing for a while."""
        self.stopped_until_s = self._scheduler.now_s + for_s
        self._scheduler.after(for_s, lambda: None)  # there is something to do then

    def kill(self) -> None:
        """End it at once; if it is the one that runs, it does not get past its next wait."""
        self.alive = False

    def close(self) -> None:
        """Leave nothing that would be missed when it is collected."""
        self.alive = False
        self.ready.clear()
        for task in self._tasks:
            if not task.done():
                with suppress(PowerLoss, Exception):  # there is no loop any more
                    task.get_coro().close()

    def check_alive(self) -> None:
        """Raise PowerLoss in what is left of a dead process."""
        if not self.alive:
            raise PowerLoss

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Have the process do something."""
        return self.create_task(work)

    def run_burst(self) -> None:
        """Run what is ready, and what that makes ready."""
        asyncio._set_running_loop(self)
        try:
            for _ in range(BURST_MAX):
                if not (self.ready and self.alive):
                    return
                handle = self.ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)
        raise Livelock(f"{self.name} does not come to an end")

    # What asyncio needs of a loop.

    def time(self) -> float:
        return self._scheduler.now_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return not self.alive

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, list(args), self, context)
        self._scheduler.add_timer(when, handle, self)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
        task = _Task(coro, loop=self, **kwargs)
        self._tasks.append(task)
        return task

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        sock.stream.write(bytes(data))

    async def sock_recv(self, sock: Any, nbytes: int) -> bytes:
        data: bytes = await sock.stream.read(nbytes)
        return data

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self.alive and error is not None and not isinstance(error, PowerLoss):
            self._scheduler.failures.append(f"{self.name}: {type(error).__name__}: {error}")
