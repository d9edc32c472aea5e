"""The header of a linear file: laid out as documented, and what Python is told of any bytes."""

from pathlib import Path
from struct import pack

from hypothesis import given
from hypothesis import strategies as st

from tests.support.documents import fields
from tests.unit.test_control_docs import FORMAT_TABLES
from vtpmd.core.linear import LINEAR_HEADER_BYTES, LinearExtent, LinearFault, linear_decode
from vtpmd.store.linear import EMPTY_BYTES, FAULTS, LinearFile

FILE_BYTES = 20000
SLOTS = 15
MAGIC = 0x737774706D6C696E

Slot = tuple[int, int, int]


def header(*slots: Slot, magic: int = MAGIC) -> bytes:
    made = pack("<QBBH", magic, 1, 0, 192) + b"".join(pack("<III", *slot) for slot in slots)
    return made.ljust(LINEAR_HEADER_BYTES, b"\0")


def test_it_is_laid_out_as_documented() -> None:
    rows = FORMAT_TABLES["Header of a linear file"]
    assert [(int(row["Offset"]), int(row["Size"])) for row in rows] == [
        (0, 8),
        (8, 1),
        (9, 1),
        (10, 2),
        (12, 12 * SLOTS),
    ]
    made = header((200, 300, 400))
    assert list(fields(rows, made).values())[1:3] == [1, 0]
    slot = FORMAT_TABLES["Slot of a linear file"]
    assert [(int(row["Offset"]), int(row["Size"])) for row in slot] == [(0, 4), (4, 4), (8, 4)]
    assert linear_decode(made, FILE_BYTES) == (
        LinearFault.NOTHING,
        (LinearExtent(200, 300), LinearExtent(0, 0), LinearExtent(0, 0)),
    )


def test_each_fault_has_words() -> None:
    assert FAULTS.keys() == set(LinearFault) - {LinearFault.NOTHING}


near = st.sampled_from([0, 1, 191, 192, 193, 4096, 8192, FILE_BYTES - 1, FILE_BYTES, 2**32 - 1])
numbers = near | st.integers(0, FILE_BYTES) | st.integers(0, 2**32 - 1)
slots = st.tuples(numbers, numbers, numbers)


@given(st.lists(slots, max_size=SLOTS), st.integers(0, 2**34))
def test_what_is_accepted_is_in_the_file_and_apart(given_slots: list[Slot], n_bytes: int) -> None:
    fault, extents = linear_decode(header(*given_slots), n_bytes)
    if fault is not LinearFault.NOTHING:
        assert extents == ()
        return
    there = sorted(extent for extent in extents if extent.n_bytes)
    assert all(extent.offset >= LINEAR_HEADER_BYTES for extent in there)
    ends = [extent.offset + extent.n_bytes for extent in there]
    assert all(end <= n_bytes for end in ends)
    assert all(end <= after.offset for end, after in zip(ends, there[1:], strict=False))


@given(st.binary(max_size=2 * LINEAR_HEADER_BYTES))
def test_any_bytes_are_judged(data: bytes) -> None:
    fault, _ = linear_decode(data, len(data))
    assert fault is LinearFault.MAGIC or data[:8] == MAGIC.to_bytes(8, "little")


def test_what_is_empty_is_zeros_in_its_first_4_mib(tmp_path: Path) -> None:
    path = tmp_path / "linear"
    for content, is_empty in (
        (b"", True),
        (bytes(192), True),
        (bytes(EMPTY_BYTES), True),
        (bytes(EMPTY_BYTES - 1) + b"x", False),
        (bytes(EMPTY_BYTES) + b"x", True),
        (b"\0x", False),
    ):
        path.write_bytes(content)
        with LinearFile.look_into(str(path)) as file:
            assert file._is_empty(len(content)) == is_empty
