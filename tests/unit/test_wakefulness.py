"""The wish that processors stay awake: what Linux is told, and for how long."""

import asyncio
import os
import struct
from pathlib import Path

import pytest

from vtpmd.daemon import wakefulness
from vtpmd.daemon.wakefulness import LATENCY_FILE, Wakefulness

AWAKE = struct.pack("=i", 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a file that takes a wish."""
    path = tmp_path / "latency"
    path.touch()
    return path


def wish(path: Path) -> bytes | None:
    """Return what this process wishes; None when it does not have the file open."""
    opened = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return path.read_bytes() if path in opened else None


def test_wish_is_taken_back(path: Path) -> None:
    """Nothing is said before it matters; then until it is released, however often it was said."""

    async def hand_over() -> None:
        processors = Wakefulness(path)
        assert wish(path) is None
        processors.hold()
        processors.hold()
        assert wish(path) == AWAKE
        processors.release()
        assert wish(path) is None
        processors.release()
        processors.hold()
        assert wish(path) == AWAKE
        processors.release()

    asyncio.run(hand_over())


def test_wish_ends_by_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a session stays as it is after its guest has stopped."""
    monkeypatch.setattr(wakefulness, "HOLD_S", 0)

    async def wait() -> None:
        Wakefulness(path).hold()
        assert wish(path) == AWAKE
        await asyncio.sleep(0.01)  # timers that are due before run before
        assert wish(path) is None

    asyncio.run(wait())


def test_file_that_may_not_be_opened_changes_nothing(tmp_path: Path) -> None:
    """It is root's."""

    async def hand_over() -> None:
        processors = Wakefulness(tmp_path / "none")
        processors.hold()
        processors.release()

    asyncio.run(hand_over())


def test_linux_takes_the_wish() -> None:
    """The real file takes what is written: it is a binary number, of four bytes."""
    if not os.access(LATENCY_FILE, os.R_OK | os.W_OK):
        pytest.skip("this kernel has no PM QoS, or this user no right to it")
    with LATENCY_FILE.open("r+b", buffering=0) as file:
        assert file.write(AWAKE) == 4
        assert file.read(4) == AWAKE
