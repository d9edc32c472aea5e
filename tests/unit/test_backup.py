"""`vtpmd backup`: what it writes, says and refuses, and what can be restored at each moment.

A crash comes at each of its steps, and at each of those of the backup after it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from shutil import copy, copytree

import pyrage
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.dying import Killed, dying
from tests.support import states
from tests.support.beside import repeating
from tests.support.cli_run import Command, QuietRun
from tests.support.file_names import NAMES
from tests.unit.test_export import HEADER, TEXT, key_file, made, table
from vtpmd import cli
from vtpmd.cli.export_options import outcome_of
from vtpmd.core.delta import delta_encode
from vtpmd.core.image import IMAGE_BYTES_MAX, Image
from vtpmd.errors import VtpmdError
from vtpmd.store import chain, chain_writing, linear_import
from vtpmd.store.chain import LOCK_NAME, TEMPORARY_NAME, ChainDamaged
from vtpmd.store.directory import StateDirectory, lock_file
from vtpmd.store.export_seal import Seal
from vtpmd.store.keys import Key
from vtpmd.wire import export_format, swtpm_format
from vtpmd.wire.export_format import DamagedExport, ExportFlag, Header, Link
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import EPOCH_GENERATIONS, StateType, TpmVersion

STATES = states.different(8)
IDENTITY, OTHER = bytes(range(16)), b"of another vTPM."
KEY = b"k" * 32
KEEP = 3
MADE = KEEP + 2
STEPS_MAX = 100

Contents = dict[str, bytes]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command, which says at most one line on standard error."""
    return partial(QuietRun, capsys)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return put(tmp_path / "state", 1)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "backups"


def put(
    path: Path,
    generation: int,
    state: bytes | None = None,
    *,
    identity: bytes | None = IDENTITY,
    key: Key | None = None,
    version: TpmVersion = TpmVersion.TPM_2_0,
) -> Path:
    """Have a state directory hold a generation; without a state, the one of that number."""
    lineage = None if identity is None else Lineage(identity, generation)
    content = STATES[generation] if state is None else state
    with StateDirectory.open(path, version=version) as directory:
        if identity is None:  # else the one of before would stay
            directory.remove(directory.names.permanent)
        directory.write_state(StateType.PERMANENT, content, key, lineage)
    return path


def contents(path: Path) -> Contents:
    """Return what a chain's files hold."""
    return {each.name: each.read_bytes() for each in path.iterdir() if each.name != LOCK_NAME}


def links(path: Path) -> list[str]:
    """Return the names of a chain's files, with what is before the first dash, and after a dot."""
    return [f"{name[:8]}.{name.rpartition('.')[2]}" for name in sorted(contents(path))]


def file_of(path: Path, number: int) -> Path:
    """Return the file of a link."""
    (found,) = path.glob(f"{number:08}-*")
    return found


def restored(path: Path, seal: Seal = None) -> dict[int, bytes]:
    """Return all that can be restored of a chain, by its generations."""
    found = {}
    for each in chain.read(path).points():
        with suppress(ChainDamaged):
            header, its = chain.restore(path, seal, name=each.name)
            found[header.generation] = its[StateType.PERMANENT]
    return found


def make_chain(run: Command, state: Path, dest: Path, generations: range, *options: str) -> None:
    """Back up generations, one after the other."""
    for generation in generations:
        put(state, generation)
        assert run("backup", state, dest, *options).status == 0


def imported(path: Path, key: bytes | None = None) -> bytes:
    """Return the permanent state in a directory."""
    return swtpm_format.decode_file((path / NAMES.permanent).read_bytes(), key=key)


def test_the_first_is_whole_and_the_next_are_what_has_changed(
    run: Command, state: Path, dest: Path
) -> None:
    ended = run("backup", state, dest)
    first = file_of(dest, 1)
    assert ended.lines == [
        f"{first}: the whole state, of generation 1: {first.stat().st_size} bytes; {dest} has 1 "
        "that can be restored"
    ]
    put(state, 2)
    ended = run("backup", state, dest)
    second = file_of(dest, 2)
    assert ended.lines == [
        f"{second}: what has changed, of generation 2: {second.stat().st_size} bytes; {dest} has "
        "2 that can be restored"
    ]
    assert second.stat().st_size < first.stat().st_size / 3
    assert first.name.endswith("Z-g1.full") and second.name.endswith("Z-g2.delta")
    assert {each.stat().st_mode & 0o777 for each in dest.iterdir()} == {0o600}
    assert dest.stat().st_mode & 0o777 == 0o700
    assert restored(dest) == {1: STATES[1], 2: STATES[2]}


