"""The tables of docs/owner-record.md say what the code does."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.file_names import OWNER_NAME
from vtpmd.daemon.mobility import Mobility
from vtpmd.store import owner
from vtpmd.store.directory import StateDirectory
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import TABLE, Fork, Outcome, Record, Session, Transition, Whose
from vtpmd.wire import peer

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "owner-record.md").read_text()
CONSTANT = re.compile(r"[A-Z]+(_[A-Z]+)+")
SESSION = b"s" * 16


def table(before: str) -> list[list[str]]:
    """Return the rows of the first table after some text, without its head."""
    _, found, rest = TEXT.partition(before)
    assert found, before
    rows = re.findall(r"(?:^\|.*\n)+", rest, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows[2:]]


def words(cell: str) -> list[str]:
    return re.findall(r"`([a-z_]+)`", cell)


def test_transitions() -> None:
    """Every one, and no other."""
    written = {}
    for before, name, after, when, first in table("## Transitions"):
        (transition,) = map(Transition, words(name))
        for whose in Whose if before == "any" else map(Whose, words(before)):
            assert (whose, transition) not in written
            as_it_was = after == "as it was"
            written[whose, transition] = whose if as_it_was else Whose(words(after)[0])
        assert when
        assert first
    assert written == TABLE


def test_whose() -> None:
    assert [words(row[0]) for row in table("## Whose it is")] == [[each] for each in Whose]


def test_outcomes_and_what_they_may_follow() -> None:
    rows = table("## What became of sessions")
    assert [words(row[0]) for row in rows] == [[each] for each in Outcome]
    follows = {Outcome(words(row[0])[0]): tuple(map(Outcome, words(row[2]))) for row in rows}
    assert {each: allowed for each, allowed in follows.items() if allowed} == owner._ENDS_FROM


@pytest.mark.parametrize("granted", [False, True])
def test_answers(tmp_path: Path, granted: bool) -> None:
    """By the code that answers: with the session there, granted, or with none."""
    with StateDirectory.open(tmp_path / "state") as directory:
        files = MovingFiles(directory)
        nothing: Any = None
        mobility = Mobility(nothing, nothing, files, bytes(16), follows_qemu=False)
        if granted:
            mobility.incoming = cast(Any, SimpleNamespace(has_ended=lambda _: False))
        assert mobility._outcome(SESSION) == peer.Unknown(SESSION)
        files.close()
        for name, _, _, asked, _ in table("## What became of sessions"):
            (outcome,) = map(Outcome, words(name))
            line = Session(SESSION.hex(), outcome, "", "")
            directory.replace(OWNER_NAME, owner.encode(Record(sessions=(line,))))
            mobility._files = MovingFiles(directory)
            answer = mobility._outcome(SESSION)
            is_open = outcome is Outcome.OPEN
            expected = ("Kept" if granted else "Released") if is_open else asked
            assert type(answer).__name__ == expected
            if is_open and not granted:
                found = mobility.owner_record().find(SESSION.hex())
                assert found is not None and found.outcome is Outcome.DECLINED


def test_fields() -> None:
    """In their order, and as they are written."""
    first = ["version", *Record._fields[:4]]
    fork = {"fork": Fork("", "", "")._asdict()}
    line = Session(SESSION.hex(), Outcome.SENT, "", "")
    record = Record(sessions=(line,), forks=(Fork("", "", ""),))
    lines = [json.loads(line) for line in owner.encode(record).splitlines()]
    assert [list(lines[0]), list(lines[1]), lines[2]] == [first, list(Session._fields), fork]
    for title, fields in (
        ("The first line:", first),
        ("A session's line:", list(Session._fields)),
        ("A possible fork's line", list(Fork._fields)),
    ):
        rows = table(title)
        assert [row[0].strip("`") for row in rows] == fields
        values = {"text": str, "time": str, "integer": int}
        kinds = [values[row[1]] for row in rows]
        written = {"The first line:": lines[0], "A session's line:": lines[1]}.get(title)
        if written is not None:
            assert [type(value) for value in written.values()] == kinds


def test_versions() -> None:
    (version,) = (row[2] for row in table("The first line:") if row[0] == "`version`")
    assert int(version) == owner.OWNER_VERSION
    assert f"Version {version} is what is written. Version {int(version) - 1}" in TEXT
    first = {"version": 1, "generation": 1, "handed-over": {"to": "", "at": ""}}
    known = owner.parse(json.dumps(first).encode(), OWNER_NAME)
    assert f"the session is called `{known.session}`" in TEXT
    assert [line.outcome for line in known.sessions] == [Outcome.OPEN]


def test_first_sector() -> None:
    """Offsets follow from the sizes, and are those of what is written."""
    (start, padded, _), (end, size, _), (rest, _, _) = table("## File")
    assert (int(start), int(end), int(rest)) == (0, int(padded), int(end) + int(size))
    content = owner.encode(Record())
    assert int(rest) == owner.SECTOR_BYTES == len(content)
    assert content.index(b"\n") == int(end)


def test_limits() -> None:
    in_code = {
        name: value
        for name, value in vars(owner).items()
        if CONSTANT.fullmatch(name) and isinstance(value, int) and name != "OWNER_VERSION"
    }
    rows = table("## Limits")
    assert {name.strip("`"): int(value) for name, value, _ in rows} == in_code
    assert all(reason for _, _, reason in rows)
