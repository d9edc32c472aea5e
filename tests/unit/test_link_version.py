"""What each version of the engine link has: an engine may be older than the vtpmd beside it.

Whoever changes the link goes red here. What is new gets a new number, and a version of its own at
the end of VERSIONS; what is there in a version stays as it is.
"""

from typing import Final, NamedTuple

from tests.support.documents import DOCS, tables
from vtpmd._core import ffi
from vtpmd.core import LINK_HEADER_BYTES, LinkOperation
from vtpmd.core.link import LINK_SINCE, LINK_VERSION, LinkQuestion

# Of the boot record, which front and engine of one build have between them.
BOOT_OPERATIONS: Final = range(2, 16)
BOOT_STRUCTURES: Final = {"link_serving", "link_journal", "link_anchor"}


class Version(NamedTuple):
    """What a version adds: names and numbers, and the lengths of payloads' structures."""

    operations: dict[str, int]
    questions: dict[str, int]
    structures: dict[str, int]


VERSIONS: Final = [
    Version(
        {
            "READY": 1,
            "GET_CONDITION": 16,
            "TAKE_BLOB": 17,
            "END_CONTROL": 18,
            "END": 19,
            "BE_ASKED": 20,
            "INIT": 24,
            "STOP": 25,
            "CAPTURE": 32,
            "STAGE": 33,
            "FORGET_STATE": 34,
            "STORE_PERMANENT": 35,
            "RAISE_GENERATION": 36,
            "GET_LINEAGE": 37,
            "GET_STAGED": 38,
            "KEEP_BASE": 39,
            "GET_INFO": 40,
            "RETIRE": 48,
            "UNRETIRE": 49,
            "AWAIT": 50,
            "ADMIT": 52,
            "ARM": 53,
            "SET_LANE": 57,
            "RECORD": 58,
            "LET_GO": 60,
            "WITHDRAW": 61,
            "RECORDED": 62,
        },
        {
            "ASK_INIT": 64,
            "ASK_STOP": 65,
            "ASK_STATE": 66,
            "ASK_BLOB": 67,
            "ASK_TAIL": 68,
            "ASK_CONNECTED": 69,
            "ASK_RUNS": 70,
            "TELL_INIT": 71,
            "TELL_SHUTDOWN": 72,
            "TELL_RESTORED": 73,
            "TELL_RUNNING": 74,
            "TELL_SIGNAL": 75,
            "TELL_END": 76,
            "TELL_HANDOVER": 77,
            "TELL_GIVEN": 78,
            "TELL_RECORDED": 79,
        },
        {
            "link_header": 16,
            "link_ready": 8,
            "link_digests": 64,
            "link_lane": 82,
            "link_handover": 64,
            "link_recorded": 8,
            "link_lineage": 24,
            "link_restored": 16,
        },
    ),
    Version({"COPY": 41}, {}, {"link_copy": 40}),
]


def added(kind: str) -> dict[str, int]:
    """Return what all versions have of a kind."""
    return {name: number for each in VERSIONS for name, number in getattr(each, kind).items()}


def test_what_a_version_has_is_never_changed() -> None:
    operations = {each.name: int(each) for each in LinkOperation if each not in BOOT_OPERATIONS}
    assert operations == added("operations")
    assert {each.name: int(each) for each in LinkQuestion} == added("questions")
    _, structures, _ = ffi.list_types()
    of_the_link = {name for name in structures if name.startswith("link_")} - BOOT_STRUCTURES
    assert of_the_link == set(added("structures"))
    for name, n_bytes in added("structures").items():
        assert ffi.sizeof(f"struct {name}") == n_bytes, name
    assert ffi.sizeof("struct link_header") == LINK_HEADER_BYTES


def test_no_number_is_used_twice() -> None:
    numbers = [*added("operations").values(), *added("questions").values()]
    assert len(set(numbers)) == len(numbers)
    assert max(added("operations").values()) < min(added("questions").values())


def test_the_last_version_is_this_vtpmd_s() -> None:
    assert len(VERSIONS) - 1 == LINK_VERSION


def test_what_is_later_than_the_first_version_is_not_asked_of_that() -> None:
    since = {
        LinkOperation[name]: version
        for version, each in enumerate(VERSIONS)
        for name in each.operations
    }
    assert {operation: version for operation, version in since.items() if version} == LINK_SINCE


def test_the_document_has_each_version() -> None:
    text = (DOCS / "ARCHITECTURE.md").read_text()
    rows = next(rows for rows in tables(text).values() if "version of the link" in rows[0])
    assert [int(row["version of the link"]) for row in rows] == list(range(LINK_VERSION + 1))
    for row, version in list(zip(rows, VERSIONS, strict=True))[1:]:
        assert all(f"`{name}`" in row["adds"] for name in version.operations)
