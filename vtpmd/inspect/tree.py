"""What a decoder found: nodes, each of some bytes of a state, in a tree that leaves none out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

Value = int | bool | str | bytes | None


class Types:
    """The types of nodes that are no structure of libtpms'."""

    LIST = "list"
    STATE = "state"
    UNKNOWN = "unknown"  # bytes that are not decoded
    UNUSED = "unused"  # bytes that the TPM does not use


@dataclass(slots=True)
class Node:
    """A part of a state, and what it says. Offsets are from the state's beginning."""

    name: str
    type: str
    offset: int
    length: int = 0  # bytes
    value: Value = None
    meaning: str = ""  # the value in words
    is_secret: bool = False  # the value is shown to nobody who does not ask for secrets
    children: list[Node] = field(default_factory=list)

    def __repr__(self) -> str:
        """Leave the value out: it may be a secret."""
        return f"Node({self.name}, {self.type}, {self.offset}+{self.length})"

    def find(self, *path: str) -> Node | None:
        """Return the node at a path of names below this one, if there is one."""
        node = self
        for name in path:
            found = next((each for each in node.children if each.name == name), None)
            if found is None:
                return None
            node = found
        return node

    def at(self, *path: str) -> Value:
        """Return the value at a path; None where there is none."""
        node = self.find(*path)
        return None if node is None else node.value

    def number(self, *path: str) -> int | None:
        """Return the number at a path; None where there is none."""
        value = self.at(*path)
        return value if isinstance(value, int) else None

    def content(self, *path: str) -> bytes:
        """Return the bytes at a path; none where there are none."""
        value = self.at(*path)
        return value if isinstance(value, bytes) else b""

    def words(self, *path: str) -> str:
        """Return what the value at a path means, in words."""
        node = self.find(*path)
        return "" if node is None else node.meaning

    def walk(self) -> Iterator[Node]:
        """Yield this node and all below it, in the order of their bytes."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))

    def leaves(self) -> Iterator[Node]:
        """Yield the nodes that have bytes, and no others below them."""
        return (node for node in self.walk() if node.length and not node.children)

    def unknown_bytes(self) -> int:
        """Return how many bytes are not decoded."""
        return sum(leaf.length for leaf in self.leaves() if leaf.type == Types.UNKNOWN)
