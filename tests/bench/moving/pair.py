"""A source and a destination that a vTPM moves between, driven at their sockets, without QEMU."""

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tests.bench.emulators import BenchError
from tests.bench.moving import load
from tests.bench.moving.floor import floor
from tests.bench.moving.hand_over import HandOver, hand_over
from tests.bench.moving.load import Activity
from tests.bench.moving.monitor import Monitor
from tests.harness.lab import Lab
from tests.harness.raw_guest import RawGuest
from tests.support.emulator_client import DataSocket
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Emulator, EmulatorKind, Peering
from vtpmd.testing.management import Management

BUFFER_BYTES = 4096  # what QEMU 7.2 sets
REPORT_TIMEOUT_S = 10.0
REPORT_POLL_S = 0.005
LAST_PHASE = "destination: wait for the grant"  # what the source hears last
# Longer than a round of the session, and at no fixed distance from one.
BEFORE_FREEZE_S = (0.25, 0.40)


class Mode(StrEnum):
    """Between what a vTPM moves, and as what."""

    SWTPM = "swtpm"
    WHOLE = "vtpmd, blobs"
    TAIL = "vtpmd, tail"
    FLOOR = "floor"


# From QEMU's STOP to its question, if no memory is left to be sent: QEMU 7.2 takes 1.7 ms at least.
STOPPED_S = 0.0017


@dataclass(frozen=True, kw_only=True)
class Side:
    """An emulator and the connections that its QEMU has; a vtpmd that follows it has one more."""

    emulator: Emulator
    guest: RawGuest
    monitor: Monitor | None = None


@dataclass(frozen=True, kw_only=True)
class Moved:
    """One hand-over, and the phases that the source's session reports of it, if there was one."""

    hand_over: HandOver
    phases_us: dict[str, int] = field(default_factory=dict)


def _start(lab: Lab, mode: Mode, state: Path | None = None, *, follows_qemu: bool) -> Side:
    """Start a side; a state directory is the source's."""
    if mode is Mode.SWTPM:
        emulator = lab.emulator(EmulatorKind.SWTPM, state)
    else:
        peering = Peering(credentials=credentials(), log_level="info", follows_qemu=follows_qemu)
        emulator = lab.peer(peering, state)
    if emulator.qmp_path is None:
        return Side(emulator=emulator, guest=lab.raw_guest(emulator))
    monitor = Monitor(emulator.qmp_path, is_incoming=state is None)
    lab.close_at_end(monitor)
    monitor.wait_until_followed()
    return Side(emulator=emulator, guest=lab.raw_guest(emulator), monitor=monitor)


@contextmanager
def pair(mode: Mode, state_file: Path, *, follows_qemu: bool) -> Iterator[tuple[Lab, Side, Side]]:
    """Run a source that powers a TPM on from a state file, and a destination for it.

    Both are new processes, as in a migration: what a daemon does for the first time, it does late.
    """
    with Lab() as lab:
        state = lab.directory / "state"
        state.mkdir()
        shutil.copy(state_file, state)
        source = _start(lab, mode, state, follows_qemu=follows_qemu)
        destination = _start(lab, mode, follows_qemu=follows_qemu)
        source.guest.control.init()
        load.start_using(source.guest.data)
        destination.guest.control.stop()
        destination.guest.control.set_buffer_size(BUFFER_BYTES)
        yield lab, source, destination


def arm(management: Management, destination: Side) -> None:
    """Arm a source for a destination; BenchError when it does not get that far."""
    event = management.arm(destination.emulator.address)
    if event["event"] != "VTPM_ARMED":
        raise BenchError(f"no session with the destination: {event['data']}")


def move(mode: Mode, state_file: Path, activity: Activity) -> Moved:
    """Move a vTPM once; for what there is without one, see move_floor()."""
    with pair(mode, state_file, follows_qemu=True) as (lab, source, destination):
        management = None
        if mode is Mode.TAIL:
            management = lab.management(source.emulator)
            arm(management, destination)
        for side in (destination, source):
            _say(side, "setup", "active")
        data = _use(source.guest, activity)
        if source.monitor is not None:
            source.monitor.stop()
        time.sleep(STOPPED_S)
        taken = hand_over(source.guest.control, data, destination.guest.control)
        if data is not None:
            load.check(taken.response)
        destination.guest.tpm.ecdsa_sign(load.SIGNING_KEY, load.DIGEST)
        phases_us = {} if management is None else _phases_us(management)
        return Moved(hand_over=taken, phases_us=phases_us)


def move_floor(tail_bytes: int, activity: Activity) -> Moved:
    """Do what QEMU does to move a vTPM once, without one, with a tail of so many bytes."""
    with Lab() as lab:
        source = floor(lab, tail_bytes)
        destination = floor(lab, tail_bytes, source)
        guests = [lab.raw_guest(each) for each in (source, destination)]
        data = _use(guests[0], activity)
        time.sleep(STOPPED_S)
        return Moved(hand_over=hand_over(guests[0].control, data, guests[1].control))


def _say(side: Side, *statuses: str) -> None:
    """Say how QEMU's migration goes, to who follows it."""
    for status in statuses:
        if side.monitor is not None:
            side.monitor.migration(status)


def _use(guest: RawGuest, activity: Activity) -> DataSocket | None:
    """Let the guest do its work; return its data socket if a command runs there now."""
    duration_s = random.uniform(*BEFORE_FREEZE_S)
    if activity is Activity.IDLE:
        time.sleep(duration_s)
        return None
    load.work(guest.data, duration_s)
    return guest.data


def _phases_us(management: Management) -> dict[str, int]:
    """Return what the session reports of its phases; BenchError when it was not handed over."""
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    while LAST_PHASE not in (report := management.migration())["phases-us"]:
        if time.monotonic() > deadline:
            raise BenchError(f"the session is {report['state']}: {report['reason']}")
        time.sleep(REPORT_POLL_S)
    phases_us: dict[str, int] = report["phases-us"]
    return phases_us