def test_nothing_changed_makes_no_file(run: Command, state: Path, dest: Path) -> None:
    """Also where only the generation is another one."""
    run("backup", state, dest)
    before = contents(dest)
    for generation in (1, 2):
        put(state, generation, STATES[1])
        ended = run("backup", state, dest)
        assert ended.lines == [
            f"nothing has changed since {file_of(dest, 1)}, of generation 1; {dest} has 1 that "
            "can be restored"
        ]
        assert contents(dest) == before


def test_json_says_what_was_done(run: Command, state: Path, dest: Path) -> None:
    run("backup", state, dest)
    put(state, 2)
    said = run("backup", state, dest, "--keep", "1", "--json").outcome
    assert said.pop("export") and said.pop("made")
    assert said == {
        "path": str(state),
        "destination": str(dest),
        "changed": True,
        "file": file_of(dest, 2).name,
        "number": 2,
        "whole": True,
        "tpm": "2.0",
        "identity": IDENTITY.hex(),
        "generation": 2,
        "states": ["permanent"],
        "sealed": None,
        "bytes": file_of(dest, 2).stat().st_size,
        "backups": 1,
        "removed": said["removed"],
        "served": False,
        "owner": "ours",
    }
    assert [name.rpartition(".")[2] for name in said["removed"]] == ["full", "delta"]
    assert run("backup", state, dest, "--json").outcome["changed"] is False


def test_each_can_be_imported(run: Command, state: Path, dest: Path) -> None:
    """The newest, one of a generation, one in a file; whole ones also without the others."""
    make_chain(run, state, dest, range(1, 5))
    words = ("--identity", "copy", "--json")
    into = dest.with_name("newest")
    assert run("import", dest, into, *words).outcome["generation"] == 4
    assert imported(into) == STATES[4]
    for generation in range(1, 5):
        into = dest.with_name(f"at-{generation}")
        said = run("import", dest, into, "--at", str(generation), *words).outcome
        assert (said["generation"], said["becomes"]) == (generation, EPOCH_GENERATIONS)
        assert imported(into) == STATES[generation]
        into = dest.with_name(f"file-{generation}")
        assert run("import", file_of(dest, generation), into, *words).status == 0
        assert imported(into) == STATES[generation]
        assert run("inspect", file_of(dest, generation)).status == 0
    into = dest.with_name("into")
    for asked in ((dest, "--at", "7"), (file_of(dest, 3), "--at", "2")):
        ended = run("import", *asked, into, "--identity", "copy")
        assert (ended.status, into.exists()) == (12, False), ended.error
    alone = copy(file_of(dest, 1), dest.with_name("alone"))
    assert run("import", alone, into, "--identity", "copy").status == 0
    assert imported(into) == STATES[1]


def test_the_newest_are_kept(run: Command, state: Path, dest: Path) -> None:
    """With one whole state at a time; and fewer, as soon as that is asked for."""
    options = ("--keep", str(KEEP))
    for generation in range(1, 7):
        make_chain(run, state, dest, range(generation, generation + 1), *options)
        kept = range(max(1, generation - KEEP + 1), generation + 1)
        assert restored(dest) == {number: STATES[number] for number in kept}
        whole, *others = links(dest)
        assert whole == f"{kept[0]:08}.full"
        assert others == [f"{number:08}.delta" for number in kept[1:]]
    ended = run("backup", state, dest, "--keep", "1")
    assert ended.lines[0].startswith(f"nothing has changed since {file_of(dest, 6)}")
    assert restored(dest) == {6: STATES[6]}
    assert run("verify", dest).status == 0


def test_a_key_seals_it(run: Command, state: Path, dest: Path) -> None:
    """Each link; what is sealed otherwise is not added, and another key opens nothing."""
    key = key_file(dest.with_name("key"), KEY)
    other = key_file(dest.with_name("other"), b"o" * 32)
    options = ("--seal-key", key, "--keep", "2")
    make_chain(run, state, dest, range(1, 4), *options)
    assert restored(dest, Key(bytearray(KEY))) == {2: STATES[2], 3: STATES[3]}
    content = b"".join(contents(dest).values())
    assert STATES[3][:64] not in content and b"DDDDDDDD" not in content
    put(state, 4)
    before = contents(dest)
    recipient = str(pyrage.x25519.Identity.generate().to_public())
    for wrong in ((), ("--seal-key", other), ("--recipient", recipient)):
        ended = run("backup", state, dest, *wrong)
        assert (ended.status, contents(dest)) == (4, before), ended.error
    assert run("verify", dest, "--seal-key", key).status == 0
    assert run("verify", dest, "--seal-key", other).status == 4
    assert run("verify", dest).status == 4
    into = dest.with_name("into")
    assert run("import", dest, into, "--identity", "copy", "--seal-key", other).status == 4
    assert run("import", dest, into, "--identity", "copy", "--key", key).status == 0
    assert imported(into, KEY) == STATES[3]


