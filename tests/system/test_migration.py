"""A guest's TPM moves with the guest, through QEMU's own migration stream.

Invariants of the design that are checked: 5 (the TPM is the same at the destination, as far as the
guest and the host can see) and 6 (the blobs are swtpm's, so that a plain swtpm is a peer).
The cases cover each pair of pair, transport, TPM model, machine and load; not their product.
"""

from dataclasses import dataclass
from itertools import combinations, product

import pytest

from tests.harness.lab import Lab
from vtpmd.daemon.engine import EXIT_JOURNAL
from vtpmd.testing import migration
from vtpmd.testing.emulator import EmulatorKind
from vtpmd.testing.facts import differences
from vtpmd.testing.guest import Guest, Machine

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM


@dataclass(frozen=True, kw_only=True)
class Case:
    """One migration: from where to where, over what, of which guest, that does what meanwhile."""

    source: EmulatorKind
    destination: EmulatorKind
    transport: str
    tpm_model: str
    machine: str
    load: str | None

    def __str__(self) -> str:
        """Give the case's name in the test report."""
        parts = [self.transport, self.tpm_model, self.machine, self.load or "idle"]
        return f"{self.source}-to-{self.destination}-{'-'.join(parts)}"


def case(
    source: EmulatorKind,
    destination: EmulatorKind,
    transport: str,
    tpm_model: str,
    machine: str,
    load: str | None,
) -> Case:
    """Make a case from a row of the table below."""
    return Case(
        source=source,
        destination=destination,
        transport=transport,
        tpm_model=tpm_model,
        machine=machine,
        load=load,
    )


CASES = [
    case(VTPMD, VTPMD, "unix", "tpm-tis", "q35", "mixed"),
    case(VTPMD, VTPMD, "tcp", "tpm-crb", "pc", None),
    case(VTPMD, VTPMD, "tcp", "tpm-tis", "q35", "rsa-2048"),
    case(VTPMD, SWTPM, "unix", "tpm-crb", "q35", None),
    case(VTPMD, SWTPM, "tcp", "tpm-tis", "pc", "mixed"),
    case(VTPMD, SWTPM, "unix", "tpm-crb", "pc", "rsa-2048"),
    case(SWTPM, VTPMD, "unix", "tpm-tis", "pc", None),
    case(SWTPM, VTPMD, "tcp", "tpm-crb", "q35", "mixed"),
    case(SWTPM, VTPMD, "tcp", "tpm-crb", "pc", "rsa-2048"),
    case(SWTPM, SWTPM, "unix", "tpm-crb", "pc", "mixed"),
]


def test_cases_cover_every_pair_of_choices() -> None:
    """Each choice meets each other choice in some case: what the table above is made for."""
    rows = [
        ((case.source, case.destination), case.transport, case.tpm_model, case.machine, case.load)
        for case in CASES
        if VTPMD in (case.source, case.destination)
    ]
    for one, other in combinations(zip(*rows, strict=True), 2):
        assert set(zip(one, other, strict=True)) == set(product(set(one), set(other)))


def listen(lab: Lab, destination: Guest, transport: str) -> str:
    """Let a destination listen; return the URI for the source."""
    if transport == "tcp":
        return migration.listen_tcp(destination)
    return migration.listen_unix(destination, lab.directory / "stream")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_guest_sees_no_difference_after_migration(lab: Lab, case: Case) -> None:
    """The workload checks the same facts before and after, with or without load meanwhile."""
    machine = Machine(tpm_model=case.tpm_model, machine=case.machine)
    first, second = lab.emulator(case.source), lab.emulator(case.destination)
    source = lab.booted_guest(first, machine)
    destination = lab.guest(second, machine, migration.INCOMING)
    migration.set_capabilities(source)
    migration.set_capabilities(destination)

    before = source.check()
    if case.load:
        source.command(f"start {case.load}")
    migration.migrate(source, destination, listen(lab, destination, case.transport))
    if case.load:
        destination.command("stop")
    after = destination.check()
    destination.command("work 30")
    destination.check()

    assert differences(before, after, worked=case.load is not None) == []
    assert source.status == "postmigrate"
    gave = EXIT_JOURNAL if case.source is EmulatorKind.VTPMD else 0
    assert (first.stop(), second.stop()) == (gave, 0)


def test_guest_migrates_on_from_where_it_came_to(lab: Lab) -> None:
    """A TPM that came in by migration goes out again, between all kinds of emulator."""
    machine = Machine()
    guest = lab.booted_guest(lab.emulator(SWTPM), machine)
    before = guest.check()
    for hop, kind in enumerate([VTPMD, VTPMD, SWTPM]):
        destination = lab.guest(lab.emulator(kind), machine, migration.INCOMING)
        migration.set_capabilities(guest)
        migration.set_capabilities(destination)
        path = lab.directory / f"stream{hop}"
        migration.migrate(guest, destination, migration.listen_unix(destination, path))
        guest.close()
        guest = destination
    assert differences(before, guest.check(), worked=False) == []
