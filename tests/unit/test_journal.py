"""Journals through the binding, and docs/journal-format.md held against the code.

What is right and wrong in a journal: tests/c/test_journal.c. The journals here are built from the
document's tables. Invariant 8: a journal is from outside.
"""

import hashlib
import re
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tests.support.documents import Row, tables
from tests.support.image_digest import whole_digest
from tests.unit.test_delta import crc32c
from vtpmd import core
from vtpmd._core import lib
from vtpmd.core import Image, JournalFault, Recovery
from vtpmd.core.delta import delta_encode
from vtpmd.store import recovery

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/journal-format.md").read_text()
TABLES = tables(DOCUMENT)
RECOVERY = "The first row that fits decides"
SOURCE = (Path(__file__).resolve().parents[2] / "csrc/journal_recover.c").read_text()

IDENTITY, SALT, SECRET = b"i" * 16, b"s" * 32, b"k" * 32
SECTOR_BYTES, PAGE_SECTORS, FILE_BYTES = 512, 8, 8192
IMAGES = [
    Image(1, 7 + n, data)
    for n, data in enumerate([b"state" * 300, b"State" + b"state" * 299, b"state" * 99, b"x" * 99])
]


def layout(title: str) -> struct.Struct:
    """Return the layout of a table's fields, but for those whose size another field gives."""
    letters = {1: "B", 2: "H", 4: "I", 8: "Q"}
    sizes = [int(row["Size"]) for row in TABLES[title] if row["Size"] != "…"]
    return struct.Struct(">" + "".join(letters.get(size, f"{size}s") for size in sizes))


HEADER = layout("Header")
FRAME = struct.Struct(">IHHQ")
CONTENT = layout("The parts of all of its sectors, one after the other.")


def nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def key() -> AESGCM:
    """Return the key of the file, as "Keys and nonces" has it."""
    return AESGCM(HKDF(SHA256(), 32, SALT, b"vtpmd journal 1").derive(SECRET))


def header(*, sealed: bool) -> bytes:
    """Build sector 0."""
    base = IMAGES[0]
    own = (0x5654504D4A524E4C, 2, 128, 0, int(sealed), IDENTITY, SALT)
    of_base = (base.generation, len(base.data), FILE_BYTES, whole_digest(base.data))
    unsealed = HEADER.pack(*own, *of_base, bytes(16), bytes(380), 0)[:112]
    seal = key().encrypt(nonce(0), b"", unsealed) if sealed else bytes(16)
    checked = unsealed + seal + bytes(380)
    return checked + struct.pack(">I", crc32c(checked))


def sectors(sequence: int, content: bytes) -> list[bytes]:
    """Cut a record's content into sectors."""
    parts = [content[at : at + 496].ljust(496, b"\0") for at in range(0, len(content), 496)]
    made = []
    for index, part in enumerate(parts):
        checked = FRAME.pack(0, index, len(parts), sequence)[4:] + part
        made.append(struct.pack(">I", crc32c(checked)) + checked)
    return made


def build(images: list[Image] = IMAGES, *, sealed: bool = False) -> bytes:
    """Build the journal that leads from the first of the images to the last."""
    file = [header(sealed=sealed)]
    link = hashlib.sha256(file[0]).digest()
    for sequence, (base, following) in enumerate(pairwise(images), start=1):
        delta = delta_encode(base, following)
        length = struct.pack(">I", len(delta))
        if sealed:
            made = key().encrypt(nonce(sequence), delta, link + length)
            delta, link = made[:-16], made[-16:] + bytes(16)
        else:
            link = hashlib.sha256(link + length + delta).digest()
        record = sectors(sequence, CONTENT.pack(len(delta), link) + delta)
        if len(file) % PAGE_SECTORS + len(record) > PAGE_SECTORS >= len(record):
            file += [bytes(512)] * (PAGE_SECTORS - len(file) % PAGE_SECTORS)
        file += record
    return b"".join(file).ljust(FILE_BYTES, b"\0")


def recover(journal: bytes, checkpoint: Image = IMAGES[0], secret: bytes | None = None) -> Recovery:
    return core.journal_recover(checkpoint.data, journal, identity=IDENTITY, secret=secret)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_journal_by_the_document_is_recovered(sealed: bool) -> None:
    secret = SECRET if sealed else None
    for number, checkpoint in enumerate(IMAGES):
        found = recover(build(sealed=sealed), checkpoint, secret=secret)
        assert found.applied == len(IMAGES) - 1 - number
        assert found.letter == "O"
        assert found.may_start
        assert found.image == IMAGES[-1]
        assert found.records == len(IMAGES) - 1
        assert found.used_bytes == found.offset == 512 * (1 + found.records)