def test_of_a_vtpm_with_a_key(run: Command, tmp_path: Path, dest: Path) -> None:
    key = Key(bytearray(KEY))
    state = put(tmp_path / "sealed", 1, key=key)
    given = key_file(tmp_path / "key", KEY)
    assert run("backup", state, dest).status == 4
    assert not dest.exists()
    for generation in (1, 2):
        put(state, generation, key=key)
        assert run("backup", state, dest, "--key", given).status == 0
    assert restored(dest, key) == {1: STATES[1], 2: STATES[2]}
    assert run("verify", dest, "--key", given).status == 0


def test_with_age_each_is_whole(run: Command, state: Path, dest: Path) -> None:
    """As it cannot be opened; whether anything has changed, the generation says."""
    identity = pyrage.x25519.Identity.generate()
    secret = dest.with_name("secret")
    secret.write_text(f"{identity}\n")
    options = ("--recipient", str(identity.to_public()), "--keep", str(KEEP))
    make_chain(run, state, dest, range(1, 6), *options)
    assert links(dest) == [f"{number:08}.full" for number in (3, 4, 5)]
    assert "nothing has changed" in run("backup", state, dest, *options).output
    assert run("verify", dest, "--age-key", secret).status == 0
    assert run("verify", file_of(dest, 4), "--age-key", secret).status == 0
    assert run("verify", dest).status == 4
    assert run("backup", state, dest).status == 4
    into = dest.with_name("into")
    words = ("--at", "4", "--identity", "copy", "--age-key", secret)
    assert run("import", dest, into, *words).status == 0
    assert imported(into) == STATES[4]


def test_a_tpm_12_is_backed_up(run: Command, tmp_path: Path, dest: Path) -> None:
    new = next(state for state, kind in states.TPM12.values() if kind is StateType.PERMANENT)
    for generation, each in enumerate((new, states.BUSY_12), start=1):
        state = put(tmp_path / "state", generation, each, version=TpmVersion.TPM_1_2)
        assert run("backup", state, dest).status == 0
    assert links(dest) == ["00000001.full", "00000002.delta"]
    assert restored(dest) == {1: new, 2: states.BUSY_12}
    ended = run("verify", dest, "--json")
    assert (ended.status, ended.outcome["tpm"]) == (0, "1.2")


def test_a_linear_file_is_backed_up(run: Command, tmp_path: Path, dest: Path) -> None:
    linear = tmp_path / "linear"
    for generation in (1, 2):
        header = Header(b"e" * 16, IDENTITY, 0, 0, TpmVersion.TPM_2_0, (StateType.PERMANENT,))
        content = {StateType.PERMANENT: STATES[generation]}
        header = header._replace(becomes=generation)
        linear_import.put(linear, header, content, None, force=True)
        assert run("backup", linear, dest).status == 0
    assert restored(dest) == {1: STATES[1], 2: STATES[2]}


def test_of_a_state_without_generation_the_content_tells(
    run: Command, tmp_path: Path, dest: Path
) -> None:
    """As swtpm writes it; of two of them a file says which is meant."""
    for number in (1, 2, 2):
        state = put(tmp_path / "state", number, identity=None)
        assert run("backup", state, dest).status == 0
    assert links(dest) == ["00000001.full", "00000002.delta"]
    into = tmp_path / "into"
    words = (into, "--identity", "copy")
    ended = run("import", dest, *words, "--at", "0")
    assert (ended.status, into.exists()) == (12, False)
    assert "has 2 backups of generation 0; give the file of one" in ended.error
    assert run("import", file_of(dest, 1), *words).status == 0
    assert imported(into) == STATES[1]


# What is refused.


def refused(run: Command, state: Path, dest: Path, status: int, says: str) -> None:
    """Back up; it is refused, says which file, and changes nothing."""
    before = contents(dest)
    ended = run("backup", state, dest)
    assert (ended.status, contents(dest)) == (status, before), ended.error
    assert says in ended.error


