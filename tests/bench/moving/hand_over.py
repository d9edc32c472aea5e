"""A vTPM's part of stop-and-copy, as QEMU drives it over both control sockets, step by step."""

import socket
import struct
import time
from dataclasses import dataclass
from enum import StrEnum

from tests.support.emulator_client import (
    INIT_DELETE_VOLATILE,
    STATEBLOB_DECRYPTED,
    TPM_RETRY,
    Blob,
    Control,
    ControlClient,
    ControlError,
    DataSocket,
    receive_exactly,
)

ANSWER = struct.Struct(">IIII")  # result, flags, total length, length


class Step(StrEnum):
    """What the guest waits for, in order (QEMU's tpm_emulator.c, pre_save and post_load)."""

    RUNNING_COMMAND = "source: the running command"
    GET_PERMANENT = "source: GET_STATEBLOB permanent"
    GET_VOLATILE = "source: GET_STATEBLOB volatile"
    GET_SAVESTATE = "source: GET_STATEBLOB savestate"
    STOP = "destination: STOP"
    SET_PERMANENT = "destination: SET_STATEBLOB permanent"
    SET_VOLATILE = "destination: SET_STATEBLOB volatile"
    SET_SAVESTATE = "destination: SET_STATEBLOB savestate"
    INIT = "destination: INIT"


GET_STEPS = {
    Blob.PERMANENT: Step.GET_PERMANENT,
    Blob.VOLATILE: Step.GET_VOLATILE,
    Blob.SAVESTATE: Step.GET_SAVESTATE,
}
SET_STEPS = {
    Blob.PERMANENT: Step.SET_PERMANENT,
    Blob.VOLATILE: Step.SET_VOLATILE,
    Blob.SAVESTATE: Step.SET_SAVESTATE,
}


@dataclass(frozen=True, kw_only=True)
class HandOver:
    """One hand-over: how long each step took, what each blob held in bytes.

    `response` is to the command that ran when the guest was stopped; empty when none did.
    """

    steps_us: dict[Step, float]
    blob_bytes: dict[Blob, int]
    response: bytes

    @property
    def share_us(self) -> float:
        """The vTPM's share of the downtime: all steps but the guest's own command."""
        return sum(self.steps_us.values()) - self.steps_us[Step.RUNNING_COMMAND]

    @property
    def moved_bytes(self) -> int:
        """What QEMU's stream carries of the vTPM."""
        return sum(self.blob_bytes.values())


class Stopwatch:
    """Gives the time since it was last asked to a step of a hand-over."""

    def __init__(self) -> None:
        self.steps_us = dict.fromkeys(Step, 0.0)
        self._last_ns = time.perf_counter_ns()

    def finish(self, step: Step) -> None:
        """Note that a step is over and the next one begins."""
        now_ns = time.perf_counter_ns()
        self.steps_us[step] = (now_ns - self._last_ns) / 1000
        self._last_ns = now_ns


def hand_over(
    source: ControlClient, data: DataSocket | None, destination: ControlClient
) -> HandOver:
    """Move a vTPM; return what that took.

    `data` is the source's data socket when a command is running there. What the stream itself takes
    is not counted. ControlError when an emulator answers an error.
    """
    watch = Stopwatch()
    response = b"" if data is None else data.receive()
    watch.finish(Step.RUNNING_COMMAND)
    blobs = {}
    for blob, step in GET_STEPS.items():
        blobs[blob] = _get(source.socket, blob)
        watch.finish(step)
    destination.stop()
    watch.finish(Step.STOP)
    for blob, step in SET_STEPS.items():
        if blobs[blob]:
            _set(destination.socket, blob, blobs[blob])
            watch.finish(step)
    destination.init(INIT_DELETE_VOLATILE)
    watch.finish(Step.INIT)
    blob_bytes = {blob: len(content) for blob, content in blobs.items()}
    return HandOver(steps_us=watch.steps_us, blob_bytes=blob_bytes, response=response)


def _get(control: socket.socket, blob: Blob) -> bytes:
    """Ask for a blob as QEMU does: the answer's header and content are received apart."""
    control.sendall(struct.pack(">IIII", Control.GET_STATEBLOB, STATEBLOB_DECRYPTED, blob, 0))
    result, _, total, length = ANSWER.unpack(receive_exactly(control, ANSWER.size))
    if result not in (0, TPM_RETRY) or total != length:
        raise ControlError(Control.GET_STATEBLOB, result)
    return receive_exactly(control, length)


def _set(control: socket.socket, blob: Blob, content: bytes) -> None:
    """Give a blob as QEMU does: header and content are sent apart."""
    head = (Control.SET_STATEBLOB, STATEBLOB_DECRYPTED, blob, len(content))
    control.sendall(struct.pack(">IIII", *head))
    control.sendall(content)
    result = int.from_bytes(receive_exactly(control, 4), "big")
    if result != 0:
        raise ControlError(Control.SET_STATEBLOB, result)
