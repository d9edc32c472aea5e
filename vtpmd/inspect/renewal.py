"""Replacing a TPM, whichever it is: parts of its state take the place of a new one's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vtpmd.errors import VtpmdError
from vtpmd.inspect.decoding import decode
from vtpmd.inspect.fates import Item, Settings
from vtpmd.inspect.tree import Node
from vtpmd.wire.tpm import StateType, TpmVersion


class Piece(NamedTuple):
    """What takes the place of a part of a state."""

    part: Node
    content: bytes


def decoded(place: str, state: bytes, tpm: TpmVersion) -> Node:
    """Return a permanent state taken apart, of which nothing is unknown. Raises VtpmdError."""
    found = decode(state, StateType.PERMANENT, tpm)
    if found.faults:
        fault = found.faults[0]
        raise VtpmdError(f"{place}: byte {fault.offset}: {fault.what}; update vtpmd")
    return found.root


def part(root: Node, *path: str) -> Node:
    """Return a part that is in each state that could be decoded."""
    found = root.find(*path)
    if found is None:
        raise ValueError(f"a permanent state without {path}")
    return found


def settings(table: Settings, data: Node, new: Node) -> Iterator[Item]:
    """Yield what a TPM had been told, and a new one does not know."""
    for kind, (what, names) in table.items():
        if any(_says(data.find(name)) != _says(new.find(name)) for name in names):
            yield Item(kind, what)


def _says(node: Node | None) -> list[object]:
    """Return what a part says, in whichever version it is written."""
    leaves = () if node is None else node.leaves()
    return [
        leaf.meaning if leaf.type == "COMMANDS" else leaf.value
        for leaf in leaves
        if leaf.type != "NV_HEADER"
    ]


def bytes_of(state: bytes, node: Node) -> bytes:
    """Return a part of a state, as libtpms has written it."""
    return state[node.offset : node.offset + node.length]


def spliced(state: bytes, pieces: Iterable[Piece]) -> bytes:
    """Return a state in which pieces have taken the place of parts."""
    whole, at = b"", 0
    for piece in sorted(pieces, key=lambda piece: piece.part.offset):
        whole += state[at : piece.part.offset] + piece.content
        at = piece.part.offset + piece.part.length
    return whole + state[at:]
