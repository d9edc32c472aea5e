"""The tables of docs/control-channel.md and docs/state-format.md say what the code does.

What a request is by its table, in any reads, is for tests/property/test_control_properties.py.
"""

import re
import struct
from pathlib import Path

import pytest

from tests.support import control_document
from tests.support.control_codec import RUNNING, STOPPED, Codec, asked
from tests.support.control_document import LIMITS, TABLES
from tests.support.documents import DOCS, fields, tables
from tests.support.file_names import JOURNAL_NAME, NAMES
from vtpmd._core import ffi, lib
from vtpmd.store import directory
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import (
    EPOCH_GENERATIONS,
    EPOCHS_OF_IMPORTS,
    GENERATION_GIVEN_MAX,
    Result,
    StateType,
)

SERVER = Path(__file__).resolve().parents[2] / "csrc/engine/server.h"
FORMAT = (DOCS / "state-format.md").read_text()
FORMAT_TABLES = tables(FORMAT)
# What flags are called in C.
PREFIXES = {
    "InitFlag": "CONTROL_INIT_",
    "StateFlag": "CONTROL_STATE_",
    "ConfigFlag": "CONTROL_CONFIG_",
    "StateType": "LINK_STATE_",
}
# Of a capability that is not called as its command is.
CAPABILITIES = {"HASHING": ("HASH_START", "HASH_DATA", "HASH_END"), "SEND_COMMAND_HEADER": ()}


@pytest.mark.parametrize("number", range(lib.CONTROL_N_NUMBERS + 1))
def test_commands(number: int) -> None:
    said, command = control_document.COMMANDS.get(number), lib.control_command_of(number)
    if said is None:
        assert command == ffi.NULL
        return
    assert ffi.string(command.name).decode() == said.name
    assert lib.control_request_bytes(command) == said.layout.size
    assert command.data_bytes_max == (said.data_bytes_max or 0)
    assert command.drops_excess == said.drops_excess
    assert command.n_descriptors == said.needs_descriptor
    assert command.powers == sum(said.powers)
    assert (command.powers_to_ask or command.powers) == sum(said.powers_to_ask)


def test_commands_have_the_lengths_of_their_fields() -> None:
    for said in control_document.COMMANDS.values():
        row = control_document.ROWS[said.name]
        assert int(row["length"].removesuffix(" + …")) == said.layout.size
        assert row["length"].endswith("…") == (said.data_bytes_max is not None)


def test_limits() -> None:
    names = {name.removeprefix("CONTROL_"): name for name in dir(lib) if name.endswith("_MAX")}
    in_code = {
        name: int(getattr(lib, of_c)) for name, of_c in names.items() if of_c.startswith("CONTROL_")
    }
    found = re.findall(r"\bSERVER_(\w+) = (\d+)(?: << (\d+))?,", SERVER.read_text())
    assert len(found) == 3
    in_code |= {name: int(number) << int(shift or 0) for name, number, shift in found}
    assert in_code == LIMITS
    rows = {row["name"].strip("`"): float(row["value"]) for row in FORMAT_TABLES["Limits"]}
    assert lib.GENERATION_GIVEN_MAX == GENERATION_GIVEN_MAX
    assert lib.EPOCH_GENERATIONS == EPOCH_GENERATIONS
    assert lib.EPOCHS_OF_IMPORTS == EPOCHS_OF_IMPORTS
    assert rows == {
        "GENERATION_GIVEN_MAX": GENERATION_GIVEN_MAX,
        "EPOCH_GENERATIONS": EPOCH_GENERATIONS,
        "EPOCHS_OF_IMPORTS": EPOCHS_OF_IMPORTS,
        "STATE_BYTES_MAX": swtpm_format.STATE_BYTES_MAX,
        "FILE_BYTES_MAX": swtpm_format.FILE_BYTES_MAX,
    }


def test_flags_and_types() -> None:
    rows = TABLES["Flags and types"]
    in_code = [
        getattr(lib, PREFIXES[row["of"]] + row["name"]) for row in rows if row["of"] in PREFIXES
    ]
    assert in_code == [int(row["value"], 0) for row in rows if row["of"] in PREFIXES]
    types = {row["name"]: int(row["value"]) for row in rows if row["of"] == "StateType"}
    assert types == {kind.name: kind.value for kind in StateType}


def test_capabilities() -> None:
    rows = [row for row in TABLES["Flags and types"] if row["of"] == "Capability"]
    commands = {said.name: said.number for said in control_document.COMMANDS.values()}
    seen = {"GET_CAPABILITY"}
    for row in rows:
        for name in CAPABILITIES.get(row["name"], (row["name"],)):
            command = lib.control_command_of(commands[name])
            assert command.capability == int(row["value"], 0), name
            seen.add(name)
    assert seen == commands.keys()
    flags = sum(int(row["value"], 0) for row in rows)
    assert asked(struct.pack(">I", 1)).answer("capability", True) == struct.pack(">II", 0, flags)


def test_results() -> None:
    rows = {row["name"]: int(row["value"], 0) for row in TABLES["Results"]}
    assert rows == {result.name: result.value for result in Result}


def marked(size: int) -> bytes:
    """Return bytes that are all different, so that each field has its own value."""
    return bytes(range(1, size + 1))


def request_of(title: str, data: bytes, power: int) -> tuple[dict[str, int | bytes], Codec]:
    """Return a request's fields by the document, and a codec that has taken it."""
    return fields(TABLES[title], data), asked(data, power)


