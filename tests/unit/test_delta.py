"""Delta records: every rule of docs/delta-format.md, and that it says what the code does.

The records here are built from the document's table. Invariant 8: a record is from outside;
whatever is wrong in it, it is refused by the name of what is wrong, and nothing is made of it.
"""

import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.documents import Row, tables
from tests.support.image_digest import image_digest, whole_digest
from vtpmd import moment
from vtpmd._core import lib
from vtpmd.core import Image
from vtpmd.core.delta import (
    _REFUSALS,
    DELTA_RECORD_BYTES_MAX,
    DeltaError,
    DeltaHeader,
    DeltaInvalidError,
    DeltaMismatchError,
    DeltaRefusal,
    DeltaUnsupportedError,
    delta_apply,
    delta_encode,
    delta_inspect,
)
from vtpmd.core.image import IMAGE_DIGEST_BYTES
from vtpmd.wire.tpm import StateType

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/delta-format.md").read_text()
TABLES = tables(DOCUMENT)

LAYOUT = TABLES["Record"]
HEADER_FIELDS = [
    re.split("[,:]", row["Field"])[0].replace(" ", "_").replace("-", "_") for row in LAYOUT[:-3]
]
HEADER = struct.Struct(
    ">"
    + "".join(
        {"1": "B", "2": "H", "4": "I", "8": "Q"}.get(row["Size"], "32s") for row in LAYOUT[:-3]
    )
)
BASE = Image(2, 5, bytes(range(200)))
CRC32C_POLYNOMIAL = 0x82F63B78


def crc32c(data: bytes) -> int:
    """Return the CRC-32C, bit by bit."""
    crc = 0xFFFF_FFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ CRC32C_POLYNOMIAL * (crc & 1)
    return crc ^ 0xFFFF_FFFF


def number(value: int) -> bytes:
    """Encode a number of the operations."""
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes(group | 0x80 for group in groups[:-1]) + bytes(groups[-1:])


def copy(length: int, distance: int = 0) -> bytes:
    """Encode a COPY."""
    return number(length * 2) + number(distance * 2 if distance >= 0 else -distance * 2 - 1)


def insert(data: bytes) -> bytes:
    """Encode an INSERT."""
    return number(len(data) * 2 + 1) + data


def record(
    operations: bytes, result: bytes = b"", *, header_excess: bytes = b"", **fields: int | bytes
) -> bytes:
    """Build a record for BASE as the document has it; `fields` replaces some."""
    values: dict[str, int | bytes] = {
        "magic": 0x56545044,
        "version": 2,
        "type_of_image": BASE.type,
        "header_size": HEADER.size + len(header_excess),
        "compatible_flags": 0,
        "incompatible_flags": 0,
        "base_length": len(BASE.data),
        "from_generation": BASE.generation,
        "to_generation": BASE.generation + 1,
        "result_length": len(result),
        "operations_length": len(operations),
        "base_digest": whole_digest(BASE.data),
        "result_digest": whole_digest(result),
    }
    assert set(values) == set(HEADER_FIELDS) >= set(fields)
    header = HEADER.pack(*((values | fields)[name] for name in HEADER_FIELDS))
    checked = header + header_excess + operations
    return checked + struct.pack(">I", crc32c(checked))


def refusal_of(data: bytes, base: Image = BASE) -> DeltaRefusal | None:
    """Return why a record is refused, or None."""
    try:
        delta_apply(base, data)
    except DeltaError as error:
        return error.refusal
    return None


RESULT = BASE.data[:100] + b"new" + BASE.data[150:]
RIGHT = copy(100) + insert(b"new") + copy(50, 47)
DATED = 1
TIME = struct.Struct(">Q")


def dated(ms: int, more: bytes = b"") -> bytes:
    """Build a record that has a time, and what a later version may have behind it."""
    return record(RIGHT, RESULT, header_excess=TIME.pack(ms) + more, compatible_flags=DATED)


def test_a_time_is_read_from_a_dated_record_alone() -> None:
    assert delta_inspect(dated(1_795_959_040_125)).time_ms == 1_795_959_040_125
    assert delta_apply(BASE, dated(1)).data == RESULT
    undated = record(RIGHT, RESULT, header_excess=TIME.pack(9), compatible_flags=2)
    assert delta_inspect(undated).time_ms is None
    assert delta_inspect(record(RIGHT, RESULT)).time_ms is None


