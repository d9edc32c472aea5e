"""Export and import as a person meets them, and the tables of docs/export-format.md."""

import io
import json
import os
import re
import sys
from pathlib import Path
from threading import Timer
from typing import Any

import pyrage
import pytest

from tests.support import states
from tests.support.cli_run import Command
from tests.support.file_names import NAMES
from tests.support.journal import write_journal
from vtpmd import cli
from vtpmd.store import export_seal, exporting
from vtpmd.store.directory import StateDirectory
from vtpmd.store.keys import Key
from vtpmd.wire import export_format, swtpm_format
from vtpmd.wire.export_format import ExportFlag, Header
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import EPOCH_GENERATIONS, StateType, TpmVersion

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "export-format.md").read_text()
BASE, NEWER = states.different(2)
IDENTITY = bytes(range(16))
KEY, OTHER_KEY = b"k" * 32, b"o" * 16
HEADER = Header(b"e" * 16, IDENTITY, 7, 0, TpmVersion.TPM_2_0, (StateType.PERMANENT,))


def make_directory(path: Path, key: Key | None = None, *, first: int = 1) -> Path:
    """Make a directory with a checkpoint, a journal of one commit, and a volatile state."""
    with StateDirectory.open(path) as directory:
        lineage = Lineage(IDENTITY, first, continued=True)
        directory.write_state(StateType.PERMANENT, BASE, key, lineage)
        directory.write_state(StateType.VOLATILE, states.BUSY_VOLATILE, key)
        secret = None if key is None else key.journal_secret()
        journal = write_journal(
            [BASE, NEWER], identity=IDENTITY, secret=secret, first_generation=first
        )
        directory.replace(NAMES.journal, bytes(journal))
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return make_directory(tmp_path / "state")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def key_file(path: Path, material: bytes) -> str:
    """Write a key into a file; return what gives it."""
    path.write_text(material.hex())
    path.chmod(0o600)
    return f"file={path},mode=aes-{8 * len(material)}-cbc"


def imported(path: Path, key: bytes | None = None) -> bytes:
    """Return the permanent state in a directory."""
    return swtpm_format.decode_file((path / NAMES.permanent).read_bytes(), key=key)


def test_export_and_import_say_what_they_did(run: Command, state: Path, out: Path) -> None:
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    ended = run("export", state, "--out", out)
    n_bytes = out.stat().st_size
    assert ended.lines == [
        f"{state}: exported generation 2 of the TPM 2.0, permanent: {n_bytes} bytes, in the clear: "
        "keep it secret"
    ]
    assert out.stat().st_mode & 0o777 == 0o600
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before
    into = out.with_name("into")
    ended = run("import", out, into, "--identity", "copy")
    assert ended.lines == [
        f"{into}: imported generation 2 of the TPM 2.0, as generation {EPOCH_GENERATIONS}, of "
        "restore epoch 1"
    ]
    assert imported(into) == NEWER
    assert "possible fork: imported at 2" in run("owner", into).output
    assert run("verify", into).status == 0


def test_json_says_what_is_in_it(run: Command, state: Path, out: Path) -> None:
    said = run("export", state, "--volatile", "--out", out, "--json").outcome
    name, made = said.pop("export"), said.pop("made")
    assert said == {
        "path": str(state),
        "tpm": "2.0",
        "identity": IDENTITY.hex(),
        "generation": 2,
        "states": ["permanent", "volatile"],
        "sealed": None,
        "bytes": out.stat().st_size,
        "served": False,
        "owner": "ours",
    }
    into = out.with_name("into")
    assert run("import", out, into, "--identity", "copy", "--json").outcome == {
        "directory": str(into),
        "export": name,
        "tpm": "2.0",
        "identity": IDENTITY.hex(),
        "generation": 2,
        "states": ["permanent"],
        "sealed": None,
        "made": made,
        "becomes": EPOCH_GENERATIONS,
        "epoch": 1,
        "left-out": ["volatile"],
        "originals": {},
    }


