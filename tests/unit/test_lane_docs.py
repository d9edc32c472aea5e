"""docs/lane-format.md says what the code does, and `cryptography` makes the same bytes of it."""

import re
from contextlib import nullcontext

import pytest

from tests.support import lane as apart
from tests.support.documents import DOCS, Row, fields, tables
from vtpmd.core import lane
from vtpmd.core.lane import Lane, LaneFrame, LaneKeying, LaneKind, LaneRefusal
from vtpmd.wire import greeting
from vtpmd.wire.greeting import Greeting, GreetingError

TEXT = (DOCS / "lane-format.md").read_text()
TABLES = tables(TEXT)
GREETING = next(iter(tables(TEXT.partition("\n## Opening\n")[2]).values()))
KINDS, REFUSALS = TABLES["Content+"], tables(TEXT.partition("finds first:")[2])[""]

KEYING = LaneKeying(
    session=bytes(range(0x10)),
    key=bytes(range(0x20, 0x40)),
    uuid=bytes(range(0x40, 0x50)),
    lineage=bytes(range(0x50, 0x60)),
)
HELLO = LaneFrame(LaneKind.HELLO)
TAKE = LaneFrame(
    LaneKind.TAKE,
    permanent_digest=b"\xa1" * 32,
    volatile_digest=b"\xb2" * 32,
    apply_us=300,
    start_us=400,
)


def example(number: int) -> bytes:
    """Return the bytes of an example."""
    dumps = re.findall(r"(?:^    [0-9a-f]{4}  .*\n)+", TEXT, re.MULTILINE)
    return bytes.fromhex("".join(line[10:] for line in dumps[number].splitlines()))


def names(rows: list[Row], key: str) -> dict[str, int]:
    """Return the names in a table, with their numbers."""
    return {row["name"]: int(row[key]) for row in rows}


def test_limits() -> None:
    assert {row["name"].strip("`"): int(row["value"]) for row in TABLES["Limits"]} == {
        name: getattr(lane, name)
        for name in ("LANE_CONTENT_BYTES", "LANE_FRAME_BYTES", "LANE_FRAMES_MAX")
    }


def test_kinds_and_refusals() -> None:
    assert names(KINDS, "kind") == {kind.name: kind.value for kind in LaneKind}
    assert names(REFUSALS, "refusal") == {each.name: each.value for each in LaneRefusal}


def test_infos() -> None:
    assert re.findall(r"`(vtpmd lane .*?)`", TEXT) == [
        apart.INFO[is_source].decode() for is_source in (True, False)
    ]


def test_layout() -> None:
    """Of a frame's content, and of a frame; the other implementation has the same fields."""
    content = apart.encode(TAKE._replace(kind=LaneKind.REFUSE, reason=7))
    assert fields(TABLES["Content"], content) == {
        "kind": 4,
        "zeros": 0,
        "reason": 7,
        "apply": 300,
        "start": 400,
        "permanent digest": int.from_bytes(b"\xa1" * 32, "big"),
        "volatile digest": int.from_bytes(b"\xb2" * 32, "big"),
    }
    assert set(fields(TABLES["Frame"], example(0))) == {"AES-256-GCM", "tag"}
    assert len(content) == lane.LANE_CONTENT_BYTES == int(TABLES["Frame"][1]["Offset"])


def test_fields_of_kinds() -> None:
    """A field is refused with a kind that does not have it, and sealed with one that does."""
    digest = b"\1" * 32
    for row in KINDS:
        kind, has = LaneKind[row["name"]], set(row["fields"].split(", ")) - {""}
        frame = LaneFrame(kind, reason=7 if "reason" in has else 0)
        for name, with_it in {
            "reason": frame._replace(reason=7),
            "apply": frame._replace(apply_us=1),
            "start": frame._replace(start_us=1),
            "permanent digest": frame._replace(permanent_digest=digest),
            "volatile digest": frame._replace(volatile_digest=digest),
        }.items():
            keying = KEYING._replace(is_greeted=kind is not LaneKind.HELLO)
            with nullcontext() if name in has else pytest.raises(ValueError, match="next frame"):
                Lane(keying, is_source=True).seal(with_it)


def test_greeting() -> None:
    """Its layout; and a greeting is what the document says, whatever is altered."""
    data = greeting.encode(Greeting(KEYING.session, example(0)))
    assert fields(GREETING, data) == {
        "magic": int.from_bytes(b"VTPMLANE", "big"),
        "version": greeting.VERSION,
        "session": int.from_bytes(KEYING.session, "big"),
        "HELLO": int.from_bytes(example(0), "big"),
    }
    assert GREETING[1]["Field"] == f"version, {greeting.VERSION}"
    assert greeting.HELLO_BYTES == lane.LANE_FRAME_BYTES
    assert greeting.decode(data) == Greeting(KEYING.session, example(0))
    for at in range(10):
        altered = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        with pytest.raises(GreetingError):
            greeting.decode(altered)


def test_a_greeting_is_told_from_tls() -> None:
    """By the types of TLS's records (RFC 8446, 5.1, and RFC 6520), and from nothing at all."""
    for first in (*range(0x14, 0x19), 0):
        assert not greeting.begins(bytes([first]))
    assert not greeting.begins(b"")
    assert greeting.begins(greeting.encode(Greeting(KEYING.session, example(0)))[:1])


def test_examples() -> None:
    """They are what both implementations make, and they open."""
    assert example(0) == apart.seal(KEYING, 0, apart.encode(HELLO), is_source=True)
    assert example(1) == apart.seal(KEYING, 1, apart.encode(TAKE), is_source=False)
    source, destination = Lane(KEYING, is_source=True), Lane(KEYING, is_source=False)
    assert source.seal(HELLO) == example(0)
    assert destination.open(example(0)) == HELLO
    assert source.open(destination.seal(HELLO)) == HELLO
    assert destination.seal(TAKE) == example(1)
    assert source.open(example(1)) == TAKE
