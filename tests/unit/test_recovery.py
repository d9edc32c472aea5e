"""What a directory's files make, in every row of the recovery table, and what can be salvaged.

Invariant 2: what was once whole and is now wrong is refused, with its place, and left as it is; an
older state is restored only when that is asked for, and the originals are kept.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import states
from tests.support.journal import SECTOR, digest, write_journal
from vtpmd.store import recovery, salvage
from vtpmd.store.anchor import Found
from vtpmd.store.directory import StateDirectory, StateDirectoryError, StateKeyError
from vtpmd.store.keys import INFO_JOURNAL, Key
from vtpmd.store.recovery import RecoveryRefused
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType

KEY = b"k" * 32
*IMAGES, OLDER = states.different(6)  # a sector a change
JOURNAL, PERMANENT = "tpm2-00.journal", "tpm2-00.permall"


class Fixture(NamedTuple):
    """A state directory, with or without a key."""

    directory: StateDirectory
    key: Key | None

    @property
    def secret(self) -> bytes | None:
        return None if self.key is None else self.key.derive(INFO_JOURNAL)

    def put(self, checkpoint: bytes | None, journal: bytes | bytearray | None) -> None:
        """Write the files of a permanent state."""
        if checkpoint is not None:
            self.directory.write_state(StateType.PERMANENT, checkpoint, self.key)
        if journal is not None:
            self.directory.replace(JOURNAL, bytes(journal))

    def files(self) -> dict[str, bytes]:
        """Return what is there."""
        return {
            path.name: path.read_bytes()
            for path in Path(self.directory.path).iterdir()
            if path.name != ".lock"
        }

    def permanent(self) -> bytes | None:
        return self.directory.read_state(StateType.PERMANENT, self.key)


@pytest.fixture(params=[None, KEY], ids=["in the clear", "sealed"])
def at_rest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fixture]:
    key = None if request.param is None else Key(bytearray(request.param))
    with StateDirectory.open(tmp_path / "state") as directory:
        yield Fixture(directory, key)


@pytest.mark.parametrize("version", [1, 2])
def test_a_whole_journal_is_applied_and_folded(at_rest: Fixture, version: int) -> None:
    at_rest.put(IMAGES[0], write_journal(IMAGES, secret=at_rest.secret, version=version))
    examined = recovery.recover(at_rest.directory, at_rest.key)
    assert examined.permanent == IMAGES[-1]
    assert examined.found == Found(None, digest(IMAGES[-1]), 5)
    assert "AAAA" not in repr(examined) and "EEEE" not in repr(examined)
    recovery.fold(at_rest.directory, examined, at_rest.key)
    assert at_rest.files().keys() == {PERMANENT}
    assert at_rest.permanent() == IMAGES[-1]
    again = recovery.recover(at_rest.directory, at_rest.key)
    assert (again.permanent, again.has_journal) == (IMAGES[-1], False)
    assert again.found == Found(None, digest(IMAGES[-1]), None)


@pytest.mark.parametrize("reached", range(5))
def test_a_crash_in_folding_loses_nothing(at_rest: Fixture, reached: int) -> None:
    """The checkpoint may be any state of the journal's."""
    at_rest.put(IMAGES[reached], write_journal(IMAGES, secret=at_rest.secret))
    examined = recovery.recover(at_rest.directory, at_rest.key)
    assert examined.permanent == IMAGES[-1]
    assert examined.recovery.records == 4


def test_a_torn_tail_is_dropped(at_rest: Fixture) -> None:
    """Its commit was never acknowledged."""
    big = [IMAGES[0], IMAGES[1], bytes(range(256)) * 20]
    journal = write_journal(big, secret=at_rest.secret)
    last = len(bytes(journal).rstrip(b"\0")) // SECTOR
    journal[last * SECTOR : (last + 1) * SECTOR] = bytes(SECTOR)
    at_rest.put(IMAGES[0], journal)
    examined = recovery.recover(at_rest.directory, at_rest.key)
    assert examined.permanent == IMAGES[1]


def test_nothing_and_a_checkpoint_alone_are_what_they_are(at_rest: Fixture) -> None:
    examined = recovery.recover(at_rest.directory, at_rest.key)
    assert (examined.permanent, examined.found) == (None, Found(None, None, None))
    recovery.fold(at_rest.directory, examined, at_rest.key)
    at_rest.put(IMAGES[0], None)
    examined = recovery.recover(at_rest.directory, at_rest.key)
    assert examined.permanent == IMAGES[0]
    found = salvage.assess(at_rest.directory, at_rest.key)
    assert (found.problems, found.lost, found.set_aside) == ([], [], [])


def altered(offset: int) -> Callable[[bytearray], bytearray]:
    def alter(journal: bytearray) -> bytearray:
        journal[offset] ^= 1
        return journal

    return alter


def without_record(journal: bytearray) -> bytearray:
    """Remove the second of four."""
    del journal[2 * SECTOR : 3 * SECTOR]
    return journal + bytes(SECTOR)


