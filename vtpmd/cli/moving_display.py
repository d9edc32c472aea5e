"""Show a move as it happens: bars on a terminal, lines elsewhere. Imports rich, which is slow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from vtpmd.cli.moving import Progress
from vtpmd.counted import grouped

MIB: Final = 1 << 20
# Lines come when something has happened, and at least and at most so often.
LINE_INTERVAL_S: Final = 1.0


class Display:
    """Two rows: the guest's memory and the vTPM's state."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began_s = time.monotonic()
        self._said = ""
        self._said_s = -LINE_INTERVAL_S
        self._bars = Bars(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=8),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._vtpm = self._bars.add_task("vTPM state", total=None, detail="")
        self._guest: TaskID | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show progress while the block runs."""
        with self._bars:
            yield

    def warn(self, text: str) -> None:
        """Show a warning, which stays."""
        self._console.print(f"vtpmd: warning: {text}", markup=False)

    def show(self, progress: Progress) -> None:
        """Show how far it is."""
        if self._console.is_terminal:
            self._show_bars(progress)
        else:
            self._show_line(progress)

    def _show_bars(self, progress: Progress) -> None:
        self._bars.update(self._vtpm, detail=vtpm_text(progress))
        if progress.guest is None:
            return
        if self._guest is None:
            self._guest = self._bars.add_task("guest memory", total=None, detail="")
        done_bytes = progress.guest.ram_transferred_bytes or 0
        total_bytes = done_bytes + (progress.guest.ram_remaining_bytes or 0)
        self._bars.update(
            self._guest,
            completed=done_bytes,
            total=total_bytes or None,
            detail=guest_text(progress),
        )

    def _show_line(self, progress: Progress) -> None:
        now_s = time.monotonic()
        happened = stage(progress)
        if happened == self._said and now_s - self._said_s < LINE_INTERVAL_S:
            return
        self._said, self._said_s = happened, now_s
        line = f"{now_s - self._began_s:6.2f} s  vTPM: {vtpm_text(progress)}"
        if progress.guest is not None:
            line += f"; guest: {guest_text(progress)}"
        self._console.print(line, markup=False)


def stage(progress: Progress) -> str:
    """Say where a move is, without numbers that change all the time."""
    guest = progress.guest
    where = "arming" if guest is None else f"{guest.status}, pass {guest.passes}"
    base = "a base" if progress.rounds else "no base"
    return f"{where}, {base}, {progress.whole_blobs}, {progress.tail_bytes}"


def guest_text(progress: Progress) -> str:
    """Say how far guest memory is."""
    guest = progress.guest
    if guest is None:
        return "not begun"
    parts = [guest.status.value]
    if guest.passes is not None:
        parts += [f"pass {guest.passes}", f"{_mib(guest.ram_transferred_bytes)} moved"]
        parts += [f"{_mib(progress.ram_rate_bytes)}/s", f"{_mib(guest.ram_remaining_bytes)} dirty"]
    if guest.dirty_pages_per_s:
        parts.append(f"{guest.dirty_pages_per_s:,} pages/s dirtied")
    return ", ".join(parts)


def vtpm_text(progress: Progress) -> str:
    """Say how far the vTPM's state is."""
    if progress.whole_blobs:
        return "all of it in QEMU's stream"
    if not progress.rounds:
        return "asking the destination"
    parts = [f"round {progress.rounds}, {grouped(progress.round_bytes, 'byte')}"]
    parts += [f"{progress.vtpm_bytes:,} in all", f"{progress.vtpm_rate_bytes:,} bytes/s"]
    if progress.tail_bytes is not None:
        parts.append(f"tail {grouped(progress.tail_bytes, 'byte')}")
    return ", ".join(parts)


def _mib(count_bytes: int | None) -> str:
    return f"{(count_bytes or 0) / MIB:.1f} MiB"