@pytest.mark.parametrize(
    ("generation", "content", "identity", "says"),
    [
        (4, None, OTHER, "is another vTPM than that of"),
        (4, None, None, "or has no identity, as swtpm leaves it"),
        (2, None, IDENTITY, "it is an older copy, or was put back"),
        (3, STATES[0], IDENTITY, "are both of generation 3, and differ"),
        (EPOCH_GENERATIONS, STATES[4], IDENTITY, "of restore epoch 1, and"),
    ],
)
def test_what_has_not_become_of_the_newest_is_refused(
    run: Command,
    state: Path,
    dest: Path,
    generation: int,
    content: bytes | None,
    identity: bytes | None,
    says: str,
) -> None:
    make_chain(run, state, dest, range(1, 4))
    put(state, generation, content, identity=identity)
    refused(run, state, dest, 10, says)
    refused(run, state, dest, 10, file_of(dest, 3).name)


def alter(file: Path) -> None:
    """Flip a bit of a file."""
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)


def forge(file: Path, link: Link, *, of: Header | None = None) -> None:
    """Have a link without a seal say that it is another one, as somebody could."""
    export = export_format.decode(file.read_bytes())
    header = (of or export.header)._replace(link=link)
    head = export_format.encode_header(header)
    body = sha256(head).digest() + export.body[export_format.DIGEST_BYTES :]
    file.write_bytes(export_format.encode(head, body))


def exchange(one: Path, other: Path) -> None:
    """Have two links say that they are each other."""
    first, second = (export_format.decode(each.read_bytes()).header for each in (one, other))
    assert first.link is not None and second.link is not None
    forge(one, second.link, of=second)
    forge(other, first.link, of=first)


def another_copy(run: Command, dest: Path, number: int) -> Path:
    """Return a link of a chain that went on from a copy of this one, in place of this one's."""
    fork, state = dest.with_name("fork"), dest.with_name("forked")
    make_chain(run, state, fork.with_name("unused"), range(1, 2))
    copytree(dest, fork)
    for path in sorted(contents(fork))[number - 1 :]:
        (fork / path).unlink()
    put(state, number, STATES[7])
    assert run("backup", state, fork).status == 0
    return file_of(fork, number)


def another_chain(run: Command, dest: Path, number: int) -> Path:
    """Return a link of another chain of the same vTPM."""
    other = dest.with_name("other")
    make_chain(run, dest.with_name("again"), other, range(1, number + 1))
    return file_of(other, number)


BROKEN: dict[str, tuple[Callable[[Command, Path], object], int, str, set[int]]] = {
    "altered": (
        lambda _, dest: alter(file_of(dest, 2)),
        5,
        "00000002-{}: it is damaged: its checksum is not that of its bytes",
        {1},
    ),
    "missing": (
        lambda _, dest: file_of(dest, 2).unlink(),
        5,
        "00000003-{} does not continue {}: link 2 is missing",
        {1},
    ),
    "the whole one missing": (
        lambda _, dest: file_of(dest, 1).unlink(),
        5,
        "is a delta to is missing",
        set(),
    ),
    "reordered": (
        lambda _, dest: exchange(file_of(dest, 2), file_of(dest, 3)),
        5,
        "00000003-{} does not continue the link before it",
        {1},
    ),
    "twice": (
        lambda _, dest: copy(file_of(dest, 2), dest / "a copy"),
        5,
        "does not continue {}: both are link 2",
        {1, 2, 3, 4},
    ),
    "of a copy": (
        lambda run, dest: copy(another_copy(run, dest, 2), file_of(dest, 2)),
        5,
        "00000003-{} does not continue the link before it, which is of another copy",
        {1, 2},
    ),
    "of another chain": (
        lambda run, dest: copy(another_chain(run, dest, 2), file_of(dest, 2)),
        10,
        "00000002-{} is of another chain than {}; move one of them",
        {1},
    ),
    "of another vTPM": (
        lambda _, dest: forge(
            file_of(dest, 2),
            link_of(dest, 2),
            of=header_of(dest, 2)._replace(identity=OTHER),
        ),
        10,
        "00000002-{} is of another vTPM than {}; move",
        {1, 2, 3, 4},
    ),
    "of another epoch": (
        lambda _, dest: forge(
            file_of(dest, 4),
            link_of(dest, 4),
            of=header_of(dest, 4)._replace(generation=EPOCH_GENERATIONS),
        ),
        10,
        "00000004-{} is of another restore epoch than {}; move",
        {1, 2, 3, EPOCH_GENERATIONS},
    ),
    "of an older generation": (
        lambda _, dest: forge(
            file_of(dest, 3),
            link_of(dest, 3),
            of=header_of(dest, 3)._replace(generation=2),
        ),
        5,
        "00000003-{} does not continue {}: it is of generation 2, after 2",
        {1, 2, 4},
    ),
    "something else": (
        lambda _, dest: (dest / "notes").write_text("remember"),
        10,
        "notes is no link of a chain of backups",
        {1, 2, 3, 4},
    ),
    "a directory": (
        lambda _, dest: (dest / "inner").mkdir(),
        5,
        "inner cannot be read",
        {1, 2, 3, 4},
    ),
    "an export": (
        lambda run, dest: run("export", dest.with_name("state"), "--out", dest / "whole"),
        10,
        "whole is an export by itself",
        {1, 2, 3, 4},
    ),
    "of a later version": (
        lambda _, dest: (dest / "later").write_bytes(b"VTPMEXPT" + bytes(300)),
        9,
        "later: it is an export of a later version of vtpmd",
        {1, 2, 3, 4},
    ),
}


