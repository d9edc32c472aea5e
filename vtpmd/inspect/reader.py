"""The one place where bytes of a state are taken, in order, each into a node of its own.

Nothing that a state says of lengths is trusted: a read ends at the innermost block, or raises
``Fault``. What a section appends in later versions is in a *block*, which says how long it is: a
fault in a block costs the rest of that block, and what is behind it is read.

Source of the formats: libtpms' NVMarshal.c, for what it writes, and for what it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

from vtpmd.counted import counted
from vtpmd.inspect.tree import Node, Types

DEPTH_MAX: Final = 24  # parts in parts: libtpms' own are 10 deep
FAULTS_MAX: Final = 100  # more of them say no more: the rest of the state is not read
HEADER_MINIMUM_VERSION: Final = 2  # from this version on a header says who may read it

Words = Callable[[int], str]
Order = Literal["big", "little"]


class Found(NamedTuple):
    """Something that is wrong, and in which part of the state."""

    offset: int
    path: str
    what: str
    is_newer: bool  # it is of a format that only a later libtpms has


class Fault(Exception):
    """The bytes at an offset are not what they would have to be."""

    def __init__(self, found: Found) -> None:
        super().__init__(found.what)
        self.found = found


class Section(NamedTuple):
    """What a section of libtpms' begins with."""

    type: str
    magic: int
    version: int  # the latest that is known here