def test_a_record_by_the_document_applies() -> None:
    made = delta_apply(BASE, record(RIGHT, RESULT))
    assert made == Image(2, 6, RESULT, image_digest(RESULT))


def test_the_encoder_writes_what_the_document_says() -> None:
    assert delta_encode(BASE, Image(2, 6, RESULT)) == record(RIGHT, RESULT)


def test_a_whole_image_is_a_record_on_nothing() -> None:
    empty = Image(1, 0, b"")
    data = delta_encode(empty, Image(1, 9, b"state"))
    assert data[HEADER.size : -4] == insert(b"state")
    assert delta_apply(empty, data)[:3] == (1, 9, b"state")


def test_an_image_can_become_empty() -> None:
    data = delta_encode(BASE, Image(2, 6, b""))
    assert data == record(b"")
    assert delta_apply(BASE, data).data == b""


def test_inspect_gives_the_header() -> None:
    assert delta_inspect(record(RIGHT, RESULT)) == DeltaHeader(
        type=2,
        from_generation=5,
        to_generation=6,
        base_bytes=200,
        result_bytes=len(RESULT),
        operations_bytes=len(RIGHT),
        base_digest=whole_digest(BASE.data),
        result_digest=whole_digest(RESULT),
        compatible_flags=0,
    )


def test_a_known_digest_is_believed_and_not_computed() -> None:
    following = Image(2, 6, RESULT, digest=b"r" * IMAGE_DIGEST_BYTES)
    base = BASE._replace(digest=b"b" * IMAGE_DIGEST_BYTES)
    header = delta_inspect(delta_encode(base, following))
    assert (header.base_digest, header.result_digest) == (b"b" * 32, b"r" * 32)


GENERATION_MAX = 2**63 - 1
IMAGE_BYTES_MAX = 256 * 1024


@pytest.mark.parametrize(
    ("refusal", "data"),
    [
        ("SHORT", record(RIGHT, RESULT)[: HEADER.size - 1]),
        ("SHORT", b""),
        ("NO_RECORD", record(RIGHT, RESULT, magic=0x56545045)),
        ("VERSION_UNKNOWN", record(RIGHT, RESULT, version=0)),
        ("VERSION_UNKNOWN", record(RIGHT, RESULT, version=1)),
        ("VERSION_UNKNOWN", record(RIGHT, RESULT, version=3)),
        ("FLAG_UNKNOWN", record(RIGHT, RESULT, incompatible_flags=1)),
        ("FLAG_UNKNOWN", record(RIGHT, RESULT, incompatible_flags=0x8000)),
        ("HEADER_WRONG", record(RIGHT, RESULT, header_size=103)),
        ("HEADER_WRONG", record(RIGHT, RESULT, header_excess=b"x")),
        ("HEADER_WRONG", record(RIGHT, RESULT, header_excess=bytes(409), compatible_flags=1)),
        ("LENGTH_WRONG", record(RIGHT, RESULT)[:-1]),
        ("LENGTH_WRONG", record(RIGHT, RESULT) + b"x"),
        ("LENGTH_WRONG", record(RIGHT, RESULT, operations_length=len(RIGHT) + 1)),
        ("LENGTH_WRONG", record(RIGHT, RESULT, operations_length=2**32 - 1)),
        ("CHECKSUM_WRONG", record(RIGHT, RESULT)[:-1] + b"x"),
        ("HEADER_WRONG", record(RIGHT, RESULT, compatible_flags=DATED)),
        ("HEADER_WRONG", record(RIGHT, RESULT, header_excess=bytes(7), compatible_flags=DATED)),
        ("LIMIT_BROKEN", dated(0)),
        ("LIMIT_BROKEN", dated(lib.DELTA_TIME_MS_MAX + 1)),
        ("LIMIT_BROKEN", record(RIGHT, RESULT, type_of_image=0)),
        ("LIMIT_BROKEN", record(RIGHT, RESULT, type_of_image=4)),
        ("LIMIT_BROKEN", record(RIGHT, RESULT, to_generation=5)),
        ("LIMIT_BROKEN", record(RIGHT, RESULT, to_generation=4)),
        ("LIMIT_BROKEN", record(RIGHT, RESULT, to_generation=GENERATION_MAX + 1)),
        ("LIMIT_BROKEN", record(RIGHT, RESULT, from_generation=0)),
        ("LIMIT_BROKEN", record(RIGHT, RESULT, base_length=IMAGE_BYTES_MAX + 1)),
        ("LIMIT_BROKEN", record(RIGHT, RESULT, result_length=IMAGE_BYTES_MAX + 1)),
        ("LIMIT_BROKEN", record(RIGHT, RESULT, result_length=len(RIGHT) - 4)),
        ("OTHER_TYPE", record(RIGHT, RESULT, type_of_image=1)),
        ("OTHER_BASE", record(RIGHT, RESULT, from_generation=4)),
        ("OTHER_BASE", record(RIGHT, RESULT, base_length=199)),
        ("OTHER_BASE", record(RIGHT, RESULT, base_length=201)),
        ("BASE_DIFFERS", record(RIGHT, RESULT, base_digest=bytes(32))),
        ("OPERATION_WRONG", record(RIGHT, RESULT, result_length=len(RESULT) - 1)),
        ("OPERATION_WRONG", record(RIGHT, RESULT, result_length=len(RESULT) + 1)),
        ("RESULT_DIFFERS", record(RIGHT, RESULT, result_digest=bytes(32))),
    ],
)
def test_a_wrong_header_is_refused(refusal: str, data: bytes) -> None:
    assert refusal_of(data) is DeltaRefusal[refusal]


