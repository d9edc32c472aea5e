"""fold and recover as a person meets them: lines, JSON, and a status for each way to end."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import states
from tests.support.cli_run import Command
from tests.support.journal import SECTOR, digest, write_journal
from vtpmd import cli
from vtpmd.store.anchor import Anchor, Mark
from vtpmd.store.directory import StateDirectory
from vtpmd.store.libtpms import library
from vtpmd.wire import swtpm_format
from vtpmd.wire.state_level import needs_of

IMAGES = states.different(4)
PROBLEM = "tpm2-00.journal is damaged: a sector is altered, at byte 1024 (K)"
TIMEOUT_S = 20
COMMANDS = ["fold", "recover", "rekey"]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A directory with a checkpoint and a journal of three commits."""
    path = tmp_path / "state"
    path.mkdir()
    (path / "tpm2-00.permall").write_bytes(swtpm_format.encode_file(IMAGES[0]))
    (path / "tpm2-00.journal").write_bytes(write_journal(IMAGES))
    return path


def damage(state: Path, offset: int) -> None:
    """Alter a byte of the journal."""
    file = state / "tpm2-00.journal"
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_each_has_an_example_and_distinct_exit_statuses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = capsys.readouterr().out
        assert "example:\n" in text
        assert f"vtpmd {command} /srv/web1-tpm" in text
        lines = text.partition("exit status:\n")[2].splitlines()
        statuses = [line.split()[0] for line in lines]
        assert statuses == sorted(set(statuses))
        assert {"0", "1", "2", "3", "4", "5"} <= set(statuses)


def test_fold_makes_it_swtpms(run: Command, state: Path) -> None:
    ended = run("fold", state)
    assert ended.status == 0
    assert ended.output == f"{state}: folded 3 commits into the checkpoint, up to generation 4\n"
    file = (state / "tpm2-00.permall").read_bytes()
    assert swtpm_format.decode_file(file) == IMAGES[-1]
    assert not (state / "tpm2-00.journal").exists()
    assert run("fold", state).output == f"{state}: there is no journal to fold\n"


def test_fold_says_the_same_to_programs(run: Command, state: Path) -> None:
    assert run("fold", state, "--json").outcome == {
        "directory": str(state),
        "folded": True,
        "records": 3,
        "generation": 4,
        "taken-up": False,
    }


def test_fold_refuses_what_is_damaged(run: Command, state: Path) -> None:
    damage(state, 2 * SECTOR + 9)
    before = (state / "tpm2-00.journal").read_bytes()
    ended = run("fold", state)
    assert ended.status == 5
    assert "a sector is altered, at byte 1024 (K)" in ended.error
    assert ended.output == ""
    assert (state / "tpm2-00.journal").read_bytes() == before


def test_recover_says_when_nothing_is_wrong(run: Command, state: Path) -> None:
    ended = run("recover", state)
    assert ended.status == 0
    expected = "nothing is wrong; vtpmd run starts from generation 4, with 3 commits of the journal"
    assert ended.output == f"{state}: {expected}\n"


def test_recover_shows_and_restores_when_told_to(run: Command, state: Path) -> None:
    damage(state, 2 * SECTOR + 9)
    before = {path: path.read_bytes() for path in state.iterdir() if path.name != ".lock"}
    ended = run("recover", state)
    assert ended.status == 5
    assert ended.output.splitlines() == [
        f"{state}: {PROBLEM}",
        "could be restored: generation 2, with 1 commit of the journal",
        "would be lost: tpm2-00.journal: what follows byte 1024, of 2048 bytes that were written "
        "to it",
        "nothing was changed: add --restore to do it",
    ]
    assert before == {path: path.read_bytes() for path in before}

    ended = run("recover", state, "--restore")
    assert ended.status == 0
    assert ended.output.splitlines()[1:] == [
        "restored: generation 2, with 1 commit of the journal",
        "lost: tpm2-00.journal: what follows byte 1024, of 2048 bytes that were written to it",
        "kept: tpm2-00.permall, as tpm2-00.permall.damaged-1",
        "kept: tpm2-00.journal, as tpm2-00.journal.damaged-1",
    ]
    file = (state / "tpm2-00.permall").read_bytes()
    assert swtpm_format.decode_file(file) == IMAGES[1]
    assert run("recover", state).status == 0


def test_recover_says_the_same_to_programs(run: Command, state: Path) -> None:
    damage(state, 2 * SECTOR + 9)
    outcome = run("recover", state, "--json").outcome
    assert outcome == {
        "directory": str(state),
        "verdict": "K",
        "offset": 1024,
        "problems": [f"{state}: tpm2-00.journal is damaged: a sector is altered, at byte 1024 (K)"],
        "generation": 2,
        "commits": 1,
        "can-restore": True,
        "lost": ["tpm2-00.journal: what follows byte 1024, of 2048 bytes that were written to it"],
        "restored": False,
        "originals": {},
    }
    restored = run("recover", state, "--json", "--restore").outcome
    assert restored["restored"]
    assert restored["originals"]["tpm2-00.journal"] == "tpm2-00.journal.damaged-1"


