"""From a state's bytes to its tree: whichever of libtpms' states it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from vtpmd.inspect.layouts import PERSISTENT_ALL, VOLATILE_STATE
from vtpmd.inspect.permanent import read_permanent
from vtpmd.inspect.reader import Fault, Found, Reader
from vtpmd.inspect.records import Written
from vtpmd.inspect.sections import has_checksum
from vtpmd.inspect.tpm12 import permanent as permanent12
from vtpmd.inspect.tpm12 import volatile as volatile12
from vtpmd.inspect.tree import Node
from vtpmd.inspect.volatile import read_volatile
from vtpmd.wire.tpm import StateType, TpmVersion

MAGIC_AT: Final = slice(2, 6)
_READ: Final[dict[tuple[TpmVersion, StateType], Callable[[Reader], None]]] = {
    (TpmVersion.TPM_2_0, StateType.PERMANENT): read_permanent,
    (TpmVersion.TPM_2_0, StateType.VOLATILE): read_volatile,
    (TpmVersion.TPM_1_2, StateType.PERMANENT): permanent12.read_permanent,
    (TpmVersion.TPM_1_2, StateType.VOLATILE): volatile12.read_volatile,
    (TpmVersion.TPM_1_2, StateType.SAVESTATE): volatile12.read_savestate,
}
_MAGICS: Final = {
    PERSISTENT_ALL.magic: StateType.PERMANENT,
    VOLATILE_STATE.magic: StateType.VOLATILE,
}
# What a TPM 1.2's begin with: tags, and of the volatile one the version that it was built as.
_TPM12_BEGINS: Final = {
    bytes.fromhex("0001 0022"): StateType.PERMANENT,
    bytes.fromhex("0001 0001 01 02"): StateType.VOLATILE,
}
_SAVED_BEGINS: Final = (bytes.fromhex("0023"), bytes.fromhex("0024"))


class Kind(NamedTuple):
    """Which state it is, and of which TPM."""

    tpm: TpmVersion
    type: StateType


class Decoded(NamedTuple):
    """A state taken apart: every byte is in a node of the tree."""

    kind: StateType | None  # None: it is a record of vtpmd's
    root: Node
    faults: list[Found]  # in the order in which they were met

    @property
    def name(self) -> str:
        """What it is called: permanent, volatile, journal."""
        return self.root.name

    @property
    def words(self) -> str:
        """The same for people."""
        return self.name.replace("-", " ") if self.kind is None else f"{self.name} state"

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


def kind_of(state: bytes) -> Kind | None:
    """Return which of a TPM's states begins so; None for what is none.

    A TPM 1.2's saved state has no mark but a tag: it has to be all there.
    """
    magic = _MAGICS.get(int.from_bytes(state[MAGIC_AT], "big"))
    if magic is not None:
        return Kind(TpmVersion.TPM_2_0, magic)
    for begin, kind in _TPM12_BEGINS.items():
        if state.startswith(begin):
            return Kind(TpmVersion.TPM_1_2, kind)
    if state.startswith(_SAVED_BEGINS) and has_checksum(state):
        return Kind(TpmVersion.TPM_1_2, StateType.SAVESTATE)
    return None


def decode(state: bytes, kind: StateType, tpm: TpmVersion = TpmVersion.TPM_2_0) -> Decoded:
    """Take a state apart, as far as that goes: faults are told, and never raised."""
    reader = Reader(state, kind.name.lower())
    _read_all(reader, _READ[tpm, kind])
    return Decoded(kind, reader.root, reader.faults)


def decode_record(written: Written) -> Decoded:
    """Take apart what vtpmd writes beside a state, in the same way."""
    reader = Reader(written.content, written.kind)
    _read_all(reader, written.read)
    return Decoded(None, reader.root, reader.faults)


def _read_all(reader: Reader, read: Callable[[Reader], None]) -> None:
    fault = None
    try:
        read(reader)
    except Fault as met:
        fault = met
    reader.finish(fault)
