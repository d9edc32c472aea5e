"""The owner record's writing by another thread, beside what the event loop does with it.

Invariant 3: what is written is what the table makes of the record as it is then.
"""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.file_names import OWNER_NAME
from vtpmd.store.directory import StateDirectory
from vtpmd.store.in_place import InPlace
from vtpmd.store.owner import OwnerRecord, OwnerRecordError, Whose

OUT, IN, NEW = b"o" * 16, b"i" * 16, b"n" * 16
TO, SENDER = "host2:4433", "host0.example.org"
A_MOMENT_S = 0.05
TIMEOUT_S = 20.0

BETWEEN: dict[str, Callable[[OwnerRecord], object]] = {
    "nothing": lambda _: None,
    "another session is begun": lambda record: record.reserve(NEW, TO, 0),
    "a peer begins one": lambda record: record.expect(NEW, SENDER),
    "a peer's is declined": lambda record: record.decline(IN),
    "a peer's vTPM is taken": lambda record: record.take(IN, 0),
    "a peer's vTPM is given back": lambda record: record.give_back(IN),
    "it is offered": lambda record: record.offer(OUT),
}


def begun(path: Path, directory: StateDirectory, in_place: InPlace | None = None) -> OwnerRecord:
    """Return a record of this host's vTPM, with one session each way."""
    record = OwnerRecord(directory, in_place or InPlace(directory), now=lambda: "then")
    record.expect(IN, SENDER)
    record.reserve(OUT, TO, 0)
    assert (path / OWNER_NAME).exists()
    return record


def after(write: Callable[[], None], path: Path) -> tuple[bool, bytes]:
    """Return whether it was refused, and what the disk says then."""
    refused = False
    try:
        write()
    except OwnerRecordError:
        refused = True
    return refused, (path / OWNER_NAME).read_bytes()


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_invariant_3_offer_that_was_made_ready_is_as_one_that_is_made_now(
    tmp_path: Path, between: Callable[[OwnerRecord], object]
) -> None:
    seen = []
    for is_ready in (True, False):
        path = tmp_path / str(is_ready)
        with StateDirectory.open(path) as directory:
            record = begun(path, directory)
            ready = record.offering(OUT)
            between(record)
            seen.append(after(ready if is_ready else partial(record.offer, OUT), path))
    assert seen[0] == seen[1]


class Slow(InPlace):
    """A disk that takes its time."""

    def __init__(self, directory: StateDirectory) -> None:
        super().__init__(directory)
        self.begins, self.goes_on = threading.Event(), threading.Event()

    def overwrite(self, name: str, offset: int, content: bytes) -> None:
        self.begins.set()
        assert self.goes_on.wait(TIMEOUT_S)
        super().overwrite(name, offset, content)


def test_transition_waits_for_the_one_that_is_written(tmp_path: Path) -> None:
    """Else what is withdrawn would be written after that, and stay."""
    with StateDirectory.open(tmp_path / "state") as directory:
        disk = Slow(directory)
        record = begun(tmp_path / "state", directory, disk)
        offering = threading.Thread(target=record.offering(OUT))
        withdrawing = threading.Thread(target=record.withdraw, args=[OUT])
        offering.start()
        assert disk.begins.wait(TIMEOUT_S)
        withdrawing.start()
        withdrawing.join(A_MOMENT_S)
        assert withdrawing.is_alive()
        disk.goes_on.set()
        offering.join(TIMEOUT_S)
        withdrawing.join(TIMEOUT_S)
        again = OwnerRecord(directory, InPlace(directory))
        assert again.read().whose is record.read().whose is Whose.OURS
