"""A host that guests move from and to: its vtpmd, and its QEMU where there is one."""

from dataclasses import replace
from pathlib import Path

from vtpmd.testing import migration
from vtpmd.testing.emulator import Emulator, Peering
from vtpmd.testing.guest import Guest, Machine
from vtpmd.testing.lab import Lab
from vtpmd.testing.management import Management
from vtpmd.testing.waiting import wait_until


class Host:
    """A vtpmd, which runs from the beginning, and a QEMU, if there is one."""

    def __init__(self, name: str, lab: Lab, peering: Peering, state: Path | None = None) -> None:
        """Start vtpmd on a state directory, by default a new one; `name` is for people.

        RuntimeError when it does not start.
        """
        self.name = name
        self.lab = lab
        self.state = state or lab.new_path("state")
        self.guest: Guest | None = None
        self._peering = peering
        self.start_vtpmd()

    @property
    def peer_address(self) -> str:
        """Where the other host's vtpmd finds this one's, for migrate-arm."""
        return self.vtpmd.address

    @property
    def is_serving(self) -> bool:
        """Whether vtpmd and its engine live."""
        return self.vtpmd.program.exit_code is None and bool(self.vtpmd.engines())

    def start_vtpmd(self) -> None:
        """Start vtpmd, the first time or again, on the state directory that there is."""
        self.vtpmd: Emulator = self.lab.peer(self._peering, self.state)
        self.manage: Management = self.lab.management(self.vtpmd)
        self._peering = replace(self._peering, port=self.vtpmd.port)  # it is found there again

    def restart_vtpmd(self) -> None:
        """Start vtpmd where it has ended, or lost its engine, as a supervisor does.

        An engine that lives is attached to. A QEMU that was connected to another has lost its TPM,
        and is killed.
        """
        if self.vtpmd.program.exit_code is not None and self.vtpmd.engines():
            self.vtpmd.attach()
            self.manage = self.lab.management(self.vtpmd)
            return
        self.close_guest()
        self.vtpmd.kill()
        self.start_vtpmd()

    def start_guest(self, machine: Machine, *arguments: str) -> Guest:
        """Start QEMU, in place of one that was there; return when vtpmd follows its monitor."""
        self.close_guest()
        self.guest = self.lab.guest(self.vtpmd, machine, arguments)
        wait_until(lambda: self.manage.command("query-status")["qemu"] == "following")
        return self.guest

    def boot_guest(self, machine: Machine) -> Guest:
        """Start QEMU with a guest, and wait until that has set up its TPM and used it."""
        guest = self.start_guest(machine)
        guest.set_up()
        return guest

    def await_guest(self, machine: Machine, *arguments: str) -> Guest:
        """Start a QEMU that waits for a guest to come in."""
        guest = self.start_guest(machine, *migration.INCOMING, *arguments)
        migration.set_capabilities(guest)
        return guest

    def listen(self) -> str:
        """Let the QEMU that awaits a guest listen; return the URI for the source's."""
        assert self.guest is not None
        return migration.listen_unix(self.guest, self.lab.new_path("stream"))

    def close_guest(self) -> None:
        """End QEMU, if there is one."""
        if self.guest is not None:
            self.guest.close()
            self.guest = None

    def has_guest(self) -> bool:
        """Whether a QEMU lives, with a guest or waiting for one."""
        return self.guest is not None and self.guest.program.exit_code is None

    def close(self) -> None:
        """End QEMU and vtpmd, in order; killed ones have ended already."""
        self.close_guest()
        if self.vtpmd.program.exit_code is None:
            self.vtpmd.stop()
        self.vtpmd.kill()
