"""The owner record: each transition, possible or not, and what any failure of the disk leaves.

Invariants 3 (never two owners: nothing but the table's transitions makes the vTPM this host's) and
10 (every generation number only grows).
"""

import errno
import json
import os
from collections.abc import Callable, Iterator
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest

from tests.support.file_names import OWNER_NAME
from tests.support.owner import write_offer
from vtpmd.errors import VtpmdError
from vtpmd.store import owner
from vtpmd.store.directory import StateDirectory, StateDirectoryError
from vtpmd.store.in_place import InPlace
from vtpmd.store.owner import (
    FORKS_MAX,
    GENERATION_MAX,
    GENERATIONS_RESERVED,
    SECTOR_BYTES,
    SESSIONS_MAX,
    TABLE,
    TEXT_LENGTH_MAX,
    Fork,
    Outcome,
    OwnerRecord,
    OwnerRecordError,
    Record,
    Session,
    Transition,
    Whose,
)

OUT, IN, NEW = b"o" * 16, b"i" * 16, b"n" * 16
TO, SENDER = "host2:4433", "host0.example.org"

Act = Callable[[OwnerRecord], object]
ACTS: dict[Transition, Act] = {
    Transition.RESERVE: lambda record: record.reserve(NEW, TO, 0),
    Transition.OFFER: lambda record: write_offer(record, OUT),
    Transition.WITHDRAW: lambda record: record.withdraw(OUT),
    Transition.CONFIRM: lambda record: record.confirm(OUT),
    Transition.RELEASE: lambda record: record.release(OUT),
    Transition.EXPECT: lambda record: record.expect(NEW, SENDER),
    Transition.DECLINE: lambda record: record.decline(IN),
    Transition.TAKE: lambda record: record.take(IN, 0),
    Transition.GIVE_BACK: lambda record: record.give_back(IN),
    Transition.ARRIVE: lambda record: record.arrive(),
    Transition.CLAIM: lambda record: record.claim(),
    Transition.CLAIM_LOCK: lambda record: record.claim_lock("host web2, process 7"),
    Transition.RESTORE: lambda record: record.restore(b"e" * 16, "an export", 7),
    Transition.REPLACE: lambda record: record.replace(1),
}
OF_SESSION: dict[Transition, Callable[[OwnerRecord, bytes], object]] = {
    Transition.OFFER: write_offer,
    Transition.CONFIRM: OwnerRecord.confirm,
    Transition.RELEASE: OwnerRecord.release,
}
# Asked for whenever a session ends, so it is no mistake where there is nothing to withdraw.
NOTHING_TO_DO = {(Whose.MOVED, Transition.WITHDRAW)}
CASES = list(product(Whose, Transition))
POSSIBLE = [case for case in CASES if case in TABLE]
IN_PLACE = (Transition.OFFER, Transition.WITHDRAW, Transition.CONFIRM, Transition.RELEASE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def directory(path: Path) -> Iterator[StateDirectory]:
    with StateDirectory.open(path) as directory:
        yield directory


@pytest.fixture
def in_place(directory: StateDirectory) -> Iterator[InPlace]:
    in_place = InPlace(directory)
    yield in_place
    in_place.close()


@pytest.fixture
def record(directory: StateDirectory, in_place: InPlace) -> OwnerRecord:
    return OwnerRecord(directory, in_place)


@pytest.fixture
def again(directory: StateDirectory, in_place: InPlace) -> Callable[[], OwnerRecord]:
    """Read the record as another start of vtpmd does."""
    return lambda: OwnerRecord(directory, in_place)


Again = Callable[[], OwnerRecord]


def bring(record: OwnerRecord, whose: Whose) -> None:
    """Bring a new record to a state; one session each way has begun."""
    record.expect(IN, SENDER)
    record.reserve(OUT, TO, 0)
    if whose is not Whose.OURS:
        write_offer(record, OUT)
    if whose is Whose.MOVED:
        record.confirm(OUT)


def outcome(record: OwnerRecord, session: bytes) -> Outcome | None:
    line = record.read().find(session.hex())
    return None if line is None else line.outcome


def test_without_a_file_it_is_ours(record: OwnerRecord, path: Path) -> None:
    assert record.read() == Record(Whose.OURS)
    assert not (path / OWNER_NAME).exists()


@pytest.mark.parametrize(("whose", "transition"), CASES)
def test_invariant_3_nothing_but_the_table_changes_whose_it_is(
    record: OwnerRecord, again: Again, path: Path, whose: Whose, transition: Transition
) -> None:
    """What is not possible raises, and writes nothing."""
    bring(record, whose)
    before = (path / OWNER_NAME).read_bytes()
    if (whose, transition) in TABLE:
        ACTS[transition](record)
        assert record.read().whose is TABLE[whose, transition]
        assert again().read() == record.read()
        return
    if (whose, transition) in NOTHING_TO_DO:
        ACTS[transition](record)
    else:
        with pytest.raises(OwnerRecordError, match=f"says {whose}"):
            ACTS[transition](record)
    assert (path / OWNER_NAME).read_bytes() == before
    assert record.read().whose is whose


@pytest.mark.parametrize(("whose", "transition"), POSSIBLE)
def test_session_and_time_go_with_whose_it_is(
    directory: StateDirectory, in_place: InPlace, whose: Whose, transition: Transition
) -> None:
    times = map(str, count())
    record = OwnerRecord(directory, in_place, now=lambda: next(times))
    bring(record, whose)
    before = record.read()
    ACTS[transition](record)
    after = record.read()
    changed = (before.whose, before.session) != (after.whose, after.session)
    assert (after.since != before.since) == changed
    sessions = {Whose.OURS: [""], Whose.OFFERED: [OUT.hex()], Whose.MOVED: [OUT.hex(), IN.hex()]}
    assert after.session in sessions[after.whose]
    assert after.peer == {"": "", OUT.hex(): TO, IN.hex(): SENDER}[after.session]


@pytest.mark.parametrize("transition", [Transition.CONFIRM, Transition.RELEASE, Transition.OFFER])
@pytest.mark.parametrize("whose", [Whose.OFFERED, Whose.MOVED])
def test_another_session_changes_nothing(
    record: OwnerRecord, path: Path, whose: Whose, transition: Transition
) -> None:
    bring(record, whose)
    before = (path / OWNER_NAME).read_bytes()
    for session in (IN, NEW):
        with pytest.raises(OwnerRecordError):
            OF_SESSION[transition](record, session)
        record.withdraw(session)
    assert (path / OWNER_NAME).read_bytes() == before


def test_only_a_session_that_was_begun_here_is_offered(record: OwnerRecord) -> None:
    """Not one of a peer's, and none of a name that there was before."""
    bring(record, Whose.OURS)
    for session in (IN, NEW):
        with pytest.raises(OwnerRecordError, match="was not begun"):
            write_offer(record, session)
    for session in (IN, OUT):
        with pytest.raises(OwnerRecordError, match="of that name before"):
            record.reserve(session, TO, 0)
        with pytest.raises(OwnerRecordError, match="of that name before"):
            record.expect(session, SENDER)


ENDS: dict[Outcome, Act] = {
    Outcome.DECLINED: ACTS[Transition.DECLINE],
    Outcome.TAKEN: ACTS[Transition.TAKE],
    Outcome.RELEASED: ACTS[Transition.GIVE_BACK],
}
MAY_FOLLOW = {
    (Outcome.TAKEN, Outcome.RELEASED),
    *((outcome, outcome) for outcome in ENDS),
}


@pytest.mark.parametrize(("first", "second"), list(product(ENDS, ENDS)))
def test_outcome_is_not_changed_by_what_cannot_follow_it(
    record: OwnerRecord, path: Path, first: Outcome, second: Outcome
) -> None:
    """Such as settling after a release: the peer has been told that it may run."""
    record.expect(IN, SENDER)
    ENDS[first](record)
    before = (path / OWNER_NAME).read_bytes()
    if (first, second) in MAY_FOLLOW:
        ENDS[second](record)
        assert outcome(record, IN) is second
        return
    with pytest.raises(OwnerRecordError, match=f"was {first} before: it cannot be {second}"):
        ENDS[second](record)
    assert (path / OWNER_NAME).read_bytes() == before


@pytest.mark.parametrize("end", [ACTS[Transition.TAKE], ACTS[Transition.GIVE_BACK]])
@pytest.mark.parametrize("whose", [Whose.OFFERED, Whose.MOVED])
def test_invariant_3_what_was_taken_and_has_left_is_neither_taken_nor_given_back(
    record: OwnerRecord, path: Path, whose: Whose, end: Act
) -> None:
    """A third host may run it: a late settling or a late Reclaim is no word of that one."""
    record.expect(IN, SENDER)
    record.take(IN, 0)
    record.reserve(OUT, TO, 0)
    write_offer(record, OUT)
    if whose is Whose.MOVED:
        record.confirm(OUT)
    before = (path / OWNER_NAME).read_bytes()
    with pytest.raises(OwnerRecordError, match="has left since"):
        end(record)
    assert (path / OWNER_NAME).read_bytes() == before


def test_ours_cannot_be_ended_as_a_peers(record: OwnerRecord) -> None:
    bring(record, Whose.MOVED)
    for end in (record.decline, record.give_back, lambda session: record.take(session, 0)):
        with pytest.raises(OwnerRecordError, match="the session was sent before"):
            end(OUT)


def test_session_that_was_not_expected_is_remembered_all_the_same(record: OwnerRecord) -> None:
    """What a crash has left is all that is known of it."""
    record.decline(IN)
    assert outcome(record, IN) is Outcome.DECLINED
    record.take(NEW, 0)
    assert outcome(record, NEW) is Outcome.TAKEN


def test_invariant_10_no_generation_is_given_twice(record: OwnerRecord, again: Again) -> None:
    """Not in another session, not after a move and back, not below another host's."""
    assert record.reserve(OUT, TO, 7) == 7
    write_offer(record, OUT)
    record.confirm(OUT)
    record.release(OUT)
    second = again().reserve(NEW, TO, 0)
    assert second == 7 + GENERATIONS_RESERVED
    third = again().take(IN, second + 5)
    assert third == second + GENERATIONS_RESERVED
    assert again().reserve(b"m" * 16, TO, 1 << 60) == 1 << 60


def test_generations_that_are_used_up(record: OwnerRecord, again: Again, path: Path) -> None:
    """A peer may say any number: what it gave is here all the same, and the record is readable."""
    assert record.take(IN, GENERATION_MAX) == GENERATION_MAX
    assert again().read().generation == GENERATION_MAX
    before = (path / OWNER_NAME).read_bytes()
    with pytest.raises(OwnerRecordError, match="used up"):
        record.reserve(OUT, TO, 0)
    assert (path / OWNER_NAME).read_bytes() == before


def name(number: int) -> bytes:
    return number.to_bytes(16)


@pytest.mark.parametrize("begin", ["expect", "reserve"])
def test_the_session_that_counts_is_never_forgotten(
    record: OwnerRecord, again: Again, begin: str
) -> None:
    """Where the vTPM is, is still known after any number of others."""
    bring(record, Whose.MOVED)
    if begin == "reserve":
        record.release(OUT)
        record.expect(NEW, SENDER)
        record.give_back(NEW)
        record.claim()
    for number in range(2 * SESSIONS_MAX):
        if begin == "expect":
            record.expect(name(number), f"peer{number}")
            record.decline(name(number))
            assert again().read().peer == TO
        else:
            record.reserve(name(number), f"host{number}:4433", 0)
    known = again().read()
    assert len(known.sessions) == SESSIONS_MAX
    kept = [name(number).hex() for number in range(SESSIONS_MAX + 1, 2 * SESSIONS_MAX)]
    assert [line.session for line in known.sessions][1:] == kept
    assert known.forks == record.read().forks
    if begin == "expect":
        record.release(OUT)
        assert record.read().whose is Whose.OURS


def test_peer_that_begins_sessions_without_end_has_its_own_forgotten(record: OwnerRecord) -> None:
    """Others still ask what became of theirs."""
    record.expect(IN, SENDER)
    record.decline(IN)
    for number in range(2 * SESSIONS_MAX):
        record.expect(name(number), "talker.example.org")
    known = record.read()
    assert len(known.sessions) == SESSIONS_MAX
    line = known.find(IN.hex())
    assert line is not None and line.outcome is Outcome.DECLINED


def test_claim_is_never_forgotten(record: OwnerRecord, again: Again, path: Path) -> None:
    bring(record, Whose.MOVED)
    fork = record.claim()
    assert (fork.session, fork.peer) == (OUT.hex(), TO)
    assert record.read().whose is Whose.OURS
    for act in (ACTS[each] for each in (Transition.TAKE, Transition.RESERVE)):
        act(record)
        assert again().read().forks == (fork,)
    for number in range(1, owner.FORKS_MAX):
        record.reserve(name(number), TO, 0)
        write_offer(record, name(number))
        record.claim()
    assert len(again().read().forks) == owner.FORKS_MAX
    record.reserve(name(0), TO, 0)
    write_offer(record, name(0))
    before = (path / OWNER_NAME).read_bytes()
    with pytest.raises(OwnerRecordError, match="claimed 64 times"):
        record.claim()
    assert (path / OWNER_NAME).read_bytes() == before


# The file.


@pytest.mark.parametrize(("whose", "transition"), POSSIBLE)
def test_a_write_in_place_touches_the_first_sector_only(
    record: OwnerRecord, again: Again, path: Path, whose: Whose, transition: Transition
) -> None:
    """And it is what the sessions' transitions do, with a guest that waits."""
    bring(record, whose)
    file = path / OWNER_NAME
    before, inode = file.read_bytes(), file.stat().st_ino
    ACTS[transition](record)
    after = file.read_bytes()
    assert after.index(b"\n") == SECTOR_BYTES - 1
    if transition in IN_PLACE:
        assert file.stat().st_ino == inode
        assert after[SECTOR_BYTES:] == before[SECTOR_BYTES:]
    assert again().read() == record.read()


def edited(content: bytes) -> bytes:
    """Return the file as an editor leaves it that takes away blanks at the ends of lines."""
    return b"\n".join(line.rstrip() for line in content.split(b"\n"))


@pytest.mark.parametrize("change", [edited, lambda content: content.replace(b": ", b":")])
@pytest.mark.parametrize(("whose", "transition"), POSSIBLE)
def test_a_file_that_a_person_has_edited_is_not_broken_by_the_next_write(
    record: OwnerRecord,
    again: Again,
    path: Path,
    change: Callable[[bytes], bytes],
    whose: Whose,
    transition: Transition,
) -> None:
    bring(record, whose)
    known = record.read()
    (path / OWNER_NAME).write_bytes(change((path / OWNER_NAME).read_bytes()))
    fresh = again()
    assert fresh.read() == known
    ACTS[transition](fresh)
    assert again().read() == fresh.read()


def test_record_is_json_for_people(record: OwnerRecord, path: Path) -> None:
    bring(record, Whose.OFFERED)
    record.claim()
    first, *rest = map(json.loads, (path / OWNER_NAME).read_text().splitlines())
    assert set(first) == {"version", *Record._fields[:4]}
    assert [line.keys() for line in rest[:-1]] == [dict.fromkeys(Session._fields).keys()] * 2
    assert rest[-1]["fork"].keys() == dict.fromkeys(Fork._fields).keys()


HOSTILE = [
    "",
    'quote" and \\ backslash',
    "bücher.example:4433",
    "line\nbreak",
    "line\x85break\u2028too\x1cand\r",
    "\x00\x1b[31mred",
    "half \ud800 a pair",
    "'" + "x" * TEXT_LENGTH_MAX,
    "x" * 1000,
    "\U0001f511" * 1000,
    "\n" * 1000,
]


@pytest.mark.parametrize("peer", HOSTILE)
def test_any_peers_name_leaves_a_file_that_can_be_read(
    record: OwnerRecord, again: Again, path: Path, peer: str
) -> None:
    record.expect(IN, peer)
    record.reserve(OUT, peer, 0)
    write_offer(record, OUT)
    record.claim()
    known = again().read()
    assert known == record.read()
    texts = [*(line.peer for line in known.sessions), *(fork.peer for fork in known.forks)]
    assert all(text.isprintable() and len(text) <= TEXT_LENGTH_MAX for text in texts)
    assert len((path / OWNER_NAME).read_bytes().splitlines()) == 4


def test_peers_whose_names_differ_stay_different() -> None:
    """Who may ask for a session's outcome is told by the name that began it."""
    names = [*HOSTILE, "x" * 1001, "x" * 999 + "y", "line\rbreak", "line?break"]
    assert len({owner.name_text(name) for name in names}) == len(names)
    assert owner.name_text("host1, '2001:db8::1'") == "host1, '2001:db8::1'"


def test_the_longest_record_can_be_read(record: OwnerRecord, again: Again, path: Path) -> None:
    """Every line that there may be, each as long as JSON can make it."""
    peer = "\U0001f511" * TEXT_LENGTH_MAX
    for number in range(owner.FORKS_MAX):
        record.reserve(name(number), peer, 0)
        write_offer(record, name(number))
        record.claim()
    assert (path / OWNER_NAME).stat().st_size <= owner.OWNER_BYTES_MAX
    assert again().read() == record.read()


# Each is one change to a good file, at its first line, a session's or a fork's.
GOOD_SESSION = {"session": OUT.hex(), "outcome": "sent", "peer": TO, "at": ""}
GOOD = {"version": 2, "whose": "offered", "session": OUT.hex(), "since": "", "generation": 7}
WRONG_FIRST: list[dict[str, Any]] = [
    {"version": 3},
    {"version": None},
    {"whose": "mine"},
    {"whose": "ours"},
    {"whose": []},
    {"session": ""},
    {"session": IN.hex()},
    {"session": 1},
    {"since": None},
    {"since": "x" * 301},
    {"since": "\n"},
    {"generation": -1},
    {"generation": True},
    {"generation": 1.0},
    {"generation": "1"},
    {"generation": 1 << 63},
]
WRONG_LINES: list[dict[str, Any]] = [
    {"outcome": "lost"},
    {"outcome": []},
    {"session": "../../x"},
    {"session": OUT.hex().upper()},
    {"session": OUT.hex() + "\n"},
    {"session": OUT.hex() + "00"},
    {"peer": "\x1b[31m"},
    {"peer": "x" * 301},
    {"peer": {}},
    {"at": 3},
]


def lines(*objects: object) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in objects).encode()


