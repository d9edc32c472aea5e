"""Whole hand-overs, with the project's own daemons, on hosts, disks and links that fail by a seed.

Each schedule moves a guest between two hosts one to three times, with up to four faults, and then
has everything heal. Invariants 3, 10 and 13 are looked at after each step: one host executes at
most, on a state that has every acknowledged command, is of the same lineage, and goes with the
guest's memory; generations only grow; Released is for ever; no daemon makes a mistake of its own.
After the healing the guest runs at one host, without an operator's word, and starts nowhere else.

``VTPMD_SEED=n`` runs that schedule alone; a failed test prints its transcript, and the seed is kept
in ``corpus/seeds.txt``. ``python -m tests.sim n`` prints the transcript of any.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import pytest

from tests.sim.canaries import CANARIES, Canary
from tests.sim.run import simulate
from vtpmd.migration import destination, source, states
from vtpmd.migration.states import TABLE, Event, State

SCHEDULES: Final = 10_000
CHUNK: Final = 500
CORPUS: Final = Path(__file__).parent / "corpus" / "seeds.txt"


def corpus() -> list[int]:
    """Return the seeds that found something once."""
    lines = CORPUS.read_text().splitlines()
    return [int(line.split()[0]) for line in lines if line and not line.startswith("#")]


def check(seed: int) -> None:
    """Run a schedule; one that fails is shown and kept."""
    outcome = simulate(seed)
    if outcome.violation is None:
        return
    if seed not in corpus():
        with CORPUS.open("a") as file:
            file.write(f"{seed} {outcome.violation}\n")
    pytest.fail(f"{outcome}\nrepeat it with VTPMD_SEED={seed}", pytrace=False)


def chunks() -> list[range]:
    """Return the seeds, in parts that processes can share."""
    one = os.environ.get("VTPMD_SEED")
    if one is not None:
        return [range(int(one), int(one) + 1)]
    return [range(first, first + CHUNK) for first in range(0, SCHEDULES, CHUNK)]


@pytest.mark.parametrize("seeds", chunks(), ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_invariant_3_one_owner_whatever_fails(seeds: range) -> None:
    for seed in seeds:
        check(seed)


@pytest.mark.parametrize("seed", corpus())
def test_seed_that_found_something_once(seed: int) -> None:
    check(seed)


def test_seed_repeats_its_schedule() -> None:
    for seed in (3, 10, 358):
        assert simulate(seed).transcript == simulate(seed).transcript


def test_schedules_come_to_most_rows_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulator that goes nowhere finds nothing."""
    taken: set[tuple[State, Event]] = set()

    def remember(state: State, event: Event) -> State:
        taken.add((state, event))
        return states.advance(state, event)

    monkeypatch.setattr(source, "advance", remember)
    monkeypatch.setattr(destination, "advance", remember)
    executed = [simulate(seed).executed for seed in range(300)]
    assert min(executed) > 0
    assert len(taken & set(TABLE)) > 0.6 * len(TABLE)


# Why a session may not hand over where no disk, link or process fails: people do not wait for it
# to be armed, or for the other host to be there; or migrate, and resume, as they like.
REASONS: Final = re.compile(
    "QEMU brings whole blobs|has not said that a stream comes in|before the destination held a base"
    "|the destination has let go of it|the guest runs here again|cannot connect to|vtpmd stops"
    "|the (link|lane) to the destination|no lane to the destination"
    # Somebody boots a guest there, which an operator may.
    "|a guest uses the TPM there already|QEMU starts the TPM without the tail"
)


def test_sessions_hand_over_where_nothing_fails() -> None:
    """A state that comes is one that the TPM starts from, wherever that has been before."""
    nothing = Canary(lambda _: None, (lambda _: None,))
    transcripts = [line for seed in range(200) for line in simulate(seed, nothing).transcript]
    assert sum("VTPM_HANDED_OVER" in line for line in transcripts) > 200
    reasons = [line for line in transcripts if "'reason'" in line]
    assert [line for line in reasons if not REASONS.search(line)] == []


def test_exports_change_nothing() -> None:
    """Whatever fails: a session misses nothing, and each export has what was acknowledged."""
    exporting = Canary(lambda _: None, exports=True)
    exports = 0
    for seed in range(500):
        outcome = simulate(seed, exporting)
        if outcome.violation is not None:
            pytest.fail(str(outcome), pytrace=False)
        exports += outcome.exports
    assert exports > 10_000


TOLD: Final = re.compile(r" ([abc]): VTPM_(ARMED|FALL_BACK|GO_ON|HANDED_OVER)")


def test_session_that_is_armed_holds_a_base_whenever_qemu_asks() -> None:
    """Also while something of it is under way: it falls back for no reason that is not true."""
    nothing = Canary(lambda _: None, (lambda _: None,))
    for seed in range(200):
        armed = set()
        for line in simulate(seed, nothing).transcript:
            if (told := TOLD.search(line)) is None:
                continue
            host, event = told.groups()
            assert host not in armed or "before the destination held a base" not in line, seed
            if event == "ARMED":
                armed.add(host)
            else:
                armed.discard(host)


def find(canary: Canary) -> str:
    """Return what the first schedule that finds a canary says of it."""
    for seed in canary.seeds:
        violation = simulate(seed, canary).violation
        if violation is not None:
            return violation
    pytest.fail(f"none of {len(canary.seeds)} schedules has found it", pytrace=False)


@pytest.mark.timeout(900)  # up to three minutes by itself
@pytest.mark.parametrize("name", [name for name, each in CANARIES.items() if not each.numbers])
def test_invariant_3_canary_is_found(name: str) -> None:
    assert find(CANARIES[name])


@pytest.mark.timeout(900)  # up to three minutes by itself
@pytest.mark.parametrize("name", [name for name, each in CANARIES.items() if each.numbers])
def test_invariant_10_canary_is_found(name: str) -> None:
    assert "is used again" in find(CANARIES[name])
