"""`vtpmd log` and `--at`: a journal as history, whatever of it is right. Nothing is changed by it.

A vTPM that is served is in tests/system/test_log.py.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support import states
from tests.support.cli_run import QuietRun
from tests.support.documents import DOCS, tables
from tests.support.file_names import JOURNAL_NAME, PERMANENT_NAME
from tests.support.journal import write_journal
from tests.unit.test_cli_inspect import IDENTITY, IV, KEY, content, key_file
from vtpmd._core import lib
from vtpmd.inspect.history import FOLDED
from vtpmd.store.keys import Key
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import EPOCH_GENERATIONS

FIRST = 5  # generation: the base's
SECTOR = 512
IMAGES = states.different(4)
CHANGE = "endorsement seed changed: what is made of it is another now"

Command = Callable[..., QuietRun]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command on a path; each time it is as it was."""

    def run(name: str, path: Path, *arguments: str | Path) -> QuietRun:
        before = content(path)
        result = QuietRun(capsys, name, path, *arguments)
        assert content(path) == before
        return result

    return run


def put(
    path: Path,
    *,
    checkpoint: int = 0,
    images: Sequence[bytes] = IMAGES,
    key: bytes | None = None,
    version: int = 2,
    restored: int | None = None,
    times: Sequence[int] = (),
) -> bytearray:
    """Put a state file and a journal, of which the state file may have a part; return the journal.

    ``checkpoint`` is which of the images the state file has, the rest as ``write_journal``'s.
    """
    lineage = Lineage(IDENTITY, FIRST + checkpoint, continued=True)
    encrypted = {} if key is None else {"key": key, "iv": IV}
    file = swtpm_format.encode_file(images[checkpoint], lineage, **encrypted)
    (path / PERMANENT_NAME).write_bytes(file)
    journal = write_journal(
        images,
        identity=IDENTITY,
        first_generation=FIRST,
        secret=None if key is None else Key(bytearray(key)).journal_secret(),
        version=version,
        restored=restored,
        times=times,
    )
    (path / JOURNAL_NAME).write_bytes(journal)
    return journal


def generations(shown: QuietRun) -> list[int | None]:
    return [commit["generation"] for commit in shown.outcome["commits"]]


def test_a_restore_epoch_is_told_where_it_begins(tmp_path: Path, run: Command) -> None:
    put(tmp_path, restored=2)
    lines = run("log", tmp_path).lines
    (at,) = [number for number, line in enumerate(lines) if line.startswith("restore epoch 1: ")]
    assert [line.split()[0] for line in lines[1:at]] == [str(FIRST), str(FIRST + 1)]
    assert [line.split()[0] for line in lines[at + 1 :]] == [
        str(EPOCH_GENERATIONS + FIRST + number) for number in (2, 3)
    ]
    assert run("log", tmp_path, "--last", "1").lines[1] == lines[at]
    commits = [line for line in lines if not line.startswith("restore epoch")]
    assert len({len(line.partition("  512  ")[0]) for line in commits[2:]}) == 1  # in columns


@pytest.mark.parametrize("version", [1, 2])
def test_each_commit_is_told_with_what_it_changed(
    version: int, tmp_path: Path, run: Command
) -> None:
    put(tmp_path, version=version)
    shown = run("log", tmp_path)
    assert shown.status == 0
    n_bytes = len(IMAGES[0])
    assert shown.lines == [
        f"generation  {'time':<20}  bytes  what",
        f"{5:>10}  {'-':<20}  {0:>5}  the checkpoint: a state of {n_bytes} bytes",
        *(f"{generation:>10}  {'-':<20}  {512:>5}  {CHANGE}" for generation in (6, 7, 8)),
    ]


@pytest.mark.parametrize("key", [None, KEY])
def test_a_commit_is_told_with_its_time(key: bytes | None, tmp_path: Path, run: Command) -> None:
    """Whatever the host's clock was set to: the order is the journal's."""
    state = tmp_path / "state"
    state.mkdir()
    put(state, key=key, times=[1_795_959_040_125, 1, lib.DELTA_TIME_MS_MAX])
    options = [] if key is None else ["--key", key_file(tmp_path, key)]
    whole = ["2026-11-29T13:30:40.125Z", "1970-01-01T00:00:00.001Z", "9999-12-31T23:59:59.999Z"]
    shown = run("log", state, "--json", *options)
    assert [commit["time"] for commit in shown.outcome["commits"]] == [None, *whole]
    seconds = [line.split()[1] for line in run("log", state, *options).lines[1:]]
    assert seconds == ["-", *(f"{each[:-5]}Z" for each in whole)]


