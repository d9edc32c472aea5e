"""A listener of a ``QemuView`` that notes what it is told."""

import asyncio

from vtpmd.daemon.qemu import Listener


class Told(Listener):
    """What was told, in order, as the names of the methods."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._noted = asyncio.Event()

    async def until(self, last: str) -> list[str]:
        """Wait for a call; return all since the last time, and it."""
        while last not in self.calls:
            self._noted.clear()
            await self._noted.wait()
        end = self.calls.index(last) + 1
        calls, self.calls = self.calls[:end], self.calls[end:]
        return calls

    def take(self) -> list[str]:
        """Return what was told since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self._noted.set()

    def migration_began(self) -> None:
        self._note("migration_began")

    def migration_ended(self) -> None:
        self._note("migration_ended")

    def guest_stopped(self) -> None:
        self._note("guest_stopped")

    def guest_resumed(self) -> None:
        self._note("guest_resumed")

    def receiving(self, now: bool) -> None:
        self._note(f"receiving({now})")

    def colo_seen(self) -> None:
        self._note("colo_seen")

    def disconnected(self) -> None:
        self._note("disconnected")
