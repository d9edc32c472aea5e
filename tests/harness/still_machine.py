"""A QEMU whose processors stand still: the test is its guest, by the registers of its TPM.

QEMU has a socket for its own tests that reads and writes what its processors would (`-qtest`,
docs/devel/testing in its tree). So tpm-tis, QEMU's backend and its migration are the real ones, and
a machine costs a tenth of a second.
"""

import time
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from pathlib import Path

from vtpmd.testing.guest import Machine, tpm_arguments
from vtpmd.testing.monitored import Monitored
from vtpmd.testing.program import STOP_TIMEOUT_S, Program

MEMORY_MIB = 8  # nothing runs in it
COMMAND_TIMEOUT_S = 30.0
POLL_S = 0.001
TPM_HEADER_BYTES = 10
RESPONSE_BYTES_MAX = 4096


class Register(IntEnum):
    """Where the registers of locality 0 are (TCG PC Client Platform TPM Profile, 6.3)."""

    ACCESS = 0xFED4_0000
    STATUS = 0xFED4_0018
    DATA_FIFO = 0xFED4_0024


class Access(IntFlag):
    """Bits of the access register."""

    REQUEST_USE = 0x02
    ACTIVE_LOCALITY = 0x20


class Status(IntFlag):
    """Bits of the status register."""

    DATA_AVAILABLE = 0x10
    GO = 0x20
    COMMAND_READY = 0x40


class StillMachine(Monitored):
    """A QEMU process with a TPM that an emulator serves, and no guest."""

    def __init__(
        self, directory: Path, control_path: Path, extra_arguments: Sequence[str] = ()
    ) -> None:
        """Start QEMU, which powers the TPM on unless it waits for a migration.

        `directory` is the machine's own, short as socket paths must be. RuntimeError when QEMU ends
        instead; the message has its output.
        """
        directory.mkdir()
        self.machine = Machine(memory_mib=MEMORY_MIB)
        arguments: list[str | Path] = ["qemu-system-x86_64", "-accel", "tcg", "-S"]
        arguments += ["-machine", self.machine.machine, "-m", f"{MEMORY_MIB}M"]
        arguments += ["-nodefaults", "-no-user-config", "-display", "none"]
        arguments += ["-qtest", f"unix:{directory / 'registers'},server=on,wait=off"]
        arguments += ["-qtest-log", "/dev/null"]
        arguments += ["-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"]
        arguments += tpm_arguments(control_path, self.machine.tpm_model)
        program = Program("qemu", [*arguments, *extra_arguments], directory)
        super().__init__(program, directory / "qmp")
        self._registers = program.connect(directory / "registers")
        self._registers.settimeout(COMMAND_TIMEOUT_S)
        self._answers = self._registers.makefile()

    def close(self) -> None:
        """End QEMU, if it still runs, and the connections to it."""
        super().close()
        self._answers.close()
        self._registers.close()

    def quit(self) -> None:
        """Have QEMU end in order, and tell the TPM's emulator so; return when it has ended."""
        self.qmp("quit")
        self.program.wait(STOP_TIMEOUT_S)

    def transact(self, command: bytes) -> bytes:
        """Have the TPM run a command, as a driver does; return its response."""
        self._write(Register.ACCESS, Access.REQUEST_USE)
        self._wait(Register.ACCESS, Access.ACTIVE_LOCALITY)
        self._write(Register.STATUS, Status.COMMAND_READY)
        self._wait(Register.STATUS, Status.COMMAND_READY)
        self._write(Register.DATA_FIFO, *command)
        self._write(Register.STATUS, Status.GO)
        self._wait(Register.STATUS, Status.DATA_AVAILABLE)
        header = self._read(Register.DATA_FIFO, TPM_HEADER_BYTES)
        size = int.from_bytes(header[2:6], "big")
        if not TPM_HEADER_BYTES <= size <= RESPONSE_BYTES_MAX:
            raise ValueError(f"a response of {size} bytes is announced")
        return header + self._read(Register.DATA_FIFO, size - TPM_HEADER_BYTES)

    def _wait(self, register: Register, bit: int) -> None:
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while not self._read(register, 1)[0] & bit:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the TPM's {register.name} has not got {bit:#x}")
            time.sleep(POLL_S)

    def _write(self, register: Register, *values: int) -> None:
        """Write bytes to a register, one after the other."""
        self._ask([f"writeb {register:#x} {value:#x}" for value in values])

    def _read(self, register: Register, count: int) -> bytes:
        """Read a register that often."""
        answers = self._ask([f"readb {register:#x}"] * count)
        return bytes(int(answer.split()[1], 16) for answer in answers)

    def _ask(self, lines: Sequence[str]) -> list[str]:
        """Send lines; return QEMU's answers, which are all OK."""
        self._registers.sendall("".join(f"{line}\n" for line in lines).encode())
        answers = [self._answers.readline() for _ in lines]
        if wrong := [answer for answer in answers if not answer.startswith("OK")]:
            raise ConnectionError(f"QEMU answers {wrong[0]!r} and says {self.program.output}")
        return answers
