"""libvirt's guests, with our program in swtpm's place and nothing else changed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from tests.harness import versions
from tests.harness.guest_tpm12 import tpm12_of
from tests.harness.lab import Lab
from tests.harness.libvirt import Domain, Libvirt
from tests.harness.swtpm_program import PROGRAMS
from vtpmd.testing.emulator import EmulatorKind
from vtpmd.testing.workload import WorkloadFailedError

PLAIN = "<backend type='emulator' version='2.0'/>"
EXTERNAL = "<backend type='external'><source type='unix' mode='connect' path='{}'/></backend>"
TPM_12 = "<backend type='emulator' version='1.2'/>"
IN_A_FILE = "<backend type='emulator' version='2.0'><source type='file' path='{}'/></backend>"
ENCRYPTED = "<backend type='emulator' version='2.0'><encryption secret='{}'/></backend>"
PCR_12 = 10
LINEAR_MAGIC = b"swtpmlin"[::-1]  # a little-endian number


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


def test_domain_with_a_tpm_12_is_saved_restored_and_started_again(
    start_libvirt: Callable[[str], Libvirt], lab: Lab
) -> None:
    """Its owner and its key stay; what its PCRs hold, until it is started again."""
    owner, storage, usage, digest = (letter * 20 for letter in (b"o", b"s", b"k", b"d"))
    libvirt = start_libvirt("vtpmd")
    with closing(Domain(libvirt, lab.new_path("domain"), "web1", TPM_12)) as domain:
        with closing(domain.start()) as workload:
            workload.wait_until_ready()
            tpm = tpm12_of(workload)
            fresh = tpm.pcr(PCR_12)
            tpm.extend(PCR_12, digest)
            extended = tpm.pcr(PCR_12)
            tpm.take_ownership(owner, storage)
            key = tpm.create_key(storage, usage)
            handle = tpm.load_key(key, storage)
            domain.virsh("managedsave")
        with closing(domain.start()) as workload:
            tpm = tpm12_of(workload)
            assert tpm.pcr(PCR_12) == extended != fresh
            key.verify(digest, tpm.sign(handle, digest, usage))
            domain.virsh("destroy")
        with closing(domain.start()) as workload:
            workload.wait_until_ready()
            tpm = tpm12_of(workload)
            assert tpm.pcr(PCR_12) == fresh
            key.verify(digest, tpm.sign(tpm.load_key(key, storage), digest, usage))


def test_domain_has_its_state_in_a_file(start_libvirt: Callable[[str], Libvirt], lab: Lab) -> None:
    if versions.libvirt() < versions.LIBVIRT_WITH_TPM_SOURCE:
        pytest.skip("this libvirt knows no <source type='file'> for a TPM; one from 10.10 on does")
    libvirt = start_libvirt("vtpmd")
    file = lab.new_path("state")
    backend = IN_A_FILE.format(file)
    with closing(Domain(libvirt, lab.new_path("domain"), "web1", backend)) as domain:
        with closing(domain.start()) as workload:
            workload.wait_until_ready()
            workload.command("setup")
            workload.command("work 10")
            domain.virsh("managedsave")
        with closing(domain.start()) as workload:
            workload.command("work 5")
            workload.check()
            domain.virsh("destroy")
        assert file.read_bytes()[: len(LINEAR_MAGIC)] == LINEAR_MAGIC
        with closing(domain.start()) as workload:
            workload.wait_until_ready()
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


def test_domain_with_an_external_backend_starts_again_where_vtpmd_run_stays(
    start_libvirt: Callable[[str], Libvirt], lab: Lab
) -> None:
    served = lab.emulator(EmulatorKind.VTPMD, options=["--stay"])
    backend = EXTERNAL.format(served.control_path)
    libvirt = start_libvirt("swtpm")
    with closing(Domain(libvirt, lab.new_path("domain"), "web1", backend)) as domain:
        with closing(domain.start()) as workload:
            workload.wait_until_ready()
            workload.command("setup")
            domain.virsh("destroy")
        with closing(domain.start()) as workload:
            workload.wait_until_ready()
            # TPM_RC_NV_DEFINED: it is the same TPM.
            with pytest.raises(WorkloadFailedError, match="0x14c"):
                workload.command("setup")
        assert served.program.exit_code is None
    assert served.stop() == 0
