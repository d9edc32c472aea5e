"""NV indices, objects and sessions of decoded states, as programs get them and people are shown.

What is here is the value of keys that docs/inspect.md names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from vtpmd.inspect.certificates import certificate_in
from vtpmd.inspect.objects import OCCUPIED
from vtpmd.inspect.primitives import nv_type
from vtpmd.inspect.secrets import Secrets
from vtpmd.inspect.tree import Node
from vtpmd.inspect.words.handles import HANDLE_TYPE_SHIFT, HT_NV_INDEX, HT_PERSISTENT

ORDERLY: Final = 1 << 26  # of TPMA_NV
# Of OBJECT_ATTRIBUTES; none of them is the null hierarchy's.
HIERARCHIES: Final = {1: "endorsement", 2: "platform", 3: "owner"}
SEQUENCE_BITS: Final = {8: "hmac sequence", 9: "hash sequence", 10: "event sequence"}
TRANSIENT_FIRST: Final = 0x8000_0000  # the handle of the object in the first slot
POLICY, TRIAL = 1 << 0, 1 << 7  # of SESSION_ATTRIBUTES


def entries(permanent: Node, kind: int) -> Iterator[Node]:
    """Yield the entries of NV memory that are indices, or persistent objects."""
    found = permanent.find("persistent-all", "user-nvram", "entries")
    for entry in found.children if found is not None else ():
        if (entry.number("handle") or 0) >> HANDLE_TYPE_SHIFT == kind and entry.name != "end":
            yield entry


def memory_map(memory: Node) -> list[dict[str, Any]]:
    """Return what lies where in NV memory: entries have no gap between them, what is free is last.

    An entry begins where the one before it ends (libtpms' USER_NVRAM_Marshal(), NVMarshal.c).
    """
    found: list[dict[str, Any]] = []
    offset = 0
    listed = memory.find("entries")
    for entry in listed.children if listed is not None else ():
        n_bytes = entry.number("entry-bytes")
        if n_bytes is not None:
            found.append({"what": entry.name, "offset": offset, "bytes": n_bytes})
            offset += n_bytes
    return found


def nv_indices(permanent: Node, secrets: Secrets) -> list[dict[str, Any]]:
    """Return the NV indices."""
    return [_nv_index(permanent, entry, secrets) for entry in entries(permanent, HT_NV_INDEX)]


def _nv_index(permanent: Node, entry: Node, secrets: Secrets) -> dict[str, Any]:
    public = entry.find("index", "public") or entry
    known = public.number("attributes")
    attributes = known or 0
    data = entry.find("data")
    if data is None and attributes & ORDERLY:
        data = permanent.find("persistent-all", "orderly-ram", "entries", entry.name, "data")
    found: dict[str, Any] = {
        "handle": entry.name,
        "type": None if known is None else nv_type(known),
        "attributes": public.words("attributes").split()[1:],
        "name-algorithm": public.words("name-algorithm"),
        "policy": public.content("auth-policy").hex() or None,
        "auth-set": bool(entry.at("index", "auth")),
        "bytes": public.number("data-size"),
        "data": None if data is None else shown(data, secrets),
        "certificate": None,
    }
    if data is not None and isinstance(data.value, bytes) and not data.is_secret:
        found["certificate"] = certificate_in(data.value)
    return found


def shown(node: Node, secrets: Secrets) -> Any:
    """Return a value as programs get it."""
    if node.is_secret:
        return {"secret": secrets.instead(node)}
    return node.value.hex() if isinstance(node.value, bytes) else node.value


def persistent_objects(permanent: Node) -> list[dict[str, Any]]:
    """Return the persistent objects."""
    return [
        _object(entry.name, slot)
        for entry in entries(permanent, HT_PERSISTENT)
        if (slot := entry.find("slot")) is not None
    ]


def loaded_objects(volatile: Node) -> list[dict[str, Any]]:
    """Return the objects and sequences that are loaded: their handles follow from their slots."""
    slots = volatile.find("volatile-state", "objects")
    nodes = [] if slots is None else [node for node in slots.children if node.name.isdigit()]
    return [
        _object(f"{TRANSIENT_FIRST + int(node.name):#010x}", node)
        for node in nodes
        if (node.number("slot-attributes") or 0) & OCCUPIED
    ]


def _object(handle: str, slot: Node) -> dict[str, Any]:
    """Return an object; it has each key, whatever of it is decoded."""
    attributes = slot.number("slot-attributes") or 0
    public = slot.find("object", "public")
    is_decoded = public is not None
    public = public or slot
    parameters = public.find("parameters") or public
    return {
        "handle": handle,
        "hierarchy": _word_of(attributes, HIERARCHIES, "null"),
        "sequence": _word_of(attributes, SEQUENCE_BITS, "") or None,
        "type": public.words("type") if is_decoded else None,
        "key-bits": parameters.number("key-bits") or parameters.number("symmetric", "key-bits"),
        "curve": parameters.words("curve") or None,
        "scheme": parameters.words("scheme", "scheme") or None,
        "attributes": public.words("attributes").split(),
        "policy": public.content("auth-policy").hex() or None,
        "auth-set": bool(slot.at("object", "sensitive", "auth")) if is_decoded else None,
        "name": slot.content("object", "name").hex() or None,
    }


def _word_of(attributes: int, words: dict[int, str], otherwise: str) -> str:
    return next((word for bit, word in words.items() if attributes >> bit & 1), otherwise)


def sessions(volatile: Node) -> list[dict[str, Any]]:
    """Return the sessions that are loaded."""
    slots = volatile.find("volatile-state", "sessions", "slots")
    found = []
    for slot in slots.children if slots is not None else ():
        session = slot.find("session")
        if session is not None:
            attributes = session.number("attributes") or 0
            kind = "policy" if attributes & POLICY else "hmac"
            found.append(
                {
                    "slot": int(slot.name),
                    "type": "trial" if attributes & TRIAL else kind,
                    "hash": session.words("hash-algorithm"),
                    "cipher": session.words("symmetric", "algorithm"),
                    "attributes": session.words("attributes").split(),
                    "command": session.words("command") or None,
                    "digest": session.content("digest").hex(),
                }
            )
    return found


def pcr_values(volatile: Node, banks: dict[str, list[int]]) -> dict[str, dict[str, str]]:
    """Return the values of the PCRs of active banks; of all, where it is not known which are."""
    pcrs = volatile.find("volatile-state", "pcrs")
    if pcrs is None:
        return {}
    banks = banks or _all_banks(pcrs)
    return {
        bank: {str(pcr): value.hex() for pcr in chosen if (value := pcrs.content(str(pcr), bank))}
        for bank, chosen in banks.items()
    }


def _all_banks(pcrs: Node) -> dict[str, list[int]]:
    numbers = [int(node.name) for node in pcrs.children if node.name.isdigit()]
    first = pcrs.find("0")
    names = [] if first is None else [node.name for node in first.children]
    return {name: numbers for name in names if f"{name}-bytes" in names}
