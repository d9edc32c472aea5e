"""What differs between two states, in the TPM's terms: what was extended, written, added, counted.

It compares what docs/inspect.md has for both; what that leaves out is named by its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, Final, NamedTuple

from vtpmd.counted import counted
from vtpmd.inspect.certificates import printable
from vtpmd.inspect.overview import HIERARCHIES, Inspected, overview
from vtpmd.inspect.screen import object_words
from vtpmd.inspect.secrets import Secrets
from vtpmd.inspect.source import Source
from vtpmd.inspect.tree import Node, Value
from vtpmd.wire.tpm import StateType, TpmVersion

Known = dict[str, Any]

TRANSIENT: Final = "0x80"  # what the handle of an object that is loaded begins with
FIXED_12: Final = ("0x40000000", "0x40000006")  # a TPM 1.2's own keys: SRK and EK
RUNS_MAX: Final = 4  # that are told one by one
# Where the overview has it all. Authorisations are not among them: it says only if one is set.
TOLD: Final = (
    *("user-nvram", "orderly-ram", "pcrs", "objects", "sessions", "orderly-data", "profile"),
    *("failed-tries", "tries-max", "recovery-time-s", "lockout-recovery-s", "lockout-auth-enabled"),
    *("reset-count", "restart-count", "total-reset-count", "orderly-state", "pcr-allocated"),
    *(f"{name}-{what}" for name in HIERARCHIES for what in ("policy", "seed", "enabled")),
)
TOLD_12: Final = (
    *("nv", "permanent-flags", "endorsement-key", "srk", "counters", "owner-evict-keys"),
    *("loaded-keys", "owner-installed", "auth-fail-count", "stclear-flags", "ticks", "pcrs"),
    *("authorisation-sessions", "transport-sessions", "daa-sessions", "test-state", "count-id"),
    *("authorisation-sessions-count", "transport-sessions-count", "daa-sessions-count"),
    *("audit-counter", "no-owner-nv-writes", "state-saved", "post-initialise", "checksum"),
)


class Change(NamedTuple):
    """Something that differs."""

    part: str  # a word of PARTS, or "state"
    what: str  # a PCR and its bank, a handle, a name, a place in the tree
    text: str  # a line for a person


class Seen(NamedTuple):
    """What is compared of a source."""

    known: Known
    leaves: dict[StateType, dict[str, Value]]  # what that leaves out, by its place


def see(found: Inspected, secrets: Secrets) -> Seen:
    """Return what is compared; of all that are compared the secrets' salt has to be the same."""
    told = TOLD_12 if found.source.tpm is TpmVersion.TPM_1_2 else TOLD
    leaves = {kind: dict(_leaves(each.root, told)) for kind, each in found.states.items()}
    return Seen(overview(found, secrets), leaves)


def differences(before: Inspected, after: Inspected) -> list[Change]:
    """Return what differs; nothing that is a secret is in it."""
    secrets = Secrets([*before.states.values(), *after.states.values()])
    return compare(see(before, secrets), see(after, secrets))


def put_back(before: Source, after: Source) -> str | None:
    """Return a line if an older state of a vTPM was put back between two of its states."""
    if before.lineage is None or after.lineage is None or before.epoch == after.epoch:
        return None
    if before.lineage.identity != after.lineage.identity:
        return None
    return (
        f"A is of restore epoch {before.epoch}, B of {after.epoch}: an older state was put back "
        "between them, by an import or by a snapshot that QEMU loaded"
    )


def compare(before: Seen, after: Seen) -> list[Change]:
    """Return what differs between two that were seen."""
    found = list(_states(before.known, after.known))
    for part, compare_part in PARTS.items():
        told = compare_part(before.known, after.known)
        found += [Change(part, what, text) for what, text in told]
    return found + list(_others(before, after))


def _states(old: Known, new: Known) -> Iterator[Change]:
    if old["tpm"] != new["tpm"]:
        yield Change("state", "tpm", f"one is a TPM {old['tpm']}, the other a TPM {new['tpm']}")
    if old["identity"] and new["identity"] and old["identity"] != new["identity"]:
        yield Change("state", "identity", "they are of two vTPMs")
    for name in sorted({*old["states"], *new["states"]}):
        if (name in old["states"]) != (name in new["states"]):
            which = "first" if name in old["states"] else "second"
            yield Change("state", name, f"the {which} alone has a {name} state")


def _pcrs(old: Known, new: Known) -> Iterator[tuple[str, str]]:
    if old["pcrs"]["banks"] != new["pcrs"]["banks"]:
        banks = [" ".join(known["pcrs"]["banks"]) or "none" for known in (old, new)]
        yield "banks", f"PCR banks: {banks[0]} -> {banks[1]}"
    for bank, values in old["pcrs"]["values"].items():
        for pcr, value in values.items():
            now = new["pcrs"]["values"].get(bank, {}).get(pcr, value)
            if now != value:
                how = "extended" if set(now) - {"0"} else "reset"
                yield f"{pcr} {bank}", f"PCR {pcr} {bank} {how}: {now}"


