"""PCRs: the value of each in the banks that are on, and those that are as they began in a line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final
from xml.etree.ElementTree import Element

from vtpmd.inspect.html.elements import Child, Column, element, part, table
from vtpmd.inspect.screen import is_told

COLUMNS: Final = (Column("PCR", "code"), Column("value", "code digest rest"))
AS_THEY_BEGAN: Final = "All PCRs are zeros, or ones where they begin so, in"
NO_VALUES: Final = (
    "Their values are in a running TPM's volatile state alone, and there is none here."
)


def pcrs(known: dict[str, Any]) -> Iterator[Element]:
    """Yield the part about PCRs, if there is anything to be told."""
    found = known["pcrs"]
    if not found["banks"] and not found["values"]:
        return
    told = {
        bank: values
        for bank, values in found["values"].items()
        if any(is_told(value) for value in values.values())
    }
    banks = [
        table(f"Bank {bank}", COLUMNS, list(_rows(values)), "--json")
        for bank, values in told.items()
    ]
    others = [bank for bank in found["values"] if bank not in told]
    on = ", ".join(f"{bank} ({len(chosen)} PCRs)" for bank, chosen in found["banks"].items())
    yield part(
        "pcrs",
        "PCRs",
        element("p", f"Banks that are on: {on}." if on else "No bank is known to be on."),
        *banks,
        element("p", f"{AS_THEY_BEGAN} {', '.join(others)}.") if others else None,
        None if found["values"] else element("p", NO_VALUES, class_="quiet"),
    )


def _rows(values: dict[str, str]) -> Iterator[tuple[str | None, tuple[Child, ...]]]:
    """Yield a row for each value that says something, and one for each run of others."""
    for how, run in groupby(values.items(), lambda pair: _beginning(pair[1])):
        pairs = list(run)
        if how is None:
            yield from ((None, pair) for pair in pairs)
        else:
            numbers = [int(number) for number, _ in pairs]
            yield None, (_range(numbers), element("span", how, class_="quiet"))


def _beginning(value: str) -> str | None:
    """Return how a value begins, if it is as it began."""
    if is_told(value):
        return None
    return "ones" if value.strip("0") else "zeros"


def _range(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    is_run = numbers == list(range(first, last + 1)) and first != last
    return f"{first} to {last}" if is_run else ", ".join(map(str, numbers))
