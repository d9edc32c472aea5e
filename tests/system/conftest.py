"""What the system tests need before they can run."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random, SystemRandom

import pytest

from tests.harness.lab import Lab
from tests.harness.saved_guest import SavedGuest, save
from tests.harness.swtpm_program import OURS, PROGRAMS, Place
from tests.harness.testbed import Testbed
from vtpmd.testing.disk import ZRAM_CONTROL, Disk


@pytest.fixture(scope="session")
def saved_guest() -> Iterator[SavedGuest]:
    """Boot a guest once for all tests of a process that go on with it."""
    with Lab() as lab:
        yield save(lab)


@pytest.fixture
def testbed(record_property: Callable[[str, object], None]) -> Iterator[Testbed]:
    """Give a test two hosts and a link of 1 Gbit/s; say for how long QEMU was not to be asked."""
    with Testbed() as testbed:
        yield testbed
        longest_ms = max(host.longest_blocked_ms for host in testbed.hosts.values())
        record_property("longest time that QEMU's monitor was blocked, in ms", longest_ms)
        print(f"longest time that QEMU's monitor was blocked: {longest_ms} ms")


@pytest.fixture
def random() -> Random:
    """Give randomness that VTPMD_SEED repeats; a failed test's report has the seed."""
    seed = int(os.environ.get("VTPMD_SEED", SystemRandom().randrange(1 << 32)))
    print(f"VTPMD_SEED={seed}")
    return Random(seed)


@pytest.fixture
def disk(lab: Lab) -> Iterator[Disk]:
    """Give a test a disk of its own, for a state directory."""
    if not ZRAM_CONTROL.exists():
        pytest.fail("there is no zram for the test's disk; run modprobe zram")
    disk = Disk(lab.directory / "disk")
    lab.close_at_end(disk)
    yield disk


@pytest.fixture(params=PROGRAMS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Give a test a state that swtpm serves, and then one that the program in its place does."""
    made = Place(PROGRAMS[request.param], tmp_path)
    yield made
    made.end()


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Place]:
    """Give it ours alone, where swtpm 0.7 does otherwise: not as documented, or later."""
    made = Place(OURS, tmp_path)
    yield made
    made.end()
