"""What a person or a program wants to know of a TPM: of the container, and of its states.

``overview()`` gives it as JSON has it; the screen shows the same. docs/inspect.md has every key.
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from vtpmd.counted import counted
from vtpmd.inspect import contents
from vtpmd.inspect.decoding import Decoded, decode, decode_record
from vtpmd.inspect.primitives import SU_DA_USED
from vtpmd.inspect.public import banks_of, banks_words
from vtpmd.inspect.secrets import Secrets
from vtpmd.inspect.source import Source
from vtpmd.inspect.tpm12 import overview as tpm12
from vtpmd.inspect.tree import Node
from vtpmd.wire.tpm import StateType, TpmVersion

NOTHING: Final = Node("", "", 0)
HIERARCHIES: Final = ("owner", "endorsement", "platform", "lockout", "null")
NEARLY: Final = 0.8  # of NV memory: libtpms keeps some free, and defines nothing above 0.87


class Inspected(NamedTuple):
    """A source, and its states taken apart."""

    source: Source
    states: dict[StateType, Decoded]
    written: Decoded | None = None

    @property
    def parts(self) -> list[Decoded]:
        """All that was taken apart."""
        return [*self.states.values(), *([] if self.written is None else [self.written])]

    @property
    def permanent(self) -> Node:
        """The permanent state's tree, or an empty node."""
        decoded = self.states.get(StateType.PERMANENT)
        return NOTHING if decoded is None else decoded.root

    @property
    def volatile(self) -> Node:
        """The volatile state's tree, or an empty node."""
        decoded = self.states.get(StateType.VOLATILE)
        return NOTHING if decoded is None else decoded.root

    @property
    def data(self) -> Node:
        """The permanent data that is of no index or object."""
        return self.permanent.find("persistent-all", "persistent-data") or NOTHING

    @property
    def clear_data(self) -> Node:
        """What a Startup(CLEAR) makes anew: the running TPM's, or a Shutdown's."""
        running = self.volatile.find("volatile-state", "state-clear")
        return running or self.permanent.find("persistent-all", "state-clear") or NOTHING

    @property
    def reset_data(self) -> Node:
        """What a reset makes anew: the running TPM's, or a Shutdown's."""
        running = self.volatile.find("volatile-state", "state-reset")
        return running or self.permanent.find("persistent-all", "state-reset") or NOTHING

    @property
    def orderly(self) -> Node:
        """The clock, of the running TPM or as it was saved last."""
        running = self.volatile.find("volatile-state", "orderly-data")
        return running or self.permanent.find("persistent-all", "orderly-data") or NOTHING

    @property
    def banks(self) -> dict[str, list[int]]:
        """The PCRs of each bank that is on now."""
        active = self.data.find("version-3", "pcr-active") or self.data.find("pcr-allocated")
        return banks_of(active)


def inspect(source: Source) -> Inspected:
    """Take the states of a source apart."""
    states = {
        kind: decode(state, kind, source.tpm) for kind, state in sorted(source.states.items())
    }
    written = None if source.written is None else decode_record(source.written)
    return Inspected(source, states, written)


def overview(found: Inspected, secrets: Secrets) -> dict[str, Any]:
    """Return what there is to be known. What no state says is None, or empty."""
    known = _of_a_tpm_2(found, secrets)
    if found.source.tpm is TpmVersion.TPM_1_2:
        own = tpm12.fill(found, secrets)
        own["surprises"] = known["surprises"] + own["surprises"]
        known |= own
    return known


def _of_a_tpm_2(found: Inspected, secrets: Secrets) -> dict[str, Any]:
    """Return each key. Of a TPM 1.2, which has none of these parts, that is what its files say."""
    return {
        **container(found.source),
        "states": {kind.name.lower(): _state(each) for kind, each in found.states.items()},
        "profile": _profile(found.permanent),
        "hierarchies": {name: _hierarchy(found, name, secrets) for name in HIERARCHIES},
        "lockout": _lockout(found.data),
        "clock": _clock(found),
        "pcrs": _pcrs(found),
        "nv": _nv(found, secrets),
        "objects": contents.persistent_objects(found.permanent)
        + contents.loaded_objects(found.volatile),
        "sessions": contents.sessions(found.volatile),
        "audit": {
            "algorithm": found.data.words("audit-algorithm") or None,
            "commands": found.data.words("audit-commands").split(),
            "counter": found.data.number("audit-counter"),
        },
        "tpm12": None,
        "record": _record(found),
        "surprises": surprises(found),
    }


def container(source: Source) -> dict[str, Any]:
    """Return what is known of what a TPM's states are in."""
    record = source.record
    return {
        "path": source.path,
        "kind": source.kind,
        "snapshot": source.snapshot,
        "tpm": source.tpm.facts.word,
        "encrypted": source.is_encrypted,
        "identity": None if source.lineage is None else source.lineage.identity.hex(),
        "generation": source.generation,
        "restore-epoch": source.epoch,
        "journal-commits": source.journal_commits,
        "owner": None if record is None else record.whose.value,
        "possible-fork": bool(record and record.forks),
        "in-use": source.is_in_use,
        "problems": list(source.problems),
    }


def _record(found: Inspected) -> dict[str, Any] | None:
    """Return what a record of vtpmd's says, where that is all that there is."""
    if found.written is None or found.source.written is None:
        return None
    return {**_state(found.written), "says": found.source.written.says}


def _state(decoded: Decoded) -> dict[str, Any]:
    return {
        "bytes": decoded.total_bytes,
        "decoded-bytes": decoded.decoded_bytes,
        "faults": [
            {
                "offset": fault.offset,
                "part": fault.path,
                "what": fault.what,
                "newer": fault.is_newer,
            }
            for fault in decoded.faults
        ],
    }