class Reader:
    """Takes the bytes of a state; what is taken becomes nodes of a tree."""

    def __init__(self, data: bytes, name: str) -> None:
        self._data = data
        self._end = len(data)  # of the innermost block
        self._parts = [Node(name, Types.STATE, 0, len(data))]
        self.at = 0
        self.root = self._parts[0]
        self.faults: list[Found] = []

    @property
    def left(self) -> int:
        """How many bytes there are before the end of the innermost block."""
        return self._end - self.at

    @property
    def part_node(self) -> Node:
        """The innermost part, which is being read."""
        return self._parts[-1]

    def before(self, n_bytes: int) -> bytes:
        """Return all bytes of the state but the last ones."""
        return self._data[: len(self._data) - n_bytes]

    def peek(self, n_bytes: int) -> bytes:
        """Return what comes next, without taking it."""
        return self._data[self.at : min(self.at + n_bytes, self._end)]

    def fault(self, what: str, offset: int | None = None, *, is_newer: bool = False) -> Fault:
        """Return a fault of the innermost part, at an offset, or here."""
        path = ".".join(part.name for part in self._parts)
        return Fault(Found(self.at if offset is None else offset, path, what, is_newer))

    def take(self, name: str, n_bytes: int, type_: str, *, is_secret: bool = False) -> bytes:
        """Take bytes as they are. Raises Fault if there are less."""
        return self._leaf(name, n_bytes, type_, is_secret=is_secret)

    def number(
        self,
        name: str,
        n_bytes: int,
        type_: str,
        words: Words | None = None,
        order: Order = "big",
    ) -> int:
        """Take a number, and have ``words`` say what it means. Raises Fault."""
        raw = self._leaf(name, n_bytes, type_)
        value = int.from_bytes(raw, order)
        node = self._parts[-1].children[-1]
        node.value = value
        node.meaning = "" if words is None else words(value)
        return value

    def flag(self, name: str) -> bool:
        """Take a byte that is true or false. Raises Fault."""
        value = self.number(name, 1, "BOOL") != 0
        self._parts[-1].children[-1].value = value
        return value

    def sized(
        self, name: str, bytes_max: int, type_: str, *, is_secret: bool = False, wide: int = 2
    ) -> bytes:
        """Take a length, of ``wide`` bytes, and so many bytes, as one node. Raises Fault."""
        length = int.from_bytes(self.peek(wide), "big")
        if length > bytes_max:
            has = counted(length, "byte")
            raise self.fault(f"{name} has {has}, and {type_} at most {bytes_max}")
        raw = self._leaf(name, wide + length, type_, is_secret=is_secret)
        self._parts[-1].children[-1].value = raw[wide:]
        return raw[wide:]

    def count(self, name: str, n_bytes: int, count_max: int) -> int:
        """Take a number of things that follow. Raises Fault for more than ``count_max``."""
        count = self.number(name, n_bytes, f"UINT{8 * n_bytes}")
        if count > count_max:
            raise self.fault(f"{name} is {count}, and at most {count_max}", self.at - n_bytes)
        return count

    @contextmanager
    def part(self, name: str, type_: str) -> Iterator[Node]:
        """What is read in here becomes one node's."""
        if len(self._parts) >= DEPTH_MAX:
            raise self.fault(f"{name} lies more than {DEPTH_MAX} parts deep")
        node = Node(name, type_, self.at)
        self._parts[-1].children.append(node)
        self._parts.append(node)
        try:
            yield node
        finally:
            node.length = self.at - node.offset
            self._parts.pop()

    @contextmanager
    def section(self, name: str, section: Section) -> Iterator[int]:
        """Read a section; its version is given. Raises Fault for another, or one too new."""
        with self.part(name, section.type):
            yield self._header(section)

    @contextmanager
    def block(self, name: str) -> Iterator[bool]:
        """Read a block that may be there, and is skipped by who does not know it.

        Whether it is there is given. What is left of it belongs to a later version; a fault in it
        is kept, and the rest of it is not decoded.
        """
        with self.part(name, "block"):
            is_there = self.flag("present")
            length = self.count("length", 2, self.left - 2 if is_there else 0)
            with self.within(length):
                yield length > 0

    @contextmanager
    def within(self, n_bytes: int) -> Iterator[None]:
        """Read so many bytes, which are there: what is left of them belongs to a later version.

        A fault in them is kept, and the rest of them is not decoded.
        """
        outer, self._end = self._end, self.at + n_bytes
        try:
            yield
            self._skip("newer-part")
        except Fault as fault:
            self._keep(fault)
            self._skip("not-decoded")
        finally:
            self._end = outer

    def later(self) -> None:
        """Read what a section ends with from version 2 on: the block of later versions."""
        with self.block("later-versions"):
            pass

    def finish(self, fault: Fault | None) -> None:
        """End the reading, by a fault or not: what is left is not decoded."""
        del self._parts[1:]
        self._end = len(self._data)
        if fault is None and self.left:
            fault = self.fault(f"{counted(self.left, 'byte follows', 'bytes follow')} its end")
        if fault is not None and len(self.faults) < FAULTS_MAX:
            self.faults.append(fault.found)
        self._skip("not-decoded")

    def _keep(self, fault: Fault) -> None:
        """Keep a fault that does not end the reading. Raises it once there are too many."""
        self.faults.append(fault.found)
        if len(self.faults) >= FAULTS_MAX:
            raise fault

    def _header(self, section: Section) -> int:
        start = self.at
        version, magic = (int.from_bytes(self.peek(6)[a:b], "big") for a, b in ((0, 2), (2, 6)))
        if self.left >= 6 and magic != section.magic:
            raise self.fault(f"no {section.type} begins here: its magic is not {section.magic:#x}")
        has_minimum = version >= HEADER_MINIMUM_VERSION
        raw = self._leaf("header", 8 if has_minimum else 6, "NV_HEADER")
        node = self._parts[-1].children[-1]
        node.value, node.meaning = version, f"version {version}"
        minimum = int.from_bytes(raw[6:8], "big")
        if has_minimum:
            node.meaning += f", for who knows version {minimum}"
        if minimum > section.version:
            what = f"{section.type} is for who knows version {minimum}, a later one than is known"
            raise self.fault(f"{what} here, {section.version}", start, is_newer=True)
        return version

    def _leaf(self, name: str, n_bytes: int, type_: str, *, is_secret: bool = False) -> bytes:
        if n_bytes > self.left:
            left = counted(self.left, "is left", "are left")
            raise self.fault(f"{name} has {counted(n_bytes, 'byte')}, and {left}")
        raw = self._data[self.at : self.at + n_bytes]
        node = Node(name, type_, self.at, n_bytes, raw, is_secret=is_secret)
        self._parts[-1].children.append(node)
        self.at += n_bytes
        return raw

    def _skip(self, name: str) -> None:
        """Make what is left of the innermost block a node that is not decoded."""
        if self.left > 0:
            # Nobody knows what it is, so it may be a secret.
            self._leaf(name, self.left, Types.UNKNOWN, is_secret=True)
