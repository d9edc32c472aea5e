"""The record of who has the lock: its bytes, its table, and what is none. Invariants 3 and 8."""

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.documents import DOCS, tables
from vtpmd.store import holder
from vtpmd.store.directory import (
    LOCK_BYTES_MAX,
    LOCK_NAME,
    StateDirectory,
    StateDirectoryInUse,
    lock_file,
)
from vtpmd.store.holder import TABLE, Asked, Do, Found, Holder, Place
from vtpmd.store.moving import MovingFiles

ROOT = Path(__file__).resolve().parents[2]
TEXT = (DOCS / "state-format.md").read_text()
HERE = holder.here()
BOOT, MACHINE = "0" * 8 + "-0000-0000-0000-" + "0" * 12, "f" * 32
MINE = holder.this_process()
OTHER = MINE._replace(place=Place(BOOT, MACHINE, HERE.namespace, "web2"), pid=7)


def ended() -> Holder:
    """Return the record of a process that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return MINE._replace(pid=child.pid, started=1)


def in_file(path: Path, found: Found) -> bytes:
    """Return bytes of which that is found."""
    place = MINE.place
    records = {
        Found.FREE: OTHER._replace(is_held=False),
        Found.OVER: ended(),
        Found.LIVES: MINE._replace(pid=os.getppid(), started=start_of(os.getppid())),
        Found.ELSEWHERE: OTHER,
    }
    assert place == HERE
    path.mkdir()
    if found is Found.NOTHING:
        return b""
    return b"none of ours" if found is Found.DAMAGED else holder.encode(records[found])


def start_of(pid: int) -> int:
    started = holder._start_time(pid)
    assert started is not None
    return started


@pytest.mark.parametrize(
    ("found", "is_locked", "asked"), list(itertools.product(Found, (True, False), Asked))
)
def test_invariant_3_every_row_of_the_table(
    tmp_path: Path, found: Found, is_locked: bool, asked: Asked
) -> None:
    """As StateDirectory.open() has it; what is refused is left as it was."""
    content = in_file(tmp_path / "state", found)
    lock = tmp_path / "state" / LOCK_NAME
    lock.write_bytes(content)
    claims = asked is Asked.CLAIM
    other = None if is_locked else StateDirectory.open(tmp_path / "state", lock=False)
    if other is not None:
        lock_file("it", other.lock_fd)
    assert holder.find(content)[0] is found
    if TABLE[found, is_locked, asked] is Do.REFUSE:
        with pytest.raises(StateDirectoryInUse):
            StateDirectory.open(tmp_path / "state", claims=claims)
        assert lock.read_bytes() == content
    else:
        with StateDirectory.open(tmp_path / "state", claims=claims):
            # What is over is said to be that; the rest is whoever has asked to change it.
            now = holder.find(lock.read_bytes())[0]
            assert now is (Found.FREE if found is Found.OVER else found)
    if other is not None:
        other.close()


def test_table_is_whole_and_as_it_is_written() -> None:
    assert set(TABLE) == set(itertools.product(Found, (True, False), Asked))
    assert {TABLE[found, False, asked] for found in Found for asked in Asked} == {Do.REFUSE}
    rows = re.findall(r"^\| `([A-Z]+)` \| (\w+) \| (\w+) \| (\w+) \|$", TEXT, re.MULTILINE)
    assert [Found[name] for name, *_ in rows] == list(Found)
    for name, start, claim, _ in rows:
        assert TABLE[Found[name], True, Asked.START].value == start
        assert TABLE[Found[name], True, Asked.CLAIM].value == claim
    meanings = re.findall(r"^\| `([A-Z]+)` \| [^|]+ \|$", TEXT, re.MULTILINE)
    assert [Found[name] for name in meanings] == list(Found)


def test_bytes_are_as_they_are_written() -> None:
    """In the document, in Python and in C."""
    rows = [(int(row["Offset"]), int(row["Size"])) for row in tables(TEXT)["Record of a lock"]]
    ends = [at + length for at, length in rows]
    content = holder.encode(OTHER)
    assert ends[-1] == len(content) == LOCK_BYTES_MAX
    assert [at for at, _ in rows[1:]] == [end + 1 for end in ends[:-1]]
    assert {content[end : end + 1] for end in ends[:-1]} == {b"\n"}
    fields = [content[at : at + length].decode() for at, length in rows]
    place = OTHER.place
    assert fields[:4] == ["vtpmlock1", "held", place.boot, place.machine]
    assert [int(field) for field in fields[4:7]] == [place.namespace, OTHER.pid, OTHER.started]
    assert [field.rstrip() for field in fields[7:]] == [OTHER.since, place.host, ""]
    header = (ROOT / "csrc" / "engine" / "holder.h").read_text()
    in_c = [int(n) for n in re.findall(r"HOLDER_AT_\w+ = (\d+)", header)]
    assert in_c == [at for at, _ in rows[1:-1]]
    lengths = [int(n) for n in re.findall(r"HOLDER_[A-Z]+_BYTES = (\d+)", header)]
    assert lengths == [length for _, length in rows[1:-1]]


def test_record_is_read_as_it_was_written() -> None:
    for record in (MINE, OTHER, OTHER._replace(is_held=False)):
        assert holder.decode(holder.encode(record)) == record


def test_invariant_8_what_is_no_record_is_none() -> None:
    """Every length, and every byte of another kind."""
    content = holder.encode(OTHER)
    for length in range(LOCK_BYTES_MAX):
        with pytest.raises(ValueError, match="length"):
            holder.decode(content[:length])
    with pytest.raises(ValueError, match="length"):
        holder.decode(content + b" ")
    for at, byte in itertools.product(range(LOCK_BYTES_MAX), (0, 0x0A, 0xFF)):
        changed = content[:at] + bytes([byte]) + content[at + 1 :]
        found, named = holder.find(changed)
        assert found in (Found.DAMAGED, Found.ELSEWHERE)
        assert changed == content or named is None or "\n" not in holder.describe(named)


THERE = Place(HERE.boot, "e" * 32, HERE.namespace, "web1")


@pytest.mark.parametrize(
    ("place", "found"),
    [
        (THERE._replace(namespace=THERE.namespace + 1), Found.ELSEWHERE),
        (THERE._replace(boot=BOOT), Found.OVER),
        (THERE._replace(boot=BOOT, host="web2"), Found.ELSEWHERE),
        (THERE._replace(boot=BOOT, machine=MACHINE), Found.ELSEWHERE),
        (THERE._replace(boot=BOOT, machine="-" * 32), Found.ELSEWHERE),
    ],
)
def test_where_a_record_is_from(place: Place, found: Found) -> None:
    """A machine that was started again is the same one, if that can be told."""
    content = holder.encode(MINE._replace(place=place))
    assert holder.find(content, THERE)[0] is found
    nameless = THERE._replace(machine=place.machine)
    if "-" in place.machine:
        assert holder.find(content, nameless)[0] is Found.ELSEWHERE


def test_number_that_another_process_has_got_since_is_not_the_process() -> None:
    parent = os.getppid()
    assert holder.find(holder.encode(MINE._replace(pid=parent, started=1)))[0] is Found.OVER


def test_claim_of_a_lock_is_remembered_and_nothing_else_changes(tmp_path: Path) -> None:
    with StateDirectory.open(tmp_path / "state") as directory:
        owner = MovingFiles(directory).owner
        fork = owner.claim_lock("host web2, process 7")
        assert (fork.session, fork.peer) == ("", "host web2, process 7")
        assert owner.read().forks == (fork,)
        assert owner.read().is_ours
    with StateDirectory.open(tmp_path / "state") as directory:
        assert MovingFiles(directory).owner.read().forks == (fork,)
