"""libvirt's guests, with our program in swtpm's place and nothing else changed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from tests.harness.lab import Lab
from tests.harness.libvirt import Domain, Libvirt
from tests.harness.swtpm_program import PROGRAMS
from vtpmd.testing.emulator import EmulatorKind
from vtpmd.testing.workload import WorkloadFailedError

PLAIN = "<backend type='emulator' version='2.0'/>"
EXTERNAL = "<backend type='external'><source type='unix' mode='connect' path='{}'/></backend>"
ENCRYPTED = "<backend type='emulator' version='2.0'><encryption secret='{}'/></backend>"


@pytest.fixture
def start_libvirt(lab: Lab) -> Iterator[Callable[[str], Libvirt]]:
    with ExitStack() as stack:

        def start(program: str) -> Libvirt:
            started = Libvirt(lab.new_path("libvirt"), PROGRAMS[program])
            return stack.enter_context(closing(started))

        yield start


@pytest.mark.parametrize(
    ("program", "backend"),
    [("swtpm", PLAIN), ("vtpmd", PLAIN), ("vtpmd", ENCRYPTED)],
    ids=["swtpm", "vtpmd", "vtpmd, with a secret"],
)
def test_domain_starts_is_saved_restored_reverted_and_started_again(
    start_libvirt: Callable[[str], Libvirt], lab: Lab, program: str, backend: str
) -> None:
    libvirt = start_libvirt(program)
    backend = backend.format(libvirt.make_secret())
    with closing(Domain(libvirt, lab.new_path("domain"), "web1", backend)) as domain:
        with closing(domain.start()) as workload:
            workload.wait_until_ready()
            workload.command("setup")
            workload.command("work 10")
            domain.virsh("managedsave")
        with closing(domain.start()) as workload:
            workload.command("work 5")
            workload.check()
            domain.virsh("snapshot-create-as", "here")
            workload.check()
            domain.virsh("destroy")
        domain.virsh("snapshot-revert", "here")
        with closing(domain.connected()) as workload:
            workload.command("work 5")
            workload.check()
            domain.virsh("destroy")
        with closing(domain.start()) as workload:
            workload.wait_until_ready()
            # TPM_RC_NV_DEFINED: it is the same TPM, its keys are there.
            with pytest.raises(WorkloadFailedError, match="0x14c"):
                workload.command("setup")


def test_domain_with_an_external_backend_has_the_tpm_that_vtpmd_run_serves(
    start_libvirt: Callable[[str], Libvirt], lab: Lab
) -> None:
    served = lab.emulator(EmulatorKind.VTPMD)
    backend = EXTERNAL.format(served.control_path)
    libvirt = start_libvirt("swtpm")
    with closing(Domain(libvirt, lab.new_path("domain"), "web1", backend)) as domain:
        with closing(domain.start()) as workload:
            workload.wait_until_ready()
            workload.command("setup")
            domain.virsh("destroy")
        assert served.program.wait() == 0  # it is QEMU that ends it
