"""What QEMU waited for on the control channel: commands, as tests/bench/waits.c has kept them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.bench import programs
from tests.bench.emulators import BenchError
from tests.support.emulator_client import Control


class Wait(NamedTuple):
    """One command: its number, when it was sent, and when the last of its answer had come."""

    command: int
    began_ns: int
    ended_ns: int

    @property
    def took_us(self) -> float:
        """How long QEMU waited."""
        return (self.ended_ns - self.began_ns) / 1000


def recorder() -> list[str]:
    """Return what to start QEMU through, so that its waits are kept."""
    return ["env", f"LD_PRELOAD={programs.build_preload('waits', programs.BUILD)}"]


def waits_on(control: Path) -> list[Wait]:
    """Return what the QEMU on a control socket has waited for so far, in order."""
    waits: dict[int, Wait] = {}
    for line in control.with_name(f"{control.name}.waits").read_text().splitlines():
        wait = Wait(*map(int, line.split()))
        waits[wait.began_ns] = wait  # what came last ends it
    return list(waits.values())


def share_us(source: Sequence[Wait], destination: Sequence[Wait]) -> float:
    """Return the vTPM's share of one downtime: what both QEMUs waited for, in microseconds.

    The source's asks for its blobs last of all; the destination's stops the TPM, sets the blobs and
    powers it on. BenchError when they did not.
    """
    asked = [wait for wait in source if wait.command == Control.GET_STATEBLOB]
    given = [number for number, wait in enumerate(destination) if _sets_blob(wait)]
    if not asked or not given:
        raise BenchError("QEMU was not seen to move a vTPM's state")
    begin, end = given[0] - 1, given[-1] + 2
    loaded = destination[begin:end]
    if loaded[0].command != Control.STOP or loaded[-1].command != Control.INIT:
        raise BenchError("QEMU does not stop the TPM, set its blobs and power it on, in this order")
    return sum(wait.took_us for wait in [*asked, *loaded])


def _sets_blob(wait: Wait) -> bool:
    return wait.command == Control.SET_STATEBLOB
