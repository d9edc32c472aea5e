"""What vtpmd writes beside a state: journal, delta record, owner record, tail. Each by itself.

Each module has what its file begins with, the code that takes it apart, and what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from vtpmd.inspect.reader import Reader
from vtpmd.inspect.records import delta, journal, owner, tail
from vtpmd.store.keys import Key


class Written(NamedTuple):
    """A record, and how it is taken apart."""

    kind: str
    content: bytes
    read: Callable[[Reader], None]
    says: dict[str, Any]  # docs/inspect.md has the keys

    def __repr__(self) -> str:
        """Leave the content out."""
        return f"Written({self.kind})"


_Read = Callable[[Reader], None]
_Open = Callable[[bytes, Key | None], tuple[_Read, dict[str, Any]]]
_KINDS: Final[dict[str, tuple[Callable[[bytes], bool], _Open]]] = {
    "journal": (journal.is_one, journal.opened),
    "delta-record": (delta.is_one, delta.opened),
    "owner-record": (owner.is_one, owner.opened),
    "tail": (tail.is_one, tail.opened),
}


def find_record(content: bytes, key: Key | None) -> Written | None:
    """Return the record that a file is; None for any other. Raises StateKeyError."""
    for kind, (is_one, opened) in _KINDS.items():
        if is_one(content):
            read, says = opened(content, key)
            return Written(kind, content, read, says)
    return None