def test_the_good_file_is_one() -> None:
    fork = {"session": OUT.hex(), "peer": TO, "at": ""}
    record = owner.parse(lines(GOOD, GOOD_SESSION, {"fork": fork}), OWNER_NAME)
    assert record == Record(
        Whose.OFFERED,
        OUT.hex(),
        "",
        7,
        (Session(OUT.hex(), Outcome.SENT, TO, ""),),
        (Fork(OUT.hex(), TO, ""),),
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\n",
        b"\xff\xfe",
        b" " * 1000,
        b"[" * 5000,
        b"[" * 511,
        b"9" * 5000,
        *(lines(GOOD | wrong, GOOD_SESSION) for wrong in WRONG_FIRST),
        *(
            lines({key: value for key, value in GOOD.items() if key != left_out}, GOOD_SESSION)
            for left_out in GOOD
        ),
        *(
            lines(GOOD, GOOD_SESSION, GOOD_SESSION | {"session": "00" * 16} | w)
            for w in WRONG_LINES
        ),
        lines(GOOD),
        lines(GOOD, GOOD_SESSION, GOOD_SESSION),
        lines(GOOD, GOOD_SESSION, 1),
        lines(GOOD, GOOD_SESSION, "fork"),
        lines(GOOD, GOOD_SESSION, {"fork": 1}),
        lines(GOOD, GOOD_SESSION, {"fork": {"session": "", "peer": "\n", "at": ""}}),
        lines(GOOD, *(GOOD_SESSION | {"session": name(n).hex()} for n in range(65)), GOOD_SESSION),
        lines(GOOD, GOOD_SESSION, *[{"fork": {"session": "", "peer": "", "at": ""}}] * 65),
        lines(GOOD, GOOD_SESSION).ljust(owner.OWNER_BYTES_MAX + 1),
        lines({"version": 1, "generation": 1}),
        lines({"version": 1, "handed-over": None}),
        lines({"version": 1, "handed-over": None, "generation": -1}),
        lines({"version": 1, "handed-over": 1, "generation": 1}),
        lines({"version": 1, "handed-over": {"to": "x"}, "generation": 1}),
        lines({"version": 1, "handed-over": {"to": "\n", "at": ""}, "generation": 1}),
    ],
)
def test_what_cannot_be_read_is_an_error_and_stays(
    record: OwnerRecord, path: Path, content: bytes
) -> None:
    """Whose the vTPM is, is not known then: not ours by mistake, and nothing overwrites it."""
    (path / OWNER_NAME).write_bytes(content)
    with pytest.raises(OwnerRecordError, match="whose the vTPM is, is not known") as caught:
        record.read()
    assert "\n" not in str(caught.value)
    for act in ACTS.values():
        with pytest.raises(OwnerRecordError):
            act(record)
    assert (path / OWNER_NAME).read_bytes() == content


