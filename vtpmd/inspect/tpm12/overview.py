"""What a person or a program wants to know of a TPM 1.2, beside what its container says.

It has the keys of a TPM 2.0's overview where a TPM 1.2 has the same: PCRs, NV memory, keys,
sessions, lockout. What it alone has is under ``tpm12``. docs/inspect.md has every key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from vtpmd.inspect.certificates import certificate_in
from vtpmd.inspect.contents import shown
from vtpmd.inspect.secrets import Secrets
from vtpmd.inspect.tree import Node
from vtpmd.inspect.words.tpm12 import PERMANENT_FLAGS
from vtpmd.wire.tpm import StateType

if TYPE_CHECKING:
    from vtpmd.inspect.overview import Inspected

NOTHING: Final = Node("", "", 0)
BANK: Final = "sha1"
HASH: Final = "SHA1"
EK, SRK = 0x4000_0006, 0x4000_0000
NEARLY: Final = 0.9  # of what libtpms takes for a permanent state
LOCKOUT_TRIES: Final = 6  # one more than TPM_LOCKOUT_THRESHOLD
FAILURE: Final = 3  # of the test state
EVICT: Final = 1  # of a key's control
LOCKS: Final = {
    "READLOCKED": "read-locked",
    "WRITELOCKED": "write-locked",
    "WRITEDEFINED": "write-defined",
}


class Trees:
    """The parts of a TPM 1.2's states."""

    def __init__(self, found: Inspected) -> None:
        decoded = found.states.get(StateType.SAVESTATE)
        permanent = found.permanent.find("permanent-all") or NOTHING
        self.permanent = permanent
        self.data = permanent.find("permanent-data") or NOTHING
        self.flags = permanent.number("permanent-flags", "flags")
        self.evict_keys = permanent.find("owner-evict-keys", "keys") or NOTHING
        self.nv = permanent.find("nv") or NOTHING
        self.n_bytes = found.permanent.length
        running = found.volatile.find("volatile-all")
        saved = NOTHING if decoded is None else decoded.root.find("saved") or NOTHING
        # What runs is newer than what was saved.
        self.memory = running or saved
        self.session_data = self.memory.find("stclear-data") or NOTHING


def fill(found: Inspected, secrets: Secrets) -> dict[str, Any]:
    """Return what a TPM 1.2's states say, under the keys of ``overview``."""
    trees = Trees(found)
    return {
        "lockout": _lockout(trees),
        "pcrs": _pcrs(trees),
        "nv": _nv(trees, secrets),
        "objects": list(_keys(trees)),
        "sessions": list(_sessions(trees)),
        "audit": {
            "algorithm": None,
            "commands": trees.data.words("audited-ordinals").split(),
            "counter": trees.data.number("audit-counter", "counter"),
        },
        "tpm12": _own(trees),
        "surprises": _surprises(trees),
    }


def _lockout(trees: Trees) -> dict[str, Any]:
    tries = trees.session_data.number("auth-fail-count")
    return {
        "failed-tries": tries,
        "tries-max": None if tries is None else LOCKOUT_TRIES,
        "recovery-time-s": None,
        "lockout-recovery-s": None,
        # From so many on it is, for a time that each one doubles.
        "locked-out": None if tries is None or tries >= LOCKOUT_TRIES else False,
        "lockout-auth-enabled": None,
    }


def _pcrs(trees: Trees) -> dict[str, Any]:
    pcrs = trees.session_data.find("pcrs") or NOTHING
    values = {
        node.name: node.value.hex() for node in pcrs.children if isinstance(node.value, bytes)
    }
    banks = {BANK: [int(number) for number in values]} if values else {}
    return {"banks": banks, "banks-after-reset": banks, "values": {BANK: values} if values else {}}


def _nv(trees: Trees, secrets: Secrets) -> dict[str, Any]:
    return {
        "bytes": trees.memory.number("parameters", "nv-bytes-max"),
        "used-bytes": trees.n_bytes,
        "entries": _memory_map(trees),
        "indices": [_index(entry, secrets) for entry in nv_entries(trees.nv)],
    }


def _memory_map(trees: Trees) -> list[dict[str, Any]]:
    """Return what lies where in the permanent state, which is all of a TPM 1.2's memory."""
    found: list[dict[str, Any]] = []
    for part in trees.permanent.children:
        entries = list(nv_entries(part)) if part is trees.nv else [part]
        found += [
            {"what": each.name, "offset": each.offset, "bytes": each.length}
            for each in entries
            if each.children
        ]
    return found


def nv_entries(nv: Node) -> Iterator[Node]:
    """Yield the NV indices."""
    for entry in nv.children:
        if entry.find("public", "index") is not None:
            yield entry


def _index(entry: Node, secrets: Secrets) -> dict[str, Any]:
    data = entry.find("data")
    is_whole = entry.find("public", "data-size") is not None
    found: dict[str, Any] = {
        "handle": entry.name,
        "type": "ordinary" if is_whole else None,
        "attributes": _index_words(entry),
        "name-algorithm": HASH,
        "policy": _pcr_digest(entry),
        "auth-set": any(entry.content("auth")),
        "bytes": entry.number("public", "data-size"),
        "data": None if data is None else shown(data, secrets),
        "certificate": None,
    }
    if data is not None and isinstance(data.value, bytes) and not data.is_secret:
        found["certificate"] = certificate_in(data.value)
    return found


def _index_words(entry: Node) -> list[str]:
    """Return the words of its attributes, and of how it is locked, as a TPM 2.0's index has them.

    Whether it was written, no state says.
    """
    words = entry.words("public", "permission", "attributes").split()
    return words + [word for word, name in LOCKS.items() if entry.at("public", name)]


