"""A new TPM in place of an exported one: what a person is told, what is refused, hostile states.

What the new TPM has is looked for in one that runs, by tests/system/test_replacement.py.
"""

import re
from pathlib import Path
from random import Random

import pytest

from tests.support import states
from tests.support.cli_run import Command
from tests.support.documents import DOCS, tables
from tests.unit.test_profile import CUSTOM
from vtpmd.errors import VtpmdError
from vtpmd.inspect.decoding import decode
from vtpmd.inspect.fates import FATES, KINDS, Fate, Item, Kind
from vtpmd.inspect.replacement import replace
from vtpmd.inspect.tree import Node
from vtpmd.store import export_seal, libtpms
from vtpmd.store.anchor import Anchor, Mark
from vtpmd.store.directory import StateDirectory
from vtpmd.store.moving import MovingFiles
from vtpmd.wire import state_level
from vtpmd.wire.export_format import Header
from vtpmd.wire.tpm import EPOCH_GENERATIONS, StateType, TpmVersion

DOCUMENT = tables((DOCS / "export-format.md").read_text())
IDENTITY = bytes(range(16))
ALTERED = 60  # states: each is taken apart by a process of its own
UNKNOWN_TYPE = 3 << 4  # of TPMA_NV


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Give an export of a TPM that was used."""
    return write_export(tmp_path / "out", states.BUSY)


def write_export(
    path: Path, permanent: bytes, version: TpmVersion = TpmVersion.TPM_2_0, *others: StateType
) -> Path:
    """Write an export of a permanent state, with the volatile one of the TPM that was used."""
    exported = {StateType.PERMANENT: permanent, **dict.fromkeys(others, states.BUSY_VOLATILE)}
    header = Header(b"e" * 16, IDENTITY, 7, 0, version, tuple(exported))
    path.write_bytes(export_seal.sealed(header, exported, None))
    return path


def permanent(state: bytes) -> Node:
    """Return a permanent state, taken apart."""
    found = decode(state, StateType.PERMANENT).root.find("persistent-all")
    assert found is not None
    return found


def with_number(state: bytes, node: Node | None, number: int) -> bytes:
    """Return a state in which a number is another one."""
    assert node is not None
    content = number.to_bytes(node.length, "big")
    return state[: node.offset] + content + state[node.offset + node.length :]


def replaced(state: bytes) -> tuple[bytes, tuple[Item, ...]]:
    """Return a new TPM's permanent state, and what became of the old one's things."""
    new, items = replace("a state", TpmVersion.TPM_2_0, {StateType.PERMANENT: state})
    return new[StateType.PERMANENT], items


def fates(state: bytes) -> dict[tuple[Kind, str | None], Fate]:
    return {(each.kind, each.handle): each.fate for each in replaced(state)[1]}


def test_the_table_is_as_documented() -> None:
    """Each kind, in its order, with its fate and the reason that is printed."""
    rows = DOCUMENT["What becomes of what"]
    documented = {row["kind"].strip("`"): (row["fate"], row["because"]) for row in rows}
    assert documented == {kind: (fate, why) for kind, (fate, why) in FATES.items()}
    assert list(documented) == [kind.value for kind in FATES]
    assert set(FATES) == set(Kind)
    for row in rows:
        versions = {version for version, kinds in KINDS.items() if row["kind"].strip("`") in kinds}
        words = ", ".join(version.facts.word for version in sorted(versions))
        assert row["TPM"] == words, row


def test_a_person_is_told_line_by_line(run: Command, out: Path) -> None:
    into = out.with_name("into")
    first, *lines = run("import", out, into, "--identity", "replace").lines
    assert first == (
        f"{into}: made a new TPM 2.0, with what it can have of generation 7 of the exported one"
    )
    kept = FATES[Kind.ORDINARY][1]
    assert lines[0] == f"kept: NV index 0x01000000, ordinary, 32 bytes: {kept}"
    (policy,) = [line for line in lines if "0x01000009" in line]
    assert policy == (
        f"kept: NV index 0x01000009, ordinary, 16 bytes: {kept}; its policy, too: one that asks "
        "for a key of the old TPM is never met"
    )
    (key,) = [line for line in lines if "persistent object" in line]
    assert key == (
        "lost: persistent object 0x81000000, RSA 2048, of the owner hierarchy: it belongs to the "
        "old seeds"
    )
    (sealed,) = [line for line in lines if "BitLocker" in line and "recovery key" in line]
    assert sealed.startswith("lost: data sealed by the old TPM: will not unseal")
    assert [line.partition(":")[0] for line in lines] == sorted(
        (line.partition(":")[0] for line in lines), key=[*Fate].index
    )


def test_a_program_is_told_the_same(run: Command, tmp_path: Path) -> None:
    out = write_export(tmp_path / "out", states.BUSY, TpmVersion.TPM_2_0, StateType.VOLATILE)
    into = out.with_name("into")
    said = run("import", out, into, "--identity", "replace", "--json").outcome
    assert {row["key"].strip("`") for row in DOCUMENT["Keys of an import"]} == set(said)
    (of_each,) = {tuple(each) for each in said["contents"]}
    assert [row["key"].strip("`") for row in DOCUMENT["Keys of a thing"]] == list(of_each)
    assert (said["becomes"], said["epoch"], said["left-out"]) == (1, 0, ["volatile"])
    assert said["identity"] not in (None, IDENTITY.hex())
    kinds = {each["kind"] for each in said["contents"]}
    assert Kind.PCR_POLICIES in kinds and Kind.SEALED_DATA in kinds


def test_it_takes_the_place_of_another_with_nothing_of_its_past(run: Command, out: Path) -> None:
    """What was there is kept; its restore epoch, and that it may be a fork, are not its."""
    into = out.with_name("into")
    assert run("import", out, into, "--identity", "copy").status == 0
    assert "possible fork" in run("owner", into).output
    old = (into / "tpm2-00.permall").read_bytes()
    assert run("import", out, into, "--identity", "replace").status == 10
    said = run("import", out, into, "--identity", "replace", "--force", "--json").outcome
    assert said["originals"] == {"tpm2-00.permall": "tpm2-00.permall.before-1"}
    assert (into / "tpm2-00.permall.before-1").read_bytes() == old
    with StateDirectory.open(into) as directory:
        lineage = directory.read_lineage()
        record = MovingFiles(directory).owner.read()
    assert lineage is not None and lineage.identity.hex() == said["identity"]
    assert (lineage.generation, record.generation, record.forks) == (1, 1, ())
    assert run("import", out, into, "--identity", "copy", "--force", "--json").outcome[
        "becomes"
    ] == (EPOCH_GENERATIONS)


def test_each_one_is_another(run: Command, out: Path) -> None:
    made = []
    for number in range(2):
        into = out.with_name(f"into-{number}")
        made.append(run("import", out, into, "--identity", "replace", "--json").outcome["identity"])
    assert made[0] != made[1]
    one, other = (permanent(replaced(states.BUSY)[0]) for _ in range(2))
    for name in ("endorsement-seed", "owner-seed", "platform-seed"):
        seeds = [each.content("persistent-data", name) for each in (one, other)]
        assert len(seeds[0]) == len(seeds[1]) == 64 and seeds[0] != seeds[1]


def test_an_index_of_a_type_that_is_not_known_is_lost() -> None:
    entry = permanent(states.BUSY).find("user-nvram", "entries", "0x01000000", "index", "public")
    assert entry is not None
    attributes = (entry.number("attributes") or 0) | UNKNOWN_TYPE
    altered = with_number(states.BUSY, entry.find("attributes"), attributes)
    assert fates(states.BUSY)[Kind.ORDINARY, "0x01000000"] is Fate.KEPT
    assert fates(altered)[Kind.UNKNOWN_INDEX, "0x01000000"] is Fate.LOST
    new = permanent(replaced(altered)[0]).find("user-nvram", "entries")
    assert new is not None and new.find("0x01000000") is None


def test_what_a_new_tpm_does_not_know_is_told_where_it_differs() -> None:
    commands = permanent(states.LEVEL_1).find("persistent-data", "physical-presence-commands")
    altered = with_number(states.LEVEL_1, commands, 7)
    assert (Kind.PHYSICAL_PRESENCE, None) not in fates(states.LEVEL_1)
    assert fates(altered)[Kind.PHYSICAL_PRESENCE, None] is Fate.LOST
    assert fates(states.BUSY)[Kind.PCR_POLICIES, None] is Fate.LOST


@pytest.mark.parametrize("state", [states.BUSY, states.BUSY_OLD, states.BUSY_7], ids=str)
def test_it_is_of_the_format_of_the_old_one(state: bytes) -> None:
    needs = state_level.needs_of(state)
    if not libtpms.library().reads(needs):
        pytest.skip(f"this libtpms does not read {needs}")
    made, _ = replaced(state)
    assert state_level.needs_of(made) == needs


def test_a_profile_of_somebodys_own_stays_as_it_is() -> None:
    """Its algorithms and commands are in the state, and nowhere else."""
    if not libtpms.library().profiles:
        pytest.skip("this libtpms has no profiles")
    old = libtpms.make(TpmVersion.TPM_2_0, CUSTOM.replace("rsa-min-size=1024", "rsa-min-size=2048"))
    made, _ = replaced(old)
    profiles = [
        libtpms.ask(
            TpmVersion.TPM_2_0, libtpms.INFO_ACTIVE_PROFILE, states={StateType.PERMANENT: state}
        ).info
        for state in (old, made)
    ]
    assert '"Name":"custom"' in profiles[0] and "rsa-min-size=2048" in profiles[0]
    assert profiles[0] == profiles[1]


def test_a_tpm_without_seeds_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libtpms gives one that it has made, and not yet loaded again."""
    made = libtpms.make(TpmVersion.TPM_2_0)
    for name in ("endorsement-seed", "owner-seed", "platform-seed"):
        seed = permanent(made).content("persistent-data", name)
        without = made.replace(seed, bytes(len(seed)))
        monkeypatch.setattr(libtpms, "make", lambda *_, state=without: state)
        with pytest.raises(VtpmdError, match="libtpms has made a TPM without seeds"):
            replaced(states.BUSY)