def header_of(dest: Path, number: int) -> Header:
    """Return what a link says of itself."""
    return export_format.decode(file_of(dest, number).read_bytes()).header


def link_of(dest: Path, number: int) -> Link:
    """Return which link a file has."""
    link = header_of(dest, number).link
    assert link is not None
    return link


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_chain_is_refused_and_what_can_be_restored_is(
    run: Command, state: Path, dest: Path, how: str
) -> None:
    """Nothing is added or removed; verify says so; what is whole is restored by name or --at."""
    make_chain(run, state, dest, range(1, 5))
    damage, status, says, can_be_restored = BROKEN[how]
    damage(run, dest)
    put(state, 5)
    before = sorted(dest.iterdir())
    for options in ((), ("--keep", "1")):
        ended = run("backup", state, dest, *options)
        assert (ended.status, sorted(dest.iterdir())) == (status, before)
        assert_says(ended.error, says)
    ended = run("verify", dest)
    assert ended.status == 5
    assert_says(ended.output, says)
    into = dest.with_name("into")
    ended = run("import", dest, into, "--identity", "copy")
    assert (ended.status, into.exists()) == (5, False), ended.error
    assert restored_of(dest) == can_be_restored


def assert_says(text: str, says: str) -> None:
    """Look for words, in order."""
    for words in says.split("{}"):
        _, found, text = text.partition(words)
        assert found, words


def restored_of(dest: Path) -> set[int]:
    """Return which generations can be restored, each with the state that it had."""
    found = restored(dest)
    for generation, state in found.items():
        assert state in STATES, generation
    return set(found)


def test_with_a_key_no_link_goes_into_another_place(run: Command, state: Path, dest: Path) -> None:
    """The header is sealed to the rest, so what is made to fit is seen."""
    key = key_file(dest.with_name("key"), KEY)
    make_chain(run, state, dest, range(1, 4), "--seal-key", key)
    exchange(file_of(dest, 2), file_of(dest, 3))
    before = contents(dest)
    assert run("backup", state, dest, "--seal-key", key).status == 4
    assert run("verify", dest, "--seal-key", key).status == 4
    assert contents(dest) == before


@pytest.mark.parametrize("what", ["state", "file", "other"])
def test_what_is_no_chain_is_left_as_it_is(
    run: Command, state: Path, tmp_path: Path, what: str
) -> None:
    dest = {"state": put(tmp_path / "second", 2), "file": tmp_path / "file"}.get(what)
    if dest is None:
        dest = tmp_path / "other"
        dest.mkdir()
        (dest / "letter").write_text("dear")
    elif what == "file":
        dest.write_text("dear")
    before = contents(dest) if dest.is_dir() else dest.read_bytes()
    ended = run("backup", state, dest)
    assert ended.status == (1 if what == "file" else 10), ended.error
    assert (contents(dest) if dest.is_dir() else dest.read_bytes()) == before
    assert not (dest / LOCK_NAME).exists()


def test_of_what_is_no_chain_nothing_is_imported(run: Command, state: Path, tmp_path: Path) -> None:
    empty, into = tmp_path / "empty", tmp_path / "into"
    empty.mkdir()
    for path in (state, empty):
        ended = run("import", path, into, "--identity", "copy")
        assert (ended.status, into.exists()) == (9, False)
        assert ended.error == (
            f"vtpmd: cannot import {path}: it has no backup; give the directory of a chain, or an "
            "export\n"
        )
    assert run("inspect", empty).status == 9


