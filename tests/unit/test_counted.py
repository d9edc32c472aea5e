"""What is counted is written as a person does, whatever the count is."""

import pytest

from tests.support.page import Page
from tests.unit.test_inspect_html import MADE, MIX, known_of
from vtpmd.counted import counted, grouped
from vtpmd.inspect.history import Commit
from vtpmd.inspect.html.state import state_page
from vtpmd.inspect.screen import journal_words, lockout_words


@pytest.mark.parametrize(
    ("count", "says"), [(0, "0 bytes"), (1, "1 byte"), (2, "2 bytes"), (1000, "1000 bytes")]
)
def test_one_of_a_thing_is_no_plural(count: int, says: str) -> None:
    assert counted(count, "byte") == says
    assert grouped(count, "byte") == says.replace("1000", "1,000")


def test_what_adds_no_s_is_said_as_it_is() -> None:
    assert [counted(n, "pass", "passes") for n in (1, 2)] == ["1 pass", "2 passes"]


def test_one_commit_is_one_on_the_screen_and_on_a_page() -> None:
    assert journal_words(1) == "1 commit since the checkpoint"
    history = [Commit(7, None, True, None, 0, 5000, None), Commit(8, 1, False, 512, 512, 5000, [])]
    known = known_of(MIX) | {"journal-commits": 1}
    text = Page(state_page(known, history, MADE)).text
    assert text.count("1 commit since the checkpoint") == 2
    assert "generation 8" in text and "generations" not in text


def test_one_try_that_failed_is_one() -> None:
    lockout = known_of(MIX)["lockout"]
    says = [lockout_words(lockout | {"failed-tries": n, "tries-max": 32}) for n in (0, 1, 2)]
    assert [each.partition(": ")[2].partition(";")[0].partition(",")[0] for each in says] == [
        *("0 of 32 tries have failed", "1 of 32 tries has failed", "2 of 32 tries have failed")
    ]
