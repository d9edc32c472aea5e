"""What the system tests need before they can run."""

import pytest

from tests.harness.guest import IMAGE


@pytest.fixture(scope="session", autouse=True)
def guest_image() -> None:
    """Fail clearly when the guest image has not been built."""
    if not (IMAGE / "initramfs.cpio.gz").exists():
        pytest.fail("there is no guest image in build/guest; run scripts/setup")
