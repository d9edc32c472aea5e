"""A proxy on an emulator's control socket that acts when a chosen control command passes."""

import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from tests.support.emulator_client import Control
from vtpmd.testing.emulator import Emulator
from vtpmd.testing.sockets import connect

RECEIVE_BYTES_MAX = 1 << 16
DESCRIPTORS_MAX = 4
BLOB_HEADER = struct.Struct(">IIII")  # SET_STATEBLOB: the command, flags, type, length


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """When to act, and how: the connection to both sides is cut after `action` has returned.

    `occurrence` counts the commands of that number from 1. `answered` waits until the emulator has
    answered, which the client never hears: it might be done before the action is. Without it the
    command never reaches the emulator.
    """

    control: Control
    occurrence: int = 1
    answered: bool = False
    action: Callable[[], None]


class ControlProxy:
    """Forward one client's control connection, descriptors included, until the trigger.

    A client waits for an answer before it sends again: so the first bytes after an answer begin a
    command, and the proxy needs to know nothing else of the protocol.
    """

    def __init__(self, control_path: Path, emulator: Emulator, trigger: Trigger) -> None:
        """Listen on `control_path` in the emulator's place."""
        self.control_path = control_path
        self.qmp_path = emulator.qmp_path
        self.seen: list[int] = []
        self.triggered = threading.Event()
        self._emulator_path = emulator.control_path
        self._trigger = trigger
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(control_path))
        self._listener.listen(1)
        self._stop_receiver, self._stop_sender = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """Cut the connection, and end the proxy."""
        self._stop_sender.close()
        self._thread.join()
        self._stop_receiver.close()
        self._listener.close()

    def _serve(self) -> None:
        readable = wait([self._listener, self._stop_receiver])
        if self._stop_receiver in readable:
            return
        client, _ = self._listener.accept()
        with client, connect(self._emulator_path) as emulator:
            self._forward(client, emulator)

    def _forward(self, client: socket.socket, emulator: socket.socket) -> None:
        answered = True
        while True:
            sockets = [client, emulator, self._stop_receiver]
            readable = wait(sockets)
            if self._stop_receiver in readable:
                break
            from_client = client in readable
            source, target = (client, emulator) if from_client else (emulator, client)
            data, descriptors = _receive(source)
            if not data:
                break
            begins, answered = from_client and answered, not from_client
            if begins:
                self.seen.append(int.from_bytes(data[:4], "big"))
                data = self._passed_on(client, data)
                answered = not data
                if answered:
                    continue
            if self._is_time(after_answer=not from_client):
                self._act(descriptors)
                break
            _send(target, data, descriptors)

    def _passed_on(self, client: socket.socket, data: bytes) -> bytes:
        """Return what is sent in a command's place; b"": it is answered here."""
        del client
        return data

    def _is_time(self, *, after_answer: bool) -> bool:
        return (
            self._trigger.answered is after_answer
            and self.seen[-1:] == [self._trigger.control]
            and self.seen.count(self._trigger.control) == self._trigger.occurrence
        )

    def _act(self, descriptors: list[int]) -> None:
        _close(descriptors)
        self._trigger.action()
        self.triggered.set()


class WithholdingProxy(ControlProxy):
    """Keep from an emulator what QEMU's stream has of its TPM.

    That resumes from its own directory: what came beside the guest's memory, by another way.
    """

    def __init__(self, control_path: Path, emulator: Emulator) -> None:
        """Listen on `control_path` in the emulator's place."""
        never = Trigger(control=Control.SHUTDOWN, occurrence=0, action=lambda: None)
        super().__init__(control_path, emulator, never)

    def _passed_on(self, client: socket.socket, data: bytes) -> bytes:
        if self.seen[-1] == Control.INIT:
            return struct.pack(">II", Control.INIT, 0)  # and its volatile state is not deleted
        if self.seen[-1] != Control.SET_STATEBLOB:
            return data
        while len(data) < BLOB_HEADER.size or (
            len(data) < BLOB_HEADER.size + BLOB_HEADER.unpack_from(data)[3]
        ):
            more, _ = _receive(client)
            if not more:
                break
            data += more
        client.sendall(bytes(4))  # success
        return b""


def _receive(source: socket.socket) -> tuple[bytes, list[int]]:
    try:
        data, descriptors, _, _ = socket.recv_fds(source, RECEIVE_BYTES_MAX, DESCRIPTORS_MAX)
    except ConnectionResetError:
        return b"", []  # killed: the same as an orderly end here
    return data, descriptors


def _send(target: socket.socket, data: bytes, descriptors: list[int]) -> None:
    try:
        socket.send_fds(target, [data], descriptors)
    except BrokenPipeError:
        pass  # killed: the next receive says so
    finally:
        _close(descriptors)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
