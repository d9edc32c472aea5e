"""Two hosts on this machine between which a guest moves: a vtpmd each, and a QEMU where one is.

The link by which one vtpmd reaches the other can be cut at a message (`link.py`). Memory goes from
QEMU to QEMU over a UNIX socket. It needs no privileges, except where disks are to lose power.
"""

from vtpmd.closing import Closing
from vtpmd.testing import outcome
from vtpmd.testing.credentials import credentials
from vtpmd.testing.disk import Disk
from vtpmd.testing.emulator import Peering
from vtpmd.testing.faults import MESSAGES, Message
from vtpmd.testing.guest import Guest, Machine
from vtpmd.testing.host import Host
from vtpmd.testing.lab import Lab
from vtpmd.testing.link import Cut, Ending, MessageLink
from vtpmd.testing.logged import Logged
from vtpmd.testing.moves import Move, move


class LocalHost(Host):
    """One of two on this machine, with a link before it and perhaps a disk of its own."""

    def __init__(self, name: str, lab: Lab, disk: Disk | None = None) -> None:
        """Start vtpmd, with its state directory on the disk if there is one."""
        state = None if disk is None else disk.path / "state"
        peering = Peering(credentials=credentials(), follows_qemu=True)
        super().__init__(name, lab, peering, state)
        self.disk = disk
        self.link = lab.link(self.vtpmd, MessageLink)

    @property
    def peer_address(self) -> str:
        """Where its end of the link is."""
        return self.link.address

    def lose_power(self) -> None:
        """Lose all that has not reached the disk, and all processes. It needs a disk of its own."""
        if self.disk is None:
            raise ValueError(f"host {self.name} has no disk that loses power: on_disks=True has")
        self.disk.lose_power()
        self.vtpmd.kill()
        self.close_guest()

    def restore_power(self) -> None:
        """Bring the disk back, as a start of the host does, and start vtpmd on what is there."""
        assert self.disk is not None
        self.disk.repair()
        self.restart_vtpmd()


class Hosts(Closing, Logged):
    """Host `a`, where guests begin, and host `b`."""

    def __init__(self, machine: Machine | None = None, *, on_disks: bool = False) -> None:
        """Start a vtpmd on each. Guests are such a `machine`; b's QEMU is started to move one.

        With `on_disks` each host can lose power. That needs root, zram and ext4: OSError without.
        RuntimeError when a vtpmd does not start.
        """
        self.machine = machine or Machine()
        self._lab = Lab()
        try:
            # Disks first: mounts are for what is started after them.
            disks = [self._lab.new_power_disk() if on_disks else None for _ in range(2)]
            self.a, self.b = (
                LocalHost(name, self._lab, disk) for name, disk in zip("ab", disks, strict=True)
            )
        except BaseException:
            self._lab.close()
            raise

    def close(self) -> None:
        """End all that was started, and remove its files."""
        self._lab.close()

    def logs(self) -> list[tuple[str, str]]:
        """Return a title and the end of the text of each log there is."""
        return self._lab.logs()

    def boot(self) -> Guest:
        """Boot a guest at host a; return when it has set up its TPM and used it."""
        return self.a.boot_guest(self.machine)

    def migrate(
        self, source: Host | None = None, destination: Host | None = None, *, armed: bool = True
    ) -> Move:
        """Move the guest, by default from a to b; return what was measured when it runs there.

        `armed`: vtpmd hands the vTPM over; else QEMU's stream carries all of it, as with swtpm.
        migration.MigrationFailedError when QEMU gives up; `settle` finds out where the guest is.
        """
        return move(source or self.a, destination or self.b, armed=armed)

    def cut_link(self, at: Message, ending: Ending = Ending.RESET) -> None:
        """Plan to cut the link that leads to host b, once, when a message is about to pass.

        With Ending.SILENCE nobody is told, and nothing gets through until `b.link.heal()`.
        `b.link.was_cut` is set when it has come.
        """
        self.b.link.cut_at(Cut(before=MESSAGES[at], ending=ending))

    def settle(self) -> Host:
        """Do what a supervisor does after a fault; return the host where the guest has gone on.

        A vtpmd that has ended is started; QEMU decides; the guest goes on where it is, and the
        other's QEMU is ended. outcome.GuestLostError when no QEMU has the guest.
        """
        for host in (self.a, self.b):
            if not host.is_serving:
                host.restart_vtpmd()
        outcome.wait_until_decided(self.a, self.b)
        return outcome.go_on(self.a, self.b)
