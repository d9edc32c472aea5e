"""From a state's bytes to its tree: whichever of libtpms' states it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from vtpmd.inspect.layouts import PERSISTENT_ALL, VOLATILE_STATE
from vtpmd.inspect.permanent import read_permanent
from vtpmd.inspect.reader import Fault, Found, Reader
from vtpmd.inspect.tree import Node
from vtpmd.inspect.volatile import read_volatile
from vtpmd.wire.tpm import StateType

MAGIC_AT: Final = slice(2, 6)
_READ: Final[dict[StateType, Callable[[Reader], None]]] = {
    StateType.PERMANENT: read_permanent,
    StateType.VOLATILE: read_volatile,
}
_MAGICS: Final = {
    PERSISTENT_ALL.magic: StateType.PERMANENT,
    VOLATILE_STATE.magic: StateType.VOLATILE,
}


class Decoded(NamedTuple):
    """A state taken apart: every byte is in a node of the tree."""

    kind: StateType
    root: Node
    faults: list[Found]  # in the order in which they were met

    @property
    def total_bytes(self) -> int:
        """How many bytes the state has."""
        return self.root.length

    @property
    def decoded_bytes(self) -> int:
        """How many of them are decoded."""
        return self.root.length - self.root.unknown_bytes()

    @property
    def is_newer(self) -> bool:
        """Whether nothing is wrong but that a later libtpms has written it."""
        return bool(self.faults) and self.faults[0].is_newer


def kind_of(state: bytes) -> StateType | None:
    """Return which of a TPM 2.0's states begins so; None for what is none."""
    return _MAGICS.get(int.from_bytes(state[MAGIC_AT], "big"))


def decode(state: bytes, kind: StateType) -> Decoded:
    """Take a state apart, as far as that goes: faults are told, and never raised."""
    reader = Reader(state, kind.name.lower())
    fault = None
    try:
        _READ[kind](reader)
    except Fault as met:
        fault = met
    reader.finish(fault)
    return Decoded(kind, reader.root, reader.faults)
