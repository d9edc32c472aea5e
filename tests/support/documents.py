"""The tables of this project's documents, as tests read them."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"

Row = dict[str, str]


def tables(text: str) -> dict[str, list[Row]]:
    """Return every table of a document, by the last line of text or heading before it.

    Of two tables under one line the second gets a plus sign.
    """
    found: dict[str, list[Row]] = {}
    title, header = "", None
    for line in text.splitlines():
        if not line.startswith("|"):
            title, header = line.strip("# :") or title, None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
            title += "+" * (title in found)
            found[title] = []
        elif not set(line) <= set("|-"):
            found[title].append(dict(zip(header, cells, strict=True)))
    return found


def fields(rows: list[Row], data: bytes) -> dict[str, int | bytes]:
    """Take data apart by an Offset / Size / Field table, which must leave no gap.

    A field's name is what its row says before a comma or colon.
    """
    found: dict[str, int | bytes] = {}
    end = 0
    for row in rows:
        assert int(row["Offset"]) == end, row
        name = re.split("[,:]| of ", row["Field"])[0]
        rest = row["Size"] == "…"
        end = len(data) if rest else end + int(row["Size"])
        value = data[int(row["Offset"]) : end]
        found[name] = value if rest else int.from_bytes(value, "big")
    assert end == len(data)
    return found
