"""Trees of states as programs get them. docs/inspect.md has the keys."""

from __future__ import annotations

from typing import Any

from vtpmd.inspect.secrets import Secrets
from vtpmd.inspect.tree import Node


def node_json(node: Node, secrets: Secrets) -> dict[str, Any]:
    """Return a node and all below it. Bytes are hexadecimal digits; a secret is not told."""
    found: dict[str, Any] = {
        "name": node.name,
        "type": node.type,
        "offset": node.offset,
        "length": node.length,
    }
    if node.children:
        found["children"] = [node_json(child, secrets) for child in node.children]
    elif node.is_secret:
        found["secret"] = secrets.instead(node)
    elif node.value is not None:
        found["value"] = node.value.hex() if isinstance(node.value, bytes) else node.value
    if node.meaning:
        found["meaning"] = node.meaning
    return found
