"""Who goes first: the engine's threads, as Linux is told (6.12 on), and before vtpmd's."""

import ctypes
import os
import platform
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.harness.followed import followed
from tests.harness.handover import make_armed_pair
from tests.harness.lab import Lab
from tests.harness.owners import hand_over, record_stands_still
from vtpmd.daemon.precedence import NICENESS, NICENESS_MAX
from vtpmd.testing.emulator import EmulatorKind

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}  # asm/unistd.h
ATTRIBUTES = struct.Struct("=IIQiIQQQ")  # struct sched_attr, linux/sched/types.h
SLICE_NS = 100_000  # csrc/slice.c
FIRST_WITH_SLICES = (6, 12)
LOOK_S = 0.0005
STILL_S = 0.2  # less than an INIT waits for its Grant
TIMEOUT_S = 20.0

_syscall = ctypes.CDLL(None, use_errno=True).syscall


def attributes_of(thread: int) -> tuple[int, int, int]:
    """Return a thread's policy, niceness and slice in ns."""
    buffer = ctypes.create_string_buffer(ATTRIBUTES.size)
    number = SCHED_GETATTR[platform.machine()]
    assert _syscall(number, thread, buffer, ATTRIBUTES.size, 0) == 0, ctypes.get_errno()
    _, policy, _, niceness, _, slice_ns, _, _ = ATTRIBUTES.unpack(buffer.raw)
    return policy, niceness, slice_ns


def threads_of(process: int) -> list[int]:
    return [int(path.name) for path in Path(f"/proc/{process}/task").iterdir()]


def has_slices() -> bool:
    major, minor = platform.release().split(".")[:2]
    return (int(major), int(minor)) >= FIRST_WITH_SLICES


@pytest.mark.skipif(not has_slices(), reason="this kernel has no slices of a thread's own")
@pytest.mark.parametrize("is_alone", [True, False])
def test_threads_of_an_engine_have_short_slices(lab: Lab, *, is_alone: bool) -> None:
    emulator = lab.emulator(EmulatorKind.VTPMD) if is_alone else lab.daemon()
    lab.raw_guest(emulator).boot()  # it serves
    (engine,) = emulator.engines()
    threads = threads_of(engine)
    assert len(threads) > 1
    for thread in threads:
        policy, _, slice_ns = attributes_of(thread)
        assert (policy, slice_ns) == (os.SCHED_OTHER, SLICE_NS)
    assert attributes_of(0)[2] > SLICE_NS  # this process, as most are


@pytest.mark.skipif(not has_slices(), reason="this kernel has no slices of a thread's own")
@pytest.mark.parametrize("end", ["failed", "completed", "its QEMU's"])
def test_vtpmd_has_short_slices_while_its_qemu_migrates(lab: Lab, end: str) -> None:
    """It hears that the guest has stopped before QEMU asks for the state; and no longer than so."""
    source, monitor = followed(lab, is_incoming=False)
    process = source.vtpmd.program.pid
    source.guest.boot()
    usual = attributes_of(process)
    assert usual[2] > SLICE_NS
    monitor.migration("active")
    wait_for(lambda: attributes_of(process) == (*usual[:2], SLICE_NS))
    if end == "its QEMU's":
        monitor.close()
    else:
        monitor.migration(end)
    wait_for(lambda: attributes_of(process) == usual)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(LOOK_S)


@contextmanager
def watched(*processes: int) -> Iterator[list[set[int]]]:
    """Give the nicenesses that the first threads of processes have while the block runs."""
    seen: list[set[int]] = [set() for _ in processes]
    is_over = Event()

    def look() -> None:
        while not is_over.wait(LOOK_S):
            for process, nicenesses in zip(processes, seen, strict=True):
                nicenesses.add(os.getpriority(os.PRIO_PROCESS, process))

    thread = Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def test_vtpmd_gives_way_while_the_guest_stands_still(lab: Lab) -> None:
    """On both hosts, and takes it back."""
    pair = make_armed_pair(lab)
    pids = [host.vtpmd.program.pid for host in (pair.source, pair.destination)]
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with watched(*pids) as seen, ThreadPoolExecutor(1) as executor:
        with record_stands_still(pair.source):  # so that the guest stands still for a while
            moved = executor.submit(hand_over, pair)
            time.sleep(STILL_S)
        moved.result(TIMEOUT_S)
    assert seen == [{usual, min(usual + NICENESS, NICENESS_MAX)}] * 2
    for pid in pids:
        wait_for_niceness(pid, usual)


def wait_for_niceness(process: int, wanted: int) -> None:
    wait_for(lambda: os.getpriority(os.PRIO_PROCESS, process) == wanted)


def test_the_destination_gives_way_before_its_qemu_has_the_tail(lab: Lab) -> None:
    """From what the source says: else it runs for the first time when its engine has to."""
    source, monitor = followed(lab, is_incoming=False)
    destination, incoming_monitor = followed(lab, is_incoming=True)
    process, usual = destination.vtpmd.program.pid, os.getpriority(os.PRIO_PROCESS, 0)
    source.guest.boot()
    assert source.manage.arm(destination.vtpmd.address)["event"] == "VTPM_ARMED"
    for each in (incoming_monitor, monitor):
        each.migration("active")
    wait_for_niceness(process, usual)
    monitor.stop()
    wait_for_niceness(process, min(usual + NICENESS, NICENESS_MAX))
    wait_for_niceness(process, usual)  # not for ever, if nothing comes