# What is done to a journal of four records; letter, reason and place; the state up to there.
DAMAGE: dict[str, tuple[Callable[[bytearray], bytearray], str, str, int | None]] = {
    "header": (altered(70), "E", "the header is altered, at byte 0", None),
    "magic": (altered(0), "E", "it is no journal, at byte 0", None),
    "cut": (
        lambda j: j[:5000],
        "E",
        "the file's length is not what its header says, or past a limit, at byte 0",
        None,
    ),
    "sector": (altered(3 * SECTOR + 100), "K", f"a sector is altered, at byte {3 * SECTOR}", 2),
    "first sector": (altered(SECTOR + 5), "K", f"a sector is altered, at byte {SECTOR}", 0),
    "missing record": (without_record, "K", f"missing or moved, at byte {2 * SECTOR}", 1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_invariant_2_damage_is_refused_named_and_salvaged(at_rest: Fixture, name: str) -> None:
    damage, letter, reason, reached = DAMAGE[name]
    at_rest.put(IMAGES[0], damage(write_journal(IMAGES, secret=at_rest.secret)))
    before = at_rest.files()
    with pytest.raises(RecoveryRefused) as caught:
        recovery.recover(at_rest.directory, at_rest.key)
    text = str(caught.value)
    assert caught.value.exit_status == 5
    assert reason in text
    assert f"({letter})" in text
    assert f"vtpmd recover {at_rest.directory.path}" in text
    assert "\n" not in text

    found = salvage.assess(at_rest.directory, at_rest.key)
    assert reason in found.problems[0]
    assert found.image == IMAGES[reached or 0]
    assert at_rest.files() == before

    kept = salvage.restore(at_rest.directory, found, at_rest.key)
    assert kept == {PERMANENT: f"{PERMANENT}.damaged-1", JOURNAL: f"{JOURNAL}.damaged-1"}
    after = at_rest.files()
    assert {kept[file]: content for file, content in before.items()}.items() <= after.items()
    assert after.keys() == {PERMANENT, *kept.values()}
    examined = recovery.recover(at_rest.directory, at_rest.key)
    assert examined.permanent == IMAGES[reached or 0]


def test_an_older_checkpoint_under_a_newer_journal_is_refused(at_rest: Fixture) -> None:
    at_rest.put(OLDER, write_journal(IMAGES, secret=at_rest.secret))
    with pytest.raises(RecoveryRefused, match=r"that is older than the journal.*\(L\)"):
        recovery.recover(at_rest.directory, at_rest.key)
    found = salvage.assess(at_rest.directory, at_rest.key)
    assert found.image == OLDER
    assert "all 2560 bytes that were written to it" in found.lost[0]


@pytest.mark.parametrize(("copied", "age"), [(0, "older"), (4, "newer")])
def test_a_copy_of_two_moments_is_called_that(at_rest: Fixture, copied: int, age: str) -> None:
    """File by file, of a vTPM that was served: what the one is to the other is told as it is."""
    lineage = Lineage(b"i" * 16, 10 + copied, continued=True)
    at_rest.directory.write_state(StateType.PERMANENT, IMAGES[copied], at_rest.key, lineage)
    journal = write_journal(
        IMAGES[1:4], identity=lineage.identity, first_generation=11, secret=at_rest.secret
    )
    at_rest.put(None, journal)
    with pytest.raises(RecoveryRefused) as caught:
        recovery.recover(at_rest.directory, at_rest.key)
    words = f"continues generation 11, and {PERMANENT} is {age}, of generation {10 + copied}: as in"
    assert words in str(caught.value)
    (problem,) = salvage.assess(at_rest.directory, at_rest.key).problems
    assert words in problem


def test_a_journal_without_its_checkpoint_is_refused_and_nothing_is_made(at_rest: Fixture) -> None:
    """Never a fresh TPM."""
    at_rest.put(None, write_journal(IMAGES, secret=at_rest.secret))
    with pytest.raises(RecoveryRefused, match=r"a checkpoint that is missing, .*\(D\)"):
        recovery.recover(at_rest.directory, at_rest.key)
    found = salvage.assess(at_rest.directory, at_rest.key)
    assert not found.can_restore
    with pytest.raises(ValueError, match="nothing to restore"):
        salvage.restore(at_rest.directory, found, at_rest.key)


def test_a_later_versions_journal_is_left_to_it(at_rest: Fixture) -> None:
    at_rest.put(IMAGES[0], write_journal(IMAGES, secret=at_rest.secret, version=3))
    with pytest.raises(RecoveryRefused, match="of a later version: update vtpmd"):
        recovery.recover(at_rest.directory, at_rest.key)
    assert not salvage.assess(at_rest.directory, at_rest.key).can_restore


@pytest.mark.parametrize("secret", [None, b"x" * 32])
def test_a_journal_that_does_not_go_with_the_key_is_refused(
    at_rest: Fixture, secret: bytes | None
) -> None:
    """Sealed with another key, or not at all; salvaging would give up what the right key opens."""
    if at_rest.key is None and secret is None:
        return
    at_rest.put(IMAGES[0], write_journal(IMAGES, secret=secret))
    for attempt in (recovery.recover, salvage.assess):
        with pytest.raises(StateKeyError) as caught:
            attempt(at_rest.directory, at_rest.key)
        assert caught.value.exit_status == 4


def test_a_damaged_volatile_state_is_given_up_alone(at_rest: Fixture) -> None:
    at_rest.put(IMAGES[0], write_journal(IMAGES, secret=at_rest.secret))
    at_rest.directory.write_state(StateType.VOLATILE, b"volatile", at_rest.key)
    file = Path(at_rest.directory.path) / "tpm2-00.volatilestate"
    content = bytearray(file.read_bytes())
    content[7 if at_rest.key is None else 30] ^= 1
    file.write_bytes(content)
    with pytest.raises(StateDirectoryError):
        recovery.recover(at_rest.directory, at_rest.key)
    found = salvage.assess(at_rest.directory, at_rest.key)
    assert found.set_aside == ["tpm2-00.volatilestate"]
    salvage.restore(at_rest.directory, found, at_rest.key)
    examined = recovery.recover(at_rest.directory, at_rest.key)
    assert examined.permanent == IMAGES[-1]


def test_an_older_permanent_state_is_not_resumed_with_a_newer_volatile_one(
    at_rest: Fixture,
) -> None:
    journal = write_journal(IMAGES, secret=at_rest.secret)
    at_rest.put(IMAGES[0], altered(2 * SECTOR + 50)(journal))
    at_rest.directory.write_state(StateType.VOLATILE, b"volatile", at_rest.key)
    found = salvage.assess(at_rest.directory, at_rest.key)
    assert set(found.set_aside) == {"tpm2-00.volatilestate", JOURNAL}
    salvage.restore(at_rest.directory, found, at_rest.key)
    assert at_rest.directory.read_states(at_rest.key) == {StateType.PERMANENT: IMAGES[1]}


def test_originals_never_take_each_others_names(at_rest: Fixture) -> None:
    for number in (1, 2, 3):
        journal = write_journal(IMAGES, secret=at_rest.secret)
        at_rest.put(IMAGES[0], altered(SECTOR + 50)(journal))
        found = salvage.assess(at_rest.directory, at_rest.key)
        kept = salvage.restore(at_rest.directory, found, at_rest.key)
        assert kept[JOURNAL] == f"{JOURNAL}.damaged-{number}"
    assert len(at_rest.files()) == 1 + 2 * 3


def test_a_damaged_checkpoint_can_be_salvaged_from_nothing(tmp_path: Path) -> None:
    with StateDirectory.open(tmp_path / "state") as directory:
        (Path(directory.path) / PERMANENT).write_bytes(swtpm_format.encode_file(IMAGES[0])[:-1])
        found = salvage.assess(directory, None)
    assert not found.can_restore
    assert "its header says" in found.problems[0]


def test_a_lineage_is_kept_and_believed(at_rest: Fixture) -> None:
    """Identity and generation go through folding; another vTPM's journal is refused."""
    ours, other = b"o" * 16, b"x" * 16
    lineage = Lineage(ours, 3, continued=True)
    journal = write_journal(IMAGES, secret=at_rest.secret, identity=ours, first_generation=3)
    at_rest.directory.write_state(StateType.PERMANENT, IMAGES[0], at_rest.key, lineage)
    at_rest.put(None, journal)
    examined = recovery.recover(at_rest.directory, at_rest.key)
    assert (examined.identity, examined.generation) == (ours, 7)
    recovery.fold(at_rest.directory, examined, at_rest.key)
    assert at_rest.directory.read_lineage() == Lineage(ours, 7)
    at_rest.directory.write_state(StateType.PERMANENT, IMAGES[1], at_rest.key)
    assert at_rest.directory.read_lineage() == Lineage(ours, 7)

    at_rest.put(None, write_journal(IMAGES[1:], secret=at_rest.secret, identity=other))
    with pytest.raises(RecoveryRefused, match=r"is another vTPM's \(G\)"):
        recovery.recover(at_rest.directory, at_rest.key)


def test_a_journal_that_is_gone_is_missed(at_rest: Fixture) -> None:
    """The checkpoint says that there was one; restoring it leaves the numbers of what was lost."""
    ours = b"o" * 16
    lineage = Lineage(ours, 3, continued=True)
    at_rest.directory.write_state(StateType.PERMANENT, IMAGES[0], at_rest.key, lineage)
    with pytest.raises(RecoveryRefused, match=r"is missing: .* \(C\)"):
        recovery.recover(at_rest.directory, at_rest.key)
    found = salvage.assess(at_rest.directory, at_rest.key)
    assert found.image == IMAGES[0]
    assert found.lost == ["tpm2-00.journal: all commits since the checkpoint"]
    salvage.restore(at_rest.directory, found, at_rest.key)
    assert at_rest.directory.read_lineage() == Lineage(ours, 3 + salvage.LOST_COMMITS_MAX)
    assert recovery.recover(at_rest.directory, at_rest.key).permanent == IMAGES[0]