def test_a_copy_of_a_copy_is_of_the_epoch_after(run: Command, state: Path, out: Path) -> None:
    """Also in place of one that has come further than what is imported."""
    run("export", state, "--out", out)
    into = out.with_name("into")
    force = ["--identity", "copy", "--force", "--json"]
    epochs = [run("import", out, into, *force).outcome["epoch"] for _ in range(3)]
    assert epochs == [1, 2, 3]
    again = out.with_name("again")
    run("export", into, "--out", again)
    other = out.with_name("other")
    ended = run("import", again, other, "--identity", "copy", "--json").outcome
    assert (ended["generation"], ended["epoch"]) == (3 * EPOCH_GENERATIONS, 4)


@pytest.mark.parametrize("key", [None, KEY], ids=["in the clear", "sealed"])
def test_a_copy_is_of_a_later_epoch_than_the_journal(
    run: Command, state: Path, out: Path, tmp_path: Path, key: bytes | None
) -> None:
    """A snapshot that was loaded has begun one, of which no file tells until it is folded."""
    run("export", state, "--out", out)
    material = None if key is None else Key(bytearray(key))
    into = make_directory(tmp_path / "into", material, first=EPOCH_GENERATIONS - 1)
    keys = [] if key is None else ["--key", key_file(tmp_path / "key", key), "--unsealed"]
    ended = run("import", out, into, "--identity", "copy", "--force", "--json", *keys)
    assert ended.outcome["epoch"] == 2, ended.error


def test_what_is_there_is_kept_when_that_is_asked_for(run: Command, state: Path, out: Path) -> None:
    run("export", state, "--out", out)
    before = {path.name: path.read_bytes() for path in state.iterdir() if path.name != ".lock"}
    ended = run("import", out, state, "--identity", "copy")
    assert ended.status == 10
    assert "is not empty: it has tpm2-00.permall" in ended.error
    assert {path.name: path.read_bytes() for path in state.iterdir() if path.name != ".lock"} == (
        before
    )
    ended = run("import", out, state, "--identity", "copy", "--force", "--json")
    assert ended.outcome["originals"] == {name: f"{name}.before-1" for name in before}
    kept = {name: (state / f"{name}.before-1").read_bytes() for name in before}
    assert kept == before
    assert imported(state) == NEWER


