"""A new TPM 1.2 in place of an exported one: what a person is told, whatever the old state has.

What the new TPM does is tried with one that runs, by tests/system/test_replacement_tpm12.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.support import states
from tests.support.cli_run import Command
from tests.support.documents import DOCS, tables
from tests.unit.test_replacement import write_export
from vtpmd.errors import VtpmdError
from vtpmd.inspect.decoding import decode
from vtpmd.inspect.fates import SETTINGS_12, Fate, Item, Kind
from vtpmd.inspect.replacement import replace
from vtpmd.inspect.tpm12.layouts import NV_WITHOUT_UNUSED_DIGESTS
from vtpmd.inspect.tpm12.replacement import KEPT, PLATFORM_FLAGS, SECRETS
from vtpmd.inspect.tree import Node
from vtpmd.inspect.words.tpm12 import PERMANENT_FLAGS
from vtpmd.store import libtpms
from vtpmd.wire.tpm import StateType, TpmVersion

VERSION = TpmVersion.TPM_1_2
DIGEST_BYTES = 20
ALTERED = 300
NEW = next(state for name, (state, _) in states.TPM12.items() if name.startswith("1.2 new"))
GUARDED = "0x00011103"  # of BUSY_12: its owner alone reads it


@pytest.fixture(scope="module", autouse=True)
def _made_once() -> Iterator[None]:
    """Have libtpms make one new TPM, and not one for each test, as that takes its time."""
    new = libtpms.make(VERSION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libtpms, "make", lambda *_: new)
        yield


def permanent(state: bytes) -> Node:
    """Return a permanent state, taken apart."""
    decoded = decode(state, StateType.PERMANENT, VERSION)
    found = decoded.root.find("permanent-all")
    assert found is not None and not decoded.faults
    return found


def altered(state: bytes, content: bytes, *path: str) -> bytes:
    """Return a state in which a part is another one."""
    node = permanent(state).find(*path)
    assert node is not None
    return states.with_checksum(state[: node.offset] + content + state[node.offset + node.length :])


def replaced(state: bytes) -> tuple[Node, tuple[Item, ...]]:
    """Return a new TPM's permanent state, taken apart, and what became of the old one's things."""
    new, items = replace("a state", VERSION, {StateType.PERMANENT: state})
    return permanent(new[StateType.PERMANENT]), items


def fates(state: bytes) -> dict[tuple[Kind, str | None], Fate]:
    return {(each.kind, each.handle): each.fate for each in replaced(state)[1]}


def test_a_person_is_told_line_by_line(run: Command, tmp_path: Path) -> None:
    into = tmp_path / "into"
    out = write_export(tmp_path / "out", states.BUSY_12, VERSION)
    first, *lines = run("import", out, into, "--identity", "replace").lines
    assert first == (
        f"{into}: made a new TPM 1.2, with what it can have of generation 7 of the exported one"
    )
    for line in (
        "kept: NV index 0x00011101, 32 bytes: with its content",
        "kept: monotonic counter 0x00000000, label 6f6e652e: with its value; it counts on once "
        "there is an owner",
        "kept: flags of the platform, physicalPresenceCMDEnable: the same ones are set",
        "lost: NV index 0x00011103, 16 bytes: the owner's authorisation guards it, and is not kept",
        "lost: NV index 0x1000f000, 1000 bytes: it belongs to the old endorsement key",
        "lost: other flags, readPubek: they are a new TPM's",
        "lost: the storage root key, RSA 2048: the TPM makes a new one with its next owner",
        "lost: the owner: there is none now: take ownership again",
    ):
        assert line in lines
    (sealed,) = [line for line in lines if "BitLocker" in line and "recovery key" in line]
    assert sealed.startswith("lost: data sealed by the old TPM: will not unseal")
    (key,) = [line for line in lines if line.startswith("lost: key 0x")]
    assert key.endswith(", RSA 2048: it belongs to the old storage root key")
    assert [line.partition(":")[0] for line in lines] == sorted(
        (line.partition(":")[0] for line in lines), key=[*Fate].index
    )


def test_a_program_is_told_the_same(run: Command, tmp_path: Path) -> None:
    others = (StateType.VOLATILE, StateType.SAVESTATE)
    out = write_export(tmp_path / "out", states.BUSY_12, VERSION, *others)
    into = tmp_path / "into"
    said = run("import", out, into, "--identity", "replace", "--json").outcome
    documented = tables((DOCS / "export-format.md").read_text())
    assert {row["key"].strip("`") for row in documented["Keys of an import"]} == set(said)
    (of_each,) = {tuple(each) for each in said["contents"]}
    assert [row["key"].strip("`") for row in documented["Keys of a thing"]] == list(of_each)
    assert (said["tpm"], said["becomes"], said["epoch"]) == ("1.2", 1, 0)
    assert said["left-out"] == ["volatile", "savestate"]
    files = {path.name for path in into.iterdir()}
    assert files == {".lock", "tpm-00.permall", "tpm-00.owner"}


def test_nothing_is_overwritten_without_force(run: Command, tmp_path: Path) -> None:
    into = tmp_path / "into"
    out = write_export(tmp_path / "out", states.BUSY_12, VERSION)
    assert run("import", out, into, "--identity", "copy").status == 0
    before = {path.name: path.read_bytes() for path in into.iterdir()}
    assert run("import", out, into, "--identity", "replace").status == 10
    assert {path.name: path.read_bytes() for path in into.iterdir()} == before
    said = run("import", out, into, "--identity", "replace", "--force", "--json").outcome
    assert said["originals"] == {"tpm-00.permall": "tpm-00.permall.before-1"}
    kept = (into / "tpm-00.permall.before-1").read_bytes()
    assert kept == before["tpm-00.permall"] != (into / "tpm-00.permall").read_bytes()


def test_each_part_of_the_permanent_data_has_a_fate() -> None:
    """It is kept, or a secret of the new TPM, or told of where it differs."""
    parts = permanent(states.BUSY_12).find("permanent-data")
    assert parts is not None
    told = [name for _, names in SETTINGS_12.values() for name in names]
    assert sorted([*KEPT, *SECRETS, *told]) == sorted(
        each.name for each in parts.children if each.name != "tag"
    )


def like_a_new_one() -> bytes:
    """Return the state of a TPM that knows nothing but what a new one does; its key is another."""
    state = libtpms.make(VERSION)
    modulus = permanent(state).find("permanent-data", "endorsement-key", "public-key")
    assert modulus is not None
    return flipped(state, modulus)


def flipped(state: bytes, part: Node) -> bytes:
    """Return a state in which the last bit of a part is another one."""
    at = part.offset + part.length - 1
    return states.with_checksum(state[:at] + bytes([state[at] ^ 1]) + state[at + 1 :])


def told_of_settings(state: bytes) -> set[Kind]:
    return {each.kind for each in replaced(state)[1]} & set(SETTINGS_12)


MAINTENANCE = SETTINGS_12[Kind.MAINTENANCE_KEY][1]
TOLD = [(kind, name) for kind, (_, names) in SETTINGS_12.items() for name in names]


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, name in TOLD if name not in MAINTENANCE[:2]]
)
def test_what_a_new_tpm_does_not_know_is_told_where_it_differs(kind: Kind, name: str) -> None:
    old = like_a_new_one()
    part = permanent(old).find("permanent-data", name)
    assert part is not None
    assert told_of_settings(old) == set()
    assert told_of_settings(flipped(old, part)) == {kind}


def test_a_key_of_maintenance_is_told_of() -> None:
    """No command of libtpms' loads one; a state has one, or not."""
    old = like_a_new_one()
    has_one, key = (permanent(old).find("permanent-data", name) for name in MAINTENANCE[:2])
    assert has_one is not None and key is not None and has_one.value is True
    without = states.with_checksum(old[: has_one.offset] + b"\0" + old[key.offset + key.length :])
    assert told_of_settings(without) == {Kind.MAINTENANCE_KEY}


