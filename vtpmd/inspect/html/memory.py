"""NV memory: how full it is, what lies where, and what the indices are and hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, NamedTuple
from xml.etree.ElementTree import Element

from vtpmd.counted import counted, grouped
from vtpmd.inspect.html.elements import (
    MAP,
    NO_BREAK,
    ROWS_MAX,
    Child,
    Column,
    dumped,
    element,
    facts,
    once,
    part,
    table,
    words,
)
from vtpmd.inspect.screen import index_words, object_words

MAP_SIGNS_MAX: Final = 2048  # that entries are drawn with, beside one for each
SIGN_BYTES: Final = 16  # that a sign stands for, at least
BAR_UNITS: Final = 1000  # that the bar is drawn in
FREE_SIGNS: Final = 12  # what is free is not drawn to scale: it would be nearly all of the map
CONTENT_BYTES_MAX: Final = 256  # of an index that are shown; JSON has all of them
TIMES: Final = "\N{MULTIPLICATION SIGN}"
KINDS: Final = {
    "ordinary": "ordinary",
    "counter": "counter",
    "bits": "bits",
    "extend": "extend",
    "pin-fail": "pin",
    "pin-pass": "pin",
}
WORDS: Final = {
    "certificate": "certificate",
    "ordinary": "ordinary index",
    "counter": "counter",
    "bits": "bit field",
    "extend": "extended index",
    "pin": "PIN index",
    "object": "persistent object",
    "other": "other part",
}
COLUMNS: Final = (
    *(Column("index", "code"), Column("type"), Column("bytes", "number")),
    *(Column("lies at", "number"), Column("authorisation"), Column("attributes")),
    Column("content", "wide"),
)


class Piece(NamedTuple):
    """What lies somewhere in memory."""

    what: str
    kind: str  # a key of WORDS
    words: str
    offset: int
    n_bytes: int
    way: str | None  # to where the page has more of it


def memory(known: dict[str, Any]) -> Iterator[Element]:
    """Yield the part about NV memory, if there is anything to be told."""
    nv = known["nv"]
    if nv["bytes"] is None and not nv["indices"]:
        return
    pieces = _pieces(known)
    yield part(
        "memory",
        "NV memory",
        element("p", _fullness(nv)),
        _bar(pieces, nv) if nv["bytes"] else None,
        _legend(pieces, nv),
        _map(pieces, nv) if pieces else None,
        _indices(known, pieces) if nv["indices"] else element("p", "There is no index."),
    )


def _pieces(known: dict[str, Any]) -> list[Piece]:
    told: dict[str, tuple[str, str, str]] = {}
    for each in known["objects"][:ROWS_MAX]:
        told[each["handle"]] = ("object", object_words(each), f"object-{each['handle']}")
    for each in known["nv"]["indices"][:ROWS_MAX]:
        kind = "certificate" if each["certificate"] else KINDS.get(each["type"], "other")
        what = kind if each["certificate"] else each["type"] or "not decoded whole"
        told[each["handle"]] = (kind, what, f"nv-{each['handle']}")
    found = []
    for entry in known["nv"]["entries"]:
        kind, what, way = told.get(entry["what"], ("other", "", None))
        found.append(Piece(entry["what"], kind, what, entry["offset"], entry["bytes"], way))
    return found


def _fullness(nv: dict[str, Any]) -> str:
    if not nv["bytes"]:
        used = grouped(nv["used-bytes"], "byte is", "bytes are")
        return f"{used} used; of how many, no state says."
    percent = 100 * nv["used-bytes"] / nv["bytes"]
    return f"{nv['used-bytes']:,} of {nv['bytes']:,} bytes are used: {percent:.1f} %."


def _sums(pieces: list[Piece]) -> dict[str, int]:
    """Return how many bytes each kind has, of those that are there."""
    sums: Counter[str] = Counter()
    for piece in pieces:
        sums[piece.kind] += piece.n_bytes
    return {kind: sums[kind] for kind in WORDS if kind in sums}


def _bar(pieces: list[Piece], nv: dict[str, Any]) -> Element:
    """Return how full memory is, to scale."""
    total = max(nv["bytes"], sum(piece.n_bytes for piece in pieces))
    at, drawn = 0, []
    for kind, n_bytes in _sums(pieces).items():
        x, end = (BAR_UNITS * each // total for each in (at, at + n_bytes))
        size = {"x": x, "y": 0, "width": max(end - x, 1), "height": 1}
        drawn.append(element("rect", class_=kind, **size))
        at += n_bytes
    return element(
        "svg",
        *drawn,
        class_="bar",
        viewBox=f"0 0 {BAR_UNITS} 1",
        preserveAspectRatio="none",
        role="img",
        aria_label=_fullness(nv),
    )


def _legend(pieces: list[Piece], nv: dict[str, Any]) -> Element:
    counts = Counter(piece.kind for piece in pieces)
    items = [
        _legend_item(kind, f"{counts[kind]:,} {TIMES} {WORDS[kind]}, {grouped(n_bytes, 'byte')}")
        for kind, n_bytes in _sums(pieces).items()
    ]
    if nv["bytes"]:
        n_free = max(nv["bytes"] - nv["used-bytes"], 0)
        items.append(_legend_item("free", f"free, {grouped(n_free, 'byte')}"))
    return element("ul", *items, class_="legend")


def _legend_item(kind: str, text: str) -> Element:
    return element("li", element("span", class_=f"swatch {kind}", aria_hidden="true"), text)


def _map(pieces: list[Piece], nv: dict[str, Any]) -> Element:
    """Return what lies where: a run of signs for each entry, which a line of any width takes."""
    drawn, total = pieces[:ROWS_MAX], sum(piece.n_bytes for piece in pieces)
    scale = max(SIGN_BYTES, -(-total // MAP_SIGNS_MAX))
    cells = [_cell(piece, scale) for piece in drawn]
    if len(pieces) > len(drawn):
        more = grouped(len(pieces) - len(drawn), "more entry", "more entries")
        cells.append(_rest(more, "other"))
    n_free = (nv["bytes"] or 0) - nv["used-bytes"]
    if n_free > 0:
        cells.append(_rest(f"free: {grouped(n_free, 'byte')}", "free"))
    return element(
        "figure",
        element("div", *cells, class_=MAP),
        element(
            "figcaption",
            f"What lies where, in order. A sign is {scale:,} bytes; what is free is not to scale.",
        ),
    )


def _cell(piece: Piece, scale: int) -> Element:
    first, end = (each // scale for each in (piece.offset, piece.offset + piece.n_bytes))
    room = max(end - first, 1)
    name = NO_BREAK * (room > len(piece.what)) + piece.what if room >= len(piece.what) else ""
    signs = (element("span", name) if name else None, NO_BREAK * (room - len(name)))
    kind = f", {piece.words}" if piece.words else ""
    says = f"{piece.what}{kind}: {grouped(piece.n_bytes, 'byte')} at {piece.offset:,}"
    common = {"class_": f"cell {piece.kind}", "title": says, "aria_label": says}
    if piece.way is None:
        return element("span", *signs, role="img", tabindex=0, **common)
    return element("a", *signs, href=f"#{piece.way}", **common)


def _rest(text: str, kind: str) -> Element:
    """Return what is not drawn to scale."""
    room = NO_BREAK * FREE_SIGNS
    name = f"{NO_BREAK}{text}{NO_BREAK}"
    return element("span", element("span", name), room, class_=f"cell {kind}")


def _indices(known: dict[str, Any], pieces: list[Piece]) -> Element:
    indices = known["nv"]["indices"]
    places = {piece.what: piece for piece in pieces}
    ids = once(f"nv-{each['handle']}" for each in indices)
    rows = [
        (row_id, _index(each, places.get(each["handle"]), is_12=known["tpm12"] is not None))
        for row_id, each in zip(ids, indices, strict=True)
    ]
    return table("Indices", COLUMNS, rows, "--json")


def _index(index: dict[str, Any], place: Piece | None, *, is_12: bool) -> tuple[Child, ...]:
    where = "-" if place is None else f"{place.offset:,}"
    if index["bytes"] is None:
        return (index["handle"], "not decoded whole", None, where, None, None, None)
    auth = "set" if index["auth-set"] else "empty"
    policy = ", policy" if index["policy"] else ""
    return (
        index["handle"],
        index["type"],
        f"{index['bytes']:,}",
        where,
        f"{auth}{policy}",
        words(index["attributes"]),
        _content(index, index_words(index, says_written=not is_12)),
    )


def _content(index: dict[str, Any], says: str) -> Child:
    """Return what an index holds: folded up, as there may be much of it."""
    data = index["data"]
    if data is None:
        return says or "none"
    if isinstance(data, dict):
        return secret_words(data["secret"])
    raw = bytes.fromhex(data)
    more = [element("summary", says or grouped(len(raw), "byte"))]
    if index["certificate"]:
        more.append(_certificate(index["certificate"]))
    if index["policy"]:
        more.append(facts([("policy", element("code", index["policy"]))]))
    return element("details", *more, dumped(raw, CONTENT_BYTES_MAX))


def secret_words(secret: dict[str, Any]) -> Element:
    """Return what is shown in a secret's place; and the secret, if that was asked for."""
    fingerprint = secret.get("fingerprint")
    if fingerprint is None:
        return element("span", "empty", class_="secret")
    text = f"secret, {counted(secret['bytes'], 'byte')}, fingerprint {fingerprint}"
    shown = secret.get("value")
    return element(
        "span",
        text,
        None if shown is None else element("code", str(shown), class_="shown"),
        class_="secret",
    )


def _certificate(certificate: dict[str, Any]) -> Element:
    names = ("subject", "issuer", "serial", "not-before", "not-after")
    return facts([(name.replace("-", " "), certificate[name]) for name in names])
