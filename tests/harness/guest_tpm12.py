"""A TPM 1.2 as a program in a guest has it, through the guest's driver."""

from typing import Protocol

from tests.support.tpm12 import Tpm12
from vtpmd.testing.facts import Facts


class HasWorkload(Protocol):
    """What a workload's commands can be given to."""

    def command(self, line: str) -> Facts:
        """Send the workload a command; return the facts in its answer."""


def tpm12_of(guest: HasWorkload) -> Tpm12:
    """Return a TPM 1.2 as a program in the guest has it, through the guest's driver."""

    def transact(command: bytes) -> bytes:
        return bytes.fromhex(guest.command(f"raw {command.hex()}")["response"])

    return Tpm12(transact)