def test_the_flags_of_the_platform_are_as_documented() -> None:
    rows = tables((DOCS / "export-format.md").read_text())["What becomes of what"]
    (what,) = [row["what"] for row in rows if row["kind"] == "`platform-flags`"]
    assert set(what.replace("`", "").split(", ")) == PLATFORM_FLAGS
    assert set(PERMANENT_FLAGS.values()) >= PLATFORM_FLAGS


@pytest.mark.parametrize(("bit", "name"), PERMANENT_FLAGS.items())
def test_each_flag_is_kept_or_told_of(bit: int, name: str) -> None:
    """Those of the platform are kept, set or not; the others are a new TPM's."""
    before = permanent(states.BUSY_12).number("permanent-flags", "flags") or 0
    other = (before ^ 1 << bit).to_bytes(4, "big")
    ours = permanent(libtpms.make(VERSION)).number("permanent-flags", "flags") or 0
    new, items = replaced(altered(states.BUSY_12, other, "permanent-flags", "flags"))
    flags = new.number("permanent-flags", "flags") or 0
    (kept,) = [each.what for each in items if each.kind is Kind.PLATFORM_FLAGS]
    lost = [each.what for each in items if each.kind is Kind.OTHER_FLAGS]
    is_set = not before >> bit & 1
    if name in PLATFORM_FLAGS:
        assert (flags >> bit & 1, name in kept.split()) == (is_set, is_set)
    else:
        assert flags >> bit & 1 == ours >> bit & 1
        differs = is_set != ours >> bit & 1
        assert any(name in each.split() for each in lost) is differs


