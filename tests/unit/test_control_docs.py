"""The tables of docs/control-channel.md and docs/state-format.md say what the code does."""

import re
import struct
from enum import Enum
from pathlib import Path

import pytest

from tests.fuzz.fuzz_control import SHAPES
from vtpmd._core import ffi, lib
from vtpmd.daemon import control_server
from vtpmd.store import directory
from vtpmd.wire import control, swtpm_format
from vtpmd.wire.control import NEED_DATA, Command, ProtocolError, Receiver
from vtpmd.wire.tpm import Result, StateType

DOCS = Path(__file__).resolve().parents[2] / "docs"
CHANNEL = (DOCS / "control-channel.md").read_text()
FORMAT = (DOCS / "state-format.md").read_text()

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


CHANNEL_TABLES, FORMAT_TABLES = tables(CHANNEL), tables(FORMAT)
COMMANDS = {row["name"]: row for row in CHANNEL_TABLES["Commands"]}


def test_commands_are_those_of_the_code() -> None:
    assert {name: int(row["number"]) for name, row in COMMANDS.items()} == {
        command.name: command.value for command in Command
    }


@pytest.mark.parametrize("command", Command, ids=lambda command: command.name)
def test_length_and_excess_are_as_parsed(command: Command) -> None:
    row = COMMANDS[command.name]
    fixed = int(row["length"].removesuffix(" + …"))
    announces = row["length"].endswith("…")
    assert announces == row["request's body"].endswith("u32 length, data")
    # Zeros announce no data.
    complete = struct.pack(">I", command).ljust(fixed, b"\0")
    receiver = Receiver()
    receiver.receive_data(complete[:-1])
    assert receiver.next_event() is NEED_DATA
    receiver.receive_data(complete[-1:])
    assert isinstance(receiver.next_event(), control.Request)
    receiver.receive_data(complete + b"\0")
    refused = isinstance(receiver.next_event(), ProtocolError)
    assert row["excess"] == ("refused" if refused else "dropped")


@pytest.mark.parametrize("command", Command, ids=lambda command: command.name)
def test_fields_of_the_request_are_as_parsed(command: Command) -> None:
    row = COMMANDS[command.name]
    letters = {"u8": "B", "u32": "I", "u64": "Q"}
    kinds = re.findall(r"\b(u\d+) (\w+)", row["request's body"])
    fields = "".join("4x" if name == "padding" else letters[kind] for kind, name in kinds)
    assert fields == SHAPES[command].fields


@pytest.mark.parametrize("number", range(lib.CONTROL_N_NUMBERS + 1))
def test_commands_are_those_of_c(number: int) -> None:
    row = next((row for row in COMMANDS.values() if int(row["number"]) == number), None)
    command = lib.control_command_of(number)
    if row is None:
        assert command == ffi.NULL
        return
    powers = {
        "any": lib.CONTROL_STOPPED | lib.CONTROL_RUNNING,
        "running": lib.CONTROL_RUNNING,
        "stopped": lib.CONTROL_STOPPED,
    }
    asked_otherwise = re.fullmatch("(.*) to ask, (.*) to set", row["state"])
    to_ask, to_set = asked_otherwise.groups() if asked_otherwise else (None, row["state"])
    assert ffi.string(command.name).decode() == row["name"]
    assert lib.control_request_bytes(command) == int(row["length"].removesuffix(" + …"))
    assert (command.data_bytes_max > 0) == row["length"].endswith("…")
    assert command.drops_excess == (row["excess"] == "dropped")
    assert command.n_descriptors == ("descriptor" in row["request's body"])
    assert command.powers == powers[to_set]
    assert command.powers_to_ask == (powers[to_ask] if to_ask else 0)


def test_limits_of_c() -> None:
    rows = {row["name"].strip("`"): float(row["value"]) for row in CHANNEL_TABLES["Limits"]}
    servers = {"COMMAND_TIMEOUT_S", "READ_BYTES_MAX", "ANSWER_TIMEOUT_S"}
    for name in rows.keys() - servers:
        assert getattr(lib, f"CONTROL_{name}") == rows[name]
    assert lib.control_command_of(Command.HASH_DATA).data_bytes_max == rows["HASH_DATA_BYTES_MAX"]
    assert lib.control_command_of(Command.SET_STATEBLOB).data_bytes_max == rows["BLOB_BYTES_MAX"]


