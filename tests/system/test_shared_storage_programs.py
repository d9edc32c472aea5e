"""Shared storage with swtpm at one end, and its own ``--migration``: from 0.8 on it has that.

Invariant 3, by the lock that both programs take, and invariant 9, of a state that went between.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import versions
from tests.harness.lab import Lab
from tests.harness.swtpm_program import PROGRAMS, TIMEOUT_S
from tests.support.emulator_client import Blob, ControlError
from tests.support.tpm2 import TpmError
from tests.system.test_shared_storage import (
    BOTH,
    FIRST,
    INDEX,
    NV_BYTES,
    RELEASES,
    SECOND,
    THIRD,
    Host,
    Shared,
    assert_is_served,
    assert_is_served_by_both_programs,
    started,
    store,
)
from vtpmd.testing import migration
from vtpmd.testing.facts import differences
from vtpmd.testing.guest import Machine
from vtpmd.testing.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not versions.swtpm().migration_option, reason="this swtpm has no --migration; 0.8 has"
)

ONE_AND_THE_OTHER = [("swtpm", "vtpmd"), ("vtpmd", "swtpm")]
each_way = pytest.mark.parametrize("programs", ONE_AND_THE_OTHER, ids="-".join)
# swtpm maps a linear file once, and crashes where another has let it grow, and it goes on.
GOING_BACK = [
    *(("directory", programs) for programs in ONE_AND_THE_OTHER),
    ("linear", ("vtpmd", "swtpm")),
]
PCR, DIGEST = 7, b"\x07" * 32


@pytest.fixture(params=["directory", "linear"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shared]:
    """Give a test what swtpm locks, too: a linear file it locks if it is told to."""
    made = Shared(tmp_path, is_linear=request.param == "linear", suffix=",lock")
    yield made
    made.end()


def start(shared: Shared, programs: tuple[str, str]) -> tuple[Host, Host]:
    """Start a guest that has stored something, and what it is to go to."""
    source, destination = (PROGRAMS[name] for name in programs)
    here = started(shared, *RELEASES, program=source)
    there = shared.host(*BOTH, program=destination)
    there.connect()
    return here, there


def give(shared: Shared, host: Host) -> dict[Blob, bytes]:
    """Give a state away; swtpm answers before it lets go of the lock."""
    blobs = host.give()
    wait_until(lambda: not shared.is_locked())
    return blobs


@each_way
def test_vtpm_moves_with_the_lock(shared: Shared, programs: tuple[str, str]) -> None:
    source, there = start(shared, programs)
    source.tpm.extend(PCR, DIGEST)
    wanted = source.tpm.pcr(PCR)
    blobs = {kind: source.control.get_state_blob(kind) for kind in (Blob.PERMANENT, Blob.VOLATILE)}
    assert shared.is_locked()
    blobs[Blob.SAVESTATE] = source.control.get_state_blob(Blob.SAVESTATE)
    wait_until(lambda: not shared.is_locked())
    there.take(blobs)
    assert shared.is_locked()
    assert there.tpm.pcr(PCR) == wanted
    assert there.tpm.nv_read(INDEX, NV_BYTES) == FIRST
    store(there.tpm, SECOND)
    source.stop()
    assert shared.is_locked()
    store(there.tpm, THIRD)
    there.stop()
    assert_is_served_by_both_programs(shared, THIRD)


@each_way
def test_invariant_3_who_has_given_it_away_spoils_nothing(
    shared: Shared, programs: tuple[str, str]
) -> None:
    """swtpm ends at a guest's command then, and writes without the lock; vtpmd does neither."""
    source, there = start(shared, programs)
    is_swtpm = source.place.program == PROGRAMS["swtpm"]
    there.take(give(shared, source))
    store(there.tpm, SECOND)
    before = shared.content()
    with pytest.raises(ControlError) as refused:
        source.control.lock_storage(retries=5)
    assert refused.value.result == 9  # TPM_FAIL
    with pytest.raises(ConnectionError if is_swtpm else TpmError):
        store(source.tpm, FIRST)
    assert is_swtpm or shared.content() == before
    store(there.tpm, THIRD)
    there.stop()
    assert_is_served_by_both_programs(shared, THIRD)


@pytest.mark.parametrize("ends", ["stopped", "killed"])
@pytest.mark.parametrize(("shared", "programs"), GOING_BACK, indirect=["shared"])
def test_source_goes_on_where_the_destination_has_failed(
    shared: Shared, programs: tuple[str, str], ends: str
) -> None:
    """What the other program has left meanwhile is replaced."""
    source, there = start(shared, programs)
    there.take(give(shared, source))
    store(there.tpm, SECOND)
    if ends == "stopped":
        there.stop()
    else:
        there.kill()
    source.control.lock_storage()
    assert shared.is_locked()
    assert source.tpm.nv_read(INDEX, NV_BYTES) == FIRST
    store(source.tpm, THIRD)
    source.kill()
    assert_is_served(shared, THIRD)


@each_way
@pytest.mark.parametrize("ends", ["stopped", "killed"])
def test_last_word_of_the_source_loses_no_change_after_it(
    shared: Shared, programs: tuple[str, str], ends: str
) -> None:
    """swtpm has one when QEMU ends it, writes what that changes, and does not ask whose it is."""
    source, there = start(shared, programs)
    there.take(give(shared, source))
    store(there.tpm, SECOND)
    source.stop()
    if ends == "killed":
        store(there.tpm, THIRD)
        there.kill()
    else:
        there.stop()
    assert_is_served(shared, THIRD if ends == "killed" else SECOND)


@each_way
def test_guest_sees_no_difference_on_its_way_there_and_back(
    lab: Lab, programs: tuple[str, str]
) -> None:
    """Each host's program ends with its QEMU, as libvirt has it."""
    shared, machine = Shared(lab.directory), Machine()
    first, second = (PROGRAMS[name] for name in programs)
    try:
        here = shared.host(*RELEASES, "--terminate", program=first)
        guest = lab.booted_guest(here, machine)
        before = guest.check()
        for hop, program in enumerate((second, first)):
            there = shared.host(*BOTH, "--terminate", program=program)
            destination = lab.guest(there, machine, migration.INCOMING)
            migration.set_capabilities(guest)
            migration.set_capabilities(destination)
            guest.command("start mixed")
            path = lab.directory / f"stream{hop}"
            migration.migrate(guest, destination, migration.listen_unix(destination, path))
            destination.command("stop")
            guest.close()
            here.process.wait(TIMEOUT_S)
            assert shared.is_locked()
            here, guest = there, destination
        assert differences(before, guest.check(), worked=True) == []
        guest.close()
    finally:
        shared.end()
