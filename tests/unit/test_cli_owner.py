"""`vtpmd owner` as a person meets it: lines, JSON, and a status for each way to end.

Asking real hosts is in tests/system/test_owner_cli.py.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cli_run import QuietRun
from tests.support.file_names import INCOMING_NAME, NAMES, OWNER_NAME
from tests.support.owner import write_offer
from vtpmd import cli
from vtpmd.cli.owner import EXIT_STATUS
from vtpmd.store import owner
from vtpmd.store.directory import StateDirectory
from vtpmd.store.in_place import InPlace
from vtpmd.store.owner import OwnerRecord, OwnerRecordError, Record, Whose

SESSION, IN = b"s" * 16, b"i" * 16
TO = "host2.example.org:4433"
ASK = ("--ask", "--tls-creds", "nowhere")


Command = Callable[..., QuietRun]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: QuietRun(capsys, "owner", *arguments)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    return path


def write(state: Path, *acts: Callable[[OwnerRecord], object]) -> Record:
    """Have a vtpmd do something to the record, and end."""
    with StateDirectory.open(state) as directory:
        in_place = InPlace(directory)
        record = OwnerRecord(directory, in_place)
        for act in acts:
            act(record)
        in_place.close()
        return record.read()


def reserve(record: OwnerRecord) -> None:
    record.reserve(SESSION, TO, 0)


def offer(record: OwnerRecord) -> None:
    write_offer(record, SESSION)


def confirm(record: OwnerRecord) -> None:
    record.confirm(SESSION)


def give_back(record: OwnerRecord) -> None:
    record.expect(IN, "host0.example.org")
    record.give_back(IN)


MOVED = (reserve, offer, confirm)


@pytest.fixture
def locked(state: Path) -> Iterator[Path]:
    """A directory that a vtpmd runs on."""
    write(state, *MOVED)
    with StateDirectory.open(state):
        yield state


def snapshot(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in state.iterdir()}


def test_help_has_examples_and_every_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["owner", "--help"])
    text = capsys.readouterr().out
    assert "example:\n  vtpmd owner /srv/web1-tpm\n" in text
    lines = text.partition("exit status:\n")[2].splitlines()
    statuses = [int(line.split()[0]) for line in lines]
    assert statuses == sorted(set(statuses)) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert set(EXIT_STATUS) == set(Whose)
    assert set(EXIT_STATUS.values()) < set(statuses)


@pytest.mark.parametrize(
    ("acts", "whose", "words"),
    [
        ([], "ours", ["is this host's, by default"]),
        ([reserve], "ours", ["is this host's, since 2"]),
        ([reserve, offer], "offered", [f"offered to {TO}, since 2", "has not taken it"]),
        (MOVED, "moved", [f"another host's, {TO}, since 2", "until that lets go"]),
        ([give_back], "moved", ["another host's, host0.example.org, since 2"]),
    ],
)
def test_whose_it_is(
    run: Command,
    state: Path,
    acts: list[Callable[[OwnerRecord], object]],
    whose: str,
    words: list[str],
) -> None:
    record = write(state, *acts)
    before = snapshot(state)
    ended = run(state)
    assert ended.status == EXIT_STATUS[whose]
    assert ended.lines[0].startswith(f"{state}: the vTPM ")
    assert all(word in ended.lines[0] for word in words), ended.lines[0]
    if record.session:
        assert record.session in ended.lines[0]
    assert len(ended.lines) == 1 + len(record.sessions)
    outcome = run(state, "--json").outcome
    assert (outcome["owner"], outcome["in-use"], outcome["incoming"]) == (whose, False, False)
    assert outcome["peer"] == (record.peer or None)
    assert outcome["sessions"] == [line._asdict() for line in record.sessions]
    assert outcome["possible-fork"] == []
    assert snapshot(state) == before


def test_sessions_are_told_of_the_last_one_first(run: Command, state: Path) -> None:
    write(
        state,
        lambda record: record.expect(IN, "host0.example.org"),
        lambda record: record.take(IN, 0),
        *MOVED,
        lambda record: record.decline(b"d" * 16),
    )
    told = [line.partition(": ")[2] for line in run(state).lines[1:]]
    assert told == [
        "not taken, from a peer whose name is not known",
        f"sent or offered, to {TO}",
        "taken, from host0.example.org",
    ]


def test_what_vtpmd_0_1_has_written_is_told(run: Command, state: Path) -> None:
    moved = {"to": TO, "at": "2025-01-01T00:00:00Z"}
    first = {"version": 1, "handed-over": moved, "declined": "", "generation": 1}
    (state / OWNER_NAME).write_text(json.dumps(first))
    ended = run(state, *ASK)
    assert ended.status == 7
    assert f"another host's, {TO}, since 2025-01-01T00:00:00Z" in ended.lines[0]
    assert "not asked: no address is known" in ended.lines[1]
    assert run(state, "--claim").status == 0


def test_a_directory_in_use_is_read_and_left(run: Command, locked: Path) -> None:
    before = snapshot(locked)
    ended = run(locked)
    assert ended.status == 7
    assert ended.lines[1] == "in use: a vtpmd or swtpm runs on the directory"
    assert run(locked, "--json").outcome["in-use"]
    ended = run(locked, *ASK)
    assert ended.status == 7
    assert ended.lines[1].startswith("not asked: a vtpmd that runs on the directory asks by itself")
    ended = run(locked, "--claim")
    assert ended.status == 3
    assert "is in use by another vtpmd" in ended.error
    assert snapshot(locked) == before


@pytest.mark.parametrize("acts", [[reserve, offer], MOVED, [give_back]])
def test_claim_is_told_of_ever_after(
    run: Command, state: Path, acts: list[Callable[[OwnerRecord], object]]
) -> None:
    before = write(state, *acts)
    ended = run(state, "--claim")
    assert ended.status == 0
    assert "is this host's" in ended.lines[0]
    told = f"without the word of {before.peer}, which may have served it, too"
    assert told in ended.lines[1] and ended.lines[1].startswith("possible fork: claimed at 2")
    write(state, lambda record: record.expect(b"n" * 16, "x"))
    write(state, lambda record: record.take(b"n" * 16, 0))
    fork, *others = run(state, "--json").outcome["possible-fork"]
    assert (fork["session"], fork["peer"], others) == (before.session, before.peer, [])


def test_claim_of_ours_is_refused(run: Command, state: Path) -> None:
    write(state, reserve)
    before = snapshot(state)
    ended = run(state, "--claim")
    assert (ended.status, ended.output) == (9, "")
    assert "this host's already" in ended.error
    assert snapshot(state) == before


def test_claim_is_refused_while_a_state_is_on_its_way_in(run: Command, state: Path) -> None:
    """It may be granted, and this host's by that: no fork."""
    write(state, *MOVED)
    (state / INCOMING_NAME).write_bytes(b"")
    before = snapshot(state)
    ended = run(state, "--claim")
    assert (ended.status, ended.output) == (9, "")
    assert f"vtpmd fold {state}" in ended.error
    assert snapshot(state) == before
    assert run(state).lines[1].startswith("on its way in: ")
    assert run(state, "--json").outcome["incoming"]


