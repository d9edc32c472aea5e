"""What is to be seen first: what would surprise, which vTPM it is, and how far it is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final
from xml.etree.ElementTree import Element

from vtpmd.inspect.html.elements import (
    Child,
    Column,
    element,
    facts,
    mark,
    part,
    table,
)
from vtpmd.inspect.screen import clock_words, journal_words, lockout_words
from vtpmd.store.status import epoch_text

SURPRISES_MAX: Final = 64  # that are told
NOTHING: Final = "Nothing would surprise."
STATES: Final = (
    *(Column("state"), Column("bytes", "number"), Column("decoded", "number"), Column("is")),
)
FAULTS: Final = (Column("state"), Column("byte", "number"), Column("in"), Column("what", "wide"))


def surprises(known: dict[str, Any]) -> Element:
    """Return what a person would not expect."""
    said = known["surprises"]
    if not said:
        return part("surprises", "Surprises", element("p", mark("none", "good"), NOTHING))
    items = [element("li", each) for each in said[:SURPRISES_MAX]]
    if len(said) > SURPRISES_MAX:
        items.append(element("li", f"and {len(said) - SURPRISES_MAX:,} more: --json"))
    return part("surprises", "Surprises", element("ul", *items, class_="alert"))


def glance(known: dict[str, Any]) -> Iterator[Element]:
    """Yield the part that says which vTPM it is, whose, of which generation, and how it is."""
    commits, profile = known["journal-commits"], known["profile"]
    served = {None: None, True: "yes", False: "no"}[known["in-use"]]
    pairs: list[tuple[str, Child]] = [
        ("identity", None if known["identity"] is None else element("code", known["identity"])),
        ("generation", known["generation"]),
        ("restore epoch", epoch_text(known["generation"]) if known["restore-epoch"] else None),
        ("ownership", known["owner"]),
        ("served", served),
        ("journal", None if commits is None else journal_words(commits)),
        (
            "profile",
            None
            if profile["name"] is None
            else f"{profile['name']}, format level {profile['format-level']}",
        ),
        ("lockout", lockout_words(known["lockout"]) or None),
        ("clock", clock_words(known["clock"]) or None),
        ("shutdown", known["clock"]["shutdown"]),
    ]
    told = [each for each in pairs if each[1] is not None]
    if told:
        yield part("glance", "At a glance", facts(told))


def bytes_decoded(known: dict[str, Any]) -> Element:
    """Return how much of each state is decoded, and what is wrong with it."""
    parts = dict(known["states"])
    if known["record"] is not None:
        parts[known["kind"]] = known["record"]
    rows = [
        (None, (name, f"{each['bytes']:,}", f"{each['decoded-bytes']:,}", _finding(each)))
        for name, each in parts.items()
    ]
    faults = [
        (None, (name, f"{fault['offset']:,}", fault["part"], fault["what"]))
        for name, each in parts.items()
        for fault in each["faults"]
    ]
    return part(
        "bytes",
        "Every byte",
        table("States", STATES, rows),
        table("What is wrong", FAULTS, faults, "--json") if faults else None,
    )


def _finding(state: dict[str, Any]) -> Element:
    if state["faults"]:
        is_newer = all(fault["newer"] for fault in state["faults"])
        return mark("of a later libtpms", "warn") if is_newer else mark("damaged", "bad")
    if state["decoded-bytes"] < state["bytes"]:
        return mark("of a later libtpms", "warn")
    return mark("decoded whole", "good")
