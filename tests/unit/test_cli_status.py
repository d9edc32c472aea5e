"""`vtpmd status` as a person and a program meet it: on directories of every kind, and left alone.

That nothing is written, no lock taken, and no key needed is checked of each directory. A served
vTPM, and one on its management socket, are in tests/system/test_status_cli.py.
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.cli_run import QuietRun
from tests.support.file_names import INCOMING_NAME, JOURNAL_NAME, NAMES, OWNER_NAME, PERMANENT_NAME
from tests.support.journal import SECTOR, write_journal
from tests.support.owner import write_offer
from vtpmd import cli
from vtpmd.cli.status import SESSIONS_SHOWN
from vtpmd.store.directory import StateDirectory, look_into
from vtpmd.store.holders import holders
from vtpmd.store.in_place import InPlace
from vtpmd.store.owner import OwnerRecord
from vtpmd.store.status import StateStatus, state_of, status_of
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import EPOCH_GENERATIONS

SESSION = b"s" * 16
TO = "host2.example.org:4433"
IDENTITY = b"i" * 16
IMAGES = [bytes([n + 65]) * 8 + bytes(range(256)) * 4 for n in range(4)]
KEY, IV = b"k" * 32, b"v" * 32

# Takes swtpm's lock, which is of the process, says so, and waits for the end of its input.
LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


Command = Callable[..., QuietRun]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], state: Path) -> Command:
    """Run the command; each time the directory is as it was."""

    def run(*arguments: str | Path) -> QuietRun:
        before = snapshot(state)
        ended = QuietRun(capsys, "status", *arguments)
        assert snapshot(state) == before
        return ended

    return run


def snapshot(state: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in state.iterdir()}


def write_state(state: Path, *, generation: int | None = 7, key: bytes | None = None) -> None:
    """Write a checkpoint; without a generation, as swtpm does."""
    lineage = None if generation is None else Lineage(IDENTITY, generation)
    iv = b"" if key is None else IV
    content = swtpm_format.encode_file(IMAGES[0], lineage, key=key, iv=iv)
    (state / PERMANENT_NAME).write_bytes(content)


def with_journal(state: Path, *, key: bytes | None = None) -> None:
    """Write a checkpoint of generation 7, and a journal with three commits."""
    lineage = Lineage(IDENTITY, 7, continued=True)
    iv = b"" if key is None else IV
    content = swtpm_format.encode_file(IMAGES[0], lineage, key=key, iv=iv)
    (state / PERMANENT_NAME).write_bytes(content)
    journal = write_journal(IMAGES, identity=IDENTITY, first_generation=7, secret=key)
    (state / JOURNAL_NAME).write_bytes(journal)


def write_record(state: Path, *acts: Callable[[OwnerRecord], object]) -> None:
    with StateDirectory.open(state) as directory:
        in_place = InPlace(directory)
        record = OwnerRecord(directory, in_place)
        for act in acts:
            act(record)
        in_place.close()


def test_help_has_examples_and_every_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["status", "--help"])
    text = capsys.readouterr().out
    assert "example:\n  vtpmd status /srv/web1-tpm\n" in text
    lines = text.partition("exit status:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "5"]


@pytest.mark.parametrize("arguments", [[], ["d", "--manage", "m"]])
def test_one_of_both_is_shown(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["status", *arguments])
    assert stopped.value.code == 2


def test_an_empty_directory(run: Command, state: Path) -> None:
    ended = run(state)
    assert ended.status == 0
    assert ended.lines == [
        f"{state}: the vTPM is this host's, by default",
        "served: no",
        "state: none yet",
    ]


def test_a_vtpm_that_was_stopped(run: Command, state: Path) -> None:
    write_state(state)
    assert run(state).lines[1:] == [
        "TPM: 2.0",
        "served: no",
        "state: not encrypted",
        f"identity: {IDENTITY.hex()}",
        "generation: 7",
        "journal: none",
    ]


def test_an_older_state_was_put_back(run: Command, state: Path) -> None:
    write_state(state, generation=3 * EPOCH_GENERATIONS + 7)
    says = "3: an older state was put back, by an import or by a snapshot that"
    assert f"restore epoch: {says} QEMU loaded" in run(state).lines


def test_swtpms_directory(run: Command, state: Path) -> None:
    write_state(state, generation=None)
    assert "identity: none yet; it gets one at the first change under vtpmd" in run(state).lines
    outcome = run(state, "--json").outcome
    assert (outcome["identity"], outcome["generation"], outcome["state"]) == (None, None, True)


def test_a_journal_counts(run: Command, state: Path) -> None:
    """Killed after three commits."""
    with_journal(state)
    ended = run(state)
    assert ended.status == 0
    assert "generation: 10" in ended.lines
    assert ended.lines[-1].startswith("journal: there is one")


def test_an_encrypted_one_needs_no_key(run: Command, state: Path) -> None:
    """What its journal has, only the key tells."""
    with_journal(state, key=KEY)
    ended = run(state)
    assert ended.status == 0
    assert {"state: encrypted", "generation: at least 7"} < set(ended.lines)
    write_state(state, key=KEY)
    (state / JOURNAL_NAME).unlink()
    assert "generation: 7" in run(state).lines


def test_json_says_the_same(run: Command, state: Path) -> None:
    with_journal(state, key=KEY)
    write_record(state, lambda record: record.reserve(SESSION, TO, 0))
    write_record(state, lambda record: write_offer(record, SESSION))
    (state / INCOMING_NAME).write_bytes(b"")
    outcome = run(state, "--json").outcome
    (session,) = outcome.pop("sessions")
    assert (session["session"], session["peer"]) == (SESSION.hex(), TO)
    assert outcome.pop("since").startswith("2")
    assert outcome == {
        "directory": str(state),
        "tpm": "2.0",
        "state": True,
        "encrypted": True,
        "identity": IDENTITY.hex(),
        "generation": 7,
        "may-be-newer": True,
        "journal": True,
        "incoming": True,
        "served": False,
        "held-by": None,
        "served-by": [],
        "problems": [],
        "owner": "offered",
        "session": SESSION.hex(),
        "peer": TO,
        "possible-fork": [],
    }


def test_a_vtpm_that_has_moved(run: Command, state: Path) -> None:
    """To whom, since when, and the sessions before: the last ones, and where the others are."""
    for number in range(SESSIONS_SHOWN + 2):
        write_record(state, partial(OwnerRecord.expect, session=bytes([number]) * 16, peer="host0"))
    acts = (
        lambda record: record.reserve(SESSION, TO, 0),
        lambda record: write_offer(record, SESSION),
        lambda record: record.confirm(SESSION),
    )
    write_record(state, *acts)
    ended = run(state)
    assert f"another host's, {TO}, since 2" in ended.lines[0]
    told = [line for line in ended.lines if line.startswith("session ")]
    assert len(told) == SESSIONS_SHOWN
    assert f"sent or offered, to {TO}" in told[0]
    assert ended.lines[-1] == f"and 3 sessions before: vtpmd owner {state}"


def test_a_claim_is_told(run: Command, state: Path) -> None:
    acts = (
        lambda record: record.reserve(SESSION, TO, 0),
        lambda record: write_offer(record, SESSION),
        lambda record: record.claim(),
    )
    write_record(state, *acts)
    assert any(line.startswith("possible fork: claimed at 2") for line in run(state).lines)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state: alter(state / JOURNAL_NAME, 2 * SECTOR + 9), "at byte 1024 (K)"),
        (lambda state: (state / JOURNAL_NAME).unlink(), "is missing: the checkpoint says"),
        (lambda state: (state / PERMANENT_NAME).unlink(), "continues a checkpoint that is missing"),
        (lambda state: (state / PERMANENT_NAME).write_bytes(b""), f"{PERMANENT_NAME}: it is empty"),
        (lambda state: (state / OWNER_NAME).write_bytes(b"{"), "whose the vTPM is, is not known"),
        (lambda state: link(state / JOURNAL_NAME), "cannot read "),
    ],
    ids=["journal", "no-journal", "no-checkpoint", "checkpoint", "record", "link"],
)
def test_a_problem_is_a_line_and_the_rest_is_told(
    run: Command, state: Path, damage: Callable[[Path], object], words: str
) -> None:
    with_journal(state)
    damage(state)
    ended = run(state)
    assert (ended.status, ended.error) == (5, "")
    assert ended.lines[-1].startswith("problem: ")
    assert words in ended.lines[-1]
    assert "served: no" in ended.lines
    assert not any("none yet" in line and "identity" in line for line in ended.lines)
    (problem,) = run(state, "--json").outcome["problems"]
    assert words in problem


def test_what_cannot_be_read_is_not_known(run: Command, state: Path) -> None:
    """Nothing is made up: neither that there is no state, nor that nobody serves it."""
    (state / PERMANENT_NAME).symlink_to(os.devnull)
    (state / ".lock").symlink_to(os.devnull)
    ended = run(state)
    assert ended.status == 5
    assert {"served: not known", "state: not known"} < set(ended.lines)
    outcome = run(state, "--json").outcome
    unknown = ("state", "encrypted", "identity", "generation", "journal", "served")
    assert [outcome[name] for name in unknown] == [None] * len(unknown)


def alter(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def link(file: Path) -> None:
    file.unlink()
    file.symlink_to(os.devnull)


def test_who_serves_it_is_told_without_its_lock(run: Command, state: Path) -> None:
    """vtpmd's lock is of the open file description, for which the kernel names no process."""
    with StateDirectory.open(state):
        ended = run(state)
        assert ended.status == 0
        assert f"(process {os.getpid()})" in ended.lines[1]
        (holder,) = run(state, "--json").outcome["served-by"]
        assert holder["pid"] == os.getpid()
        assert holder["program"]
    assert run(state).lines[1] == "served: no"