def test_numbers_at_their_limits_are_taken() -> None:
    assert refusal_of(record(RIGHT, RESULT, to_generation=GENERATION_MAX)) is None
    assert refusal_of(record(RIGHT, RESULT, compatible_flags=0xFFFF - DATED)) is None
    excess = bytes(408)
    assert refusal_of(record(RIGHT, RESULT, header_excess=excess, compatible_flags=2)) is None
    for ms in (1, lib.DELTA_TIME_MS_MAX):
        assert refusal_of(dated(ms)) is None
        assert refusal_of(dated(ms, excess[8:])) is None
    whole = Image(1, 1, bytes(IMAGE_BYTES_MAX))
    following = Image(1, GENERATION_MAX, b"\1" * IMAGE_BYTES_MAX)
    data = delta_encode(whole, following)
    assert len(data) == DELTA_RECORD_BYTES_MAX - 408
    assert delta_apply(whole, data).data == following.data


OPERATIONS: dict[str, tuple[bytes, bytes, bool]] = {
    "nothing": (b"", b"", True),
    "to the end of the base": (copy(1, 199), b"\xc7", True),
    "past the end of the base": (copy(1, 200), b"\0", False),
    "over the end of the base": (copy(2, 199), b"\xc7\0", False),
    "longer than the base": (copy(201), bytes(201), False),
    "before the base": (copy(1, -1), b"\0", False),
    "back to the start": (copy(5) + copy(3, -5), bytes([0, 1, 2, 3, 4, 0, 1, 2]), True),
    "back before the start": (copy(5) + copy(3, -6), bytes(8), False),
    "a distance behind an INSERT": (insert(b"abc") + copy(2, -3), b"abc\0\1", True),
    "COPY of nothing": (copy(0) + insert(b"a"), b"a", False),
    "INSERT of nothing": (copy(2) + insert(b""), b"\0\1", False),
    "INSERT behind INSERT": (insert(b"a") + insert(b"b"), b"ab", False),
    "COPY that goes on": (copy(1) + copy(1), b"\0\1", False),
    "COPY behind COPY": (copy(1) + copy(1, 1), b"\0\2", True),
    "COPY behind INSERT goes on": (copy(1) + insert(b"x") + copy(1), b"\0x\2", True),
    "INSERT cut off": (number(7) + b"ab", b"ab", False),
    "COPY cut off": (number(4), b"\0\1", False),
    "number cut off": (b"\x84", b"\0\1", False),
    "length in too many bytes": (b"\x84\x00\x00", b"\0\1", False),
    "distance in too many bytes": (b"\x04\x80\x00", b"\0\1", False),
    "length of four bytes": (b"\x84\x80\x80\x00\x00", b"\0\1", False),
    "more than the result": (copy(3), b"\0\1", False),
    "less than the result": (copy(1), b"\0\1", False),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    operations, result, is_right = OPERATIONS[name]
    expected = None if is_right else DeltaRefusal.OPERATION_WRONG
    assert refusal_of(record(operations, result)) is expected


def test_an_empty_number_of_bytes_is_never_read() -> None:
    """Every truncation of the operations is refused, also where the header says the new length."""
    for length in range(len(RIGHT)):
        assert refusal_of(record(RIGHT[:length], RESULT)) is DeltaRefusal.OPERATION_WRONG


def test_every_bit_counts() -> None:
    data = record(RIGHT, RESULT)
    for bit in range(len(data) * 8):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        assert refusal_of(bytes(altered)) is not None


def test_every_truncation_is_refused() -> None:
    data = record(RIGHT, RESULT)
    for length in range(len(data)):
        assert refusal_of(data[:length]) in (DeltaRefusal.SHORT, DeltaRefusal.LENGTH_WRONG)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (DeltaInvalidError, b""),
        (DeltaUnsupportedError, record(RIGHT, RESULT, version=3)),
        (DeltaMismatchError, record(RIGHT, RESULT, from_generation=4)),
    ],
)
def test_errors_are_of_three_kinds_and_one_line(kind: type[DeltaError], data: bytes) -> None:
    with pytest.raises(kind, match=r"^a delta record .*: .*; .*[^.\n]$"):
        delta_apply(BASE, data)


