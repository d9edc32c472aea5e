"""A TPM 1.2 that an engine serves, and its states as they are at that moment."""

import tempfile
from pathlib import Path

from tests.support.emulator_client import Blob, ControlClient
from tests.support.tpm12 import Tpm12
from vtpmd.closing import Closing
from vtpmd.inspect.overview import Inspected, inspect
from vtpmd.inspect.source import Source
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType, TpmVersion


class LiveTpm12(Closing):
    """A TPM 1.2 that is on, enabled and started."""

    def __init__(self, *, is_started: bool = True) -> None:
        """Start it, new, in a directory of its own."""
        self._directory = tempfile.TemporaryDirectory(prefix="vt")
        place = Path(self._directory.name) / "e"
        self.emulator = Emulator(EmulatorKind.VTPMD, place, version=TpmVersion.TPM_1_2)
        self.control = ControlClient(self.emulator.control_path)
        self.control.init()
        self.data = self.control.attach_data()
        self.tpm = Tpm12(self.data.transact)
        if is_started:
            self.tpm.startup()
            self.tpm.enable()
            self.control.stop()
            self.control.init()
            self.tpm.startup()

    def close(self) -> None:
        """Stop it, and remove its state."""
        self.control.close()
        self.emulator.kill()
        self._directory.cleanup()

    def states(self) -> dict[StateType, bytes]:
        """Return the states that it has now."""
        blobs = {kind: self.control.get_state_blob(Blob(kind)) for kind in StateType}
        return {kind: swtpm_format.decode_blob(blob) for kind, blob in blobs.items() if blob}

    def seen(self) -> Inspected:
        """Return them taken apart."""
        return inspect(Source("tpm", "state", self.states(), TpmVersion.TPM_1_2))