def test_swtpms_process_is_told(run: Command, state: Path) -> None:
    command = [sys.executable, "-c", LOCK, str(state / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert f"(process {process.pid})" in run(state).lines[1]
        assert process.stdin is not None
        process.stdin.close()


def test_who_only_has_the_file_open_does_not_serve(state: Path) -> None:
    with StateDirectory.open(state) as directory, (state / ".lock").open("rb") as other:
        pid = subprocess.Popen(["sleep", "60"], stdin=other.fileno())  # inherits that one alone
        try:
            found = [each.pid for each in holders(directory)]
        finally:
            pid.kill()
            pid.wait()
    assert found == [os.getpid()]


def test_looking_ends_no_lock(state: Path) -> None:
    """Of a process that serves a directory, and looks into it, neither."""
    with StateDirectory.open(state) as directory:
        status_of(directory)
        with (state / ".lock").open("r+b") as other, pytest.raises(BlockingIOError):
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_directory_is_made(run: Command, tmp_path: Path) -> None:
    ended = run(tmp_path / "missing")
    assert (ended.status, ended.output) == (1, "")
    assert "No such file or directory" in ended.error
    assert not (tmp_path / "missing").exists()


def test_nobody_on_the_management_socket(run: Command, tmp_path: Path) -> None:
    ended = run("--manage", tmp_path / "missing")
    assert (ended.status, ended.output) == (1, "")
    assert "start vtpmd with --manage" in ended.error


class Folded:
    """A directory whose journal is folded between the reads of its checkpoint and its journal."""

    names = NAMES

    def __init__(self, state: Path) -> None:
        self.path = str(state)
        self._state = state
        self._reads = 0

    def place(self, name: str) -> str:
        return f"{self.path}/{name}"

    def read(self, name: str, _: int) -> bytes | None:
        self._reads += 1
        if self._reads == 2:
            content = swtpm_format.encode_file(IMAGES[2], Lineage(IDENTITY, 9, continued=True))
            (self._state / PERMANENT_NAME).write_bytes(content)
            journal = write_journal(IMAGES[2:], identity=IDENTITY, first_generation=9)
            (self._state / JOURNAL_NAME).write_bytes(journal)
        return (self._state / name).read_bytes()


def test_what_is_read_is_of_one_moment(state: Path) -> None:
    """The old checkpoint and the new journal would be damage, which is not there."""
    with_journal(state)
    found = state_of(Folded(state))  # type: ignore[arg-type]
    assert found == StateStatus(True, False, IDENTITY, 10, False, True)


def test_what_never_stands_still_is_given_up(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all else is told."""
    with_journal(state)
    contents = iter(range(10**6))
    with look_into(state) as directory:
        monkeypatch.setattr(directory, "read", lambda *_: str(next(contents)).encode())
        found = status_of(directory)
    assert any("is written all the time" in problem for problem in found.problems)
