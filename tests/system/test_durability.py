"""kill -9 of the engine, the daemon, and both, a thousand times, under a load of NV writes.

Invariants of the design that are checked: 1 (what was acknowledged is durable) and 2 (what comes up
after a crash is what was acknowledged last, at most with the one command in it whose answer did not
come). Clients of the two sockets stand for QEMU. A canary proves that a loss is found.

kill -9 leaves the page cache alone: what only a power failure loses is for test_disk_faults.
"""

from pathlib import Path
from random import Random

import pytest

from tests.harness import canary
from tests.harness.killing import Killing, Moment, Victims
from tests.harness.lab import Lab
from tests.harness.nv_load import WriteLostError
from vtpmd.testing.emulator import EmulatorKind

KILLS = 1000  # under load; in parts, of which each is a test of some ten seconds
PARTS = 5
KILLS_PER_PART = -(-KILLS // (PARTS * len(Victims)))
OTHER_MOMENTS = tuple(moment for moment in Moment if moment is not Moment.SERVING)
CANARY_KILLS_MAX = 20
KEY = bytes(range(32))


def key_options(lab: Lab) -> tuple[str, str]:
    """Return the option that gives either program a key."""
    path = lab.key_file(f"{KEY.hex()}\n")
    return "--key", f"file={path},mode=aes-256-cbc"


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("victims", Victims)
def test_invariants_1_and_2_what_was_acknowledged_survives_kill_9(
    lab: Lab, random: Random, victims: Victims, part: int
) -> None:
    """Every fourth kill is followed by one at another moment: while it recovers, starts, stops.

    Parts differ in what else a commit has to do: seal its record, write to an anchor.
    """
    key = key_options(lab) if part % 2 else ()
    anchor = ("--anchor", str(lab.new_path("anchor"))) if part % 4 > 1 else ()
    killing = Killing(lab, random, victims, key, anchor)
    for number in range(KILLS_PER_PART):
        killing.round(Moment.SERVING)
        if number % 4 == part % 4:
            killing.round(random.choice(OTHER_MOMENTS))
    killing.check()
    # Invariant 9: stopped in order, the directory is swtpm's.
    killing.check(EmulatorKind.SWTPM)
    assert killing.load.acknowledged > KILLS_PER_PART


@pytest.fixture(scope="module")
def late_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the engine that answers before it writes."""
    return canary.build("late", ("pwrite",), tmp_path_factory.mktemp("late"))


@pytest.fixture
def with_late_engine(late_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every vtpmd started with that engine."""
    monkeypatch.setenv("PYTHONPATH", str(late_engine))


@pytest.mark.usefixtures("with_late_engine")
@pytest.mark.parametrize("victims", [Victims.ALONE, Victims.ENGINE, Victims.BOTH])
def test_an_engine_that_answers_before_it_writes_is_caught(
    lab: Lab, random: Random, victims: Victims
) -> None:
    """It loses the last answer at almost every kill."""
    killing = Killing(lab, random, victims)
    with pytest.raises(WriteLostError, match="acknowledged"):
        for _ in range(CANARY_KILLS_MAX):
            killing.round(Moment.SERVING)
