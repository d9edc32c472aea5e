"""The state that a TPM has, and the steady load that it is under, before it moves."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path

from tests.bench.emulators import VTPMD, BenchError, running
from tests.support import tpm2
from tests.support.emulator_client import ControlClient, DataSocket

DIGEST = bytes(range(32))
PCRS = (8, 9, 10, 14)  # what boot loaders, shim and Linux's file measurements extend
SIGNING_KEY = tpm2.Handle.PERSISTENT_FIRST + 1
NV_FIRST = tpm2.Handle.NV_FIRST + 0x50_0000
NV_WRITTEN = 4  # indices that the load writes to, in turn
NV_WRITE_BYTES = 8
# A busy guest: Linux's driver for tpm-tis polls, and its shortest sleep is of this order.
COMMAND_INTERVAL_S = 0.005


class Size(StrEnum):
    """How much permanent state there is."""

    SMALL = "2 KB"
    LARGE = "85 KB"


class Activity(StrEnum):
    """What the guest does with its TPM up to the moment when QEMU stops it."""

    IDLE = "idle"
    LOAD = "load"


@dataclass(frozen=True, kw_only=True)
class Indices:
    """The NV indices of a size: how many, and how many bytes each has."""

    number: int
    size_bytes: int


INDICES = {
    Size.SMALL: Indices(number=NV_WRITTEN, size_bytes=64),
    Size.LARGE: Indices(number=40, size_bytes=2048),
}


def prepare(directory: Path, size: Size) -> Path:
    """Make a TPM with a key and NV indices; return its state file, which swtpm reads, too."""
    with running(VTPMD, directory) as started:
        started.connect().close()
        with ControlClient(started.control) as control:
            data = control.attach_data()
            control.init()
            tpm = tpm2.Tpm(data.transact)
            tpm.startup()
            indices = INDICES[size]
            for number in range(indices.number):
                tpm.nv_define(NV_FIRST + number, indices.size_bytes)
                tpm.nv_write(NV_FIRST + number, bytes(indices.size_bytes))
            transient = tpm.create_primary(tpm2.ecc_signing_template())
            tpm.make_persistent(transient, SIGNING_KEY)
            tpm.flush(transient)
    return directory / "state/tpm2-00.permall"


def start_using(data: DataSocket) -> None:
    """Start a TPM and use its key once: the first use after a start writes to NV."""
    tpm = tpm2.Tpm(data.transact)
    tpm.startup()
    tpm.ecdsa_sign(SIGNING_KEY, DIGEST)


def commands() -> Iterator[bytes]:
    """Yield the load without end: extends, NV writes and signatures in turn."""
    for number in count():
        content = number.to_bytes(len(DIGEST), "big")
        yield tpm2.pcr_extend(PCRS[number % len(PCRS)], content)
        yield tpm2.nv_write(NV_FIRST + number % NV_WRITTEN, content[-NV_WRITE_BYTES:])
        yield tpm2.ecdsa_sign(SIGNING_KEY, content)


def work(data: DataSocket, duration_s: float) -> None:
    """Send a command every COMMAND_INTERVAL_S; leave the last one unanswered.

    So the guest is stopped while a command runs, which is when that takes longest. BenchError when
    a command failed.
    """
    load = commands()
    due = time.monotonic()
    deadline = due + duration_s
    data.send(next(load))
    while due < deadline:
        check(data.receive())
        due += COMMAND_INTERVAL_S
        time.sleep(max(due - time.monotonic(), 0))
        data.send(next(load))


def check(response: bytes) -> None:
    """Demand that a command of the load succeeded; BenchError when it did not."""
    return_code = tpm2.parse_response(response).return_code
    if return_code != tpm2.ReturnCode.SUCCESS:
        raise BenchError(f"a command of the load was answered {return_code:#x}")