def _pcr_digest(entry: Node) -> str | None:
    """Return what PCRs have to be to read it, or else to write it."""
    for name in ("pcr-read", "pcr-write"):
        if any(entry.content("public", name, "selection")):
            return entry.content("public", name, "digest-at-release").hex() or None
    return None


def _keys(trees: Trees) -> Iterator[dict[str, Any]]:
    """Yield the endorsement key, the storage root key, and all that have a handle."""
    for handle, name in ((EK, "endorsement-key"), (SRK, "srk")):
        key = trees.data.find(name)
        if key is not None and key.content("public-key"):
            yield _key(handle, key)
    loaded = trees.memory.find("loaded-keys", "keys") or NOTHING
    entries = {entry.name: entry for entry in (*loaded.children, *trees.evict_keys.children)}
    for entry in entries.values():
        key, number = entry.find("key"), entry.number("handle")
        if key is not None and number is not None:
            yield _key(number, key, control=entry.number("control") or 0)


def _key(handle: int, key: Node, control: int = 0) -> dict[str, Any]:
    """Return a key; it has each key of an object."""
    private = key.find("private") or NOTHING
    usage = key.words("usage")
    words = [usage, *key.words("flags").split()] if usage else []
    auth = private.find("usage-auth")
    return {
        "handle": f"{handle:#010x}",
        "hierarchy": "endorsement" if handle == EK else "owner",
        "sequence": None,
        "type": key.words("parameters", "algorithm") or None,
        "key-bits": key.number("parameters", "key-bits"),
        "curve": None,
        "scheme": _scheme(key),
        "attributes": words + (["OWNER_EVICT"] if control & EVICT else []),
        "policy": _key_policy(key),
        "auth-set": None if auth is None else any(private.content("usage-auth")),
        "name": private.content("public-data-digest").hex() or None,
    }


def _scheme(key: Node) -> str | None:
    words = (key.words("parameters", f"{name}-scheme") for name in ("signature", "encryption"))
    return next((word for word in words if word and word != "NONE"), None)


def _key_policy(key: Node) -> str | None:
    return key.content("pcr-info", "digest-at-release").hex() or None


def _sessions(trees: Trees) -> Iterator[dict[str, Any]]:
    """Yield the sessions of each kind, with the keys of a TPM 2.0's."""
    data = trees.session_data
    slot = 0
    for name in ("authorisation-sessions", "transport-sessions", "daa-sessions"):
        for session in (data.find(name) or NOTHING).children:
            entity = session.words("entity-type")
            yield {
                "slot": slot,
                "type": session.words("protocol").lower() or name.partition("-")[0],
                "hash": HASH,
                "cipher": session.words("public", "algorithm"),
                "attributes": [entity] if entity else session.words("public", "attributes").split(),
                "command": None,
                "digest": session.content("digest").hex(),
            }
            slot += 1


def _own(trees: Trees) -> dict[str, Any]:
    """Return what a TPM 2.0 does not have."""
    data, memory = trees.data, trees.memory
    flags = trees.flags
    owner = data.at("owner-installed")
    return {
        "flags": None
        if flags is None
        else {name: bool(flags >> bit & 1) for bit, name in PERMANENT_FLAGS.items()},
        "owner": owner if isinstance(owner, bool) else None,
        "owner-auth-set": _is_set(data, "owner-auth"),
        "operator-auth-set": _is_set(data, "operator-auth"),
        "unowned-nv-writes": data.number("no-owner-nv-writes"),
        "counters": list(_counters(data)),
        "active-counter": memory.number("stclear-data", "count-id"),
        "families": _valid(data, "families"),
        "delegations": _valid(data, "delegations"),
        "flags-until-reset": _flags(memory.find("stclear-flags")),
        "physical-presence": memory.at("stclear-flags", "physical-presence"),
        "waits-for-startup": memory.at("stany-flags", "post-initialise"),
        "state-saved": memory.at("stany-flags", "state-saved"),
        "self-test": memory.words("test-state") or None,
        "ticks-us": memory.number("stany-data", "ticks", "ticks-us"),
    }


def _is_set(data: Node, name: str) -> bool | None:
    return None if data.find(name) is None else any(data.content(name))


def _counters(data: Node) -> Iterator[dict[str, Any]]:
    counters = data.find("counters") or NOTHING
    for counter in counters.children:
        if counter.at("valid"):
            yield {
                "handle": int(counter.name),
                "label": counter.content("label").hex(),
                "value": counter.number("counter"),
                "auth-set": any(counter.content("auth")),
            }


def _valid(data: Node, name: str) -> int | None:
    found = data.find(name)
    return None if found is None else sum(bool(each.at("valid")) for each in found.children)


def _flags(node: Node | None) -> dict[str, bool] | None:
    if node is None:
        return None
    return {each.name: bool(each.value) for each in node.children if each.type == "BOOL"}


def _surprises(trees: Trees) -> list[str]:
    """Say what a person would not expect, a line each."""
    flags = _own(trees)["flags"] or {}
    tries = trees.session_data.number("auth-fail-count") or 0
    total, used = trees.memory.number("parameters", "nv-bytes-max"), trees.n_bytes
    odd = {
        "the TPM is disabled": flags.get("disable"),
        "the TPM is deactivated": flags.get("deactivated"),
        "there is no endorsement key": (
            trees.data.find("endorsement-key") is not None
            and not trees.data.content("endorsement-key", "public-key")
        ),
        "the TPM is in failure mode": trees.memory.number("test-state") == FAILURE,
        f"{tries} authorisations have failed: it is locked out for a time after each": (
            tries >= LOCKOUT_TRIES
        ),
        f"its memory is nearly full: {used} of {total} bytes": (
            bool(total) and used >= NEARLY * (total or 0)
        ),
    }
    return [what for what, is_so in odd.items() if is_so]