def test_errors_and_images_do_not_show_state() -> None:
    secret = Image(2, 5, b"the seed")
    assert "seed" not in repr(secret)
    with pytest.raises(DeltaError) as error:
        delta_apply(secret, record(insert(b"the seed"), b"the seed"))
    assert "seed" not in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: delta_encode(BASE, BASE),
        lambda: delta_encode(BASE, Image(1, 6, b"")),
        lambda: delta_encode(BASE._replace(type=4), Image(4, 6, b"")),
        lambda: delta_encode(Image(2, 0, b"x"), BASE),
        lambda: delta_encode(Image(2, -1, b""), BASE),
        lambda: delta_encode(BASE, Image(2, GENERATION_MAX + 1, b"")),
        lambda: delta_encode(BASE, Image(2, 6, bytes(IMAGE_BYTES_MAX + 1))),
        lambda: delta_encode(BASE, Image(2, 6, b"", digest=b"short")),
        lambda: delta_apply(BASE._replace(type=0), record(RIGHT, RESULT)),
        lambda: delta_apply(Image(2, 5, bytes(IMAGE_BYTES_MAX + 1)), record(RIGHT, RESULT)),
    ],
)
def test_images_that_are_none_are_the_callers_error(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        call()


# What the encoder finds. Records stay valid without it, and become large.

RANDOM = random.Random(3)
NOISE = RANDOM.randbytes(4000)
NEW = RANDOM.randbytes(1000)


def encoded(base: bytes, following: bytes) -> bytes:
    """Return the operations that the encoder writes."""
    data = delta_encode(Image(2, 1, base), Image(2, 2, following))
    assert delta_apply(Image(2, 1, base), data).data == following
    return data[HEADER.size : -4]


def test_changes_in_place_are_inserted_without_what_is_between() -> None:
    """Of equal bytes between two changes three or fewer are inserted with them: it is shorter."""
    following = bytearray(NOISE)
    for offset in (10, 14, 1000, 1005, 3999):
        following[offset] ^= 0xFF
    changed = bytes(following)
    operations = copy(10) + insert(changed[10:15]) + copy(985) + insert(changed[1000:1001])
    operations += copy(4) + insert(changed[1005:1006]) + copy(2993) + insert(changed[3999:])
    assert encoded(NOISE, changed) == operations


def test_what_moved_is_copied_from_its_first_byte_to_its_last() -> None:
    """However it lies to the blocks that are looked up, with new bytes before and behind."""
    for start in range(1000, 1040):
        moved = NOISE[start : start + 2000]
        operations = insert(NEW[:300]) + copy(2000, start - 300) + insert(NEW[300:400])
        assert encoded(NOISE, NEW[:300] + moved + NEW[300:400]) == operations


def test_of_two_places_the_longer_match_is_taken() -> None:
    """One is in place, the other begins on a block, so that both are found at the same byte."""
    base = NEW[:300] + NOISE[:40] + NEW[300:504] + NOISE[:1040] + NEW[504:600]
    following = RANDOM.randbytes(300) + NOISE[:1040]
    assert encoded(base, following) == insert(following[:300]) + copy(1040, 244)
    base = NEW[:320] + NOISE[:40] + NEW[320:500] + NOISE[:1040] + NEW[500:600]
    following = RANDOM.randbytes(540) + NOISE[:1040]
    assert encoded(base, following) == insert(following[:540]) + copy(1040)


def test_a_record_is_never_longer_than_the_whole_image() -> None:
    """With a COPY in place of four bytes between long INSERTs it would be."""
    base = RANDOM.randbytes(IMAGE_BYTES_MAX)
    following = bytearray(RANDOM.randbytes(IMAGE_BYTES_MAX))
    for offset in range(8200, IMAGE_BYTES_MAX, 8204):
        following[offset : offset + 4] = base[offset : offset + 4]
    assert encoded(base, bytes(following)) == insert(bytes(following))


# The document.


def test_every_refusal_is_documented_and_has_a_message() -> None:
    documented = {row["name"]: int(row["refusal"]) for row in rows_with("refusal")}
    in_c = {
        name.removeprefix("DELTA_"): value
        for name in dir(lib)
        if isinstance(value := getattr(lib, name), int) and name in vars_of_refusals()
    }
    assert documented == in_c == {each.name: each.value for each in DeltaRefusal}
    assert set(_REFUSALS) == set(DeltaRefusal)


def vars_of_refusals() -> set[str]:
    """Return the names of the C constants of ``enum delta_refusal``."""
    header = (Path(__file__).resolve().parents[2] / "csrc/delta.h").read_text()
    body = header.partition("enum delta_refusal {")[2].partition("};")[0]
    return set(re.findall(r"\b(DELTA_[A-Z_]+) = \d+", body))


def rows_with(column: str) -> list[Row]:
    """Return the rows of the table that has a column."""
    (rows,) = (rows for rows in TABLES.values() if column in rows[0])
    return rows


def test_documented_limits_are_those_of_the_code() -> None:
    rows = {row["name"].strip("`"): int(row["value"]) for row in TABLES["Limits"]}
    assert rows == {name: getattr(lib, name) for name in rows}
    assert rows["DELTA_RECORD_BYTES_MAX"] == (
        rows["DELTA_HEADER_BYTES_MAX"]
        + rows["IMAGE_BYTES_MAX"]
        + rows["DELTA_OPERATIONS_EXCESS_MAX"]
        + 4
    )
    mentioned = set(re.findall(r"`([A-Z_]+_(?:MAX|BYTES))`", DOCUMENT))
    assert mentioned == set(rows)


def test_a_time_is_shown_up_to_its_limit() -> None:
    assert moment.TIME_MS_MAX == lib.DELTA_TIME_MS_MAX
    assert moment.at_millisecond(moment.TIME_MS_MAX) == "9999-12-31T23:59:59.999Z"


def test_documented_types_are_those_of_the_control_channel() -> None:
    rows = {row["name"]: int(row["type"]) for row in rows_with("type")}
    assert rows == {each.name: each.value for each in StateType}


def test_documented_layout_has_no_gaps() -> None:
    end = 0
    for row in LAYOUT[:-3]:
        assert int(row["Offset"]) == end
        end += int(row["Size"])
    assert end == int(LAYOUT[-3]["Offset"]) == HEADER.size == lib.DELTA_HEADER_BYTES
    assert end + TIME.size == lib.DELTA_DATED_HEADER_BYTES
    assert [row["Size"] for row in LAYOUT[-3:]] == ["0 or 8", "…", "4"]


def test_documented_example_is_what_the_code_writes() -> None:
    dump = re.findall(r"^    [0-9a-f]{4}  ([0-9a-f ]+)$", DOCUMENT, re.MULTILINE)
    data = bytes.fromhex("".join(dump))
    base = Image(2, 5, b"abcdefghijklmnopqrstuvwxyz")
    following = Image(2, 6, b"abcdEFghijklmnopuvwxyz")
    assert delta_encode(base, following) == data
    assert delta_apply(base, data).data == following.data
    listed = "".join(row["bytes"].strip("`") for row in rows_with("bytes"))
    assert bytes.fromhex(listed) == data[HEADER.size : -4]


def test_documented_numbers_and_checksum() -> None:
    assert number(300) == bytes.fromhex("ac 02")
    assert "0xe3069283" in DOCUMENT
    assert crc32c(b"123456789") == 0xE3069283