def test_recover_says_when_nothing_can_be_restored(run: Command, state: Path) -> None:
    """Also when it is told to."""
    (state / "tpm2-00.permall").unlink()
    for options in ((), ("--restore",)):
        ended = run("recover", state, *options)
        assert ended.status == 7
        assert ended.output.splitlines()[-1].startswith("nothing can be restored")
    assert (state / "tpm2-00.journal").exists()


def make_anchor(path: Path, state: Path, image: bytes, generation: int) -> Mark:
    """Make an anchor that has seen an image."""
    mark = Mark(bytes(16), generation, digest(image))
    with Anchor.open(path, state, is_new=True) as anchor:
        anchor.write(mark)
    return mark


def test_recover_tells_what_has_fallen_behind_the_anchor(
    run: Command, state: Path, tmp_path: Path
) -> None:
    """And makes the anchor trust it when told to."""
    path = tmp_path / "anchor"
    make_anchor(path, state, b"newer", 9)
    ended = run("recover", state, "--anchor", path)
    assert ended.status == 6
    assert "has seen generation 9: it was put back" in ended.output
    outcome = run("recover", state, "--anchor", path, "--json").outcome
    assert (outcome["verdict"], outcome["can-restore"]) == ("O", True)

    ended = run("recover", state, "--anchor", path, "--restore")
    assert ended.status == 0
    with Anchor.open(path, state, is_new=False) as anchor:
        assert anchor.mark == Mark(bytes(16), 10, digest(IMAGES[-1]))
    assert run("recover", state, "--anchor", path).status == 0
    with StateDirectory.open(state) as directory:
        assert directory.exists("tpm2-00.journal")  # it was right, and still is


def test_recover_wants_an_anchor_that_is_there(run: Command, state: Path, tmp_path: Path) -> None:
    ended = run("recover", state, "--anchor", tmp_path / "missing")
    assert ended.status == 1
    assert "mount what holds it" in ended.error


def put(state: Path, permanent: bytes) -> None:
    """Have a checkpoint alone."""
    (state / "tpm2-00.permall").write_bytes(swtpm_format.encode_file(permanent))
    (state / "tpm2-00.journal").unlink(missing_ok=True)


def content_of(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in state.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("command", ["run", "fold", "recover", "recover --restore"])
def test_a_state_of_a_later_libtpms_is_said_to_be_that(state: Path, command: str) -> None:
    """With libtpms' own words, and a status of its own; it is no damage, and nothing is changed.

    In a process of its own: one that went on would become an engine.
    """
    put(state, states.LATER)
    before = content_of(state)
    line = [sys.executable, "-m", "vtpmd", *command.split(), str(state)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (ended.returncode, ended.stdout) == (8, "")
    assert ended.stderr.count("\n") == 1
    assert "needs a later libtpms, which is no damage: it has format level 9" in ended.stderr
    assert f"this host libtpms {library().version}, which reads" in ended.stderr
    assert "libtpms says: libtpms/tpm2: " in ended.stderr
    assert content_of(state) == before


def test_a_state_of_a_later_libtpms_is_said_to_be_that_under_a_journal_too(
    run: Command, state: Path
) -> None:
    """What is damaged besides is what has to be seen to first."""
    before = states.LATER.replace(b"This profile", b"That profile")
    put(state, before)
    (state / "tpm2-00.journal").write_bytes(write_journal([before, states.LATER]))
    assert run("fold", state).status == run("recover", state).status == 8
    damage(state, SECTOR + 9)
    assert run("fold", state).status == 5
    assert run("recover", state).status == 5


@pytest.mark.parametrize("level", ["LEVEL_1", "LEVEL_7"])
def test_a_state_that_libtpms_reads_is_right(run: Command, state: Path, level: str) -> None:
    permanent = getattr(states, level)
    put(state, permanent)
    reads = library().reads(needs_of(permanent))
    assert run("fold", state).status == run("recover", state).status == (0 if reads else 8)


@pytest.mark.parametrize("level", ["LEVEL_1", "LEVEL_7"])
def test_a_state_that_libtpms_refuses_is_never_called_fine(
    run: Command, state: Path, level: str
) -> None:
    """Nor damaged where only a later libtpms could tell."""
    permanent = getattr(states, level)
    put(state, states.damaged(permanent))
    before = content_of(state)
    reads = library().reads(needs_of(permanent))
    assert run("fold", state).status == (5 if reads else 8)
    ended = run("recover", state)
    assert ended.status == (7 if reads else 8)
    if reads:
        assert "tpm2-00.permall is damaged: libtpms refuses it with 0x" in ended.output
        assert "nothing can be restored" in ended.output
    assert content_of(state) == before


def test_a_volatile_state_that_libtpms_refuses_is_given_up_alone(run: Command, state: Path) -> None:
    volatile = state / "tpm2-00.volatilestate"
    volatile.write_bytes(swtpm_format.encode_file(b"none"))
    assert run("fold", state).status == 5
    ended = run("recover", state)
    assert ended.status == 5
    assert "tpm2-00.volatilestate is damaged: libtpms refuses it with 0x" in ended.output
    assert "would be lost: tpm2-00.volatilestate: the guest begins with a reset" in ended.output
    assert run("recover", state, "--restore").status == 0
    assert not volatile.exists()
    assert run("fold", state).status == 0
