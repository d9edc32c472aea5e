"""docs/control-channel.md as a model: what its tables say of any bytes that a client sends."""

import re
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from tests.support.documents import DOCS, Row, tables
from vtpmd._core import lib
from vtpmd.wire.tpm import Result

TABLES = tables((DOCS / "control-channel.md").read_text())
ROWS = {row["name"]: row for row in TABLES["Commands"]}
LIMITS = {row["name"].strip("`"): int(row["value"]) for row in TABLES["Limits"]}

NUMBER_BYTES = 4
LETTERS = {"u8": "B", "u32": "I", "u64": "Q"}
POWERS = {
    "any": {lib.CONTROL_STOPPED, lib.CONTROL_RUNNING},
    "running": {lib.CONTROL_RUNNING},
    "stopped": {lib.CONTROL_STOPPED},
}
# What is a name of the code's, too, is called the same there.
NAMES = {"length": "data_bytes", "wanted": "wanted_bytes"}


class Command(NamedTuple):
    """What the document says of a command."""

    number: int
    name: str
    layout: struct.Struct  # of the whole request, without data
    fields: tuple[str, ...]  # of the body, in the code's names
    data_bytes_max: int | None  # None: there is no data
    drops_excess: bool
    needs_descriptor: bool
    powers: set[int]  # in which it is carried out
    powers_to_ask: set[int]  # the same if its first field is 0


def _data_bytes_max(name: str, body: str) -> int | None:
    if not body.endswith("u32 length, data"):
        return None
    (row,) = (row for row in TABLES[f"{name} request"] if row["Field"].startswith("length"))
    found = re.search("at most `(.*)`", row["Field"])
    assert found is not None
    return LIMITS[found[1]]


def _command(row: Row) -> Command:
    body = row["request's body"]
    kinds = re.findall(r"\b(u\d+) (\w+)", body)
    to_ask, _, to_set = row["state"].partition(" to ask, ")
    return Command(
        number=int(row["number"]),
        name=row["name"],
        layout=struct.Struct(">I" + "".join(LETTERS[kind] for kind, _ in kinds)),
        fields=tuple(NAMES.get(name, name) for _, name in kinds),
        data_bytes_max=_data_bytes_max(row["name"], body),
        drops_excess={"dropped": True, "refused": False}[row["excess"]],
        needs_descriptor="descriptor" in body,
        powers=POWERS[to_set.removesuffix(" to set") or to_ask],
        powers_to_ask=POWERS[to_ask],
    )


COMMANDS = {int(row["number"]): _command(row) for row in ROWS.values()}


class Verdict(NamedTuple):
    """What is to come of some bytes, with which no descriptor has come."""

    verdict: int  # enum control_verdict
    result: int = 0  # of a refusal
    closes: bool = False
    fields: Mapping[str, int | bytes] = MappingProxyType({})  # of a request


NEED_DATA = Verdict(lib.CONTROL_NEED_DATA)


def refused(result: Result, *, closes: bool = False) -> Verdict:
    """Return that a command is refused."""
    return Verdict(lib.CONTROL_REFUSED, result, closes)


def judge(data: bytes, power: int, commands: dict[int, Command] = COMMANDS) -> Verdict:
    """Say what is to come of bytes whose last one has come with the last read."""
    if len(data) < NUMBER_BYTES:
        return NEED_DATA
    command = commands.get(int.from_bytes(data[:NUMBER_BYTES], "big"))
    if command is None:
        return refused(Result.BAD_ORDINAL)
    if len(data) < command.layout.size:
        return NEED_DATA
    _, *values = command.layout.unpack_from(data)
    found: dict[str, int | bytes] = dict(zip(command.fields, values, strict=True))
    length = command.layout.size
    if command.data_bytes_max is not None:
        if values[-1] > command.data_bytes_max:
            return refused(Result.BAD_PARAMETER, closes=True)
        found["data"] = data[length : length + values[-1]]
        length += values[-1]
    if len(data) < length:
        return NEED_DATA
    if (len(data) > length and not command.drops_excess) or command.needs_descriptor:
        return refused(Result.BAD_PARAMETER)
    if power not in (command.powers if any(values) else command.powers_to_ask):
        return refused(Result.BAD_ORDINAL)
    found.pop("padding", None)
    return Verdict(lib.CONTROL_REQUEST, fields={"number": command.number, **found})
