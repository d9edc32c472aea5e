"""An export is of one moment, whatever an engine does between any two of its reads.

The engine is a list of steps, each of which changes one sector or renames one file, as
docs/journal-format.md has them: commits, whose sectors come in any order, a folding with a commit
in its middle, a close, an opening. Hypothesis decides how many of them come before each of the
export's system calls. What is found is a generation that was acknowledged when the export began, or
was written since; and it was synced after it was read.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import states
from tests.support.file_names import NAMES
from tests.support.journal import SECTOR, write_journal
from vtpmd.store import exporting
from vtpmd.store.directory import StateDirectory
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType

IDENTITY = b"i" * 16
SIZES = [8, 900, 8, 2000, 8, 8, 1200, 8, 600, 8]  # bytes that a commit changes
WHOLE = states.BUSY
RENAMES = 6  # and removals, of all that the engine does


def images() -> list[bytes]:
    """Return states, each of which differs from the one before in so many bytes."""
    made = [WHOLE]
    for number, size in enumerate(SIZES, start=1):
        at = 1000 + 100 * number
        last = made[-1]
        made.append(last[:at] + bytes([number]) * size + last[at + size :])
    return made


IMAGES = images()


class Engine:
    """What writes a state directory, in steps."""

    def __init__(self, path: Path) -> None:
        self.acknowledged = self.written = 1  # generations; the first is IMAGES[0]
        self._path = path
        self._base = 1  # of the journal
        self._salt = 0
        self._replace(NAMES.permanent, self._checkpoint(1, continued=True))
        self._replace(NAMES.journal, self._journal())

    def steps(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Iterator[Callable[[], None]]:
        """Yield all that it does."""
        yield from self.commits(3, draw)
        folded = self.written
        yield lambda: self._replace(NAMES.permanent, self._checkpoint(folded, continued=True))
        yield from self.commits(1, draw)
        yield lambda: self._begin_journal(folded)
        yield from self.commits(3, draw)
        yield lambda: self._replace(NAMES.permanent, self._checkpoint(self.written))
        yield (self._path / NAMES.journal).unlink
        yield lambda: self._begin_journal(self.written)
        yield lambda: self._replace(NAMES.permanent, self._checkpoint(self.written, continued=True))
        yield from self.commits(len(IMAGES) - self.written, draw)

    def commits(
        self, n: int, draw: Callable[[st.SearchStrategy[Any]], Any]
    ) -> Iterator[Callable[[], None]]:
        """Yield what so many commits are."""
        for _ in range(n):
            before = self._journal()
            self.written += 1
            after = self._journal()
            places = [
                at
                for at in range(0, len(after), SECTOR)
                if before[at : at + SECTOR] != after[at : at + SECTOR]
            ]
            for at in draw(st.permutations(places)):
                yield partial(self._write_sector, at, after[at : at + SECTOR])
            yield self._acknowledge

    def _acknowledge(self) -> None:
        self.acknowledged = self.written

    def _journal(self) -> bytes:
        return bytes(
            write_journal(
                IMAGES[self._base - 1 : self.written],
                identity=IDENTITY,
                salt=bytes([self._salt]) * 32,
                first_generation=self._base,
            )
        )

    def _begin_journal(self, base: int) -> None:
        self._base, self._salt = base, self._salt + 1
        self._replace(NAMES.journal, self._journal())

    def _checkpoint(self, generation: int, *, continued: bool = False) -> bytes:
        lineage = Lineage(IDENTITY, generation, continued)
        return swtpm_format.encode_file(IMAGES[generation - 1], lineage)

    def _replace(self, name: str, content: bytes) -> None:
        temporary = self._path / "new"
        temporary.write_bytes(content)
        temporary.rename(self._path / name)

    def _write_sector(self, at: int, content: bytes) -> None:
        with (self._path / NAMES.journal).open("r+b") as file:
            file.seek(at)
            file.write(content)


class Interleaving:
    """Does the engine's steps before the export's system calls, as many as are drawn."""

    def __init__(self, steps: Iterator[Callable[[], None]], draw: Callable[..., Any]) -> None:
        self.synced: set[int] = set()  # inodes, since they were read last
        self.read_last = 0  # an inode
        self.tries = 1
        self._steps, self._draw = steps, draw
        self._is_at_work = False

    def go_on(self) -> None:
        """Do some steps."""
        if self._is_at_work:
            return
        self._is_at_work = True
        try:
            for _ in range(self._draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3, 12]))):
                step = next(self._steps, None)
                if step is not None:
                    step()
        finally:
            self._is_at_work = False

    def _pause(self, _: float) -> None:
        self.tries += 1

    @contextmanager
    def between_calls(self) -> Iterator[None]:
        """Have it do so while the block runs."""
        real_open, real_pread = os.open, os.pread

        def open_(*arguments: Any, **more: Any) -> int:
            self.go_on()
            return real_open(*arguments, **more)

        def pread(fd: int, *place: int) -> bytes:
            self.go_on()
            self.read_last = os.fstat(fd).st_ino
            self.synced.discard(self.read_last)
            return real_pread(fd, *place)

        def synced(sync: Callable[[int], None], fd: int) -> None:
            sync(fd)
            self.synced.add(os.fstat(fd).st_ino)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", open_)
            patch.setattr(os, "pread", pread)
            patch.setattr(os, "fsync", partial(synced, os.fsync))
            patch.setattr(os, "fdatasync", partial(synced, os.fdatasync))
            patch.setattr(time, "sleep", self._pause)
            yield


def assert_of_a_moment(data: st.DataObject, *, only_commits: bool) -> int:
    """Export while an engine works, and look at what is found; return in how many tries."""
    with TemporaryDirectory() as directory:
        path = Path(directory)
        with StateDirectory.open(path):  # which has the lock, as an engine has
            engine = Engine(path)
            steps = engine.steps(data.draw)
            if only_commits:
                steps = engine.commits(len(SIZES), data.draw)
            interleaving = Interleaving(steps, data.draw)
            interleaving.go_on()
            from_generation = engine.acknowledged
            with interleaving.between_calls():
                taken = exporting.take(path, None)
            assert from_generation <= taken.generation <= engine.written
            assert taken.states[StateType.PERMANENT] == IMAGES[taken.generation - 1]
            assert taken.is_served
            assert interleaving.synced & {interleaving.read_last, path.stat().st_ino}
            return interleaving.tries


@given(st.data())
@settings(max_examples=100)
def test_an_export_is_of_a_generation_that_was_acknowledged(data: st.DataObject) -> None:
    """It is tried again only where a file took another's place."""
    assert assert_of_a_moment(data, only_commits=False) <= 1 + RENAMES


@given(st.data())
@settings(max_examples=100)
def test_commits_alone_never_make_it_try_again(data: st.DataObject) -> None:
    """So a guest that writes all the time keeps nobody from exporting its vTPM."""
    assert assert_of_a_moment(data, only_commits=True) == 1