def _profile(permanent: Node) -> dict[str, Any]:
    """Return the profile that the state is of; one without says that it is of none."""
    text = permanent.at("persistent-all", "profile")
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        found = {}
    named = found if isinstance(found, dict) else {}
    return {
        "name": named.get("Name") if isinstance(named.get("Name"), str) else None,
        "format-level": named.get("StateFormatLevel")
        if isinstance(named.get("StateFormatLevel"), int)
        else None,
    }


def _hierarchy(found: Inspected, name: str, secrets: Secrets) -> dict[str, Any]:
    """Return what is known of a hierarchy; the platform's authorisation is a running TPM's."""
    where = found.clear_data if name == "platform" else found.data
    auth, policy = where.find(f"{name}-auth"), where.content(f"{name}-policy")
    seed = (found.reset_data if name == "null" else found.data).find(f"{name}-seed")
    enabled = found.clear_data.at(f"{name}-enabled")
    if name == "platform":
        enabled = found.volatile.at("volatile-state", "platform-enabled")
    return {
        "auth-set": None if auth is None else bool(auth.value),
        "policy": policy.hex() or None,
        "policy-algorithm": (where.words(f"{name}-policy-algorithm") or None) if policy else None,
        "enabled": enabled if isinstance(enabled, bool) else None,
        "seed": None if seed is None else secrets.instead(seed),
    }


def _lockout(data: Node) -> dict[str, Any]:
    tries, tries_max = data.number("failed-tries"), data.number("tries-max")
    return {
        "failed-tries": tries,
        "tries-max": tries_max,
        "recovery-time-s": data.number("recovery-time-s"),
        "lockout-recovery-s": data.number("lockout-recovery-s"),
        "locked-out": None if tries is None or tries_max is None else tries >= tries_max,
        "lockout-auth-enabled": data.at("lockout-auth-enabled"),
    }


def _clock(found: Inspected) -> dict[str, Any]:
    return {
        "clock-ms": found.orderly.number("clock-ms"),
        "safe": found.orderly.at("clock-safe"),
        "reset-count": found.data.number("reset-count"),
        "restart-count": found.reset_data.number("restart-count"),
        "total-reset-count": found.data.number("total-reset-count"),
        "shutdown": found.data.words("orderly-state") or None,
    }


def _pcrs(found: Inspected) -> dict[str, Any]:
    after_reset = banks_of(found.data.find("pcr-allocated"))
    return {
        "banks": found.banks,
        "banks-after-reset": after_reset,
        "values": contents.pcr_values(found.volatile, found.banks),
    }


def _nv(found: Inspected, secrets: Secrets) -> dict[str, Any]:
    memory = found.permanent.find("persistent-all", "user-nvram") or NOTHING
    return {
        "bytes": memory.number("memory-bytes"),
        "used-bytes": _used_bytes(memory),
        "entries": contents.memory_map(memory),
        "indices": contents.nv_indices(found.permanent, secrets),
    }


def surprises(found: Inspected) -> list[str]:
    """Say what a person would not expect, a line each."""
    lockout = _lockout(found.data)
    said = [*found.source.problems]
    for decoded in found.parts:
        what = f"the {decoded.words} is not decoded whole"
        said += [f"{what}: byte {fault.offset}: {fault.what}" for fault in decoded.faults[:1]]
    record = found.source.record
    if record is not None and record.forks:
        said.append("it may be a fork: see `vtpmd owner`")
    tries, tries_max = lockout["failed-tries"] or 0, lockout["tries-max"] or 0
    failed = f"{counted(tries, 'authorisation has', 'authorisations have')} failed, of {tries_max}"
    if lockout["locked-out"]:
        said.append(f"it is locked out: {failed}")
    elif tries and tries + 1 >= tries_max:
        said.append(f"it is close to lockout: {failed}")
    return said + _nearly_full(found) + _odd_states(found)


def _nearly_full(found: Inspected) -> list[str]:
    memory = found.permanent.find("persistent-all", "user-nvram") or NOTHING
    total, used = memory.number("memory-bytes") or 0, _used_bytes(memory)
    is_nearly_full = total and used >= NEARLY * total
    return [f"NV memory is nearly full: {used} of {total} bytes"] if is_nearly_full else []


def _used_bytes(memory: Node) -> int:
    """Return how many bytes of NV memory have an index or object, by libtpms' own count."""
    entries = memory.find("entries") or NOTHING
    return sum(entry.number("entry-bytes") or 0 for entry in entries.children)


def _odd_states(found: Inspected) -> list[str]:
    data, running = found.data, found.volatile.find("volatile-state") or NOTHING
    pending = banks_of(data.find("pcr-allocated"))
    odd = {
        "the TPM is in failure mode": running.at("in-failure-mode"),
        "its clock is not safe: it may have told later times before": (
            found.orderly.at("clock-safe") is False
        ),
        "an authorisation that lockout protects was used, and it was not shut down since": (
            data.number("orderly-state") == SU_DA_USED and not running.children
        ),
        "TPM2_Clear is disabled": data.at("disable-clear"),
        "the lockout authorisation was tried, and is disabled for now": (
            data.at("lockout-auth-enabled") is False
        ),
        f"other PCRs will be on after a reset: {banks_words(pending)}": (
            bool(pending) and pending != found.banks
        ),
    }
    for name in ("owner", "endorsement"):
        off = found.clear_data.at(f"{name}-enabled") is False
        odd[f"the {name} hierarchy is off"] = off
    return [what for what, is_so in odd.items() if is_so]
