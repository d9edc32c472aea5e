"""What the system tests need before they can run."""

import os
from random import Random, SystemRandom

import pytest

from tests.harness.guest import IMAGE


@pytest.fixture(scope="session", autouse=True)
def guest_image() -> None:
    """Fail clearly when the guest image has not been built."""
    if not (IMAGE / "initramfs.cpio.gz").exists():
        pytest.fail("there is no guest image in build/guest; run scripts/setup")


@pytest.fixture
def random() -> Random:
    """Give randomness that VTPMD_SEED repeats; a failed test's report has the seed."""
    seed = int(os.environ.get("VTPMD_SEED", SystemRandom().randrange(1 << 32)))
    print(f"VTPMD_SEED={seed}")
    return Random(seed)
