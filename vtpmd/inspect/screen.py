"""One screen for a person: whose TPM it is, how it is, what lies in it, and what would surprise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from vtpmd.counted import counted
from vtpmd.inspect.certificates import printable
from vtpmd.store.status import epoch_text

INDICES_SHOWN: Final = 60  # JSON has all of them
LABEL_WIDTH: Final = 14
ITEMS_SHOWN: Final = 60  # of a list
AUTHORISATIONS: Final = {None: "-", True: "set", False: "empty"}
ENABLED: Final = {None: "-", True: "on", False: "off"}
OTHER_PCRS: Final = "all others are zeros, or ones where they begin so"
RECORDS: Final = {
    "journal": "a journal of vtpmd's: what was committed since a checkpoint",
    "delta-record": "a delta record of vtpmd's: it says what has changed between two generations",
    "owner-record": "an owner record of vtpmd's: whose a vTPM is",
    "tail": "a tail: what a vTPM's destination had not yet got, sealed for it alone",
}


def screen(known: dict[str, Any]) -> list[str]:
    """Return the lines, of what ``overview`` has told."""
    lines = [f"{known['path']}: {container_words(known)}", *_identity(known)]
    if known["record"] is not None:
        return [*lines, *_record(known), "", *_decoded(known)]
    for make in (_hierarchies, _tpm12, _lockout, _clock, _pcrs, _nv, _objects, _sessions):
        lines += make(known)
    surprises = [printable(each) for each in known["surprises"]]
    lines += ["", "surprises:", *(f"  {each}" for each in surprises)] if surprises else []
    return [*lines, "", *_decoded(known)]


def container_words(known: dict[str, Any]) -> str:
    """Return what a TPM's states are in, in words for a person."""
    kinds = {"directory": "a state directory", "linear-file": "a linear file"}
    kinds["export"] = "an export"
    kinds["migration-stream"] = "a migration stream of QEMU's"
    snapshot = printable(known["snapshot"] or "")
    kinds["snapshot"] = f"the snapshot {snapshot} in a disk image of QEMU's"
    wrapped = {"file": "a state file", "blob": "a state blob", "state": "a state of libtpms'"}
    if known["record"] is not None:
        return RECORDS[known["kind"]]
    what = (kinds | wrapped)[known["kind"]]
    encrypted = ", encrypted" if known["encrypted"] else ""
    return f"{what}{encrypted}, of a TPM {known['tpm']}"


def _label(name: str, text: str) -> str:
    return f"{name + ':':<{LABEL_WIDTH}} {text}"


def _identity(known: dict[str, Any]) -> Iterator[str]:
    if known["identity"] is not None:
        yield _label("identity", f"{known['identity']}, generation {known['generation']}")
    if known["restore-epoch"]:
        yield _label("restore epoch", epoch_text(known["generation"]))
    if known["owner"] is not None:
        yield _label("ownership", known["owner"])
    if known["in-use"] is not None:
        yield _label("served", "yes" if known["in-use"] else "no")
    commits = known["journal-commits"]
    if commits is not None:
        yield _label("journal", journal_words(commits))
    profile = known["profile"]
    if profile["name"] is not None:
        name, level = printable(profile["name"]), profile["format-level"]
        yield _label("profile", f"{name}, format level {level}")


def _record(known: dict[str, Any]) -> Iterator[str]:
    """Yield what a record of vtpmd's says."""
    for name, value in known["record"]["says"].items():
        if not isinstance(value, list):
            yield _record_line(name, value)
            continue
        yield _record_line(name, len(value))
        for item in value[:ITEMS_SHOWN]:
            words = ", ".join(f"{part} {each}" for part, each in item.items())
            yield f"  {printable(words)}"
        if len(value) > ITEMS_SHOWN:
            yield f"  and {len(value) - ITEMS_SHOWN} more: --json"


def _record_line(name: str, value: Any) -> str:
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return f"{name}: {printable('not known' if value is None else str(value))}"


def _hierarchies(known: dict[str, Any]) -> Iterator[str]:
    if known["tpm12"] is not None:
        return
    yield from ("", "hierarchy    authorisation  policy     state    seed")
    for name, each in known["hierarchies"].items():
        auth = AUTHORISATIONS[each["auth-set"]]
        policy = each["policy-algorithm"] or "-"
        enabled = ENABLED[each["enabled"]]
        seed = (each["seed"] or {}).get("fingerprint", "-")
        yield f"{name:<12} {auth:<14} {policy:<10} {enabled:<8} {seed}"
    yield ""


def _tpm12(known: dict[str, Any]) -> Iterator[str]:
    """Yield what a TPM 1.2 alone has."""
    own = known["tpm12"]
    if own is None:
        return
    yield ""
    if own["flags"] is not None:
        yield _label("flags", " ".join(name for name, is_on in own["flags"].items() if is_on))
    if own["owner"] is not None:
        yield _label("owner", "installed" if own["owner"] else "none")
    for counter in own["counters"]:
        yield _label(f"counter {counter['handle']}", f"{counter['value']}")
    if own["self-test"] is not None:
        yield _label("self-test", own["self-test"])