def test_an_empty_directory_is_taken_and_none_is_made_for_nothing(
    run: Command, state: Path, tmp_path: Path, dest: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("backup", empty, dest).status == 9
    assert not dest.exists()
    assert run("backup", state, empty).status == 0
    assert run("backup", state, tmp_path / "missing" / "backups").status == 1


def test_one_at_a_time(run: Command, state: Path, dest: Path) -> None:
    run("backup", state, dest)
    put(state, 2)
    before = contents(dest)
    fd = os.open(dest / LOCK_NAME, os.O_RDWR)
    try:
        lock_file("it", fd)
        ended = run("backup", state, dest)
    finally:
        os.close(fd)
    assert (ended.status, contents(dest)) == (3, before)
    assert f"another backup into {dest} is under way; wait for it" in ended.error
    assert run("backup", state, dest).status == 0


@pytest.mark.parametrize("value", ["0", "-1", "x", "1e3", "123456", "¹"])
def test_a_number_to_keep_is_one(
    state: Path, dest: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["backup", str(state), str(dest), f"--keep={value}"])
    assert "no number of backups to keep" in capsys.readouterr().err
    assert not dest.exists()


def test_a_name_is_not_believed_to_be_a_line(run: Command, state: Path, dest: Path) -> None:
    """Anybody may have named a file; the links are known by what is in them."""
    make_chain(run, state, dest, range(1, 4))
    file_of(dest, 3).rename(dest / "0\n\x1b[2J\udcff")
    put(state, 4)
    assert "0??[2J?: passed: generation 3" in run("verify", dest).output
    assert run("backup", state, dest, "--keep", "2").status == 0
    assert restored(dest) == {3: STATES[3], 4: STATES[4]}
    (dest / "\n\udcff").write_text("dear")
    ended = run("backup", state, dest)
    assert f"{dest}/?? is no link of a chain" in ended.error
    assert f"{dest}/?? is no link of a chain" in run("verify", dest).output


def test_numbers_and_files_have_an_end(
    run: Command, state: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_chain(run, state, dest, range(1, 4))
    put(state, 4)
    monkeypatch.setattr(chain_writing, "LINKS_MAX", 3)
    refused(run, state, dest, 1, f"{dest} has 3 backups, and may have no more; add --keep N")
    assert run("backup", state, dest, "--keep", "3").status == 0
    monkeypatch.undo()
    for path in dest.glob("0*"):
        path.unlink()
    last = Link(b"c" * 16, export_format.LINK_NUMBER_MAX)
    (dest / "last").write_bytes(made(STATES[5], HEADER._replace(link=last)))
    put(state, 8, STATES[6])
    refused(run, state, dest, 1, f"{dest} has used up the numbers of a chain")
    monkeypatch.setattr(chain, "FILES_MAX", 0)
    assert "has more than 0 files" in run("backup", state, dest).error


@pytest.mark.parametrize(
    ("state", "status", "says"),
    [
        (states.damaged(states.LEVEL_1), 5, ": failed: 662 of 1298 bytes decoded"),
        (states.LATER, 8, ": newer: generation 2, "),
    ],
)
def test_each_state_is_looked_at(
    run: Command, tmp_path: Path, dest: Path, state: bytes, status: int, says: str
) -> None:
    """One in the middle that libtpms refuses, or that needs a later one, is not missed."""
    for generation, content in enumerate((STATES[1], state, STATES[3]), start=1):
        path = put(tmp_path / "state", generation, content)
        assert run("backup", path, dest).status == 0
    ended = run("verify", dest)
    assert ended.status == status
    first, second, third = ended.lines[1:4]
    assert ": passed: generation 1" in first and ": passed: generation 3" in third
    assert file_of(dest, 2).name in second and says in second


@pytest.mark.parametrize("is_large", [False, True])
def test_a_delta_that_is_not_what_it_says_is_refused(
    run: Command, state: Path, dest: Path, is_large: bool
) -> None:
    """Of another number, or to a state that no delta is to."""
    run("backup", state, dest)
    first, second = (Image(StateType.PERMANENT, 1, STATES[1]), STATES[2])
    header = header_of(dest, 1)
    record = delta_encode(first, Image(StateType.PERMANENT, 2 if is_large else 3, second))
    if is_large:
        file_of(dest, 1).write_bytes(made(bytes(IMAGE_BYTES_MAX + 1), header))
    link = Link(link_of(dest, 1).chain, 2)
    header = header._replace(link=link, generation=2, flags=ExportFlag.DELTA)
    (dest / "delta").write_bytes(made(record, header))
    refused(run, state, dest, 5, f"{dest}/delta is damaged: it is not the delta that it says")


def test_a_state_too_large_for_a_delta_is_whole(run: Command, state: Path, dest: Path) -> None:
    """Each of the two, as a record has a limit for both."""
    large = bytes([1]) * (IMAGE_BYTES_MAX + 1)
    for generation, content in enumerate((STATES[1], large, STATES[3]), start=1):
        put(state, generation, content)
        assert run("backup", state, dest).status == 0
    assert links(dest) == [f"{number:08}.full" for number in (1, 2, 3)]
    assert restored(dest) == {1: STATES[1], 2: large, 3: STATES[3]}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a chain of three."""
    path = tmp_path_factory.mktemp("three")
    for generation in range(1, 4):
        put(path / "state", generation)
        assert cli.main(["backup", str(path / "state"), str(path / "backups")]) == 0
    return path / "backups"


@given(st.integers(1, 3), st.integers(0, 10_000), st.integers(0, 255), st.booleans())
def test_whatever_is_in_a_link_is_restored_or_refused(
    three: Path, number: int, at: int, value: int, is_cut: bool
) -> None:
    """Also where somebody has made its checksum fit."""
    file = file_of(three, number)
    before = file.read_bytes()
    content = bytearray(before[: -export_format.DIGEST_BYTES])
    at %= len(content)
    content[at] = value
    if is_cut:
        del content[at:]
    file.write_bytes(content + sha256(content).digest())
    try:
        for each in chain.read(three).points():
            try:
                header, its = chain.restore(three, None, name=each.name)
            except VtpmdError as error:
                assert "\n" not in str(error)
            else:
                assert its[StateType.PERMANENT] and outcome_of(header)
    finally:
        file.write_bytes(before)


# Crashes.


class Setting:
    """A chain of more than are kept, and a vTPM that has gone on; each time a new one."""

    def __init__(self, path: Path, seal: Seal, options: list[str]) -> None:
        self.dest = path / "backups"
        self._state, self._seal = path / "state", seal
        self._words = ["backup", str(self._state), str(self.dest), *options]
        for generation in range(1, MADE + 1):
            put(self._state, generation)
            assert cli.main(self._words) == 0
        self._words += ["--keep", str(KEEP)]
        put(self._state, MADE + 1)

    def back_up(self) -> None:
        """Back up, and keep the newest."""
        assert cli.main(self._words) == 0

    def check(self) -> bool:
        """See that the newest can be restored; return whether the new one is there."""
        found = restored(self.dest, self._seal)
        assert all(state == STATES[generation] for generation, state in found.items())
        is_there = MADE + 1 in found
        newest = MADE + is_there
        assert found.keys() >= set(range(newest - KEEP + 1, newest + 1)), found.keys()
        assert not chain.read(self.dest).problems
        return is_there

    def check_done(self) -> None:
        """See that it is as after one backup."""
        newest = MADE + 1
        assert restored(self.dest, self._seal).keys() == set(range(newest - KEEP + 1, newest + 1))
        assert len(contents(self.dest)) == KEEP


@pytest.fixture(params=["in the clear", "with a key", "with age"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Setting]]:
    seal: Seal = None
    options: list[str] = []
    if request.param == "with a key":
        seal, options = Key(bytearray(KEY)), ["--seal-key", key_file(tmp_path / "key", KEY)]
    elif request.param == "with age":
        identity = pyrage.x25519.Identity.generate()
        seal = export_seal_of(identity)
        options = ["--recipient", str(identity.to_public())]
    made = 0

    def new() -> Setting:
        nonlocal made
        made += 1
        path = tmp_path / f"setting-{made}"
        path.mkdir()
        return Setting(path, seal, options)

    yield new


def export_seal_of(identity: pyrage.x25519.Identity) -> Seal:
    """Return what opens what is sealed to an identity."""
    from vtpmd.store.export_seal import Age

    return Age(names=(str(identity),))


def test_a_backup_that_dies_at_any_step_loses_none(settings: Callable[[], Setting]) -> None:
    """Nor does the next one, at any of its own: it finishes what the first one left."""
    have_happened = []
    for at in range(STEPS_MAX):
        setting = settings()
        with suppress(Killed), dying(at) as steps:
            setting.back_up()
        have_happened.append(setting.check())
        if steps.done < at:
            break
        for then in range(0, STEPS_MAX, 3):
            with suppress(Killed), dying(then) as more:
                setting.back_up()
            setting.check()
            if more.done < then:
                break
        setting.back_up()
        setting.check_done()
    assert 10 < len(have_happened) < STEPS_MAX
    assert have_happened == sorted(have_happened) and set(have_happened) == {False, True}


def test_the_first_backup_that_dies_at_any_step_has_happened_or_not(
    state: Path, tmp_path: Path
) -> None:
    found = []
    for at in range(STEPS_MAX):
        dest = tmp_path / f"backups-{at}"
        words = ["backup", str(state), str(dest)]
        with suppress(Killed), dying(at) as steps:
            assert cli.main(words) == 0
        found.append(len(restored(dest)) if dest.exists() else 0)
        assert cli.main(words) == 0
        assert restored(dest) == {1: STATES[1]}
        if steps.done < at:
            break
    assert found == sorted(found) and set(found) == {0, 1}


def test_what_fails_to_be_written_leaves_what_was_there(
    run: Command, state: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_chain(run, state, dest, range(1, 4))
    put(state, 4)
    before = contents(dest)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    ended = run("backup", state, dest, "--keep", "1")
    assert (ended.status, contents(dest)) == (1, before)
    assert "g4.delta: No space left on device; put that right" in ended.error


def test_a_reader_does_not_mind_what_is_removed_meanwhile(
    run: Command, state: Path, dest: Path
) -> None:
    """It looks again: each time there is a whole chain, and its newest can be restored."""
    make_chain(run, state, dest, range(1, 3))
    newest: list[int] = []

    def read() -> None:
        found, its = chain.restore(dest, None)
        assert its[StateType.PERMANENT] == STATES[found.generation % 8]
        newest.append(found.generation)

    with repeating(read):
        for generation in range(3, 150):
            put(state, generation, STATES[generation % 8])
            assert run("backup", state, dest, "--keep", "2").status == 0
    assert newest == sorted(newest) and len(set(newest)) > 10


# The format.


def test_a_link_is_as_documented() -> None:
    fields = [(int(offset), int(size)) for offset, size, _ in table("no other fields of the chain")]
    assert sum(size for _, size in fields) == export_format.LINK.size
    made = Header(b"e" * 16, IDENTITY, 7, 0, TpmVersion.TPM_2_0, (StateType.PERMANENT,))
    head = export_format.encode_header(made._replace(link=Link(b"c" * 16, 5)))
    assert [head[offset : offset + size] for offset, size in fields] == [
        b"c" * 16,
        (5).to_bytes(8, "big"),
        bytes(8),
    ]
    assert int.from_bytes(head[10:12], "big") == len(head) == 160
    assert int.from_bytes(head[12:14], "big") == export_format.IS_LINK
    assert f"`{LOCK_NAME}`" in TEXT and f"`{TEMPORARY_NAME}`" in TEXT
    assert table("of the one before it in its chain |\n")[0][:2] == ["1", "LINK"]


@pytest.mark.parametrize(
    ("link", "flags", "size", "says"),
    [
        (None, ExportFlag.DELTA, None, "it is a delta, and of no permanent state before it"),
        (Link(b"c" * 16, 1), ExportFlag.DELTA, None, "it is a delta, and of no permanent state"),
        (Link(b"c" * 16, 0), ExportFlag(0), None, "it is link 0 of its chain, which is none"),
        (Link(b"c" * 16, 100_000_000), ExportFlag(0), None, "which is none"),
        (Link(b"c" * 16, 2), ExportFlag(0), 150, "its header ends before it says of which chain"),
        (Link(b"c" * 16, 2), ExportFlag(7), None, "it is sealed in two ways"),
    ],
)
def test_a_header_that_is_wrong_is_refused(
    link: Link | None, flags: ExportFlag, size: int | None, says: str
) -> None:
    made = Header(b"e" * 16, IDENTITY, 7, 0, TpmVersion.TPM_2_0, (StateType.PERMANENT,), flags)
    head = bytearray(export_format.encode_header(made._replace(link=link)))
    if size is not None:
        head[10:12] = size.to_bytes(2, "big")
    with pytest.raises(DamagedExport, match=says):
        export_format.decode(export_format.encode(bytes(head), bytes(100)))


def test_a_time_that_is_none_is_refused() -> None:
    made = Header(b"e" * 16, IDENTITY, 7, 1 << 63, TpmVersion.TPM_2_0, (StateType.PERMANENT,))
    with pytest.raises(DamagedExport, match="which is no time"):
        export_format.decode(export_format.encode(export_format.encode_header(made), bytes(100)))