def test_limits() -> None:
    rows = {row["name"].strip("`"): float(row["value"]) for row in CHANNEL_TABLES["Limits"]}
    modules = (control, control_server)
    in_code = {
        name: getattr(module, name)
        for module in modules
        for name in vars(module)
        if name.endswith(("_BYTES_MAX", "_TIMEOUT_S", "DESCRIPTORS_MAX"))
    }
    del in_code["COMMAND_BYTES_MAX"]  # follows from BLOB_BYTES_MAX
    assert rows == in_code
    rows = {row["name"].strip("`"): float(row["value"]) for row in FORMAT_TABLES["Limits"]}
    assert rows == {
        "STATE_BYTES_MAX": swtpm_format.STATE_BYTES_MAX,
        "FILE_BYTES_MAX": swtpm_format.FILE_BYTES_MAX,
    }


def test_flags_and_types() -> None:
    rows = [
        (row["of"], int(row["value"], 0), row["name"]) for row in CHANNEL_TABLES["Flags and types"]
    ]
    kinds: list[type[Enum]] = [
        control.Capability,
        control.InitFlag,
        control.StateFlag,
        control.ConfigFlag,
        StateType,
    ]
    assert rows == [(kind.__name__, each.value, each.name) for kind in kinds for each in kind]


def test_results() -> None:
    rows = {row["name"]: int(row["value"], 0) for row in CHANNEL_TABLES["Results"]}
    assert rows == {result.name: result.value for result in Result}


def marked(size: int) -> bytes:
    """Return bytes that are all different, so that each field has its own value."""
    return bytes(range(1, size + 1))


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


def request_of(title: str, data: bytes) -> tuple[dict[str, int | bytes], object]:
    """Return a request's fields by the document, and what the code makes of it."""
    receiver = Receiver()
    receiver.receive_data(data)
    return fields(CHANNEL_TABLES[title], data), receiver.next_event()


def test_requests_are_laid_out_as_written() -> None:
    said, event = request_of("HASH_DATA request", struct.pack(">II", 7, 3) + b"abc")
    assert event == control.HashData(b"abc")
    assert list(said.values()) == [7, 3, b"abc"]
    said, event = request_of("GET_STATEBLOB request", struct.pack(">I", 12) + marked(12))
    assert isinstance(event, control.GetStateBlob)
    assert list(event[:3]) == list(said.values())[1:]
    said, event = request_of("SET_STATEBLOB request", struct.pack(">IIII", 13, 5, 6, 2) + b"ab")
    assert event == control.SetStateBlob(5, 6, b"ab")
    assert list(said.values()) == [13, 5, 6, 2, b"ab"]
    said, event = request_of("GET_INFO request", struct.pack(">I", 18) + marked(16))
    assert isinstance(event, control.GetInfo)
    assert list(event[:2]) == list(said.values())[1:3]


def test_responses_are_laid_out_as_written() -> None:
    said = fields(CHANNEL_TABLES["GET_STATEBLOB response"], control.encode_state_blob(b"abcd", 1))
    assert said == {"result": 0, "flags": 0, "total length": 3, "length": 3, "data": b"bcd"}
    said = fields(CHANNEL_TABLES["GET_TPMESTABLISHED response"], control.encode_established(True))
    assert said == {"result": 0, "bit": 1, "padding": 0}
    answer = control.encode_buffer_size(1, 2, 3)
    said = fields(CHANNEL_TABLES["SET_BUFFERSIZE response"], answer)
    assert said == {"result": 0, "size in use": 1, "smallest": 2, "largest": 3}
    said = fields(CHANNEL_TABLES["GET_INFO response"], control.encode_info(b"abcd", 1))
    assert said == {"result": 0, "total length": 5, "length": 4, "text": b"bcd\0"}


def test_every_layout_is_checked() -> None:
    layouts = {title for title, rows in CHANNEL_TABLES.items() if "Offset" in rows[0]}
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
    others.add(f"`{directory.JOURNAL_NAME}`")
    assert {row["name"] for row in rows} == states | others


def test_lineage_is_laid_out_as_written() -> None:
    lineage = swtpm_format.Lineage(b"i" * 16, 7, continued=True)
    file = swtpm_format.encode_file(b"state", lineage)
    assert file[1] == 255
    assert list(fields(FORMAT_TABLES["TLV"], file[21:27] + file[27:]).values())[:2] == [0x5654, 24]
    (table,) = [rows for rows in FORMAT_TABLES.values() if "identity" in rows[0].get("Field", "")]
    assert list(fields(table, file[27:]).values()) == [int.from_bytes(b"i" * 16, "big"), 7]