def test_programs_get_the_same(tmp_path: Path, run: Command) -> None:
    put(tmp_path)
    shown = run("log", tmp_path, "--json")
    first, *rest = shown.outcome["commits"]
    assert (first["checkpoint"], first["changes"], first["offset"]) == (True, None, None)
    assert [commit["offset"] for commit in rest] == [512, 1024, 1536]
    assert {commit["journal-bytes"] for commit in rest} == {512}
    assert {commit["time"] for commit in rest} == {None}
    change = {"part": "hierarchy", "what": "endorsement", "text": CHANGE}
    assert [commit["changes"] for commit in rest] == [[change]] * 3
    assert (shown.outcome["identity"], shown.outcome["in-use"]) == (IDENTITY.hex(), False)


def test_the_document_has_each_key(tmp_path: Path, run: Command) -> None:
    put(tmp_path)
    shown = run("log", tmp_path, "--json").outcome
    said = tables((DOCS / "inspect.md").read_text())
    documented = {
        title: {row["key"].strip("`") for row in said[title]}
        for title in ("Keys of a log", "Keys of a commit")
    }
    assert documented["Keys of a log"] == set(shown)
    assert {frozenset(commit) for commit in shown["commits"]} == {
        frozenset(documented["Keys of a commit"])
    }


@pytest.mark.parametrize("last", range(1, 6))
def test_the_last_ones_are_told_alone(last: int, tmp_path: Path, run: Command) -> None:
    put(tmp_path)
    whole = run("log", tmp_path, "--json").outcome["commits"]
    assert run("log", tmp_path, "--json", "--last", str(last)).outcome["commits"] == whole[-last:]