def test_a_record_that_would_cross_a_page_is_where_the_document_has_it() -> None:
    """Records of one, one, one and six sectors: the last begins at the second page."""
    large = Image(1, 11, hashlib.shake_128(b"").digest(2500))
    file = build([*IMAGES, large])
    assert file[4 * 512 : 8 * 512] == bytes(4 * 512)
    found = recover(file)
    assert found.letter == "O"
    assert found.image is not None
    assert found.image.data == large.data


def test_a_torn_record_is_dropped_and_told() -> None:
    large = Image(1, 11, hashlib.shake_128(b"").digest(1500))
    file = bytearray(build([*IMAGES, large]))
    file[5 * 512 : 6 * 512] = bytes(512)
    found = recover(bytes(file))
    assert (found.letter, found.offset, found.may_start) == ("N", 4 * 512, True)
    assert found.image == IMAGES[-1]


def test_what_is_refused_shows_what_was_right_before() -> None:
    file = bytearray(build())
    file[2 * 512 + 40] ^= 1
    found = recover(bytes(file))
    assert (found.letter, found.fault, found.offset) == ("K", JournalFault.SECTOR, 1024)
    assert not found.may_start
    assert found.image == IMAGES[1]


def test_presence_decides_first() -> None:
    state, file = IMAGES[0].data, build()
    assert core.journal_recover(None, None) == Recovery(
        "A", JournalFault.NONE, True, 0, None, 0, 0, 0
    )
    for continued, letter in ((False, "B"), (True, "C")):
        found = core.journal_recover(state, None, continued=continued)
        assert (found.letter, found.may_start) == (letter, letter == "B")
        assert found.image == Image(1, 0, state)
    assert core.journal_recover(None, file).letter == "D"
    assert core.journal_recover(b"", file).letter == "L"
    assert core.journal_recover(state, b"").letter == "E"


def test_keys_and_identities_are_told_apart() -> None:
    sealed, plain = build(sealed=True), build()
    assert recover(sealed).letter == "H"
    assert recover(plain, secret=SECRET).letter == "I"
    assert recover(sealed, secret=b"w" * 32).letter == "J"
    assert core.journal_recover(IMAGES[0].data, plain, identity=b"j" * 16).letter == "G"
    assert core.journal_recover(IMAGES[0].data, plain).letter == "O"


def test_what_is_no_identity_or_secret_is_the_callers_error() -> None:
    with pytest.raises(ValueError, match="the identity has 16 bytes, not 5"):
        core.journal_recover(b"state", build(), identity=b"short")
    with pytest.raises(ValueError, match="the secret has 32 bytes, not 5"):
        core.journal_recover(b"state", build(), secret=b"short")


# The document.


def check_offsets(rows: list[Row]) -> int:
    """Check that a table's fields follow each other; return where they end."""
    offset = 0
    for row in rows:
        assert int(row["Offset"]) == offset, row
        offset += int(row["Size"])
    return offset


def test_layouts_have_no_holes() -> None:
    assert check_offsets(TABLES["Header"]) == lib.JOURNAL_SECTOR_BYTES
    assert check_offsets(TABLES["Sector of a record"]) == lib.JOURNAL_SECTOR_BYTES
    content = TABLES["The parts of all of its sectors, one after the other."]
    assert check_offsets(content[:2]) == CONTENT.size == int(content[2]["Offset"])


def test_header_says_what_the_code_says() -> None:
    fields = {row["Field"].partition(",")[0]: row["Field"] for row in TABLES["Header"]}
    assert fields["version"].endswith(f" {lib.JOURNAL_VERSION}")
    assert fields["header size"].endswith(f" {lib.JOURNAL_HEADER_BYTES}")
    (flag,) = TABLES["Header+"]
    assert (int(flag["incompatible flag"]), flag["name"]) == (lib.JOURNAL_SEALED, "SEALED")


def test_limits_are_those_of_the_code() -> None:
    limits = {row["name"].strip("`"): int(row["value"]) for row in TABLES["Limits"]}
    assert limits == {name: getattr(lib, name) for name in limits}


def test_faults_are_those_of_the_code() -> None:
    rows = TABLES["What is wrong in rows E, F and K"]
    assert {row["fault"]: (int(row["number"]), row["what is wrong"]) for row in rows} == {
        fault.name: (fault.value, recovery.FAULTS[fault]) for fault in JournalFault
    }


def table_in_source() -> list[list[str]]:
    """Return the table in the source's head: its letters, and whether a row starts."""
    head = SOURCE[: SOURCE.index("*/")]
    return [list(row) for row in re.findall(r"^ \*     ([A-Z])  .*(start|refuse)", head, re.M)]


def test_recovery_is_the_table_in_the_source() -> None:
    rows = [[row["row"], row["verdict"].partition(":")[0]] for row in TABLES[RECOVERY]]
    assert rows == table_in_source()
    assert [letter for letter, _ in rows] == list("ABCDEFGHIJKLMNO")
    assert [letter for letter, verdict in rows if verdict == "refuse"] == list(recovery.REASONS)
