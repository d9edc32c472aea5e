"""A blocking client of the emulator's control channel and data socket, as QEMU is one.

Works with swtpm and vtpmd alike. It checks nothing that the emulator should check: bytes go out as
given, so tests can also send what is wrong. Layouts: `docs/control-channel.md`, QEMU's tpm_ioctl.h.
"""

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from vtpmd.closing import Closing
from vtpmd.testing.sockets import TIMEOUT_S, connect

RESPONSE_BYTES_MAX = 4096  # QEMU's TIS has room for no more


class Control(IntEnum):
    """Numbers of the control commands."""

    GET_CAPABILITY = 1
    INIT = 2
    SHUTDOWN = 3
    GET_TPMESTABLISHED = 4
    SET_LOCALITY = 5
    HASH_START = 6
    HASH_DATA = 7
    HASH_END = 8
    CANCEL_TPM_CMD = 9
    STORE_VOLATILE = 10
    RESET_TPMESTABLISHED = 11
    GET_STATEBLOB = 12
    SET_STATEBLOB = 13
    STOP = 14
    GET_CONFIG = 15
    SET_DATAFD = 16
    SET_BUFFERSIZE = 17
    GET_INFO = 18
    LOCK_STORAGE = 19


class Blob(IntEnum):
    """Types of state blob."""

    PERMANENT = 1
    VOLATILE = 2
    SAVESTATE = 3


INIT_DELETE_VOLATILE = 1
STATEBLOB_DECRYPTED = 1
TPM_RETRY = 0x800


class ControlError(Exception):
    """The emulator answered a control command with an error."""

    def __init__(self, control: int, result: int) -> None:
        super().__init__(f"control command {Control(control).name} answered {result:#x}")
        self.control = control
        self.result = result