@pytest.mark.parametrize("length", range(0, 900, 7))
def test_a_record_that_was_cut_is_no_other_one(
    record: OwnerRecord, again: Again, path: Path, length: int
) -> None:
    """It may have lost what came last, but not whose the vTPM is."""
    bring(record, Whose.MOVED)
    content = (path / OWNER_NAME).read_bytes()
    (path / OWNER_NAME).write_bytes(content[:length])
    try:
        found = again().read()
    except OwnerRecordError:
        return
    assert (found.whose, found.session) == (Whose.MOVED, OUT.hex())


def first_version(handed_over: dict[str, str] | None) -> bytes:
    """Return the file as vtpmd 0.1 wrote it."""
    fields = {"version": 1, "handed-over": handed_over, "declined": "", "generation": 9}
    return (json.dumps(fields).ljust(SECTOR_BYTES - 1) + "\n").encode()


def test_version_1_is_read(record: OwnerRecord, again: Again, path: Path) -> None:
    """It knows no session, so there is nobody to ask; an operator may take it."""
    (path / OWNER_NAME).write_bytes(first_version({"to": TO, "at": "then"}))
    known = record.read()
    assert (known.whose, known.peer, known.since, known.generation) == (Whose.MOVED, TO, "then", 9)
    line = known.find(known.session)
    assert line is not None and line.outcome is not Outcome.SENT
    assert record.claim().peer == TO
    assert again().read() == record.read()
    assert again().read().generation == 9


