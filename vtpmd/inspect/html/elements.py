"""What a page is made of. Text comes in here alone, and ElementTree escapes it as it is written.

A state's bytes are anybody's: none of them can become an element, an attribute or a reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple
from xml.etree.ElementTree import Element, tostring

from vtpmd.counted import grouped

Child = Element | str | int | None

TEXT_LENGTH_MAX: Final = 4096  # of one text: no path is longer
ROWS_MAX: Final = 1024  # of a table: more indices of no bytes than NV memory has room for
PAIRS: Final = "pairs"  # the class of a table that a phone has room for
MAP: Final = "map"  # the class of an element in which a space would be seen
CUT: Final = "…"
NOT_PRINTABLE: Final = "\N{REPLACEMENT CHARACTER}"
NO_BREAK: Final = "\N{NO-BREAK SPACE}"


class Column(NamedTuple):
    """A column of a table."""

    title: str
    kind: str = ""  # what it looks like: a class of the stylesheet


def shown(text: str) -> str:
    """Return a text as a page has it: cut, without what would alter the text around it."""
    cut = text if len(text) <= TEXT_LENGTH_MAX else text[: TEXT_LENGTH_MAX - len(CUT)] + CUT
    if cut.isprintable():
        return cut
    return "".join(
        char if char.isprintable() or char == NO_BREAK else NOT_PRINTABLE for char in cut
    )


def element(tag: str, /, *children: Child, **attributes: str | int | None) -> Element:
    """Return an element. An attribute's name has ``_`` for ``-``; one that is None is left out."""
    made = Element(tag)
    for attribute, value in attributes.items():
        if value is not None:
            made.set(attribute.strip("_").replace("_", "-"), shown(str(value)))
    for child in children:
        _append(made, child)
    return made


def _append(parent: Element, child: Child) -> None:
    if isinstance(child, Element):
        parent.append(child)
    elif child is not None:
        text = shown(str(child))
        if len(parent):
            parent[-1].tail = (parent[-1].tail or "") + text
        else:
            parent.text = (parent.text or "") + text


def written(root: Element) -> str:
    """Return an element as HTML."""
    return tostring(root, encoding="unicode", method="html")


def part(name: str, title: str, *children: Child) -> Element:
    """Return a part of a page: a section with a heading, that a reference can lead to."""
    heading = element("h2", title, id=f"{name}-title")
    return element("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def facts(pairs: Iterable[tuple[str, Child]]) -> Element:
    """Return names with what they are."""
    rows = [element("div", element("dt", name), element("dd", value)) for name, value in pairs]
    return element("dl", *rows, class_="facts")


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[tuple[str | None, Sequence[Child]]],
    rest: str = "",
) -> Element:
    """Return a table, of ROWS_MAX rows at most; ``rest`` says where all of them are.

    A row is its id, if it has one, and its cells, of which the first names it. On a phone each
    cell stands alone, below what its column is called.
    """
    head = element(
        "tr", *(element("th", each.title, scope="col", class_=each.kind) for each in columns)
    )
    body = [_row(columns, cells, row_id) for row_id, cells in rows[:ROWS_MAX]]
    made = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *body),
        class_=PAIRS if len(columns) == 2 else None,
    )
    more = len(rows) - ROWS_MAX
    return element(
        "div",
        scrolled(made, caption),
        element("p", f"and {more:,} more: {rest}", class_="more") if more > 0 else None,
    )


def _row(columns: Sequence[Column], cells: Sequence[Child], row_id: str | None) -> Element:
    first, *others = zip(columns, cells, strict=True)
    return element(
        "tr",
        element("th", first[1], scope="row", class_=first[0].kind),
        *(element("td", cell, class_=column.kind, data_of=column.title) for column, cell in others),
        id=row_id,
    )


def scrolled(content: Element, what: str) -> Element:
    """Return what a narrow screen has to scroll: by the keyboard, too."""
    return element("div", content, class_="scroll", role="region", aria_label=what, tabindex=0)


def once(names: Iterable[str]) -> list[str | None]:
    """Return names as ids of a page, which has each once: None in place of one that was there."""
    seen: set[str] = set()
    found: list[str | None] = []
    for name in names:
        found.append(None if name in seen else name)
        seen.add(name)
    return found


def mark(text: str, kind: str = "") -> Element:
    """Return a word that stands out, and not by its colour alone."""
    return element("span", text, class_=f"mark {kind}".rstrip())


def words(texts: Iterable[str]) -> Element:
    """Return words, each of which stays whole on a narrow screen."""
    return element("span", *(element("span", text) for text in texts), class_="words")


def dumped(data: bytes, bytes_max: int) -> Element:
    """Return bytes as digits and text, as far as ``bytes_max``."""
    lines = [
        element("span", f"{at:04x}  {_line(data[at : min(at + 16, bytes_max)])}")
        for at in range(0, min(len(data), bytes_max), 16)
    ]
    more = len(data) - bytes_max
    if more > 0:
        lines.append(element("span", f"{CUT} {grouped(more, 'more byte')}: --json"))
    return element("pre", *lines, class_="dump")


def _line(data: bytes) -> str:
    text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in data)
    return f"{data.hex(' '):<47}  {text}"
