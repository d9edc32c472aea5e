"""docs/stream-format.md says what the code does."""

import re
from itertools import pairwise
from pathlib import Path

from vtpmd.migration import tail
from vtpmd.migration.states import TABLE, Local
from vtpmd.wire import peer

TEXT = (Path(__file__).parents[2] / "docs/stream-format.md").read_text()


def table(heading: str, which: int = 0) -> list[list[str]]:
    """Return the rows of a table of a section, without its head."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    rows = [row.strip("| ").split(" | ") for row in tables[which].splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_states() -> None:
    """Every transition, and no other."""
    rows = {
        (state.name, event.name if isinstance(event, Local) else event.__name__, after.name)
        for (state, event), after in TABLE.items()
    }
    assert {tuple(row) for row in table("States")} == rows


def test_messages() -> None:
    """Types, and the sizes that the fields of a body add up to."""
    for number, name, _, body in table("Messages"):
        kind = getattr(peer, name)
        assert peer.TYPE_NUMBERS[kind] == int(number)
        if name in ("Refuse", "Record", "Ack"):
            continue
        sizes = [
            (int(bits) // 8 if bits else int(size)) * int(times or 1)
            for bits, size, times in re.findall(
                r"(?:^|, )(?:u(\d+)|(\d+))(?: \u00d7 (\d+))?(?= |$)", body
            )
        ]
        example = kind(*(b"" if "bytes" in str(t) else 0 for t in kind.__annotations__.values()))
        assert sum(sizes) == len(peer.encode(example)) - 5, name
    assert len(table("Messages")) == len(peer.TYPE_NUMBERS)


def test_reasons() -> None:
    rows = {row[1]: int(row[0]) for row in table("Messages", 1)}
    assert rows == {reason.name: reason.value for reason in peer.Reason}


def test_limits() -> None:
    for name, value, _ in table("Limits"):
        module = tail if name.strip("`").startswith("TAIL") else peer
        assert getattr(module, name.strip("`")) == int(value)


def test_tail() -> None:
    """Offsets follow from the sizes, and are those of the code's layout."""
    rows = [(int(o), int(s)) for o, s, _ in table("The tail") if o.isdigit() and s.isdigit()]
    for (offset, size), (following, _) in pairwise(rows):
        assert offset + size == following
    assert sum(rows[-1]) == tail.HEADER.size
    assert [size for _, size in rows] == [8, 2, 2, peer.SESSION_BYTES, 8, 8, 8, 8, tail.NONCE_BYTES]
