"""The page of what differs between two states: what the lines of ``vtpmd diff`` say, in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from xml.etree.ElementTree import Element

from vtpmd.inspect.difference import Change
from vtpmd.inspect.html.document import document
from vtpmd.inspect.html.elements import Child, Column, element, mark, part, table
from vtpmd.inspect.screen import container_words

SIDES: Final = (
    *(Column("state"), Column("path", "wide"), Column("is"), Column("identity", "code digest")),
    Column("generation", "number"),
)
COLUMNS: Final = (Column("of", "code"), Column("what differs", "rest"))
TITLES: Final = {
    "state": "States",
    "pcr": "PCRs",
    "nv": "NV memory",
    "object": "Objects",
    "session": "Sessions",
    "hierarchy": "Hierarchies",
    "lockout": "Lockout",
    "clock": "Clock",
    "profile": "Profile",
    "flag": "Flags",
    "owner": "Owner",
    "counter": "Counters",
    "other": "Anything else",
}


def difference_page(
    before: dict[str, Any],
    after: dict[str, Any],
    changes: Sequence[Change],
    made: str,
    put_back: str | None = None,
) -> bytes:
    """Return the page, of what is known of both containers and of what ``differences`` found.

    ``put_back`` is the line of ``difference.put_back``.
    """
    sides = [(None, _side(name, each)) for name, each in (("A", before), ("B", after))]
    by_part: dict[str, list[Change]] = {}
    for change in changes:
        by_part.setdefault(change.part, []).append(change)
    parts: list[Element] = [
        part(
            "sides",
            "What is compared",
            table("A and B", SIDES, sides),
            None if put_back is None else element("ul", element("li", put_back), class_="alert"),
            _summary(by_part),
        )
    ]
    parts += [_part(name, by_part[name]) for name in TITLES if name in by_part]
    return document("What differs", f"{before['path']} and {after['path']}", parts, made)


def _side(name: str, known: dict[str, Any]) -> tuple[Child, ...]:
    return (
        name,
        known["path"],
        container_words(known),
        known["identity"] or "-",
        "-" if known["generation"] is None else known["generation"],
    )


def _summary(by_part: dict[str, list[Change]]) -> Element:
    if not by_part:
        return element("p", mark("the same", "good"), "Nothing differs.")
    items = [
        element("li", mark(f"{len(by_part[name]):,}", f"kind {name}"), f" {TITLES[name]}")
        for name in TITLES
        if name in by_part
    ]
    return element("ul", *items, class_="legend")


def _part(name: str, changes: list[Change]) -> Element:
    rows = [(None, (change.what, change.text)) for change in changes]
    return part(name, TITLES[name], table(TITLES[name], COLUMNS, rows, "vtpmd diff"))
