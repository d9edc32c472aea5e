"""`vtpmd owner` with real hosts: what another one answers, and what that does to the record.

Invariant 3 of the design: whoever asks gets to know whose the vTPM is, and no answer but Released
makes it this host's.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness.command import Ended, vtpmd
from tests.harness.fake_peer import FakeDestination
from tests.harness.lab import Lab
from tests.support.owner import write_offer
from vtpmd.store.directory import StateDirectory, look_into
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import OwnerRecord, Record, Whose, look
from vtpmd.testing.credentials import HOST, credentials
from vtpmd.testing.emulator import Emulator, Peering
from vtpmd.testing.waiting import wait_until
from vtpmd.wire import peer as messages

SESSION = b"s" * 16
Act = Callable[[OwnerRecord], object]


def write(state: Path, *acts: Act) -> Path:
    """Have a vtpmd do something to a directory's record, and end."""
    with StateDirectory.open(state) as directory:
        files = MovingFiles(directory)
        for act in acts:
            act(files.owner)
        files.close()
    return state


def read(state: Path) -> Record:
    with look_into(state) as directory:
        return look(directory)


def offered(lab: Lab, to: str) -> Path:
    """Return a directory whose vTPM was offered to another host."""
    return write(
        lab.new_path("source"),
        lambda record: record.reserve(SESSION, to, 0),
        lambda record: write_offer(record, SESSION),
    )


def peer(lab: Lab, *acts: Act) -> Emulator:
    """Start the host that is asked, on a directory where a session came to some end."""
    return lab.peer(state=write(lab.new_path("peer"), *acts))


def ask(state: Path, *options: str) -> Ended:
    return vtpmd("owner", state, "--ask", "--tls-creds", credentials(), *options)


def expect(record: OwnerRecord) -> None:
    record.expect(SESSION, HOST)


def decline(record: OwnerRecord) -> None:
    record.decline(SESSION)


def take(record: OwnerRecord) -> None:
    record.take(SESSION, 0)


@pytest.mark.parametrize("acts", [[expect], [expect, decline]], ids=["open", "declined"])
def test_released_makes_it_ours(lab: Lab, acts: list[Act]) -> None:
    """Not ended counts as not taken, once the vtpmd that it was with has ended."""
    other = peer(lab, *acts)
    state = offered(lab, other.address)
    ended = ask(state, "--allow", HOST)
    assert ended.status == 0, ended
    assert "the vTPM is this host's" in ended.output
    assert "answered: the other host has let go of it" in ended.output
    assert read(state).whose is Whose.OURS
    assert read(state).forks == ()
    assert vtpmd("owner", state).status == 0


def test_kept_makes_it_moved(lab: Lab) -> None:
    other = peer(lab, expect, take)
    state = offered(lab, other.address)
    for _ in range(2):
        ended = ask(state)
        assert ended.status == 7
        assert "answered: the other host has it: boot its guest there" in ended.output
        assert read(state).whose is Whose.MOVED
    assert vtpmd("owner", state, "--json").outcome["owner"] == "moved"


@pytest.mark.parametrize(
    ("acts", "reason"),
    [
        ([], f"does not know of the session {SESSION.hex()}"),
        ([lambda record: record.expect(SESSION, "third")], "only the one that began it may ask"),
    ],
)
def test_other_answers_change_nothing(lab: Lab, acts: list[Act], reason: str) -> None:
    other = peer(lab, *acts)
    state = offered(lab, other.address)
    before = read(state)
    ended = ask(state)
    assert (ended.status, ended.output) == (8, "")
    assert reason in ended.error
    assert read(state) == before


def test_nobody_there_changes_nothing(lab: Lab) -> None:
    """Nor somebody who is not allowed, nor an address that is none."""
    other = peer(lab, expect, decline)
    state = offered(lab, other.address)
    before = read(state)
    assert ask(state, "--allow", "third.example").status == 8
    address = other.address
    other.kill()
    assert ask(offered(lab, address)).status == 8
    for to in (f"{'x' * 300}:1", "a\nb:1", "[::1:2"):
        ended = ask(offered(lab, to))
        assert (ended.status, ended.output) == (8, ""), ended
    assert read(state) == before


def test_an_answer_about_another_session_is_none(lab: Lab) -> None:
    destination = FakeDestination(credentials())
    lab.close_at_end(destination)
    state = offered(lab, destination.address)
    before = read(state)
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(ask, state)
        stream = destination.accept()
        assert stream.receive(messages.Ask).session == SESSION
        stream.send(messages.Released(b"x" * 16))
        ended = asking.result()
    assert (ended.status, ended.output) == (8, "")
    assert "of another session" in ended.error
    assert read(state) == before


def test_a_running_vtpmd_is_left_to_ask_by_itself(lab: Lab) -> None:
    other = peer(lab, expect, decline)
    address = other.address
    other.kill()
    state = offered(lab, address)
    daemon = lab.peer(state=state)
    ended = ask(state)
    assert ended.status == 6
    assert "not asked: a vtpmd that runs on the directory asks by itself" in ended.output
    assert vtpmd("owner", state, "--claim").status == 3
    port = int(address.rpartition(":")[2])
    lab.peer(Peering(credentials=credentials(), port=port), other.state)
    wait_until(lambda: vtpmd("owner", state).status == 0)
    assert read(state).forks == ()
    assert daemon.stop() == 0


def test_possible_fork_is_shown_ever_after(lab: Lab) -> None:
    state = offered(lab, f"{HOST}:1")
    daemon = lab.peer(state=state)
    with_offer = lab.management(daemon).command("query-status")
    assert (with_offer["owner"], with_offer["possible-fork"]) == ("offered", [])
    assert daemon.stop() == 0

    assert vtpmd("owner", state, "--claim").status == 0
    (fork,) = read(state).forks
    for _ in range(2):
        daemon = lab.peer(state=state)
        status = lab.management(daemon).command("query-status")
        assert status["owner"] == "ours"
        assert status["possible-fork"] == [fork._asdict()]
        told = f"possible fork: the vTPM was claimed at {fork.at} without the word of {HOST}:1"
        daemon.program.wait_for_output(told)
        assert daemon.stop() == 0
    ended = vtpmd("owner", state)
    assert ended.status == 0
    assert "possible fork: claimed at" in ended.output
