"""The host's comparison of what a guest found: it must see each difference, and no other."""

import pytest

from vtpmd.testing.facts import Facts, differences

BEFORE: Facts = {
    "pcr_seal": "aa",
    "pcr_chain": "bb",
    "nv": "cc",
    "counter": "5",
    "signing_key": "dd",
    "signature": "ee",
    "extends": "7",
    "session_uses": "9",
    "clock_ms": "1000",
}
IDLE: Facts = BEFORE | {"signature": "ff", "session_uses": "10", "clock_ms": "1001"}
WORKED: Facts = IDLE | {"pcr_chain": "bc", "nv": "cd", "counter": "6", "extends": "8"}


def test_what_may_change_is_no_difference() -> None:
    """A check makes a signature, uses the session and reads the clock; work changes more."""
    assert differences(BEFORE, IDLE, worked=False) == []
    assert differences(BEFORE, WORKED, worked=True) == []


@pytest.mark.parametrize("name", ["pcr_seal", "pcr_chain", "nv", "counter", "signing_key"])
def test_changed_fact_of_an_idle_guest_is_a_difference(name: str) -> None:
    """Nothing but the check happened in between."""
    (line,) = differences(BEFORE, IDLE | {name: "0"}, worked=False)
    assert line.startswith(name)


@pytest.mark.parametrize("name", ["pcr_seal", "signing_key", "extends", "counter", "clock_ms"])
def test_changed_or_lost_fact_of_a_guest_at_work_is_a_difference(name: str) -> None:
    """What the load leaves alone is the same, and what it counts does not go back."""
    (line,) = differences(BEFORE, WORKED | {name: "0"}, worked=True)
    assert line.startswith(name)


def test_fact_that_is_missing_is_a_difference() -> None:
    """A check that does not get to a fact must not pass for it."""
    after = {name: value for name, value in IDLE.items() if name != "nv"}
    assert differences(BEFORE, after, worked=False) == ["nv: cc before, None after"]
