"""Hierarchies, objects and sessions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final
from xml.etree.ElementTree import Element

from vtpmd.inspect.html.elements import Child, Column, element, mark, once, part, table, words
from vtpmd.inspect.html.memory import secret_words
from vtpmd.inspect.screen import AUTHORISATIONS, ENABLED, object_words

NOT_KNOWN: Final = "-"
HIERARCHIES: Final = (
    *(Column("hierarchy"), Column("authorisation"), Column("state"), Column("policy", "wide")),
    Column("seed", "wide"),
)
OBJECTS: Final = (
    *(Column("object", "code"), Column("hierarchy"), Column("is"), Column("authorisation")),
    *(Column("attributes"), Column("name", "code digest")),
)
SESSIONS: Final = (
    *(Column("slot", "code"), Column("type"), Column("hash"), Column("cipher")),
    *(Column("attributes"), Column("command"), Column("digest", "code digest")),
)


def hierarchies(known: dict[str, Any]) -> Iterator[Element]:
    """Yield the part about hierarchies: a TPM 1.2 has none."""
    if known["tpm12"] is None:
        rows = [(None, _hierarchy(name, each)) for name, each in known["hierarchies"].items()]
        yield part("hierarchies", "Hierarchies", table("Hierarchies", HIERARCHIES, rows))


def _hierarchy(name: str, known: dict[str, Any]) -> tuple[Child, ...]:
    policy, seed = known["policy"], known["seed"]
    enabled = ENABLED[known["enabled"]]
    return (
        name,
        AUTHORISATIONS[known["auth-set"]],
        mark(enabled, "bad") if known["enabled"] is False else enabled,
        element("code", f"{known['policy-algorithm']} {policy}") if policy else NOT_KNOWN,
        NOT_KNOWN if seed is None else secret_words(seed),
    )


def objects(known: dict[str, Any]) -> Iterator[Element]:
    """Yield the part about objects, if there are any."""
    found = known["objects"]
    if found:
        ids = once(f"object-{each['handle']}" for each in found)
        rows = [(row_id, _object(each)) for row_id, each in zip(ids, found, strict=True)]
        yield part("objects", "Objects", table("Objects", OBJECTS, rows, "--json"))


def _object(known: dict[str, Any]) -> tuple[Child, ...]:
    scheme = "" if known["scheme"] in (None, "NULL") else f", {known['scheme']}"
    policy = ", policy" if known["policy"] else ""
    return (
        known["handle"],
        known["hierarchy"],
        f"{object_words(known)}{scheme}",
        f"{AUTHORISATIONS[known['auth-set']]}{policy}",
        words(known["attributes"]),
        known["name"] or NOT_KNOWN,
    )


def sessions(known: dict[str, Any]) -> Iterator[Element]:
    """Yield the part about sessions, if there are any."""
    found = known["sessions"]
    if found:
        rows = [(None, _session(each)) for each in found]
        yield part("sessions", "Sessions", table("Sessions", SESSIONS, rows, "--json"))


def _session(known: dict[str, Any]) -> tuple[Child, ...]:
    return (
        known["slot"],
        known["type"],
        known["hash"] or NOT_KNOWN,
        known["cipher"] or NOT_KNOWN,
        words(known["attributes"]),
        known["command"] or NOT_KNOWN,
        known["digest"] or NOT_KNOWN,
    )


def audit(known: dict[str, Any]) -> Iterator[Element]:
    """Yield the part about the audit of commands, if any are audited."""
    found = known["audit"]
    if found["commands"]:
        how = "" if found["algorithm"] is None else f", by {found['algorithm']}"
        count = "" if found["counter"] is None else f"; its counter is {found['counter']:,}"
        yield part(
            "audit",
            "Audit",
            element("p", f"These commands are audited{how}{count}."),
            element("p", words(found["commands"])),
        )