def _lockout(known: dict[str, Any]) -> Iterator[str]:
    words = lockout_words(known["lockout"])
    if words:
        yield _label("lockout", words)


def journal_words(commits: int) -> str:
    """Return how much of a state is in its journal, in words for a person."""
    return f"{counted(commits, 'commit')} since the checkpoint"


def lockout_words(lockout: dict[str, Any]) -> str:
    """Return how near to lockout a TPM is, in words for a person; none where that is not known."""
    if lockout["failed-tries"] is None:
        return ""
    have = "has" if lockout["failed-tries"] == 1 else "have"
    tries = f"{lockout['failed-tries']} of {lockout['tries-max']} tries {have} failed"
    words = {None: "locked out for a time", True: "locked out", False: "not locked out"}
    state = words[lockout["locked-out"]]
    if lockout["recovery-time-s"] is None:
        return f"{state}: {tries}"
    times = (
        f"one is forgotten in {lockout['recovery-time-s']} s, "
        f"the lockout authorisation recovers in {lockout['lockout-recovery-s']} s"
    )
    return f"{state}: {tries}; {times}"


def _clock(known: dict[str, Any]) -> Iterator[str]:
    words = clock_words(known["clock"])
    if words:
        yield _label("clock", words)
    if known["clock"]["shutdown"]:
        yield _label("shutdown", known["clock"]["shutdown"])


def clock_words(clock: dict[str, Any]) -> str:
    """Return what a TPM's clock says, in words for a person; none where that is not known."""
    if clock["clock-ms"] is None:
        return ""
    safe = "safe" if clock["safe"] else "not safe"
    names = ("resets", "restarts")
    counts = [(clock[f"{name[:-1]}-count"], name) for name in names]
    words = [f", {count} {name}" for count, name in counts if count is not None]
    return f"{clock['clock-ms']} ms, {safe}{''.join(words)}"


def _pcrs(known: dict[str, Any]) -> Iterator[str]:
    pcrs = known["pcrs"]
    if pcrs["banks"]:
        yield from ("", _label("PCR banks", ", ".join(pcrs["banks"])))
    for bank, values in pcrs["values"].items():
        for number, value in values.items():
            if is_told(value):
                yield f"  {bank:<8} {number:>2}  {value}"
    if pcrs["values"]:
        yield f"  {OTHER_PCRS}"


def is_told(pcr: str) -> bool:
    """Return whether a PCR's value says something: not where it is as it began."""
    return bool(pcr.strip("0") and pcr.strip("f"))


def _nv(known: dict[str, Any]) -> Iterator[str]:
    nv = known["nv"]
    indices = nv["indices"]
    if nv["bytes"] is None and not indices:
        return
    of_all = "" if nv["bytes"] is None else f" of {nv['bytes']}"
    yield from ("", _label("NV memory", f"{nv['used-bytes']}{of_all} bytes"))
    if indices:
        yield "  index       type      bytes  auth   policy  what"
    for each in indices[:INDICES_SHOWN]:
        if each["bytes"] is None:
            yield f"  {each['handle']}  not decoded whole"
            continue
        auth = "set" if each["auth-set"] else "empty"
        policy = "yes" if each["policy"] else "-"
        line = f"  {each['handle']}  {each['type']:<9} {each['bytes']:>5}  {auth:<6} {policy:<7} "
        yield (line + index_words(each, says_written=known["tpm12"] is None)).rstrip()
    if len(indices) > INDICES_SHOWN:
        yield f"  and {len(indices) - INDICES_SHOWN} more: --json"


def index_words(index: dict[str, Any], *, says_written: bool) -> str:
    """Return what is to be said of an index, in words for a person."""
    if index["certificate"] is not None:
        return f"certificate: {index['certificate']['subject'] or index['certificate']['issuer']}"
    return "" if "WRITTEN" in index["attributes"] or not says_written else "not written yet"


def _objects(known: dict[str, Any]) -> Iterator[str]:
    if known["objects"]:
        yield from ("", "  object      hierarchy    what")
    for each in known["objects"]:
        what = object_words(each)
        if each["attributes"]:
            what += f": {' '.join(each['attributes'])}"
        yield f"  {each['handle']}  {each['hierarchy']:<12} {what}"


def object_words(known: dict[str, Any]) -> str:
    """Return what an object is, in words for a person."""
    if known["type"] is None:
        return known["sequence"] or "nothing that is decoded"
    return f"{known['type']} {known['curve'] or known['key-bits'] or ''}".rstrip()


def _sessions(known: dict[str, Any]) -> Iterator[str]:
    if known["sessions"]:
        yield from ("", "  session  type    hash    attributes")
    for each in known["sessions"]:
        attributes = " ".join(each["attributes"])
        yield f"  slot {each['slot']:<3} {each['type']:<7} {each['hash']:<7} {attributes}".rstrip()


def _decoded(known: dict[str, Any]) -> Iterator[str]:
    parts = dict(known["states"])
    if known["record"] is not None:
        parts[known["kind"]] = known["record"]
    for name, state in parts.items():
        yield f"{name}: {state['decoded-bytes']} of {state['bytes']} bytes decoded"
        for fault in state["faults"]:
            yield f"{name}: byte {fault['offset']}, in {fault['part']}: {printable(fault['what'])}"