def refused(run: Command, out: Path, *options: str | Path, status: int = 2) -> str:
    """Return why an import is refused, in one line; nothing is changed."""
    into = out.with_name("refused")
    ended = run("import", out, into, "--identity", "replace", *options)
    assert ended.status == status
    assert not list(into.glob("tpm*"))
    assert len(ended.error.splitlines()) == 1
    return str(ended.error)


def test_a_volatile_state_is_refused(run: Command, out: Path) -> None:
    said = refused(run, out, "--volatile")
    assert "the volatile state goes with the old TPM: leave out --volatile" in said


def test_an_anchor_that_has_begun_is_another_tpms(run: Command, out: Path, tmp_path: Path) -> None:
    """One that is empty is taken."""
    path = tmp_path / "anchor"
    with Anchor.open(path, tmp_path / "refused", is_new=True) as anchor:
        anchor.write(Mark(IDENTITY, 7, b"d" * 32))
    said = refused(run, out, "--anchor", path)
    assert f"anchor {path} is of the TPM that was there: give an empty file" in said
    path.write_bytes(b"")
    into = tmp_path / "into"
    outcome = run("import", out, into, "--identity", "replace", "--anchor", path, "--json").outcome
    with Anchor.open(path, into, is_new=False) as anchor:
        assert anchor.mark is not None and anchor.mark.identity.hex() == outcome["identity"]


def test_an_altered_state_ends_with_a_new_tpm_or_a_line() -> None:
    """Whatever is altered, the seeds are libtpms' own."""
    random = Random(7)
    seed = permanent(states.BUSY).content("persistent-data", "owner-seed")
    outcomes = set()
    for _ in range(ALTERED):
        altered = bytearray(states.BUSY)
        altered[random.randrange(len(altered))] = random.randrange(256)
        try:
            made, _ = replaced(bytes(altered))
        except VtpmdError as error:
            assert re.match("cannot (replace|ask|make)", str(error)) and "\n" not in str(error)
            outcomes.add(False)
        else:
            assert seed not in made
            outcomes.add(True)
    assert outcomes == {True, False}
