"""After a failure at the destination, the source guest goes on with a working TPM.

Invariant of the design that is checked: 3 (after a failed migration exactly one side can execute
commands): the destination's TPM is gone or never ran, the source's works and has lost nothing.
The guest has booted once, for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.harness.lab import Lab
from tests.harness.proxy import Trigger
from tests.harness.saved_guest import MACHINE, SavedGuest, go_on
from tests.support.emulator_client import Control
from vtpmd.testing import migration
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.testing.facts import differences
from vtpmd.testing.guest import Guest

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
PAIRS = [(SWTPM, SWTPM), (VTPMD, VTPMD), (VTPMD, SWTPM), (SWTPM, VTPMD)]
PROXY_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """At which control command at the destination its emulator is killed."""

    control: Control
    occurrence: int
    answered: bool

    def __str__(self) -> str:
        """Give the failure's name in the test report."""
        when = "after" if self.answered else "at"
        return f"{when}-{self.control.name.lower()}-{self.occurrence}"


WHILE_LOADING = [
    Failure(control=Control.SET_STATEBLOB, occurrence=1, answered=False),
    Failure(control=Control.SET_STATEBLOB, occurrence=1, answered=True),
    Failure(control=Control.SET_STATEBLOB, occurrence=2, answered=False),
    Failure(control=Control.INIT, occurrence=1, answered=False),
]


def assert_goes_on(source: Guest, before: dict[str, str]) -> None:
    """Resume the source if QEMU has not, and check that its TPM lost nothing and works."""
    if source.status != "running":
        source.resume()
    source.command("stop")
    assert differences(before, source.check(), worked=True) == []
    source.command("work 60")
    source.check()


def migrate_into_failure(source: Guest, destination: Guest, lab: Lab, *, return_path: bool) -> str:
    """Migrate under load to a destination that will fail; return how QEMU says it ended."""
    migration.set_capabilities(source, return_path=return_path)
    migration.set_capabilities(destination, return_path=return_path)
    uri = migration.listen_unix(destination, lab.directory / "stream")
    source.command("start")
    source.qmp("migrate", uri=uri)
    return migration.wait_until_ended(source)


@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "one-way"])
@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_source_goes_on_when_destination_emulator_died_before(
    lab: Lab,
    saved_guest: SavedGuest,
    pair: tuple[EmulatorKind, EmulatorKind],
    return_path: bool,
) -> None:
    """The destination's emulator is killed before the migration begins.

    Without a return path the source may take the migration for completed, or see the stream break.
    """
    source = go_on(saved_guest, lab.emulator(pair[0]), lab)
    emulator = lab.emulator(pair[1])
    destination = lab.guest(emulator, MACHINE, migration.INCOMING)
    before = source.check()
    emulator.kill()

    status = migrate_into_failure(source, destination, lab, return_path=return_path)

    assert status == "failed" or not return_path
    assert destination.program.wait() != 0
    assert_goes_on(source, before)


@pytest.mark.parametrize("failure", WHILE_LOADING, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_source_goes_on_when_destination_emulator_dies_while_loading(
    lab: Lab,
    saved_guest: SavedGuest,
    pair: tuple[EmulatorKind, EmulatorKind],
    failure: Failure,
) -> None:
    """The destination's emulator is killed while QEMU gives it the state, or at its start."""
    emulator = lab.emulator(pair[1])
    proxy = lab.proxy(emulator, kill_at(failure, emulator.kill))
    source = go_on(saved_guest, lab.emulator(pair[0]), lab)
    destination = lab.guest(proxy, MACHINE, migration.INCOMING)
    before = source.check()

    status = migrate_into_failure(source, destination, lab, return_path=True)

    assert status == "failed"
    assert proxy.triggered.wait(PROXY_TIMEOUT_S)
    assert destination.program.wait() != 0
    assert_goes_on(source, before)


def kill_at(failure: Failure, action: Callable[[], None]) -> Trigger:
    """Make the proxy's trigger for a failure."""
    return Trigger(
        control=failure.control,
        occurrence=failure.occurrence,
        answered=failure.answered,
        action=action,
    )


@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_source_goes_on_when_destination_dies_once_its_tpm_has_started(
    lab: Lab, saved_guest: SavedGuest, pair: tuple[EmulatorKind, EmulatorKind]
) -> None:
    """The destination's host fails when its TPM has the state and has answered INIT."""
    emulator = lab.emulator(pair[1])
    guests: list[Guest] = []

    def host_fails() -> None:
        guests[0].program.kill()
        emulator.kill()

    proxy = lab.proxy(emulator, Trigger(control=Control.INIT, answered=True, action=host_fails))
    source = go_on(saved_guest, lab.emulator(pair[0]), lab)
    guests.append(lab.guest(proxy, MACHINE, migration.INCOMING))
    before = source.check()

    status = migrate_into_failure(source, guests[0], lab, return_path=True)

    assert status == "failed"
    assert proxy.triggered.wait(PROXY_TIMEOUT_S)
    assert_goes_on(source, before)


@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_source_goes_on_when_destination_dies_before_its_guest_runs(
    lab: Lab, saved_guest: SavedGuest, pair: tuple[EmulatorKind, EmulatorKind]
) -> None:
    """All has arrived at a paused destination; its host fails before the guest runs there."""
    emulator: Emulator = lab.emulator(pair[1])
    source = go_on(saved_guest, lab.emulator(pair[0]), lab)
    destination = lab.guest(emulator, MACHINE, (*migration.INCOMING, "-S"))
    before = source.check()

    status = migrate_into_failure(source, destination, lab, return_path=True)
    assert status == "completed"
    migration.wait_until(destination, "paused")
    destination.program.kill()
    emulator.kill()

    assert_goes_on(source, before)