def _by_handle(entries: list[Known]) -> dict[str, Known]:
    return {entry["handle"]: entry for entry in entries}


def _nv(old: Known, new: Known) -> Iterator[tuple[str, str]]:
    was, is_now = (_by_handle(known["nv"]["indices"]) for known in (old, new))
    for handle in sorted({*was, *is_now}):
        if handle not in was:
            yield handle, f"NV {handle} defined: {_kind(is_now[handle])}"
        elif handle not in is_now:
            yield handle, f"NV {handle} undefined"
        else:
            for text in _index(was[handle], is_now[handle]):
                yield handle, f"NV {handle} {text}"


def _kind(index: Known) -> str:
    if index["bytes"] is None:
        return "not decoded whole"
    return f"{index['type']}, {counted(index['bytes'], 'byte')}"


def _index(was: Known, now: Known) -> Iterator[str]:
    if (was["type"], was["bytes"]) != (now["type"], now["bytes"]):
        yield f"defined anew: {_kind(now)}"
        return
    if was["data"] != now["data"]:
        yield _written(now["type"], was["data"], now["data"])
    gained = [word for word in now["attributes"] if word not in was["attributes"]]
    lost = [word for word in was["attributes"] if word not in now["attributes"]]
    changed = [*(f"+{word}" for word in gained), *(f"-{word}" for word in lost)]
    if changed:
        yield f"attributes: {' '.join(changed)}"
    if was["policy"] != now["policy"]:
        yield "policy changed"
    if was["auth-set"] != now["auth-set"]:
        yield f"authorisation {'set' if now['auth-set'] else 'emptied'}"


def _written(type_: str, was: Any, now: Any) -> str:
    if not isinstance(now, str) or not isinstance(was, str):
        return "written"  # what is there may not be shown, or there was nothing
    before, after = bytes.fromhex(was), bytes.fromhex(now)
    if len(before) != len(after):
        return "written"
    if type_ == "counter":
        count = [int.from_bytes(each, "big") for each in (before, after)]
        return f"counted: {count[0]} -> {count[1]}"
    if type_ == "bits":
        bits = int.from_bytes(after, "big") & ~int.from_bytes(before, "big")
        return f"bits set: {', '.join(str(n) for n in range(8 * len(after)) if bits >> n & 1)}"
    if type_ == "extend":
        return "extended"
    return f"written, {_runs_words(before, after)}"