@pytest.mark.parametrize("transition", [Transition.ARRIVE, Transition.TAKE, Transition.DECLINE])
def test_version_1_is_written_as_2(
    record: OwnerRecord, again: Again, path: Path, transition: Transition
) -> None:
    (path / OWNER_NAME).write_bytes(first_version({"to": TO, "at": "then"}))
    ACTS[transition](record)
    assert json.loads((path / OWNER_NAME).read_bytes().splitlines()[0])["version"] == 2
    assert again().read() == record.read()
    assert again().read().find("unknown") is not None


def test_version_1_that_says_ours(record: OwnerRecord, again: Again, path: Path) -> None:
    (path / OWNER_NAME).write_bytes(first_version(None))
    assert record.read() == Record(generation=9)
    assert record.reserve(OUT, TO, 0) == 9
    write_offer(record, OUT)
    assert again().read() == record.read()


# The disk.

CALLS = ("open", "unlink", "fsync", "rename", "pwrite", "fdatasync")


class FailingDisk:
    """Makes the n-th call that changes something on the disk fail, before or after it has acted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, acts: bool) -> None:
        self._acts = acts
        self.fails_at = 0
        self.n_calls = 0
        for call in CALLS:
            monkeypatch.setattr(os, call, self._failing(getattr(os, call)))

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.n_calls += 1
            fails = self.n_calls == self.fails_at
            if fails and not self._acts:
                raise OSError(errno.EIO, "Input/output error")
            result = call(*arguments, **options)
            if fails:
                raise OSError(errno.EIO, "Input/output error")
            return result

        return wrapped

    def fail_at(self, number: int) -> None:
        """Count anew; 0: nothing fails."""
        self.n_calls, self.fails_at = 0, number


@pytest.fixture(params=[False, True], ids=["fails before it acts", "fails after it has"])
def disk(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FailingDisk:
    return FailingDisk(monkeypatch, acts=request.param)


def without_times(record: Record) -> Record:
    sessions = tuple(line._replace(at="") for line in record.sessions)
    forks = tuple(fork._replace(at="") for fork in record.forks)
    return record._replace(since="", sessions=sessions, forks=forks)


@pytest.mark.parametrize(("whose", "transition"), POSSIBLE)
def test_failure_at_each_call_leaves_the_old_record_or_the_new_one(
    path: Path, disk: FailingDisk, whose: Whose, transition: Transition
) -> None:
    """And once the disk takes it, the same transition is made, and is what the disk says."""
    with StateDirectory.open(path) as directory:
        in_place = InPlace(directory)
        for number in count(1):
            directory.remove(OWNER_NAME)
            record = OwnerRecord(directory, in_place)
            bring(record, whose)
            old = record.read()
            disk.fail_at(number)
            has_failed = fails(ACTS[transition], record)
            was_reached = disk.n_calls >= number
            disk.fail_at(0)
            left = OwnerRecord(directory, in_place).read()
            if has_failed and record.read() == old:
                ACTS[transition](record)
            done = record.read()
            assert done.whose is TABLE[whose, transition]
            assert without_times(left) in map(without_times, (old, done))
            assert OwnerRecord(directory, in_place).read() == done
            if not was_reached:
                break
        in_place.close()
    assert number > 1 or (whose, transition) in NO_WRITES


def fails(act: Act, record: OwnerRecord) -> bool:
    """Return whether the disk's failure is told of, in one line."""
    try:
        act(record)
    except StateDirectoryError as error:
        assert "\n" not in str(error)
        return True
    return False


