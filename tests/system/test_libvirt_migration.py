"""libvirt moves a guest to another libvirtd; its vTPM, which vtpmd serves, goes with it by a tail.

Invariants 3 (one owner) and 5 (the guest finds its TPM as it was).
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from tests.harness.command import vtpmd
from tests.harness.libvirt import Domain, Libvirt
from tests.harness.swtpm_program import PROGRAMS
from tests.harness.testbed import Host, Testbed
from tests.harness.wire import Side
from tests.support.emulator_client import Blob
from vtpmd.testing.facts import differences

BACKEND = "<backend type='external'><source type='unix' mode='connect' path='{}'/></backend>"
GET_STATEBLOB = re.compile(r"GET_STATEBLOB: result 0x0, (\d+) bytes")
BLOB_HEADER_BYTES = 16  # of the answer
PERMANENT_BYTES_MIN = 1300  # of a fresh TPM; a tail has less


@pytest.fixture
def libvirts(testbed: Testbed) -> Iterator[dict[Side, Libvirt]]:
    """Give each host a libvirtd."""
    with ExitStack() as stack:
        started = {}
        for side, host in testbed.hosts.items():
            directory = host.lab.new_path(f"libvirt-{side}")
            libvirt = Libvirt(directory, PROGRAMS["swtpm"], host.namespace.path)
            started[side] = stack.enter_context(closing(libvirt))
        yield started


def describe(host: Host, libvirt: Libvirt, comes_from: Domain | None = None) -> Domain:
    """Describe the guest as it is on a host, whose vtpmd follows it."""
    backend = BACKEND.format(host.vtpmd.control_path)
    directory, monitor = host.lab.new_path("domain"), host.vtpmd.qmp_path
    return Domain(libvirt, directory, "web1", backend, monitor=monitor, comes_from=comes_from)


def assert_handed_over(source: Host, destination: Host) -> None:
    """Check that a tail moved the vTPM, and that one host has it.

    libvirt ends the source's QEMU, and that its vtpmd.
    """
    assert source.vtpmd.program.wait() == 0
    sizes = [int(size) for size in GET_STATEBLOB.findall(source.vtpmd.program.output)]
    tail, *others = sizes[-len(Blob) :]
    assert 0 < tail - BLOB_HEADER_BYTES < PERMANENT_BYTES_MIN
    assert others == [BLOB_HEADER_BYTES] * len(others)
    away, here = (vtpmd("status", host.state, "--json").outcome for host in (source, destination))
    assert (away["owner"], away["peer"]) == ("moved", destination.peer_address)
    assert (here["owner"], here["identity"]) == ("ours", away["identity"])
    assert destination.manage.command("query-status")["running"] is True


def test_domain_moves_to_another_libvirtd_and_back(
    testbed: Testbed, libvirts: dict[Side, Libvirt]
) -> None:
    """Armed at the management socket, as a hook of libvirt's does; the guest works its TPM."""
    here, there = testbed.a, testbed.b
    with ExitStack() as stack:
        domain = stack.enter_context(closing(describe(here, libvirts[here.side])))
        workload = stack.enter_context(closing(domain.start()))
        workload.wait_until_ready()
        workload.command("setup")
        workload.command("work 10")
        before = workload.check()
        workload.command("start mixed")
        for _ in range(2):
            incoming = stack.enter_context(
                closing(describe(there, libvirts[there.side], comes_from=domain))
            )
            assert here.manage.arm(there.peer_address)["event"] == "VTPM_ARMED"
            workload = stack.enter_context(closing(domain.migrate(incoming, there.address)))
            assert_handed_over(here, there)
            domain, here, there = incoming, there, here
            there.restart_vtpmd()
        workload.command("stop")
        assert differences(before, workload.check(), worked=True) == []