@dataclass(frozen=True, kw_only=True)
class BufferSize:
    """The answer to SET_BUFFERSIZE, in bytes."""

    current: int
    smallest: int
    largest: int


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Receive `size` bytes; ConnectionError when the peer closes before, TimeoutError when late."""
    received = bytearray()
    while len(received) < size:
        piece = sock.recv(size - len(received))
        if not piece:
            raise ConnectionError(f"the peer closed after {len(received)} of {size} bytes")
        received += piece
    return bytes(received)


class DataSocket:
    """The test's end of the data socket that SET_DATAFD gave to the emulator."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def transact(self, command: bytes) -> bytes:
        """Send a command and return its response, taken by the length in the response's header."""
        self.send(command)
        return self.receive()

    def send(self, command: bytes) -> None:
        """Send a command without waiting for its response."""
        self.socket.sendall(command)

    def receive(self) -> bytes:
        """Return one response; ConnectionError when the emulator closes the socket."""
        header = receive_exactly(self.socket, 10)
        size = int.from_bytes(header[2:6], "big")
        if not len(header) <= size <= RESPONSE_BYTES_MAX:
            raise ValueError(f"a response of {size} bytes is announced")
        return header + receive_exactly(self.socket, size - len(header))

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class ControlClient(Closing):
    """One connection to an emulator's control socket.

    Methods named after control commands raise ControlError when the result is not 0, and
    ConnectionError or TimeoutError when the emulator closes or does not answer.
    """

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S) -> None:
        self.socket = connect(path, timeout_s)
        self._data: list[DataSocket] = []

    def close(self) -> None:
        """Close the control connection and the data sockets made with it."""
        for data in self._data:
            data.close()
        self.socket.close()

    def request(self, control: int, body: bytes = b"") -> int:
        """Send a command and return the result; the caller receives the response's body."""
        self.socket.sendall(struct.pack(">I", control) + body)
        return int.from_bytes(receive_exactly(self.socket, 4), "big")

    def receive(self, size: int) -> bytes:
        """Receive `size` bytes of a response's body."""
        return receive_exactly(self.socket, size)

    def checked(self, control: int, body: bytes = b"", response_size: int = 0) -> bytes:
        """Send a command, demand result 0 and return the response's body of a fixed size."""
        result = self.request(control, body)
        if result != 0:
            raise ControlError(control, result)
        return self.receive(response_size)

    def get_capability(self) -> int:
        """Return the capability flags; all eight bytes of the answer, as QEMU reads them."""
        self.socket.sendall(struct.pack(">I", Control.GET_CAPABILITY))
        return int.from_bytes(self.receive(8), "big")

    def init(self, flags: int = 0) -> None:
        """Power the TPM on."""
        self.checked(Control.INIT, struct.pack(">I", flags))

    def shutdown(self) -> None:
        """Ask the emulator to end."""
        self.checked(Control.SHUTDOWN)

    def stop(self) -> None:
        """Power the TPM off."""
        self.checked(Control.STOP)

    def get_established(self) -> bool:
        """Return the TPM established bit."""
        return bool(self.checked(Control.GET_TPMESTABLISHED, response_size=4)[0])

    def reset_established(self, locality: int) -> None:
        """Reset the TPM established bit, as from a locality."""
        self.checked(Control.RESET_TPMESTABLISHED, struct.pack(">Bxxx", locality))

    def set_locality(self, locality: int) -> None:
        """Set the locality of the commands that follow; four bytes go out, as QEMU sends them."""
        self.checked(Control.SET_LOCALITY, struct.pack(">Bxxx", locality))

    def hash_start(self) -> None:
        """Begin an H-CRTM event sequence."""
        self.checked(Control.HASH_START)

    def hash_data(self, data: bytes) -> None:
        """Add data to the H-CRTM event sequence."""
        self.checked(Control.HASH_DATA, struct.pack(">I", len(data)) + data)

    def hash_end(self) -> None:
        """End the H-CRTM event sequence: its digest goes into PCR 0."""
        self.checked(Control.HASH_END)

    def cancel(self) -> None:
        """Ask that the running TPM command be cancelled."""
        self.checked(Control.CANCEL_TPM_CMD)

    def store_volatile(self) -> None:
        """Write volatile state to the state directory."""
        self.checked(Control.STORE_VOLATILE)

    def get_state_blob(
        self, blob: Blob, flags: int = STATEBLOB_DECRYPTED, offset: int = 0
    ) -> bytes:
        """Return a state blob from `offset` to its end; empty when there is none of that type.

        swtpm answers TPM_RETRY for a blob that is not there, which QEMU takes as an empty blob.
        """
        result = self.request(Control.GET_STATEBLOB, struct.pack(">III", flags, blob, offset))
        if result not in (0, TPM_RETRY):
            raise ControlError(Control.GET_STATEBLOB, result)
        _, total, length = struct.unpack(">III", self.receive(12))
        content = self.receive(length)
        if length and offset + length != total:
            raise ValueError(f"{offset} + {length} of {total} bytes of the {blob.name} blob came")
        return content

    def set_state_blob(self, blob: Blob, content: bytes, flags: int = STATEBLOB_DECRYPTED) -> None:
        """Give the emulator a state blob; the TPM must be stopped."""
        body = struct.pack(">III", flags, blob, len(content)) + content
        self.checked(Control.SET_STATEBLOB, body)

    def get_config(self) -> int:
        """Return the configuration flags: 1 a file key, 2 a migration key."""
        return int.from_bytes(self.checked(Control.GET_CONFIG, response_size=4), "big")

    def set_buffer_size(self, size: int = 0) -> BufferSize:
        """Set the size of the command buffer, or with 0 only ask."""
        answer = self.checked(Control.SET_BUFFERSIZE, struct.pack(">I", size), response_size=12)
        current, smallest, largest = struct.unpack(">III", answer)
        return BufferSize(current=current, smallest=smallest, largest=largest)

    def get_info(self, flags: int = 7) -> str:
        """Return the JSON text that describes the TPM."""
        body = struct.pack(">QII", flags, 0, 0)
        _, length = struct.unpack(">II", self.checked(Control.GET_INFO, body, response_size=8))
        return self.receive(length).rstrip(b"\0").decode()

    def lock_storage(self, retries: int = 300) -> None:
        """Take the state directory's lock again."""
        self.checked(Control.LOCK_STORAGE, struct.pack(">I", retries))

    def attach_data(self, timeout_s: float = TIMEOUT_S) -> DataSocket:
        """Give the emulator one end of a new socket pair; return the other as the data socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            ours.settimeout(timeout_s)
            socket.send_fds(self.socket, [struct.pack(">I", Control.SET_DATAFD)], [theirs.fileno()])
            data = DataSocket(ours)
            self._data.append(data)
            result = int.from_bytes(self.receive(4), "big")
        if result != 0:
            raise ControlError(Control.SET_DATAFD, result)
        return data