def test_requests_are_laid_out_as_written() -> None:
    said, codec = request_of("HASH_DATA request", struct.pack(">II", 7, 3) + b"abc", RUNNING)
    assert codec.fields() == {"number": 7, "data_bytes": 3, "data": b"abc"}
    assert list(said.values()) == [7, 3, b"abc"]
    sent = struct.pack(">I", 12) + marked(12)
    said, codec = request_of("GET_STATEBLOB request", sent, RUNNING)
    found = codec.fields()
    assert [found[name] for name in ("number", "flags", "type", "offset")] == list(said.values())
    sent = struct.pack(">IIII", 13, 5, 6, 2) + b"ab"
    said, codec = request_of("SET_STATEBLOB request", sent, STOPPED)
    found = codec.fields()
    assert [found[name] for name in ("number", "flags", "type", "data_bytes", "data")] == (
        list(said.values())
    )
    said, codec = request_of("GET_INFO request", struct.pack(">I", 18) + marked(16), RUNNING)
    found = codec.fields()
    assert [found[name] for name in ("number", "flags", "offset")] == list(said.values())[:3]


def test_responses_are_laid_out_as_written() -> None:
    answer = asked(struct.pack(">IIII", 12, 0, 1, 1), RUNNING).answer_state_blob(b"abcd")
    said = fields(TABLES["GET_STATEBLOB response"], answer)
    assert said == {"result": 0, "flags": 0, "total length": 3, "length": 3, "data": b"bcd"}
    answer = asked(struct.pack(">I", 4), RUNNING).answer("established", True)
    said = fields(TABLES["GET_TPMESTABLISHED response"], answer)
    assert said == {"result": 0, "bit": 1, "padding": 0}
    answer = asked(struct.pack(">II", 17, 0)).answer("buffer_size", 1, 2, 3)
    said = fields(TABLES["SET_BUFFERSIZE response"], answer)
    assert said == {"result": 0, "size in use": 1, "smallest": 2, "largest": 3}
    answer = asked(struct.pack(">IQII", 18, 0, 1, 0)).answer_info(b"abcd")
    said = fields(TABLES["GET_INFO response"], answer)
    assert said == {"result": 0, "total length": 5, "length": 4, "text": b"bcd\0"}


def test_every_layout_is_checked() -> None:
    layouts = {title for title, rows in TABLES.items() if "Offset" in rows[0]}
    assert layouts == {
        "HASH_DATA request",
        "GET_STATEBLOB request",
        "SET_STATEBLOB request",
        "GET_INFO request",
        "GET_STATEBLOB response",
        "GET_TPMESTABLISHED response",
        "SET_BUFFERSIZE response",
        "GET_INFO response",
    }


def numbered(text: str, column: str) -> dict[str, int]:
    """Return the names of the table that has a column, with that column's numbers."""
    rows = [row for rows in tables(text).values() for row in rows if column in row]
    return {row["name"]: int(row[column], 0) for row in rows}


def test_header_flags_and_tags() -> None:
    assert numbered(FORMAT, "flag") == {flag.name: flag.value for flag in swtpm_format.HeaderFlag}
    assert numbered(FORMAT, "tag") == {tag.name: tag.value for tag in swtpm_format.Tag}


def test_file_and_blob_are_laid_out_as_written() -> None:
    file, blob = swtpm_format.encode_file(b"state"), swtpm_format.encode_blob(b"state")
    header = fields(FORMAT_TABLES["Header"], file[:10])
    assert list(header.values()) == [2, 1, 10, 0, len(file)]
    header = fields(FORMAT_TABLES["Header"], blob[:10])
    assert list(header.values()) == [2, 1, 10, 4, len(blob)]
    assert list(fields(FORMAT_TABLES["TLV"], file[10:]).values()) == [1, 5, b"state"]
    assert list(fields(FORMAT_TABLES["File"], file).values())[1:] == [1, 5, b"state"]
    rows = FORMAT_TABLES["What GET_STATEBLOB gives and SET_STATEBLOB takes."]
    sizes = [(int(row["Offset"]), row["Size"]) for row in rows]
    assert sizes == [(0, "10"), (10, "2"), (12, "4"), (16, "2"), (18, "4"), (22, "…")]
    assert struct.unpack(">HIHI", blob[10:22]) == (4, 11, 1, 5)
    assert blob[22:] == b"state"


def test_names_in_the_state_directory() -> None:
    rows = [row for rows in FORMAT_TABLES.values() for row in rows if "written" in row]
    states = {f"`tpm2-00.{name}`" for name in directory.STATE_NAMES.values()}
    others = {"`TMP2-00.…`", "`tpm2-00.….damaged-N`", f"`{directory.LOCK_NAME}`"}
    others |= {f"`{JOURNAL_NAME}`", f"`{NAMES.backup}`"}
    others |= {f"`{NAMES.arrived}`", f"`{NAMES.importing}`", "`tpm2-00.….before-N`"}
    assert {row["name"] for row in rows} == states | others


def test_lineage_is_laid_out_as_written() -> None:
    lineage = swtpm_format.Lineage(b"i" * 16, 7, continued=True)
    file = swtpm_format.encode_file(b"state", lineage)
    assert file[1] == 255
    assert list(fields(FORMAT_TABLES["TLV"], file[21:27] + file[27:]).values())[:2] == [0x5654, 24]
    (table,) = [rows for rows in FORMAT_TABLES.values() if "identity" in rows[0].get("Field", "")]
    assert list(fields(table, file[27:]).values()) == [int.from_bytes(b"i" * 16, "big"), 7]
