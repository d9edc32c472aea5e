"""The pytest plugin's fixtures; docs/testing.md explains them.

pytest imports this file in every test session of an environment that vtpmd is installed in, so it
imports nothing else of it: a fixture imports what it is, when a test asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from vtpmd.testing.emulator import Emulator
    from vtpmd.testing.guest import Guest, Machine
    from vtpmd.testing.hosts import Hosts
    from vtpmd.testing.lab import Lab


@pytest.fixture(scope="session")
def vtpm_guest_image() -> Path:
    """Give the directory of the self-checking guest's image, which is built if it is missing."""
    from vtpmd.testing import guest_image

    directory = guest_image.directory()
    if not (directory / guest_image.INITRAMFS).exists():
        guest_image.build(directory)
    return directory


@pytest.fixture
def vtpm_machine(vtpm_guest_image: Path) -> Machine:
    """Give what QEMU emulates for the other fixtures: override it for another QEMU or TPM model."""
    from vtpmd.testing.guest import Machine

    return Machine(image=vtpm_guest_image)


@pytest.fixture
def vtpm_lab() -> Iterator[Lab]:
    """Give a test emulators and guests as it asks for them; they end with it."""
    from vtpmd.testing.lab import Lab

    with Lab() as lab:
        yield lab


@pytest.fixture
def vtpm(vtpm_lab: Lab) -> Emulator:
    """Give a vtpmd that serves a new TPM 2.0 to the first QEMU that connects."""
    return vtpm_lab.daemon()


@pytest.fixture
def vtpm_guest(vtpm_lab: Lab, vtpm: Emulator, vtpm_machine: Machine) -> Guest:
    """Give a guest that has booted, and has set up the vTPM and used it."""
    return vtpm_lab.booted_guest(vtpm, vtpm_machine)


@pytest.fixture
def vtpm_hosts(vtpm_machine: Machine) -> Iterator[Hosts]:
    """Give two hosts with a vtpmd each, a link that can be cut between, and no guest yet."""
    from vtpmd.testing.hosts import Hosts

    with Hosts(vtpm_machine) as hosts:
        yield hosts


@pytest.fixture
def vtpm_hosts_on_disks(vtpm_machine: Machine) -> Iterator[Hosts]:
    """Give two hosts that can lose power as well: for root, where there are zram and ext4."""
    from vtpmd.testing.hosts import Hosts

    with Hosts(vtpm_machine, on_disks=True) as hosts:
        yield hosts


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what emulators, QEMU and guests said to the report of a test that failed."""
    report = yield
    if report.failed and report.when == "call":
        from vtpmd.testing.logged import Logged

        for resource in getattr(item, "funcargs", {}).values():
            if isinstance(resource, Logged):
                report.sections += resource.logs()
    return report