def test_it_goes_through_pipes(
    run: Command, state: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.BytesIO()
    with io.TextIOWrapper(stream, write_through=True) as written:
        monkeypatch.setattr(sys, "stdout", written)
        assert cli.main(["export", str(state)]) == 0
        monkeypatch.undo()
        content = stream.getvalue()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    ended = run("import", "-", out, "--identity", "copy")
    assert ended.status == 0, ended.error
    assert imported(out) == NEWER


def test_no_terminal_gets_one(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert cli.main(["export", str(state)]) == 2
    os.close(leader)
    assert "an export is not for a terminal" in capfd.readouterr().err


def test_no_file_is_replaced(run: Command, state: Path, out: Path) -> None:
    out.write_bytes(b"another")
    ended = run("export", state, "--out", out)
    assert ended.status == 2
    assert "is there already" in ended.error
    assert out.read_bytes() == b"another"
    ended = run("export", state, "--out", out.with_name("missing") / "x")
    assert ended.status == 1
    assert "cannot write" in ended.error


def test_a_key_opens_the_state_and_seals_the_export(run: Command, out: Path) -> None:
    """And the directory that is imported into is encrypted with it."""
    state = make_directory(out.with_name("sealed"), Key(bytearray(KEY)))
    key = key_file(out.with_name("key"), KEY)
    other = key_file(out.with_name("other"), OTHER_KEY)
    ended = run("export", state, "--out", out)
    assert (ended.status, out.exists()) == (4, False)
    assert run("export", state, "--out", out, "--key", other).status == 4
    assert run("export", state, "--out", out, "--key", key, "--json").outcome["sealed"] == "key"
    assert NEWER[:64] not in out.read_bytes()
    into = out.with_name("into")
    for wrong in ((), ("--key", other), ("--key", key, "--unsealed")):
        ended = run("import", out, into, "--identity", "copy", *wrong)
        assert (ended.status, (into / NAMES.permanent).exists()) == (4, False)
    assert run("import", out, into, "--identity", "copy", "--key", key).status == 0
    assert imported(into, KEY) == NEWER
    moved = out.with_name("moved")
    options = ("--key", other, "--seal-key", key)
    assert run("import", out, moved, "--identity", "copy", *options).status == 0
    assert imported(moved, OTHER_KEY) == NEWER


def test_what_is_not_sealed_is_taken_with_a_key_when_that_is_said(
    run: Command, state: Path, out: Path
) -> None:
    key = key_file(out.with_name("key"), KEY)
    run("export", state, "--out", out)
    into = out.with_name("into")
    ended = run("import", out, into, "--identity", "copy", "--key", key)
    assert ended.status == 4
    assert "it is not sealed, but a key was given" in ended.error
    assert run("import", out, into, "--identity", "copy", "--key", key, "--unsealed").status == 0
    assert imported(into, KEY) == NEWER


def test_age_seals_it_to_recipients(run: Command, state: Path, out: Path) -> None:
    ours, theirs, nobodys = (pyrage.x25519.Identity.generate() for _ in range(3))
    recipients = [str(each.to_public()) for each in (ours, theirs)]
    options = [word for name in recipients for word in ("--recipient", name)]
    said = run("export", state, "--out", out, "--json", *options).outcome
    assert said["sealed"] == "age"
    body = export_format.decode(out.read_bytes()).body
    assert body.startswith(b"age-encryption.org/v1\n")
    for number, (identity, status) in enumerate(((ours, 0), (theirs, 0), (nobodys, 4))):
        file, into = out.with_name(f"identity-{number}"), out.with_name(f"into-{number}")
        file.write_text(f"# created: now\n{identity}\n")
        ended = run("import", out, into, "--identity", "copy", "--age-key", file)
        assert ended.status == status, ended.error
        if status == 0:
            assert imported(into) == NEWER
    ended = run("import", out, out.with_name("into"), "--identity", "copy")
    assert ended.status == 4
    assert "it is sealed with age: give --age-key" in ended.error
    assert "`vtpmd import` opens it" in run("inspect", out).error


def test_age_seals_it_by_a_passphrase(run: Command, state: Path, out: Path) -> None:
    phrase, wrong = out.with_name("phrase"), out.with_name("wrong")
    phrase.write_text("correct horse\n")
    wrong.write_text("wrong horse\n")
    assert run("export", state, "--out", out, "--passphrase-file", phrase).status == 0
    into = out.with_name("into")
    words = ("import", out, into, "--identity", "copy", "--passphrase-file")
    assert run(*words, wrong).status == 4
    assert run(*words, phrase).status == 0
    assert imported(into) == NEWER


def test_age_that_is_not_there_is_said(
    run: Command, state: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipient = str(pyrage.x25519.Identity.generate().to_public())
    monkeypatch.setitem(sys.modules, "pyrage", None)
    ended = run("export", state, "--out", out, "--recipient", recipient)
    assert (ended.status, out.exists()) == (1, False)
    assert "pip install 'vtpmd[age]'" in ended.error
    assert len(ended.error.splitlines()) == 1


@pytest.mark.parametrize("name", ["age1nonsense", "ssh-ed25519 AAAA", ""])
def test_what_is_no_recipient_is_refused(run: Command, state: Path, out: Path, name: str) -> None:
    ended = run("export", state, "--out", out, "--recipient", name)
    assert (ended.status, out.exists()) == (2, False)
    assert len(ended.error.splitlines()) == 1


def test_what_is_no_export_is_said_to_be_that(run: Command, out: Path) -> None:
    into = out.with_name("into")
    for content, status in (
        (b"", 9),
        (states.LEVEL_1, 9),
        (b"VTPMEXPT" + bytes(200), 9),  # of a later version
        (made()[:-1], 5),
        (made() + b"\0", 5),
        (made(states.damaged(states.LEVEL_1)), 5),
    ):
        out.write_bytes(content)
        ended = run("import", out, into, "--identity", "copy")
        assert ended.status == status, ended.error
        assert len(ended.error.splitlines()) == 1
        assert ended.error.startswith(f"vtpmd: cannot import {out}: ")
        assert not into.exists()


def made(state: bytes = BASE, header: Header = HEADER) -> bytes:
    """Return an export of a permanent state."""
    return export_seal.sealed(header, {StateType.PERMANENT: state}, None)


def test_a_state_of_a_later_libtpms_is_said_to_be_that(run: Command, out: Path) -> None:
    out.write_bytes(made(states.LATER))
    into = out.with_name("into")
    ended = run("import", out, into, "--identity", "copy")
    assert (ended.status, into.exists()) == (8, False)
    assert f"cannot use the state in {out}: it needs a later libtpms" in ended.error


def test_another_version_of_tpm_is_not_put_into_a_directory(
    run: Command, state: Path, out: Path
) -> None:
    out.write_bytes(made(header=HEADER._replace(version=TpmVersion.TPM_1_2)))
    ended = run("import", out, state, "--identity", "copy", "--force")
    assert ended.status != 0
    assert imported(state) == BASE


def test_an_export_is_inspected(run: Command, state: Path, out: Path) -> None:
    key = key_file(out.with_name("key"), KEY)
    run("export", state, "--volatile", "--out", out, "--seal-key", key)
    ended = run("inspect", out, "--json", "--key", key)
    assert ended.status == 0, ended.error
    assert (ended.outcome["kind"], ended.outcome["generation"]) == ("export", 2)
    assert set(ended.outcome["states"]) == {"permanent", "volatile"}
    assert run("inspect", out, "--key", key).lines[0].startswith(f"{out}: an export")
    assert run("inspect", out).status == 4


def test_an_empty_directory_and_one_that_is_damaged_are_refused(
    run: Command, state: Path, out: Path
) -> None:
    empty = out.with_name("empty")
    empty.mkdir()
    ended = run("export", empty, "--out", out)
    assert (ended.status, ended.error) == (
        9,
        f"vtpmd: cannot export {empty}: there is no vTPM in it yet\n",
    )
    (state / NAMES.journal).unlink()
    ended = run("export", state, "--out", out)
    assert ended.status == 5
    assert "tpm2-00.journal is missing" in ended.error
    assert not out.exists()


@pytest.mark.parametrize("name", [NAMES.incoming, NAMES.arrived, NAMES.importing])
def test_a_state_that_is_about_to_be_another_one_is_not_exported(
    run: Command, state: Path, out: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer's, QEMU's, or one that is imported: it is waited for, and then said."""
    monkeypatch.setattr(exporting, "PAUSE_S", 0)
    (state / name).write_bytes(b"some")
    ended = run("export", state, "--out", out)
    assert (ended.status, out.exists()) == (1, False)
    assert "is about to take the place of what is there" in ended.error
    monkeypatch.setattr(exporting, "PAUSE_S", 0.01)
    timer = Timer(0.1, (state / name).unlink)
    timer.start()
    assert run("export", state, "--out", out).status == 0
    timer.join()


def test_a_folding_that_ends_between_two_reads_is_no_damage(
    run: Command, state: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `vtpmd fold`, which has the lock for a moment only."""
    monkeypatch.setattr(exporting, "PAUSE_S", 0)
    read = exporting._read_backwards
    folded: list[int] = []

    def fold_before(*arguments: Any) -> bytes | None:
        if not folded:
            folded.append(cli.main(["fold", str(state)]))
        return read(*arguments)

    # libtpms would refuse the volatile state, which is another TPM's.
    (state / NAMES.volatile).unlink()
    monkeypatch.setattr(exporting, "_read_backwards", fold_before)
    assert run("export", state, "--out", out).status == 0
    assert folded == [0]
    assert run("import", out, out.with_name("into"), "--identity", "copy").status == 0
    assert imported(out.with_name("into")) == NEWER


def test_an_owner_record_that_is_damaged_keeps_nothing_back(
    run: Command, state: Path, out: Path
) -> None:
    (state / NAMES.owner).write_text("no record")
    ended = run("export", state, "--out", out)
    assert ended.status == 0
    assert ended.lines[1].startswith("warning: whose the vTPM is, is not known")
    ended = run("import", out, state, "--identity", "copy", "--force")
    assert ended.status == 5
    assert "tpm2-00.owner cannot be read" in ended.error
    assert imported(state) == BASE


def test_a_copy_of_swtpms_that_is_alone_is_waited_for(
    run: Command, state: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "PAUSE_S", 0)
    (state / NAMES.journal).unlink()
    (state / NAMES.permanent).rename(state / NAMES.backup)
    ended = run("export", state, "--out", out)
    assert ended.status == 1
    assert "is there, which swtpm keeps" in ended.error


# The document.


def table(before: str) -> list[list[str]]:
    """Return the rows of the first table after some text, without its head."""
    _, found, rest = TEXT.partition(before)
    assert found, before
    rows = re.findall(r"(?:^\|.*\n)+", rest, re.MULTILINE)[0].splitlines()
    return [[cell.strip(" `") for cell in row[1:-1].split("|")] for row in rows[2:]]


def test_header_is_as_documented() -> None:
    fields = [(int(offset), int(size)) for offset, size, _ in table("## Header")]
    assert [offset for offset, _ in fields] == [
        sum(size for _, size in fields[:number]) for number in range(len(fields))
    ]
    assert sum(size for _, size in fields) == export_format.HEADER.size
    header = HEADER._replace(time_s=5, flags=ExportFlag.KEY, salt=b"s" * 32)
    head = export_format.encode_header(header)
    numbers = [head[offset : offset + size] for offset, size in fields]
    expected: list[Any] = [b"VTPMEXPT", 1, 128, 0, 1, b"e" * 16, IDENTITY, 7, 5, 2, 1]
    expected += [bytes(6), b"s" * 32, bytes(24)]
    assert [
        number if isinstance(wanted, bytes) else int.from_bytes(number, "big")
        for number, wanted in zip(numbers, expected, strict=True)
    ] == expected


def test_a_pending_import_is_as_documented() -> None:
    header = HEADER._replace(becomes=1, aside=2, aside_number=3, is_new=True)
    head = export_format.encode_header(header, export_format.MAGIC_PENDING)
    fields = [(int(offset), int(size)) for offset, size, _ in table("four fields more")]
    values = [int.from_bytes(head[offset : offset + size], "big") for offset, size in fields]
    assert values == [1, 2, 3, 1, 0]
    assert '"VTPMIMPT"' in TEXT and export_format.MAGIC_PENDING == b"VTPMIMPT"
    words = [name.removeprefix("tpm2-00.") for name in NAMES]
    assert f"in the order {', '.join(words)} |" in TEXT


def test_flags_and_limits_are_as_documented() -> None:
    flags = {int(number): name for number, name, _ in table("| 104 | 24 | zeros |\n")}
    assert flags == {flag.value: flag.name for flag in ExportFlag}
    for name, value, reason in table("## Limits"):
        assert int(value) == getattr(export_format, name)
        assert reason


def test_body_is_as_documented() -> None:
    (digest_at, digest_bytes, _), (entries_at, _, _) = table("what is sealed in it:")
    content = made()
    body = export_format.decode(content).body
    assert (int(digest_at), int(digest_bytes), int(entries_at)) == (0, 32, 32)
    rows = table("Entry of a state:")
    assert [row[:2] for row in rows] == [["0", "4"], ["4", "4"], ["8", "…"]]
    assert body[32:40] == (1).to_bytes(4, "big") + len(BASE).to_bytes(4, "big")
    assert body[40:] == BASE


def test_json_is_one_line(run: Command, state: Path, out: Path) -> None:
    ended = run("export", state, "--out", out, "--json")
    assert json.loads(ended.output) and ended.output.count("\n") == 1