def test_ours_is_not_asked_about(run: Command, state: Path) -> None:
    ended = run(state, *ASK)
    assert ended.status == 0
    assert ended.lines[1] == "not asked: it is this host's"


def test_given_back_is_not_asked_about(run: Command, state: Path) -> None:
    """This host has said so itself."""
    write(state, give_back)
    ended = run(state, *ASK)
    assert ended.status == 7
    assert ended.lines[1].startswith("not asked: no address is known")


@pytest.mark.parametrize(
    "options", [("--ask",), ("--tls-creds", "x"), ("--allow", "x"), ("--claim", "--allow", "x")]
)
def test_options_that_do_not_go_together(
    run: Command, state: Path, options: tuple[str, ...]
) -> None:
    ended = run(state, *options)
    assert (ended.status, ended.output) == (2, "")


def test_ask_and_claim_exclude_each_other(state: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["owner", str(state), "--ask", "--claim"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("option", [(), ("--claim",), ASK])
def test_no_directory_is_made(run: Command, tmp_path: Path, option: tuple[str, ...]) -> None:
    ended = run(tmp_path / "missing", *option)
    assert ended.status == 1
    assert "No such file or directory" in ended.error
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("option", [(), ("--claim",), ASK])
def test_a_record_that_cannot_be_read(run: Command, state: Path, option: tuple[str, ...]) -> None:
    (state / OWNER_NAME).write_bytes(b"{")
    ended = run(state, *option)
    assert (ended.status, ended.output) == (5, "")
    assert "whose the vTPM is, is not known" in ended.error
    assert (state / OWNER_NAME).read_bytes() == b"{"


@pytest.mark.parametrize("bad", ["lock", "record"])
def test_a_link_in_a_files_place_is_not_followed(run: Command, state: Path, bad: str) -> None:
    (state / {"lock": ".lock", "record": OWNER_NAME}[bad]).symlink_to("/dev/zero")
    ended = run(state)
    assert ended.status == 1
    assert "cannot read" in ended.error


class Reads:
    """A directory whose file is being written: what each read of it gives."""

    names = NAMES

    def __init__(self, *contents: bytes) -> None:
        self._contents = list(contents)

    def read(self, _: str, __: int) -> bytes:
        return self._contents.pop(0) if len(self._contents) > 1 else self._contents[0]


def test_what_is_read_while_it_is_written_is_one_of_both() -> None:
    """A sector that is read in part old and in part new may be JSON, and nonsense."""
    line = owner.Session(SESSION.hex(), owner.Outcome.SENT, TO, "")
    old = Record(Whose.OFFERED, SESSION.hex(), "old", 7, (line,))
    new = Record(Whose.MOVED, SESSION.hex(), "new", 7, (line,))
    before, after = owner.encode(old), owner.encode(new)
    torn = owner.encode(new._replace(whose=Whose.OFFERED))
    assert owner.look(Reads(torn, after)) == new
    assert owner.look(Reads(before, torn, after)) == new
    assert owner.look(Reads(b"{", b"", before)) == old
    assert owner.look(Reads(before)) == old


def test_a_file_that_never_stands_still_is_given_up() -> None:
    contents = [owner.encode(Record(generation=n)) for n in range(2 * owner.LOOKS_MAX)]
    with pytest.raises(OwnerRecordError, match="written all the time"):
        owner.look(Reads(*contents))
