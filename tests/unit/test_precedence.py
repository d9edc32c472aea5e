"""Who goes first while a guest stands still: what Linux is told, where that can be taken back."""

import os
import threading
from collections.abc import Callable

import pytest

from vtpmd.daemon.precedence import NICENESS, NICENESS_MAX, Precedence, may_take_back

NOBODY = 65534


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def in_thread(work: Callable[[], object]) -> object:
    """Return what a thread of its own comes to: what it does to itself ends with it."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def as_nobody(work: Callable[[], bool]) -> bool:
    """Return what a process of a user without any right comes to."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            status = int(work())
        finally:
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended) in (0, 1)
    return os.waitstatus_to_exitcode(ended) == 1


root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may go as before")


@root
@pytest.mark.parametrize("usual", [0, 5, NICENESS_MAX - 1])
def test_it_gives_way_and_takes_that_back(usual: int) -> None:
    def seen() -> list[int]:
        os.setpriority(os.PRIO_PROCESS, 0, usual)
        precedence = Precedence()
        found = [niceness()]
        for step in (precedence.give_way, precedence.give_way, precedence.take_back):
            step()
            found.append(niceness())
        return found

    low = min(usual + NICENESS, NICENESS_MAX)
    assert in_thread(seen) == [usual, low, low, usual]


@root
def test_other_threads_are_as_they_were() -> None:
    before = niceness()
    in_thread(lambda: Precedence().give_way())
    assert niceness() == before


def test_trying_it_changes_nothing() -> None:
    before = niceness()
    may_take_back()
    assert niceness() == before


@root
def test_who_could_not_take_it_back_does_not_give_way() -> None:
    def gives_way() -> bool:
        precedence = Precedence()
        before = niceness()
        precedence.give_way()
        return may_take_back() or niceness() != before

    assert not as_nobody(gives_way)
