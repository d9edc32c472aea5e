"""Everything that one test runs, clients in QEMU's place among them."""

from tests.harness.proxy import ControlProxy, Trigger
from tests.harness.raw_guest import RawGuest
from vtpmd.testing import lab
from vtpmd.testing.emulator import Emulator
from vtpmd.testing.lab import ForGuests


class Lab(lab.Lab):
    """The plugin's, and what only the tests of vtpmd itself start."""

    def raw_guest(self, emulator: ForGuests, kind: type[RawGuest] = RawGuest) -> RawGuest:
        """Connect to an emulator as QEMU does when it starts, without a QEMU."""
        guest = kind(emulator.control_path)
        self.close_at_end(guest)
        return guest

    def proxy(self, emulator: Emulator, trigger: Trigger) -> ControlProxy:
        """Put a proxy in front of an emulator's control socket."""
        proxy = ControlProxy(self.new_path("proxy"), emulator, trigger)
        self.close_at_end(proxy)
        return proxy