def test_nv_memory_is_in_the_format_that_the_old_state_has() -> None:
    """In the first one each index has digests of PCRs that it does not ask for."""
    nv = permanent(states.BUSY_12).find("nv")
    assert nv is not None
    old, at = b"", nv.offset
    for node in nv.walk():
        end = node.offset + node.length
        if node.type == "TPM_PCR_INFO_SHORT" and node.find("digest-at-release") is None:
            old += states.BUSY_12[at:end] + bytes(DIGEST_BYTES)
            at = end
    first = (NV_WITHOUT_UNUSED_DIGESTS - 1).to_bytes(2, "big")
    body = states.BUSY_12[: nv.offset] + old + states.BUSY_12[at:]
    body = states.with_checksum(body[: nv.offset] + first + body[nv.offset + len(first) :])
    assert libtpms.ask(VERSION, states={StateType.PERMANENT: body}).refusal is None
    new, items = replaced(body)
    assert [each.line for each in items] == [each.line for each in replaced(states.BUSY_12)[1]]
    assert new.number("nv", "tag") == NV_WITHOUT_UNUSED_DIGESTS - 1
    assert new.number("nv", "count") == 3
    assert new.content("nv", "0x00011101", "data") == b"x" * 32


def test_an_index_that_the_owner_reads_is_kept_where_nothing_guards_it() -> None:
    """There is no owner, or his authorisation is the well-known one."""
    assert fates(states.BUSY_12)[Kind.OWNER_GUARDED, GUARDED] is Fate.LOST
    known = altered(states.BUSY_12, bytes(DIGEST_BYTES), "permanent-data", "owner-auth")
    assert fates(known)[Kind.ORDINARY, GUARDED] is Fate.KEPT


def test_a_tpm_without_a_key_of_its_own_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (NEW, states.BUSY_12):  # it has none; it has the old one's
        monkeypatch.setattr(libtpms, "make", lambda *_, state=wrong: state)
        with pytest.raises(VtpmdError, match="libtpms has made a TPM without an endorsement key"):
            replaced(states.BUSY_12)


def test_an_altered_state_ends_with_a_new_tpm_or_a_line() -> None:
    """Whatever is altered, with a checksum that is right, the secrets are libtpms' own."""
    random = Random(12)
    data = permanent(states.BUSY_12).find("permanent-data")
    assert data is not None
    secret = data.content("endorsement-key", "private", "private-key")
    outcomes = set()
    for _ in range(ALTERED):
        other = bytearray(states.BUSY_12)
        other[random.randrange(len(other) - DIGEST_BYTES)] = random.randrange(256)
        try:
            new = replace(
                "a state", VERSION, {StateType.PERMANENT: states.with_checksum(bytes(other))}
            )
        except VtpmdError as error:
            assert re.match("cannot (replace|ask|make)", str(error)) and "\n" not in str(error)
            outcomes.add(False)
        else:
            assert secret not in new.states[StateType.PERMANENT]
            outcomes.add(True)
    assert outcomes == {True, False}
