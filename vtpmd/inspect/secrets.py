"""What is shown in a secret's place: its length, and a fingerprint that tells equal ones."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from typing import Final

from vtpmd.counted import counted
from vtpmd.inspect.decoding import Decoded
from vtpmd.inspect.tree import Node, Value

FINGERPRINT_BYTES: Final = 4
SALT_CONTEXT: Final = b"vtpmd inspect: fingerprints"
# Where a TPM's platform seed is: it has 512 bits, and a guest cannot change it.
SEED_PATHS: Final = (
    ("persistent-all", "persistent-data", "platform-seed"),
    ("volatile-state", "version-3", "platform-seed"),
    # Of a TPM 1.2, which has none: the private part of its endorsement key.
    ("permanent-all", "permanent-data", "endorsement-key", "private", "private-key"),
)


class Secrets:
    """Shows secrets, or their fingerprints.

    The salt is made of the TPM's platform seed: fingerprints of one TPM can be compared, whenever
    its states were saved, and who has not the state cannot try passwords on them. Without that
    seed it is random: then only what is shown at once can be compared.
    """

    def __init__(self, states: Iterable[Decoded], *, are_shown: bool = False) -> None:
        """Take the salt of the first of the ``states`` that has it."""
        self.are_shown = are_shown
        seeds = [state.root.content(*path) for state in states for path in SEED_PATHS]
        seed = next((seed for seed in seeds if seed), os.urandom(32))
        self._salt = hmac.digest(seed, SALT_CONTEXT, "sha256")

    def fingerprint(self, value: Value) -> str:
        """Return the fingerprint of a secret, of as many digits as can be compared by eye."""
        raw = value if isinstance(value, bytes) else repr(value).encode()
        return hmac.digest(self._salt, raw, "sha256")[:FINGERPRINT_BYTES].hex()

    def instead(self, node: Node) -> dict[str, int | str]:
        """Return what programs get in a secret's place, and the secret if secrets are shown."""
        raw = node.value if isinstance(node.value, bytes) else b""
        found: dict[str, int | str] = {"bytes": len(raw)}
        if raw:
            found["fingerprint"] = self.fingerprint(raw)
        if self.are_shown:
            found["value"] = raw.hex()
        return found

    def words(self, node: Node) -> str:
        """Return what people get in a secret's place."""
        raw = node.value if isinstance(node.value, bytes) else b""
        if not raw:
            return "empty"
        shown = f", {raw.hex()}" if self.are_shown else ""
        return f"secret, {counted(len(raw), 'byte')}, fingerprint {self.fingerprint(raw)}{shown}"
