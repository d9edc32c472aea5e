"""A guest without QEMU: it uses an emulator's sockets as QEMU does, in milliseconds.

What only a real guest can show (that its kernel and its sessions notice nothing) is for
`vtpmd.testing.guest`.
"""

from pathlib import Path
from typing import NamedTuple

from tests.support import tpm12
from tests.support.emulator_client import INIT_DELETE_VOLATILE, Blob, ControlClient
from tests.support.tpm2 import Tpm
from tests.support.tpm12 import Tpm12

PCR = 16
PCR_12 = 10  # one that TPM_SaveState keeps
NV_INDEX = 0x01500001
NV_SIZE = 64


class Blobs(NamedTuple):
    """What QEMU's stream carries, in its order."""

    permanent: bytes
    volatile: bytes
    savestate: bytes


class Facts(NamedTuple):
    """What a guest remembers of its TPM: of its volatile and of its permanent state."""

    pcr: bytes
    nv: bytes


class RawGuest:
    """A control connection, a data socket and a TPM behind them."""

    def __init__(self, control_path: Path) -> None:
        """Connect as QEMU does when it starts; the TPM is not powered on yet."""
        self.control = ControlClient(control_path)
        self.data = self.control.attach_data()
        self.tpm = Tpm(self.data.transact)
        self._steps = 0

    def close(self) -> None:
        """Hang up, as a QEMU that was killed does."""
        self.control.close()

    def boot(self) -> None:
        """Power the TPM on, start it, and make the NV index that work() writes."""
        self.control.init()
        self.tpm.startup()
        self.tpm.nv_define(NV_INDEX, NV_SIZE)
        self.work()

    def work(self) -> None:
        """Change volatile and permanent state."""
        self._steps += 1
        self.tpm.extend(PCR, self._steps.to_bytes(32, "big"))
        self.tpm.nv_write(NV_INDEX, self._steps.to_bytes(NV_SIZE, "big"))

    def facts(self) -> Facts:
        """Read what work() has changed."""
        return Facts(self.tpm.pcr(PCR), self.tpm.nv_read(NV_INDEX, NV_SIZE))

    def save(self) -> Blobs:
        """Ask for the state as QEMU does when it has stopped the guest for the switchover."""
        return Blobs(*(self.control.get_state_blob(kind) for kind in Blob))

    def give(self, blobs: Blobs) -> None:
        """Give the state to a destination, as QEMU does; the TPM is not powered on yet."""
        self.control.stop()
        for kind, blob in zip(Blob, blobs, strict=True):
            if blob:  # QEMU sets no empty blob
                self.control.set_state_blob(kind, blob)

    def start(self) -> None:
        """Power the TPM on as QEMU does at the end of an incoming migration."""
        self.control.init(INIT_DELETE_VOLATILE)

    def load(self, blobs: Blobs) -> None:
        """Give the state to a destination and power its TPM on."""
        self.give(blobs)
        self.start()

    def resume(self) -> None:
        """Say what QEMU says when the guest runs on at the source."""
        self.control.lock_storage()


class RawGuest12(RawGuest):
    """The same, whose TPM is a TPM 1.2."""

    def __init__(self, control_path: Path) -> None:
        super().__init__(control_path)
        self.tpm12 = Tpm12(self.data.transact)

    def boot(self) -> None:
        """Power the TPM on, start it, and make the NV index that work() writes."""
        self.control.init()
        self.tpm12.startup()
        self.tpm12.nv_define(tpm12.NV_INDEX, NV_SIZE)
        self.work()

    def work(self) -> None:
        """Change volatile and permanent state."""
        self._steps += 1
        self.tpm12.extend(PCR_12, self._steps.to_bytes(tpm12.DIGEST_BYTES, "big"))
        self.tpm12.nv_write(tpm12.NV_INDEX, self._steps.to_bytes(NV_SIZE, "big"))

    def facts(self) -> Facts:
        """Read what work() has changed."""
        return Facts(self.tpm12.pcr(PCR_12), self.tpm12.nv_read(tpm12.NV_INDEX, NV_SIZE))
