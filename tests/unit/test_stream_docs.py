"""docs/stream-format.md says what the code does."""

import re
from itertools import pairwise
from pathlib import Path
from typing import get_args

from tests.support import tail
from vtpmd._core import lib
from vtpmd.core.handover import Handover, HandoverAction, HandoverEvent, handover_step
from vtpmd.daemon import asking, incoming, lane, outgoing, peer_server
from vtpmd.migration import destination, events, source
from vtpmd.migration.states import TABLE, State
from vtpmd.wire import peer

LOCAL_EVENTS = get_args(events.LocalEvent)
TEXT = (Path(__file__).parents[2] / "docs/stream-format.md").read_text()


def table(heading: str, which: int = 0) -> list[list[str]]:
    """Return the rows of a table of a section, without its head."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    rows = [row.strip("| ").split(" | ") for row in tables[which].splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_states() -> None:
    """Every state in its words, every transition, and no other."""
    meanings = {tuple(row) for row in table("States")}
    assert meanings == {(each.name, *each.value.split(": ", 1)) for each in State}
    rows = [(state.name, event.__name__, after.name) for (state, event), after in TABLE.items()]
    assert sorted(map(tuple, table("States", 1))) == sorted(rows)


def test_hand_over() -> None:
    """The engine's table, row by row."""
    rows = []
    for state in Handover:
        for event in HandoverEvent:
            if (step := handover_step(state, event)) is not None:
                does = ", ".join(str(each.name) for each in HandoverAction if each in step.actions)
                rows.append([state.name, event.name, step.state.name, does or "nothing"])
    assert sorted(map(tuple, table("The hand-over"))) == sorted(map(tuple, rows))


def test_own_events() -> None:
    """With the first line of what they say of themselves."""
    rows = {kind.__name__: (kind.__doc__ or "").partition("\n")[0] for kind in LOCAL_EVENTS}
    assert {row[0]: row[1] for row in table("States", 2)} == rows


def test_messages() -> None:
    """Types, and the sizes that the fields of a body add up to."""
    for number, name, _, body in table("Messages"):
        kind = getattr(peer, name)
        assert peer.TYPE_NUMBERS[kind] == int(number)
        if name in ("Refuse", "Record"):
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


def test_what_is_known_of_a_qemu() -> None:
    rows = {row[1]: int(row[0]) for row in table("Messages", 2)}
    assert rows == {following.name: following.value for following in peer.Following}


def test_waits() -> None:
    """With their values; those that both questions have are the same."""
    modules = {
        "source": (source, outgoing, asking, lane),
        "destination": (destination, incoming, peer_server),
    }
    for side, name, value, _ in table("Waits"):
        values = {
            getattr(module, name.strip("`"))
            for module in modules[side]
            if hasattr(module, name.strip("`"))
        }
        assert values == {float(value)}, name


def test_power_loss_names_states() -> None:
    """Of the side that the column is about."""
    for row in table("What a power loss costs"):
        for side, cell in zip(("source", "destination"), row, strict=False):
            for name in re.findall(r"\b[A-Z]{2,}\b", cell):
                assert State[name].value.startswith((side, "both")), name


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
    version = next(field for offset, _, field in table("The tail") if offset == "8")
    assert version == f"version, {tail.VERSION}"
    # The engine's, of which this is an implementation apart.
    assert tail.VERSION == lib.TAIL_VERSION
    assert tail.HEADER.size == lib.TAIL_HEADER_BYTES
    assert tail.TAIL_BYTES_MAX == lib.TAIL_BYTES_MAX
    assert [size for _, size in rows] == [8, 2, 2, peer.SESSION_BYTES, 8, 8, 8, 8, tail.NONCE_BYTES]
