"""`vtpmd inspect` of what vtpmd writes beside states, alone: journal, delta, owner record, tail."""

import re
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import states
from tests.support.cli_run import QuietRun
from tests.support.documents import DOCS, tables
from tests.support.journal import dated, write_journal
from tests.support.page import Page
from tests.unit.test_cli_inspect import IDENTITY, KEY, content, key_file
from vtpmd._core import lib
from vtpmd.core import Image
from vtpmd.core.delta import delta_encode
from vtpmd.errors import VtpmdError
from vtpmd.inspect.containers import open_with_history
from vtpmd.inspect.html.state import state_page
from vtpmd.inspect.overview import inspect, overview
from vtpmd.inspect.screen import RECORDS, screen
from vtpmd.inspect.secrets import Secrets
from vtpmd.inspect.tree_text import tree_lines
from vtpmd.store.keys import Key
from vtpmd.store.owner import Fork, Outcome, Record, Session, Whose, encode

Command = Callable[..., QuietRun]
IMAGES = states.different(4)
SESSION = b"s" * 16
SECTOR = 512

DELTA = delta_encode(Image(1, 5, IMAGES[0]), Image(1, 6, IMAGES[1]))
JOURNAL = bytes(write_journal(IMAGES, identity=IDENTITY, first_generation=5))
SEALED = bytes(
    write_journal(IMAGES, identity=IDENTITY, secret=Key(bytearray(KEY)).journal_secret())
)
LINES = (
    Session(SESSION.hex(), Outcome.SENT, "host2:7000", "2026-01-01T00:00:00+00:00"),
    Session("0" * 32, Outcome.TAKEN, "CN=host3", "2026-01-02T00:00:00+00:00"),
)
FORKS = (Fork("", "host4", "2026-01-03T00:00:00+00:00"),)
OWNER = encode(Record(Whose.MOVED, SESSION.hex(), "2026-01-01T00:00:00+00:00", 9, LINES, FORKS))
TAIL = b"VTPMTAIL" + pack(">HH16sQQQQ12s", 3, 0, SESSION, 5, 6, 8, 9, b"n" * 12) + b"x" * 99
FILES = {"journal": JOURNAL, "delta-record": DELTA, "owner-record": OWNER, "tail": TAIL}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command on a file; each time it is as it was."""

    def run(name: str, path: Path, *arguments: str) -> QuietRun:
        before = content(path)
        result = QuietRun(capsys, name, path, *arguments)
        assert content(path) == before
        return result

    return run


@pytest.fixture
def put(tmp_path: Path) -> Callable[[bytes], Path]:
    def put(data: bytes) -> Path:
        path = tmp_path / "any name"
        path.write_bytes(data)
        return path

    return put


Put = Callable[[bytes], Path]


def says(run: Command, path: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = run("inspect", path, "--json", *options).outcome["record"]["says"]
    return found


@pytest.mark.parametrize("kind", FILES)
def test_each_is_known_and_every_byte_decoded(kind: str, put: Put, run: Command) -> None:
    path = put(FILES[kind])
    shown = run("inspect", path, "--json")
    assert (shown.status, shown.outcome["kind"]) == (0, kind)
    record = shown.outcome["record"]
    assert record["decoded-bytes"] == record["bytes"] == len(FILES[kind])
    assert record["tree"]["name"] == kind
    assert shown.outcome["states"] == {}
    screen_shown = run("inspect", path)
    assert screen_shown.lines[0] == f"{path}: {RECORDS[kind]}"
    n_bytes = len(FILES[kind])
    assert screen_shown.lines[-1] == f"{kind}: {n_bytes} of {n_bytes} bytes decoded"
    assert run("inspect", path, "--tree").status == 0
    verified = run("verify", path, "--json")
    assert (verified.status, verified.outcome["verdict"]) == (0, "fine")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("command", ["diff", "identity"])
def test_none_has_a_state(kind: str, command: str, put: Put, run: Command) -> None:
    path = put(FILES[kind])
    refused = run(command, path, *([str(path)] if command == "diff" else []))
    assert (refused.status, refused.output) == (9, "")
    assert kind.replace("-", " ") in refused.error


def test_a_delta_record_says_what_is_new(put: Put, run: Command) -> None:
    path = put(DELTA)
    assert says(run, path) == {
        "image": "permanent",
        "time": None,
        "from-generation": 5,
        "to-generation": 6,
        "base-bytes": len(IMAGES[0]),
        "result-bytes": len(IMAGES[1]),
        "inserts": [{"at": states.SEED_AT, "bytes": states.MARK_BYTES}],
    }
    tree = run("inspect", path, "--tree").output
    assert f"insert {states.MARK_BYTES} bytes at {states.SEED_AT}" in tree
    assert b"BBBBBBBB".hex() not in tree
    assert b"BBBBBBBB".hex() in secret_tree(run, path)


def test_a_dated_record_says_when_it_was_written(put: Put, run: Command) -> None:
    path = put(dated(DELTA, 1_795_959_040_125))
    assert says(run, path)["time"] == "2026-11-29T13:30:40.125Z"
    assert run("verify", path).status == 0
    (line,) = [line for line in run("inspect", path, "--tree").lines if " time: " in line]
    assert "2026-11-29T13:30:40.125Z" in line
    times = [1, 1_795_959_040_125, 2]
    journal = put(bytes(write_journal(IMAGES, identity=IDENTITY, times=times)))
    assert says(run, journal)["records"][1]["time"] == "2026-11-29T13:30:40.125Z"


@pytest.mark.parametrize("ms", [0, lib.DELTA_TIME_MS_MAX + 1, (1 << 64) - 1])
def test_a_time_that_is_none_is_a_fault(ms: int, put: Put, run: Command) -> None:
    shown = run("inspect", put(dated(DELTA, ms)), "--json")
    assert shown.status == 5
    record = shown.outcome["record"]
    assert (record["says"]["time"], record["decoded-bytes"]) == (None, record["bytes"])
    assert "past a limit" in record["faults"][0]["what"]


def secret_tree(run: Command, path: Path) -> str:
    """Return its tree with secrets."""
    return run("inspect", path, "--tree", "--show-secrets").output


def test_the_example_of_the_document_is_taken_apart_as_it_says(put: Put, run: Command) -> None:
    text = (DOCS / "delta-format.md").read_text()
    raw = bytes.fromhex("".join(re.findall(r"^    [0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)$", text, re.M)))
    tree = run("inspect", put(raw), "--tree").output
    assert re.findall(r"(?:copy|insert) [^\[]+(?=  )", tree) == [
        "copy 4 bytes from 0 to 0",
        "insert 2 bytes at 4",
        "copy 10 bytes from 6 to 6",
        "copy 6 bytes from 20 to 16",
    ]


def test_a_copy_from_before_is_told_with_its_place(put: Put, run: Command) -> None:
    """Behind eight bytes that are new, what was at the beginning is at a negative distance."""
    before = bytes(range(256)) * 4
    delta = delta_encode(Image(2, 1, before), Image(2, 2, b"new here" + before))
    tree = run("inspect", put(delta), "--tree").output
    assert re.findall(r"(?:copy|insert) [^\[]+(?=  )", tree) == [
        "insert 8 bytes at 0",
        "copy 1024 bytes from 0 to 8",
    ]


def test_a_journal_says_which_records_it_has(put: Put, run: Command) -> None:
    found = says(run, put(JOURNAL))
    assert (found["identity"], found["sealed"]) == (IDENTITY.hex(), False)
    assert (found["base-generation"], found["base-bytes"]) == (5, len(IMAGES[0]))
    assert [each["generation"] for each in found["records"]] == [6, 7, 8]
    assert [each["offset"] for each in found["records"]] == [512, 1024, 1536]
    delta = len(DELTA)
    assert found["records"][0] == {
        "generation": 6,
        "time": None,
        "offset": 512,
        "journal-bytes": 512,
        "delta-bytes": delta,
        "state-bytes": len(IMAGES[1]),
    }


def test_a_sealed_journal_says_as_much_as_it_can(put: Put, run: Command, tmp_path: Path) -> None:
    path = put(SEALED)
    closed = says(run, path)
    assert (closed["sealed"], closed["records"], closed["base-generation"]) == (True, None, 1)
    found = says(run, path, "--key", key_file(tmp_path, KEY))
    assert [each["generation"] for each in found["records"]] == [2, 3, 4]
    refused = run("inspect", path, "--key", key_file(tmp_path, b"x" * 32, "wrong"))
    assert (refused.status, refused.output) == (4, "")
    assert run("inspect", put(JOURNAL), "--key", key_file(tmp_path, KEY)).status == 4


def test_a_damaged_journal_is_shown_with_its_fault(put: Put, run: Command) -> None:
    damaged = bytearray(JOURNAL)
    damaged[2 * SECTOR + 100] ^= 1
    shown = run("inspect", put(bytes(damaged)), "--json")
    assert shown.status == 5
    record = shown.outcome["record"]
    (fault,) = record["faults"]
    assert (fault["offset"], fault["what"]) == (1024, "it is damaged: a sector is altered")
    assert [each["generation"] for each in record["says"]["records"]] == [6]
    assert record["decoded-bytes"] == record["bytes"]


def test_an_owner_record_says_whose_the_vtpm_is(put: Put, run: Command) -> None:
    found = says(run, put(OWNER))
    assert (found["whose"], found["session"], found["generation"]) == ("moved", SESSION.hex(), 9)
    assert [each["outcome"] for each in found["sessions"]] == ["sent", "taken"]
    assert found["forks"][0]["peer"] == "host4"


def test_an_owner_record_that_is_not_valid(put: Put, run: Command) -> None:
    shown = run("inspect", put(OWNER.replace(b'"moved"', b'"lost!"')), "--json")
    assert shown.status == 5
    assert shown.outcome["record"]["says"]["whose"] is None
    assert "is not valid" in shown.outcome["record"]["faults"][0]["what"]


def test_a_tail_says_which_generations_it_is_of(put: Put, run: Command) -> None:
    assert says(run, put(TAIL)) == {
        "session": SESSION.hex(),
        "permanent-from-generation": 5,
        "permanent-to-generation": 6,
        "volatile-from-generation": 8,
        "volatile-to-generation": 9,
        "sealed-bytes": 83,
    }


def test_a_tail_of_a_later_version(put: Put, run: Command) -> None:
    later = TAIL[:8] + pack(">H", 4) + TAIL[10:]
    assert run("inspect", put(later)).status == 8


def test_json_that_is_no_owner_record_is_said_to_be_that(put: Put, run: Command) -> None:
    for data in (b'{"version": 2}', b'{"', b'{"a": ' + b"[" * 1000, b'{"whose"'):
        refused = run("inspect", put(data))
        assert (refused.status, "JSON, and no owner record" in refused.error) == (9, True)


@pytest.mark.parametrize("kind", FILES)
def test_the_document_has_each_key(kind: str, put: Put, run: Command) -> None:
    article = "an" if kind == "owner-record" else "a"
    title = f"Keys of what {article} {kind.replace('-', ' ')} says"
    rows = tables((DOCS / "inspect.md").read_text())[title]
    keys = {key for row in rows for key in re.findall(r"`([^`]+)`", row["key"])}
    assert keys == set(says(run, put(FILES[kind])))


@given(data=st.data())
@settings(max_examples=300, deadline=4000)
def test_an_altered_one_is_shown_or_refused_in_a_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No exception, each byte in one leaf, and each way to show it has something to show."""
    changed = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))][: 8 * SECTOR])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(changed)))
        changed[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    path: Path = tmp_path_factory.getbasetemp() / "altered-record"
    path.write_bytes(changed)
    try:
        found = inspect(open_with_history(path, None)[0])
    except VtpmdError as error:
        assert len(str(error).splitlines()) == 1
        return
    secrets = Secrets(found.parts)
    known = overview(found, secrets)
    Page(state_page(known, None, ""))
    lines = screen(known)
    for decoded in found.parts:
        lines += tree_lines(decoded.root, secrets)
        at = 0
        for leaf in decoded.root.leaves():
            assert leaf.offset == at
            at += leaf.length
        assert at == decoded.total_bytes == len(changed)
    assert all(line.isascii() and line.isprintable() for line in lines)
