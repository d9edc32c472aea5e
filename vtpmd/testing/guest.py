"""A QEMU guest that runs the TPM workload of guest_image, driven over QMP and a serial line."""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qemu.qmp import ExecuteError

from vtpmd.testing import guest_image
from vtpmd.testing.facts import Facts
from vtpmd.testing.monitored import QMP_TIMEOUT_S, Monitored
from vtpmd.testing.program import Program
from vtpmd.testing.workload import COMMAND_TIMEOUT_S, Workload

RESUME_TIMEOUT_S = 20.0
POLL_S = 0.01
MONITORS = ("qmp", "monitor")  # the Guest's own, and one for somebody else

# QEMU before 9.0 (its commit 03bfc2188f06) may lose what a guest under TCG writes as it migrates:
# it clears dirty bits 64 pages at a time, and leaves TCG's TLB as if they were set. Not for memory
# that does not end with such a group: the bits of that are cleared one by one.
ODD_KIB = 8

# The guest needs a TPM, which it finds by ACPI, and two serial ports: all else only costs time.
# What it frees becomes zero, and QEMU migrates zero pages without moving them.
KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet nokaslr mitigations=off random.trust_cpu=on no_timer_check "
    "cryptomgr.notests audit=0 apparmor=0 init_on_free=1"
)
# The guest's time is what it has run for, in ticks: where nothing lets QEMU run for a second, none
# of it is gone, as ticks that were missed are not made up for. By another clock Linux finds then
# that a command has taken longer than it may (750 ms for PCR_Extend, 2 s for NV_Read:
# tpm2_ordinal_duration_index() in drivers/char/tpm/tpm2-cmd.c) and gives up, without looking once
# more whether the answer has come (tpm_try_transmit() in tpm-interface.c). It waits as long as ever
# for an answer that does not come.
CLOCK_OF_TICKS = " clocksource=jiffies nohz=off highres=off"
# The kernel leaves the TPM alone then, and says no TPM2_Shutdown before it sleeps: the guest's last
# word to its TPM is the workload's, which reaches the registers through /dev/mem.
WITHOUT_DRIVER = " initcall_blacklist=init_tis iomem=relaxed TPM=/dev/mem"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What QEMU is told to emulate; both sides of a migration must agree on it."""

    qemu: str = "qemu-system-x86_64"
    tpm_model: str = "tpm-tis"
    machine: str = "q35"
    memory_mib: int = 96  # the smallest round number that the kernel boots with
    disk: Path | None = None  # a qcow2 image that snapshots are saved in
    image: Path | None = None  # by default the one that guest_image.find() does
    has_tpm_driver: bool = True  # False: the workload has the TPM's registers for itself
    counts_ticks: bool = True  # False where time is measured: a tick is 4 ms, and some are missed
    extra_arguments: Sequence[str] = field(default=())
    started_through: Sequence[str] = field(default=())  # a program that runs QEMU in its place


def tpm_arguments(control_path: Path, model: str = "tpm-tis") -> list[str]:
    """Return the words by which a QEMU has the TPM that is served on a control socket."""
    arguments = ["-chardev", f"socket,id=tpmctl,path={control_path}"]
    arguments += ["-tpmdev", "emulator,id=tpm0,chardev=tpmctl"]
    return [*arguments, "-device", f"{model},tpmdev=tpm0"]


def _arguments(machine: Machine, directory: Path, control_path: Path) -> list[str | Path]:
    arguments: list[str | Path] = [*machine.started_through, machine.qemu]
    arguments += ["-accel", "tcg", "-cpu", "qemu64"]
    memory_kib = machine.memory_mib * 1024 + ODD_KIB
    arguments += ["-machine", machine.machine, "-m", f"{memory_kib}K"]
    arguments += ["-nodefaults", "-no-user-config", "-display", "none"]
    image = machine.image or guest_image.find()
    arguments += ["-kernel", image / guest_image.KERNEL, "-initrd", image / guest_image.INITRAMFS]
    clock = CLOCK_OF_TICKS if machine.counts_ticks else ""
    driver = "" if machine.has_tpm_driver else WITHOUT_DRIVER
    arguments += ["-append", KERNEL_COMMAND_LINE + clock + driver]
    for name in MONITORS:
        arguments += ["-qmp", f"unix:{directory / name},server=on,wait=off"]
    arguments += ["-chardev", f"file,id=console,path={directory / 'console'}"]
    arguments += ["-serial", "chardev:console"]
    arguments += ["-chardev", f"socket,id=work,path={directory / 'work'}"]
    arguments += ["-serial", "chardev:work"]
    arguments += tpm_arguments(control_path, machine.tpm_model)
    if machine.disk is not None:
        arguments += ["-drive", f"if=none,id=snapshots,format=qcow2,file={machine.disk}"]
    return [*arguments, *machine.extra_arguments]


class Guest(Monitored):
    """A QEMU process and the workload inside it.

    `qmp` works at once; the workload's commands work after `wait_for_workload`, or when the guest
    came in by migration. At `monitor_path` is another monitor, for a client of your own.
    """

    def __init__(
        self,
        directory: Path,
        control_path: Path,
        machine: Machine,
        extra_arguments: Sequence[str] = (),
        network: Path | None = None,
    ) -> None:
        """Start QEMU, with the TPM that an emulator serves on `control_path`.

        `directory` is the guest's own, short as socket paths must be; `network` is the network
        namespace that QEMU has. RuntimeError when QEMU ends instead; the message has its output.
        """
        directory.mkdir(exist_ok=True)
        self.machine = machine
        self._console = directory / "console"
        arguments = _arguments(machine, directory, control_path)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "work"))
            listener.listen(1)
            program = Program("qemu", [*arguments, *extra_arguments], directory, network)
            self._workload = Workload(program.accept(listener), lambda: program.output)
        super().__init__(program, directory / "qmp")
        self.monitor_path = directory / "monitor"

    def close(self) -> None:
        """End QEMU, if it still runs, and the connections to it."""
        super().close()
        self._workload.close()

    @property
    def console(self) -> str:
        """What the guest's kernel has written to its console."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def wait_for_event(self, name: str) -> None:
        """Wait until QEMU's monitor has said an event, or take one that it has; TimeoutError."""
        while (event := self.monitor.pull_event(wait=QMP_TIMEOUT_S)) is not None:
            if event["event"] == name:
                return

    def pause(self) -> None:
        """Stop the guest's processors."""
        self.qmp("stop")

    def resume(self) -> None:
        """Let the guest's processors run, as soon as QEMU has done with a migration."""
        deadline_s = time.monotonic() + RESUME_TIMEOUT_S
        while True:
            try:
                self.qmp("cont")
                return
            except ExecuteError as error:
                if "not finalized" not in str(error) or time.monotonic() > deadline_s:
                    raise
            time.sleep(POLL_S)

    def wait_for_workload(self) -> None:
        """Wait until the guest has booted and the workload says that it is ready."""
        self._workload.wait_until_ready()

    def set_up(self) -> None:
        """Wait for the workload, and let it set up the TPM and use it."""
        self.wait_for_workload()
        self.command("setup")
        self.command("work 30")

    def command(self, line: str) -> Facts:
        """Send the workload a command; return the facts in its answer, or raise as it does."""
        return self._workload.command(line)

    def fall_asleep(self) -> None:
        """Have the guest suspend to RAM, and wait until it has."""
        self._workload.send("sleep")
        self._wait_for_status("suspended")

    def wake_up(self) -> None:
        """Wake the guest up, unless QEMU has, and wait until its kernel is back."""
        if self.status == "suspended":
            self.qmp("system_wakeup")
        self._workload.receive("sleep")

    def _wait_for_status(self, wanted: str) -> None:
        deadline_s = time.monotonic() + COMMAND_TIMEOUT_S
        while (status := self.status) != wanted:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the guest is still {status}; its console: {self.console}")
            time.sleep(POLL_S)

    def check(self) -> Facts:
        """Let the workload check everything; return what it found."""
        return self._workload.check()
