"""The owner record's offer, which is handed out to be written by somebody else meanwhile.

Invariant 3: until that is over whose the vTPM is does not change, whatever else the record is to
say by then; and what is written late, into a file that was replaced, changes nothing.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.file_names import OWNER_NAME
from tests.support.owner import write, write_offer
from vtpmd.store.directory import StateDirectory, StateDirectoryError
from vtpmd.store.in_place import InPlace
from vtpmd.store.owner import OwnerRecord, OwnerRecordError, Record, Whose, parse

OUT, IN, NEW = b"o" * 16, b"i" * 16, b"n" * 16
TO, SENDER = "host2:4433", "host0.example.org"

Act = Callable[[OwnerRecord], object]
# What may be written meanwhile: it says nothing of whose the vTPM is.
BESIDE: dict[str, Act] = {
    "a peer begins a session": lambda record: record.expect(NEW, SENDER),
    "a peer's is declined": lambda record: record.decline(IN),
}
# What may not.
CHANGES: dict[str, Act] = {
    "withdraw": lambda record: record.withdraw(OUT),
    "confirm": lambda record: record.confirm(OUT),
    "release": lambda record: record.release(OUT),
    "take": lambda record: record.take(IN, 0),
    "give back": lambda record: record.give_back(IN),
    "arrive": lambda record: record.arrive(),
    "claim": lambda record: record.claim(),
    "reserve": lambda record: record.reserve(NEW, TO, 0),
}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StateDirectory]:
    with StateDirectory.open(tmp_path / "state") as directory:
        yield directory


@pytest.fixture
def record(directory: StateDirectory) -> OwnerRecord:
    """Return a record of this host's vTPM, with one session each way."""
    record = OwnerRecord(directory, InPlace(directory), now=lambda: "then")
    record.expect(IN, SENDER)
    record.reserve(OUT, TO, 0)
    return record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / OWNER_NAME


def on_disk(path: Path) -> Record:
    return parse(path.read_bytes(), path.name)


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("is_late", [False, True])
def test_invariant_3_what_is_written_beside_an_offer_says_offered_too(
    record: OwnerRecord, path: Path, beside: Act, *, is_late: bool
) -> None:
    """Before the engine's disk is done with it, or after."""
    with record.offering(OUT) as sector:
        assert sector is not None
        if not is_late:
            write(sector)
        beside(record)
        assert on_disk(path) == record.read()
        assert record.read().whose is Whose.OFFERED
        if is_late:
            write(sector)
    record.end_offering(is_durable=True)
    assert on_disk(path) == record.read()
    assert record.is_offered(OUT)
    record.withdraw(OUT)
    assert on_disk(path) == record.read()
    assert record.read().whose is Whose.OURS


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_invariant_3_whose_it_is_does_not_change_while_it_is_written(
    record: OwnerRecord, path: Path, change: Act
) -> None:
    """The engine may grant the vTPM as soon as the disk has it."""
    with record.offering(OUT) as sector:
        assert sector is not None
        with pytest.raises(OwnerRecordError):
            change(record)
        record.expect(NEW, SENDER)  # as what was written anew
        with pytest.raises(OwnerRecordError):
            change(record)
        write(sector)
        with pytest.raises(OwnerRecordError):
            change(record)
    record.end_offering(is_durable=True)
    assert on_disk(path).whose is Whose.OFFERED
    assert on_disk(path) == record.read()


@pytest.mark.parametrize("change", ["withdraw", "arrive", "take", "claim", "confirm"])
def test_once_it_is_written_it_does(record: OwnerRecord, path: Path, change: str) -> None:
    write_offer(record, OUT)
    CHANGES[change](record)
    assert on_disk(path) == record.read()
    assert record.read().whose is not Whose.OFFERED


@pytest.mark.parametrize("has_reached_the_disk", [False, True])
def test_invariant_3_offer_that_failed_is_ours_and_written_down_so_next(
    record: OwnerRecord, path: Path, *, has_reached_the_disk: bool
) -> None:
    before = record.read()
    with record.offering(OUT) as sector:
        assert sector is not None
        if has_reached_the_disk:
            write(sector)
    record.end_offering(is_durable=False)
    assert record.read() == before
    assert not record.is_offered(OUT)
    record.withdraw(OUT)
    assert on_disk(path) == before


def test_it_is_handed_out_once(record: OwnerRecord) -> None:
    with record.offering(OUT) as sector:
        assert sector is not None
        assert not record.is_offered(OUT)
        with record.offering(OUT) as another:
            assert another is None
        write(sector)
    record.end_offering(is_durable=True)
    with record.offering(OUT) as another:
        assert another is None


def test_one_of_another_session_is_refused_meanwhile(record: OwnerRecord) -> None:
    with record.offering(OUT), pytest.raises(OwnerRecordError), record.offering(NEW):
        pass


def test_file_that_is_gone_is_made_again(record: OwnerRecord, path: Path) -> None:
    path.unlink()
    with pytest.raises(StateDirectoryError, match="cannot update"), record.offering(OUT):
        pass
    assert record.read().whose is Whose.OURS
    write_offer(record, OUT)
    assert on_disk(path) == record.read()
    assert on_disk(path).whose is Whose.OFFERED


def full(*_: object) -> None:
    """Be a disk that takes nothing more."""
    raise StateDirectoryError("cannot update: no space")


def test_invariant_3_what_could_not_be_written_beside_it_is_written_next(
    record: OwnerRecord, directory: StateDirectory, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with record.offering(OUT) as sector:
        assert sector is not None
        with monkeypatch.context() as patch:
            patch.setattr(directory, "replace", full)
            with pytest.raises(StateDirectoryError):
                record.expect(NEW, SENDER)
        write(sector)
    record.end_offering(is_durable=True)
    assert not record.is_offered(OUT)  # what the failed one has left is not known
    record.expect(NEW, SENDER)
    assert on_disk(path) == record.read()
    assert record.is_offered(OUT)
