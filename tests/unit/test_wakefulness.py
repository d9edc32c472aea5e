"""The wish that processors stay awake: what Linux is told, and for how long."""

import asyncio
import os
import struct
from pathlib import Path

import pytest

from vtpmd.daemon import wakefulness
from vtpmd.daemon.wakefulness import LATENCY_FILE, Wakefulness

AWAKE, ASLEEP = struct.pack("=i", 0), struct.pack("=i", 2_000_000_000)


def content(path: Path) -> bytes:
    """Return what was written so far."""
    return path.read_bytes()


@pytest.fixture
def said(tmp_path: Path) -> Path:
    """Return a file that keeps all that is written into it."""
    path = tmp_path / "latency"
    path.touch()
    return path


def test_wish_is_taken_back(said: Path) -> None:
    """Nothing is said before it matters; then once, until it is released or closed."""

    async def hand_over() -> None:
        with Wakefulness(said) as processors:
            assert content(said) == b""
            processors.hold()
            processors.hold()
            assert content(said) == AWAKE
            processors.release()
            processors.release()
            assert content(said) == AWAKE + ASLEEP
            processors.hold()
        assert content(said) == (AWAKE + ASLEEP) * 2
        processors.close()

    asyncio.run(hand_over())


def test_wish_ends_by_itself(said: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a session stays as it is after its guest has stopped."""
    monkeypatch.setattr(wakefulness, "HOLD_S", 0)

    async def wait() -> None:
        with Wakefulness(said) as processors:
            processors.hold()
            await asyncio.sleep(0.01)  # timers that are due before run before
            assert content(said) == AWAKE + ASLEEP

    asyncio.run(wait())


def test_file_that_may_not_be_opened_changes_nothing(tmp_path: Path) -> None:
    """It is root's."""

    async def hand_over() -> None:
        with Wakefulness(tmp_path / "none") as processors:
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
        assert file.write(ASLEEP) == 4
        assert file.read(4) != AWAKE
