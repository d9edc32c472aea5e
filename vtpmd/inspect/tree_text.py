"""The tree of a state for people: a line for each node, with its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vtpmd.counted import counted
from vtpmd.inspect.certificates import printable
from vtpmd.inspect.decoding import Decoded
from vtpmd.inspect.secrets import Secrets
from vtpmd.inspect.tree import Node

HEX_BYTES_SHOWN: Final = 64  # of a value; JSON has all of it
SEPARATOR: Final = "."  # of the names in a path


def tree_lines(root: Node, secrets: Secrets, depth: int = 0) -> Iterator[str]:
    """Yield the lines of a tree: offset, length, name, value."""
    yield _line(root, secrets, depth)
    for child in root.children:
        yield from tree_lines(child, secrets, depth + 1)


def fault_lines(decoded: Decoded) -> Iterator[str]:
    """Yield how much of a state is decoded, and what is wrong with it, from its first fault on."""
    name = decoded.name
    yield f"{name}: {decoded.decoded_bytes} of {decoded.total_bytes} bytes decoded"
    for fault in decoded.faults:
        yield f"{name}: byte {fault.offset}, in {fault.path}: {printable(fault.what)}"


def sections(root: Node, name: str) -> list[tuple[str, Node]]:
    """Return the nodes whose path ends with a name, or with names between dots, and their paths."""
    wanted = name.lower().split(SEPARATOR)
    found: list[tuple[str, Node]] = []
    waiting: list[tuple[list[str], Node]] = [([root.name], root)]
    while waiting:
        path, node = waiting.pop()
        if [each.lower() for each in path[-len(wanted) :]] == wanted:
            found.append((SEPARATOR.join(path), node))
        else:
            waiting += [([*path, child.name], child) for child in reversed(node.children)]
    return found


def _line(node: Node, secrets: Secrets, depth: int) -> str:
    place = f"{node.offset:>7} {node.length:>6}"
    value = _value(node, secrets)
    meaning = f" ({printable(node.meaning)})" if node.meaning and value else ""
    text = f"{place}  {'  ' * depth}{node.name}"
    return f"{text}: {value}{meaning}" if value else f"{text}  [{node.type}]"


def _value(node: Node, secrets: Secrets) -> str:
    if node.children:
        return ""
    if node.is_secret:
        return secrets.words(node)
    match node.value:
        case bytes(raw) if not any(raw):
            return f"{len(raw)} zeros" if len(raw) > 1 else raw.hex() or "empty"
        case bytes(raw):
            rest = len(raw) - HEX_BYTES_SHOWN
            more = f"... {counted(rest, 'more byte')}" if rest > 0 else ""
            return f"{raw[:HEX_BYTES_SHOWN].hex()}{more}"
        case bool(flag):
            return "yes" if flag else "no"
        case int(number):
            is_bits = node.type == "TPM_HANDLE" or node.type.startswith("TPMA_")
            return f"{number:#010x}" if is_bits else str(number)
        case str(text):
            return printable(text)
    return ""
