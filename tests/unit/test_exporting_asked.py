"""What a vtpmd answers to export-permanent is what it has stored; nothing of it is trusted.

A chain of backups is as it was after each answer that is refused.
"""

from binascii import b2a_base64
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli_run import Command, QuietRun, Run
from tests.support.file_names import NAMES
from tests.unit.test_backup import IDENTITY, KEY, OTHER, STATES, contents, links, restored
from tests.unit.test_export import key_file
from tests.unit.test_exporting_live import answering, going_away
from vtpmd.daemon.management import Arguments, Handler
from vtpmd.errors import VtpmdError
from vtpmd.store import exporting_asked, owner
from vtpmd.store.directory import StateKeyError
from vtpmd.store.exporting import Taken
from vtpmd.store.exporting_asked import answer, decode
from vtpmd.store.keys import Key
from vtpmd.store.owner import Record
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import FILE_BYTES_MAX, STATE_BYTES_MAX, Lineage
from vtpmd.wire.tpm import EPOCH_GENERATIONS, GENERATION_GIVEN_MAX, StateType, TpmVersion

DIRECTORY = "/srv/tpm"


def taken(generation: int, state: bytes | None = None, identity: bytes | None = IDENTITY) -> Taken:
    """Return what a vtpmd has found in its directory."""
    content = STATES[generation % len(STATES)] if state is None else state
    return Taken(
        TpmVersion.TPM_2_0,
        {StateType.PERMANENT: content},
        identity,
        0 if identity is None else generation,
        is_served=True,
        record=Record(),
    )


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command, which says at most one line on standard error."""
    return partial(QuietRun, capsys)


@pytest.fixture
def manage(tmp_path: Path) -> Path:
    return tmp_path / "manage"


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "backups"


def saying(what: Any) -> Handler:
    """Return a command that answers that, or raises it."""

    async def handle(_: Arguments) -> object:
        if isinstance(what, Exception):
            raise what
        return what

    return handle


def asked(run: Command, manage: Path, what: Any, *words: str | Path) -> Run:
    """Run a command while a vtpmd answers so."""
    with answering(manage, export_permanent=saying(what)):
        ended = run(*words)
    manage.unlink(missing_ok=True)
    return ended


@pytest.mark.parametrize("identity", [IDENTITY, None])
@pytest.mark.parametrize("key", [None, Key(bytearray(KEY))], ids=["in the clear", "with a key"])
def test_what_is_answered_is_what_was_found(identity: bytes | None, key: Key | None) -> None:
    found = taken(3, identity=identity)
    answered = answer(found, DIRECTORY, key)
    assert decode(answered, key) == (DIRECTORY, found)
    assert decode(answer(found._replace(record=None), DIRECTORY, key), key)[1].record is None


def test_with_a_key_nothing_crosses_the_socket_in_the_clear() -> None:
    """The key is needed to take it, and only that one takes it."""
    key, wrong = Key(bytearray(KEY)), Key(bytearray(b"w" * 32))
    answered = answer(taken(3), DIRECTORY, key)
    with pytest.raises(swtpm_format.FormatError):
        swtpm_format.decode_file(exporting_asked._file(str(answered["file"])))
    for given, sent in ((None, key), (wrong, key), (key, None)):
        with pytest.raises(StateKeyError, match="cannot export the vTPM: "):
            decode(answer(taken(3), DIRECTORY, sent), given)


def file_text(content: bytes) -> str:
    return b2a_base64(content, newline=False).decode()


def altered(**members: Any) -> dict[str, Any]:
    """Return a good answer, but for some members."""
    return answer(taken(3), DIRECTORY, None) | members


def with_lineage(generation: int, *, continued: bool = False) -> dict[str, Any]:
    lineage = Lineage(IDENTITY, generation, continued=continued)
    return altered(file=file_text(swtpm_format.encode_file(STATES[3], lineage)))


HOSTILE: dict[str, Any] = {
    "nothing": None,
    "a text": "file",
    "an array": [],
    "an empty object": {},
    "no directory": altered(directory=None),
    "an array for a directory": altered(directory=["/srv/tpm"]),
    "another TPM": altered(tpm="3.0"),
    "an object for a TPM": altered(tpm={}),
    "no file": altered(file=None),
    "a number for a file": altered(file=7),
    "no base64": altered(file="not base64"),
    "not ASCII": altered(file="ä" * 8),
    "a long file": altered(file=file_text(bytes(FILE_BYTES_MAX + 3))),
    "an empty file": altered(file=""),
    "a cut file": altered(file=file_text(swtpm_format.encode_file(STATES[3])[:-9])),
    "an empty state": altered(file=file_text(swtpm_format.encode_file(b""))),
    "a generation of none": with_lineage(0),
    "a generation beyond all": with_lineage(GENERATION_GIVEN_MAX + 1),
    "a journal elsewhere": with_lineage(3, continued=True),
    "a number for a record": altered(owner=7),
    "no record": altered(owner=""),
    "another record": altered(owner="{}"),
    "a long record": altered(owner=owner.encode(Record()).decode() + "{}\n" * 100_000),
    "half a character": altered(owner="\ud800"),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_answer_is_refused(hostile: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode(hostile, None)


def test_a_file_that_is_too_long_is_not_decoded() -> None:
    with pytest.raises(ValueError, match="its file is too long"):
        decode(HOSTILE["a long file"], None)


def test_a_state_of_the_largest_size_is_taken() -> None:
    """In the clear, and with a key."""
    for key in (None, Key(bytearray(KEY))):
        largest = taken(3, bytes([1]) * STATE_BYTES_MAX)
        answered = answer(largest, DIRECTORY, key)
        assert len(str(answered["file"])) <= exporting_asked.TEXT_LENGTH_MAX
        assert decode(answered, key)[1] == largest


@pytest.mark.parametrize("name", ["nothing", "a cut file", "no base64", "no record"])
def test_a_chain_is_as_it_was_after_what_is_no_answer(
    name: str, run: Command, manage: Path, dest: Path
) -> None:
    words = ("backup", "--manage", manage, dest)
    for is_there in (False, True):
        before = contents(dest) if is_there else None
        ended = asked(run, manage, HOSTILE[name], *words)
        assert (ended.status, ended.output) == (1, "")
        assert f"vtpmd: vtpmd on {manage} answers export-permanent with what this" in ended.error
        assert (contents(dest) if dest.exists() else None) == before
        assert asked(run, manage, answer(taken(1), DIRECTORY, None), *words).status == 0


def test_each_backup_has_what_was_answered(run: Command, manage: Path, dest: Path) -> None:
    """One whole, then deltas; the newest are kept; what has not changed makes none."""
    for generation in (1, 2, 2, 3, 4):
        answered = answer(taken(generation), DIRECTORY, None)
        ended = asked(
            run, manage, answered, "backup", "--manage", manage, dest, "--keep", "3", "--json"
        )
        assert ended.status == 0, ended.error
        assert (ended.outcome["path"], ended.outcome["served"]) == (str(manage), True)
        assert (ended.outcome["generation"], ended.outcome["owner"]) == (generation, "ours")
    assert restored(dest) == {number: STATES[number] for number in (2, 3, 4)}
    assert links(dest) == ["00000002.full", "00000003.delta", "00000004.delta"]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (taken(3, identity=OTHER), "is another vTPM than that of"),
        (taken(3, identity=None), "is another vTPM than that of"),
        (taken(2, STATES[4]), "are both of generation 2, and differ"),
        (taken(1), "is of generation 1, and"),
        (taken(EPOCH_GENERATIONS), "is of restore epoch 1, and"),
        (taken(3)._replace(version=TpmVersion.TPM_1_2), "is another vTPM than that of"),
    ],
)
def test_what_is_not_of_the_chain_is_refused(
    found: Taken, says: str, run: Command, manage: Path, dest: Path
) -> None:
    words = ("backup", "--manage", manage, dest)
    for generation in (1, 2):
        answered = answer(taken(generation), DIRECTORY, None)
        assert asked(run, manage, answered, *words).status == 0
    before = contents(dest)
    ended = asked(run, manage, answer(found, DIRECTORY, None), *words)
    assert ended.status == 10 and says in ended.error, ended.error
    assert contents(dest) == before


def test_a_vtpm_with_a_key_is_not_backed_up_in_the_clear_by_mistake(
    run: Command, manage: Path, dest: Path, tmp_path: Path
) -> None:
    right, wrong = key_file(tmp_path / "key", KEY), key_file(tmp_path / "wrong", b"w" * 32)
    answered = answer(taken(1), DIRECTORY, Key(bytearray(KEY)))
    words = ("backup", "--manage", manage, dest)
    for options in ((), ("--key", wrong)):
        ended = asked(run, manage, answered, *words, *options)
        assert ended.status == 4, ended.error
        assert not dest.exists()
    assert asked(run, manage, answered, *words, "--key", right).status == 0
    assert restored(dest, Key(bytearray(KEY))) == {1: STATES[1]}


def test_an_earlier_vtpmd_and_one_that_refuses_are_one_line(
    run: Command, manage: Path, dest: Path
) -> None:
    words = ("backup", "--manage", manage, dest)
    with answering(manage):
        ended = run(*words)
    assert (ended.status, dest.exists()) == (1, False)
    assert "is of an earlier version, which has no export-permanent: end it," in ended.error
    manage.unlink(missing_ok=True)
    ended = asked(run, manage, VtpmdError("there is no vTPM in it yet"), *words)
    assert (ended.status, ended.error) == (1, "vtpmd: there is no vTPM in it yet\n")


def test_a_chain_is_as_it_was_after_a_vtpmd_that_goes_away(
    run: Command, manage: Path, dest: Path
) -> None:
    words = ("backup", "--manage", manage, dest)
    assert asked(run, manage, answer(taken(1), DIRECTORY, None), *words).status == 0
    before = contents(dest)
    with going_away(manage, answer(taken(2), DIRECTORY, None)):
        ended = run(*words)
    assert ended.status == 1
    assert f"vtpmd on {manage} went away before it answered export-permanent" in ended.error
    assert contents(dest) == before


def test_a_place_that_is_a_line_is_all_that_is_shown(
    run: Command, manage: Path, tmp_path: Path
) -> None:
    """Of a vtpmd that names another directory than it has: it is shown, and not opened."""
    state, out = tmp_path / "state", tmp_path / "out"
    state.mkdir()
    (state / NAMES.permanent).write_bytes(b"none")
    for directory in (str(state), "two\nlines \x1b[2J"):
        answered = answer(taken(3), directory, None)
        ended = asked(run, manage, answered, "export", "--manage", manage, "--out", out)
        assert ended.status == 0, ended.error
        assert len(ended.lines) == 1 and ended.lines[0].isprintable()
        out.unlink()


@pytest.mark.parametrize("make", [lambda: altered(owner=None), lambda: altered()])
def test_whose_it_is_is_told_if_it_is_known(
    make: Callable[[], dict[str, Any]], run: Command, manage: Path, dest: Path
) -> None:
    answered = make()
    ended = asked(run, manage, answered, "backup", "--manage", manage, dest)
    is_unknown = answered["owner"] is None
    assert ("warning: whose the vTPM is, is not known" in ended.output) == is_unknown
