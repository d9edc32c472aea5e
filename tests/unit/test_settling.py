"""What a vtpmd that attaches finds, and does first: the tables, row by row (invariants 3 and 11).

`tests/sim` plays the crashes that lead to them; here is what must hold of every row.
"""

import itertools

import pytest

from vtpmd.core.link import LinkCondition, LinkCustody
from vtpmd.daemon.settling import COME, OWN, Come, File, Own, come, own
from vtpmd.store.owner import Outcome, Record, Session, Whose

A, G, F, R, S, P = LinkCustody
OFF = [(False, each) for each in (A, G, F)]
ON = [(True, each) for each in LinkCustody]
ENGINES = OFF + ON
ON_APPROVAL = {Come.DECLINE, Come.ADOPT, Come.GIVE_BACK}


def condition(is_on: bool) -> LinkCondition:
    return LinkCondition.ON if is_on else LinkCondition(0)


def record(whose: Whose, outcome: Outcome = Outcome.SENT) -> Record:
    if whose is Whose.OURS:
        return Record()
    line = Session("0" * 32, outcome, "b:1", "")
    return Record(whose, line.session, "", 0, (line,))


def test_no_row_is_of_an_engine_that_there_is_not() -> None:
    """Off, nothing is held, nor asked back."""
    assert {(is_on, custody) for _, is_on, custody in COME} <= set(ENGINES)
    assert {(is_on, custody) for _, _, is_on, custody in OWN} <= set(ENGINES)


@pytest.mark.parametrize(("is_on", "custody"), ENGINES)
def test_what_is_on_its_way_in_is_never_left(is_on: bool, custody: LinkCustody) -> None:
    """Not granted, it is declined, given back or, where the engine has seen the Grant, adopted."""
    ways = {file: come(file, condition(is_on), custody) for file in File}
    assert ways[File.OPEN] in ON_APPROVAL
    assert ways[File.GRANTED] not in (Come.NOTHING, Come.DECLINE, Come.REMOVE, Come.LET_GO)
    assert (ways[File.OPEN] is Come.ADOPT) == (custody is P)
    assert ways[File.NONE] is (Come.LET_GO if custody in (S, P) else Come.NOTHING)
    assert ways[File.OVER] in (Come.LET_GO, Come.REMOVE)


def test_a_vtpm_that_is_fenced_is_served_only_if_the_record_says_ours() -> None:
    """Whoever may have it is asked first: the Grant may have been sent."""
    for (is_on, custody), whose, outcome in itertools.product(
        ENGINES, Whose, (Outcome.SENT, Outcome.RELEASED)
    ):
        if whose is Whose.OFFERED and outcome is not Outcome.SENT:
            continue
        how = own(record(whose, outcome), condition(is_on), custody)
        if custody in (F, R):
            assert (how is Own.UNRETIRE) == (whose is Whose.OURS)
            assert how not in (Own.WITHDRAW, Own.ARRIVE, Own.NOTHING)
        if custody is R and outcome is Outcome.SENT and whose is not Whose.OURS:
            assert how is Own.RECLAIM


@pytest.mark.parametrize("custody", [A, G])
@pytest.mark.parametrize("is_on", [False, True])
def test_a_vtpm_that_is_not_fenced_was_not_granted(is_on: bool, custody: LinkCustody) -> None:
    """Its engine retires before the Grant; and starts again only what QEMU has brought."""
    found = {whose: own(record(whose), condition(is_on), custody) for whose in Whose}
    assert found == {
        Whose.OURS: Own.NOTHING,
        Whose.OFFERED: Own.WITHDRAW,
        Whose.MOVED: Own.ARRIVE,
    }


def test_a_vtpm_that_was_given_back_stays_off() -> None:
    given_back = record(Whose.MOVED, Outcome.RELEASED)
    assert own(given_back, condition(False), F) is Own.STAY
    assert own(given_back, condition(True), F) is Own.STOP