@pytest.mark.parametrize("wrong", ["0", "-1", "x", "1" * 10])
def test_another_number_of_them_is_refused(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as met:
        QuietRun(capsys, "log", tmp_path, "--last", wrong)
    assert met.value.code == 2


def test_what_the_checkpoint_has_already_is_not_told(tmp_path: Path, run: Command) -> None:
    """As a crash in folding leaves it."""
    put(tmp_path, checkpoint=2)
    shown = run("log", tmp_path, "--json")
    commits = shown.outcome["commits"]
    assert [(each["generation"], each["checkpoint"]) for each in commits] == [
        *((6, False), (7, False), (7, True), (8, False)),
    ]
    assert [each["changes"] is None for each in commits] == [True, True, True, False]
    assert run("log", tmp_path).lines[1].endswith(FOLDED)
    for generation, status in ((6, 12), (7, 0), (8, 0), (9, 12)):
        assert run("inspect", tmp_path, "--at", str(generation)).status == status
    for last in range(1, 5):
        assert (
            run("log", tmp_path, "--json", "--last", str(last)).outcome["commits"]
            == (commits[-last:])
        )


def test_a_sealed_journal_opens_with_its_key_alone(tmp_path: Path, run: Command) -> None:
    state = tmp_path / "state"
    state.mkdir()
    put(state, key=KEY)
    right, wrong = key_file(tmp_path, KEY), key_file(tmp_path, b"x" * 32, "wrong")
    shown = run("log", state, "--json", "--key", right)
    assert (shown.status, generations(shown)) == (0, [5, 6, 7, 8])
    for options in ((), ("--key", wrong)):
        refused = run("log", state, *options)
        assert (refused.status, refused.output) == (4, "")


def test_a_damaged_journal_is_told_up_to_its_fault(tmp_path: Path, run: Command) -> None:
    journal = put(tmp_path)
    journal[2 * SECTOR + 100] ^= 1
    (tmp_path / JOURNAL_NAME).write_bytes(journal)
    shown = run("log", tmp_path)
    assert shown.status == 5
    assert [line.split()[0] for line in shown.lines[1:3]] == ["5", "6"]
    assert "tpm2-00.journal is damaged: a sector is altered, at byte 1024 (K)" in shown.lines[3]
    assert len(shown.lines) == 4


def test_a_journal_whose_checkpoint_is_missing_or_another(tmp_path: Path, run: Command) -> None:
    put(tmp_path)
    other = Lineage(IDENTITY, 2, continued=True)
    (tmp_path / PERMANENT_NAME).write_bytes(swtpm_format.encode_file(states.LEVEL_7, other))
    shown = run("log", tmp_path, "--json")
    assert (shown.status, generations(shown)) == (5, [6, 7, 8, 2])
    (tmp_path / PERMANENT_NAME).unlink()
    shown = run("log", tmp_path, "--json")
    assert (shown.status, generations(shown)) == (5, [6, 7, 8])
    assert {commit["changes"] is None for commit in shown.outcome["commits"]} == {True}


def test_a_directory_without_a_journal_has_its_checkpoint(tmp_path: Path, run: Command) -> None:
    (tmp_path / PERMANENT_NAME).write_bytes(swtpm_format.encode_file(IMAGES[0]))
    shown = run("log", tmp_path)
    assert shown.status == 0
    assert shown.lines[1].split()[0] == "-"
    (tmp_path / PERMANENT_NAME).write_bytes(
        swtpm_format.encode_file(IMAGES[0], Lineage(IDENTITY, 9))
    )
    assert generations(run("log", tmp_path, "--json")) == [9]


def test_what_has_no_history_is_refused(tmp_path: Path, run: Command) -> None:
    assert run("log", tmp_path).status == 9
    file = tmp_path / "state"
    file.write_bytes(swtpm_format.encode_file(IMAGES[0]))
    refused = run("log", file)
    assert (refused.status, "it is no state directory" in refused.error) == (9, True)


def seed_at(run: Command, path: Path, *options: str) -> bytes:
    shown = run("inspect", path, "--json", "--show-secrets", *options).outcome
    return bytes.fromhex(shown["hierarchies"]["endorsement"]["seed"]["value"])


def test_a_generation_is_shown_as_it_was(tmp_path: Path, run: Command) -> None:
    put(tmp_path)
    for number, generation in enumerate((5, 6, 7, 8)):
        mark = bytes([number + ord("A")]) * states.MARK_BYTES
        assert seed_at(run, tmp_path, "--at", str(generation)).startswith(mark)
        shown = run("inspect", tmp_path, "--json", "--at", str(generation)).outcome
        assert (shown["generation"], shown["journal-commits"]) == (generation, number)
    assert seed_at(run, tmp_path).startswith(b"DDDDDDDD")


def test_of_an_older_generation_there_is_no_volatile_state(tmp_path: Path, run: Command) -> None:
    put(tmp_path)
    volatile = swtpm_format.encode_file(states.BUSY_VOLATILE)
    (tmp_path / "tpm2-00.volatilestate").write_bytes(volatile)
    assert set(run("inspect", tmp_path, "--json").outcome["states"]) == {"permanent", "volatile"}
    assert set(run("inspect", tmp_path, "--json", "--at", "7").outcome["states"]) == {"permanent"}


def test_a_generation_that_is_not_there_is_refused(tmp_path: Path, run: Command) -> None:
    put(tmp_path)
    for command in ("inspect", "verify", "identity"):
        refused = run(command, tmp_path, "--at", "4")
        assert (refused.status, refused.output) == (12, "")
        assert "it has 5 to 8" in refused.error
    file = tmp_path / "file"
    file.write_bytes(swtpm_format.encode_file(IMAGES[0], Lineage(IDENTITY, 9)))
    assert run("inspect", file, "--at", "9").status == 0
    assert run("inspect", file, "--at", "8").status == 12


def test_two_generations_are_compared(tmp_path: Path, run: Command) -> None:
    put(tmp_path)
    same = run("diff", tmp_path, tmp_path, "--from", "6", "--to", "6")
    assert (same.status, same.output) == (0, "nothing differs\n")
    other = run("diff", tmp_path, tmp_path, "--from", "6", "--to", "8", "--json")
    assert other.status == 11
    assert [change["text"] for change in json.loads(other.output)["changes"]] == [CHANGE]
    assert run("diff", tmp_path, tmp_path, "--to", "4").status == 12


def test_a_long_journal_takes_a_bounded_time(tmp_path: Path, run: Command) -> None:
    """As many records as a file of that size has."""
    n_sectors = 64 * 1024 // SECTOR
    images = [IMAGES[number % 2] for number in range(n_sectors)]
    put(tmp_path, images=images)
    shown = run("log", tmp_path, "--json")
    assert generations(shown) == [*range(FIRST, FIRST + n_sectors)]
    assert all(before != after for before, after in pairwise(images))
