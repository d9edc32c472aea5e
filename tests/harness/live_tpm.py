"""A vTPM that an engine serves, and its states as they are at that moment, taken apart."""

import tempfile
from pathlib import Path

from tests.support.emulator_client import Blob, ControlClient
from tests.support.tpm2 import Tpm
from vtpmd.closing import Closing
from vtpmd.inspect.decoding import Decoded, decode
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType


class LiveTpm(Closing):
    """A TPM 2.0 that is on, and was started."""

    def __init__(self, kind: EmulatorKind = EmulatorKind.VTPMD, *, is_started: bool = True) -> None:
        """Start it, new, in a directory of its own."""
        self._directory = tempfile.TemporaryDirectory(prefix="vt")
        self.emulator = Emulator(kind, Path(self._directory.name) / "e")
        self.control = ControlClient(self.emulator.control_path)
        self.control.init()
        self.data = self.control.attach_data()
        self.tpm = Tpm(self.data.transact)
        if is_started:
            self.tpm.startup()

    def close(self) -> None:
        """Stop it, and remove its state."""
        self.control.close()
        self.emulator.kill()
        self._directory.cleanup()

    def blob(self, blob: Blob) -> bytes:
        """Return a state blob as GET_STATEBLOB gives it."""
        return self.control.get_state_blob(blob)

    def state(self, kind: StateType) -> bytes:
        """Return a state as libtpms has it now."""
        return swtpm_format.decode_blob(self.blob(Blob(kind)))

    def decoded(self, kind: StateType) -> Decoded:
        """Return a state taken apart."""
        return decode(self.state(kind), kind)
