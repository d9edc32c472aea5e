"""What a record of vtpmd's says, where that is all that there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

from vtpmd.inspect.html.elements import Column, facts, part, table


def record(known: dict[str, Any]) -> Iterator[Element]:
    """Yield the part about what it says, and a table for each list in it."""
    says = known["record"]["says"]
    pairs = [
        (_title(name), _word(value)) for name, value in says.items() if not isinstance(value, list)
    ]
    tables = [
        _items(_title(name), value) for name, value in says.items() if isinstance(value, list)
    ]
    yield part("record", "What it says", facts(pairs), *tables)


def _items(name: str, items: list[dict[str, Any]]) -> Element:
    names = list(items[0]) if items else ["none"]
    rows = [(None, [_word(each.get(name)) for name in names]) for each in items]
    return table(name, [Column(_title(each)) for each in names], rows, "--json")


def _title(name: str) -> str:
    return name.replace("-", " ")


def _word(value: Any) -> str:
    if value is None:
        return "not known"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