# What is so already.
NO_WRITES = {
    (Whose.OFFERED, Transition.OFFER),
    (Whose.OURS, Transition.WITHDRAW),
    (Whose.MOVED, Transition.CONFIRM),
    (Whose.OURS, Transition.ARRIVE),
}


@pytest.mark.parametrize("whose", [Whose.OFFERED, Whose.MOVED])
@pytest.mark.parametrize("transition", [Transition.RELEASE, Transition.CLAIM, Transition.TAKE])
def test_what_makes_it_ours_can_be_tried_again(
    record: OwnerRecord,
    monkeypatch: pytest.MonkeyPatch,
    whose: Whose,
    transition: Transition,
) -> None:
    """The peer says Released as often as it is asked: a disk that failed once is not the end."""
    bring(record, whose)
    disk = FailingDisk(monkeypatch, acts=True)
    number = 1  # the first call may be that there is nothing to remove
    while record.read().whose is not Whose.OURS:
        number += 1
        disk.fail_at(number)
        has_failed = fails(ACTS[transition], record)
        assert has_failed == (record.read().whose is not Whose.OURS)
    assert number > 2


def test_what_failed_to_be_written_is_not_taken_for_written(
    record: OwnerRecord, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file shows it, the disk may not have it: a crash would bring back what was before."""
    bring(record, Whose.OURS)
    disk = FailingDisk(monkeypatch, acts=True)
    disk.fail_at(2)  # the sync: what was written is in memory, and dropped when power is lost
    for _ in range(2):
        with pytest.raises(VtpmdError):
            write_offer(record, OUT)
        assert record.read().whose is Whose.OURS
        disk.fail_at(2)
    disk.fail_at(0)
    record.withdraw(OUT)
    assert disk.n_calls > 0
    assert json.loads((path / OWNER_NAME).read_bytes().splitlines()[0])["whose"] == "ours"


def test_a_file_that_was_removed_is_made_again(
    record: OwnerRecord, again: Again, path: Path
) -> None:
    """People remove it: a transition fails, or is durable, and never goes to a file of no name."""
    bring(record, Whose.OURS)
    (path / OWNER_NAME).unlink()
    with pytest.raises(StateDirectoryError, match="cannot update"):
        write_offer(record, OUT)
    write_offer(record, OUT)
    assert again().read() == record.read()
    assert again().read().whose is Whose.OFFERED


def test_of_imports_the_last_is_remembered(record: OwnerRecord, again: Again) -> None:
    """As it sets aside what was imported before; what was claimed is never forgotten."""
    record.claim_lock("host web2")
    for number in range(FORKS_MAX + 1):
        record.restore(bytes([number]) * 16, f"export {number}", number)
    claimed, imported = again().read().forks
    assert (claimed.peer, claimed.export) == ("host web2", "")
    assert (imported.peer, imported.export) == (f"export {FORKS_MAX}", f"{FORKS_MAX:02x}" * 16)
    assert again().read().generation == FORKS_MAX


def test_an_import_that_cannot_be_remembered_is_refused_before(
    record: OwnerRecord, again: Again
) -> None:
    for number in range(FORKS_MAX):
        record.check_restore()
        record.claim_lock(f"host {number}")
    for act in (record.check_restore, lambda: record.restore(b"e" * 16, "an export", 7)):
        with pytest.raises(OwnerRecordError):
            act()
    assert len(again().read().forks) == FORKS_MAX


def test_an_import_lowers_no_generation(record: OwnerRecord, again: Again) -> None:
    record.reserve(OUT, "host:1", 7)
    before = record.read().generation
    record.restore(b"e" * 16, "an export", 7)
    assert again().read().generation == before


def test_forks_of_before_there_were_exports_are_read(directory: StateDirectory) -> None:
    fork = {"fork": {"session": "", "peer": "host web2", "at": "2026-01-01T00:00:00Z"}}
    content = owner.encode(Record()) + json.dumps(fork).encode() + b"\n"
    directory.replace(OWNER_NAME, content)
    assert owner.look(directory).forks == (Fork("", "host web2", "2026-01-01T00:00:00Z"),)
