"""What is compared: emulators with the same state, and a bare append beside them."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.bench import programs
from tests.bench.chapters.round_trip import Operation
from tests.bench.emulators import (
    SWTPM,
    VTPMD,
    BenchError,
    Emulator,
    child_processes,
    running,
)
from tests.support import tpm2
from tests.support.emulator_client import ControlClient, DataSocket

BUILD = programs.BUILD
APPEND = "append"
APPEND_END_TIMEOUT_S = 30
KEY_BYTES = 32
STATE_FILE = "state/tpm2-00.permall"
FIRST_INDEX = tpm2.Handle.NV_FIRST + 0x50_0000
NUMBER, BLOCK, COUNTER = range(FIRST_INDEX, FIRST_INDEX + 3)
FIRST_FILLER = FIRST_INDEX + 0x100
FILLER_BYTES = 2048  # the most that libtpms allows
NUMBER_BYTES = 8
BLOCK_BYTES = tpm2.NV_CHUNK_BYTES_MAX


def _synced_swtpm_command(state: Path, control: Path) -> list[str]:
    preload = f"LD_PRELOAD={programs.build_preload('synced', BUILD)}"
    return ["env", preload, *SWTPM.command(state, control)]


def _sealed_vtpmd_command(state: Path, control: Path) -> list[str]:
    key = BUILD / "key"
    key.write_text(f"{bytes(KEY_BYTES).hex()}\n")
    return [*VTPMD.command(state, control), "--key", f"file={key},mode=aes-256-cbc"]


# Debian's swtpm does not sync. This one does, as swtpm's source has it (see synced.c).
SYNCED_SWTPM = Emulator(name="swtpm synced", command=_synced_swtpm_command)
SEALED_VTPMD = Emulator(name="vtpmd sealed", command=_sealed_vtpmd_command)
REFERENCES = (SWTPM, SYNCED_SWTPM)
OURS = (VTPMD, SEALED_VTPMD)
EMULATORS = (*REFERENCES, *OURS)


class Size(StrEnum):
    """How much permanent state there is."""

    SMALL = "2 KB"
    MEDIUM = "85 KB"
    LARGE = "140 KB"


FILLERS = {Size.SMALL: 0, Size.MEDIUM: 40, Size.LARGE: 66}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An emulator that has been started, or the append: its data socket and what writes for it."""

    name: str
    data: DataSocket
    pid: int


def writes(name: str, index: int, n_bytes: int) -> Operation:
    """Return the operation that writes an index with two contents in turn."""
    contents = [bytes([value]) * n_bytes for value in (0x55, 0xAA)]
    commands, others = ([tpm2.nv_write(index, content)] for content in contents)
    return Operation(name=name, commands=commands, others=others)


OPERATIONS = (
    writes(f"NV_Write, {NUMBER_BYTES} B", NUMBER, NUMBER_BYTES),
    writes(f"NV_Write, {BLOCK_BYTES} B", BLOCK, BLOCK_BYTES),
    Operation(name="NV_Increment", commands=[tpm2.nv_increment(COUNTER)]),
)


def prepare(emulator: Emulator, directory: Path, size: Size) -> Path:
    """Make a TPM of a size; return its state file, which other emulators read, too."""
    with running(emulator, directory) as started:
        started.connect().close()
        with ControlClient(started.control) as control:
            data = control.attach_data()
            control.init()
            tpm = tpm2.Tpm(data.transact)
            tpm.startup()
            tpm.nv_define(NUMBER, NUMBER_BYTES)
            tpm.nv_define(BLOCK, BLOCK_BYTES)
            tpm.nv_define(COUNTER, NUMBER_BYTES, tpm2.NV_COUNTER)
            for index in range(FIRST_FILLER, FIRST_FILLER + FILLERS[size]):
                tpm.nv_define(index, FILLER_BYTES)
                tpm.nv_write(index, bytes(FILLER_BYTES))
            for operation in OPERATIONS:
                tpm.execute(operation.commands[0])
    return directory / STATE_FILE


def plain_state(directory: Path) -> Path:
    """Return the state in the clear that subjects in a directory started from copies of."""
    return directory / "plain" / STATE_FILE


@contextmanager
def powered_on(emulator: Emulator, directory: Path, state_file: Path) -> Iterator[Subject]:
    """Run an emulator on a copy of a state."""
    state = directory / "state"
    state.mkdir(parents=True)
    shutil.copy(state_file, state)
    with running(emulator, directory) as started:
        started.connect().close()
        with ControlClient(started.control) as control:
            data = control.attach_data()
            control.init()
            tpm2.Tpm(data.transact).startup()
            # Of a vtpmd it is the engine that writes.
            (pid,) = child_processes(started.process.pid) or [started.process.pid]
            yield Subject(name=emulator.name, data=data, pid=pid)


@contextmanager
def appending(directory: Path) -> Iterator[Subject]:
    """Run what appends and syncs; BenchError when it does not end as it should."""
    program = programs.build(APPEND, BUILD)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen([program, directory / APPEND], stdin=theirs.fileno())
        theirs.close()
        try:
            yield Subject(name=APPEND, data=DataSocket(ours), pid=process.pid)
        finally:
            ours.close()
            status = process.wait(APPEND_END_TIMEOUT_S)
    if status != 0:
        raise BenchError(f"{APPEND} ended with status {status}; see above")


@contextmanager
def all_subjects(directory: Path, size: Size) -> Iterator[list[Subject]]:
    """Run all emulators on states of a size, and the append beside them."""
    plain = prepare(VTPMD, directory / "plain", size)
    sealed = prepare(SEALED_VTPMD, directory / "sealed", size)
    with ExitStack() as stack:
        subjects = []
        for emulator in EMULATORS:
            state_file = sealed if emulator is SEALED_VTPMD else plain
            powered = powered_on(emulator, directory / emulator.name, state_file)
            subjects.append(stack.enter_context(powered))
        subjects.append(stack.enter_context(appending(directory)))
        for subject in subjects:
            subject.data.socket.setblocking(True)  # the C client sets its own time limit
        yield subjects