def _runs_words(before: bytes, after: bytes) -> str:
    """Say which bytes differ."""
    places = [at for at, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    runs = [
        [at for _, at in run]
        for _, run in groupby(enumerate(places), lambda pair: pair[1] - pair[0])
    ]
    if len(runs) > RUNS_MAX:
        return f"{len(places)} bytes in {len(runs)} places"
    return ", ".join(f"{counted(len(run), 'byte')} at {run[0]}" for run in runs)


def _objects(old: Known, new: Known) -> Iterator[tuple[str, str]]:
    was, is_now = (_by_handle(known["objects"]) for known in (old, new))
    for handle in sorted({*was, *is_now}):
        is_loaded = _is_loaded((is_now.get(handle) or was[handle]), new)
        if handle not in was:
            how = "loaded" if is_loaded else "added"
            yield handle, f"object {handle} {how}: {object_words(is_now[handle])}"
        elif handle not in is_now:
            yield handle, f"object {handle} {'flushed' if is_loaded else 'removed'}"
        elif was[handle]["name"] != is_now[handle]["name"]:
            yield handle, f"object {handle} is another: {object_words(is_now[handle])}"
        elif was[handle] != is_now[handle]:
            yield handle, f"object {handle} changed"


def _is_loaded(each: Known, known: Known) -> bool:
    """Return whether an object is one that a reset takes away."""
    if known["tpm12"] is None:
        return bool(each["handle"].startswith(TRANSIENT))
    return not (each["handle"] in FIXED_12 or "OWNER_EVICT" in each["attributes"])


def _sessions(old: Known, new: Known) -> Iterator[tuple[str, str]]:
    was, is_now = ({each["slot"]: each for each in known["sessions"]} for known in (old, new))
    for slot in sorted({*was, *is_now}):
        what = f"slot {slot}"
        if slot not in was:
            yield what, f"session in {what} started: {is_now[slot]['type']}"
        elif slot not in is_now:
            yield what, f"session in {what} ended"
        elif was[slot] != is_now[slot]:
            yield what, f"session in {what} used"


def _hierarchies(old: Known, new: Known) -> Iterator[tuple[str, str]]:
    for name in HIERARCHIES:
        was, now = old["hierarchies"][name], new["hierarchies"][name]
        if None in (was["auth-set"], now["auth-set"]) and was["seed"] is None:
            continue
        if was["seed"] != now["seed"] and was["seed"] and now["seed"]:
            yield name, f"{name} seed changed: what is made of it is another now"
        if was["auth-set"] != now["auth-set"]:
            yield name, f"{name} authorisation {'set' if now['auth-set'] else 'emptied'}"
        if was["policy"] != now["policy"]:
            yield name, f"{name} policy {'changed' if now['policy'] else 'removed'}"
        if was["enabled"] != now["enabled"] and None not in (was["enabled"], now["enabled"]):
            yield name, f"{name} hierarchy {'on' if now['enabled'] else 'off'}"


def _numbers(part: str) -> Callable[[Known, Known], Iterator[tuple[str, str]]]:
    """Return what compares a part that has a name for each value."""

    def compare(old: Known, new: Known) -> Iterator[tuple[str, str]]:
        for name, was in old[part].items():
            now = new[part][name]
            if was != now and None not in (was, now):
                yield name, f"{name}: {_word(was)} -> {_word(now)}"

    return compare


def _flags(old: Known, new: Known) -> Iterator[tuple[str, str]]:
    """Compare a TPM 1.2's flags, and how far it has started."""
    for group in ("flags", "flags-until-reset"):
        was, now = (((known["tpm12"] or {}).get(group) or {}) for known in (old, new))
        for name in was:
            if was[name] != now.get(name, was[name]):
                yield name, f"flag {name}: {_word(was[name])} -> {_word(now[name])}"
    yield from _named(old, new, ("waits-for-startup", "self-test", "state-saved"))


def _named(old: Known, new: Known, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Compare single values of a TPM 1.2's."""
    was, now = (known["tpm12"] or {} for known in (old, new))
    for name in names:
        if None not in (was.get(name), now.get(name)) and was[name] != now[name]:
            yield name, f"{name}: {_word(was[name])} -> {_word(now[name])}"


def _owner(old: Known, new: Known) -> Iterator[tuple[str, str]]:
    """Compare a TPM 1.2's owner."""
    was, now = (known["tpm12"] or {} for known in (old, new))
    if was.get("owner") is False and now.get("owner"):
        yield "owner", "it has an owner"
    elif was.get("owner") and now.get("owner") is False:
        yield "owner", "it has no owner any more"
    yield from _named(old, new, ("unowned-nv-writes", "families", "delegations"))


def _counters(old: Known, new: Known) -> Iterator[tuple[str, str]]:
    """Compare a TPM 1.2's monotonic counters, and the one of its audit."""
    was, now = (
        {each["handle"]: each["value"] for each in (known["tpm12"] or {}).get("counters", [])}
        for known in (old, new)
    )
    for handle in sorted({*was, *now}):
        what = f"counter {handle}"
        if handle not in was:
            yield what, f"{what} made: {now[handle]}"
        elif handle not in now:
            yield what, f"{what} released"
        elif was[handle] != now[handle]:
            yield what, f"{what} counted: {was[handle]} -> {now[handle]}"
    yield from _named(old, new, ("active-counter",))
    counts = [known["audit"]["counter"] for known in (old, new)]
    if old["tpm12"] and None not in counts and counts[0] != counts[1]:
        yield "audit", f"audit counter: {counts[0]} -> {counts[1]}"


def _word(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else printable(str(value))


PARTS: Final[dict[str, Callable[[Known, Known], Iterator[tuple[str, str]]]]] = {
    "pcr": _pcrs,
    "nv": _nv,
    "object": _objects,
    "session": _sessions,
    "hierarchy": _hierarchies,
    "lockout": _numbers("lockout"),
    "clock": _numbers("clock"),
    "profile": _numbers("profile"),
    "flag": _flags,
    "owner": _owner,
    "counter": _counters,
}


def _others(before: Seen, after: Seen) -> Iterator[Change]:
    """Name what else differs, by its place in the tree."""
    for kind in sorted({*before.leaves} & {*after.leaves}):
        was, now = before.leaves[kind], after.leaves[kind]
        for place in sorted({*was, *now}):
            if was.get(place) != now.get(place):
                yield Change("other", place, f"differs, too: {place}")


def _leaves(root: Node, told: tuple[str, ...]) -> Iterator[tuple[str, Value]]:
    """Yield the values that the overview does not tell of, each with its place."""
    waiting = [(root, root.name)]
    while waiting:
        node, place = waiting.pop()
        if node.name in told:
            continue
        if not node.children:
            yield place, node.value
        waiting += [(child, f"{place}/{child.name}") for child in node.children]
