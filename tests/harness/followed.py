"""A vtpmd that follows the monitor of a QEMU: of one that says what a test has it say."""

from pathlib import Path

from tests.bench.moving.monitor import Monitor
from tests.harness.handover import Host, make_host
from tests.harness.lab import Lab
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Peering


def followed(lab: Lab, state: Path | None = None, *, is_incoming: bool) -> tuple[Host, Monitor]:
    """Start a vtpmd that follows a monitor, and its guest."""
    host = make_host(lab, Peering(credentials=credentials(), follows_qemu=True), state)
    assert host.vtpmd.qmp_path is not None
    monitor = Monitor(host.vtpmd.qmp_path, is_incoming=is_incoming)
    lab.close_at_end(monitor)
    monitor.wait_until_followed()
    return host, monitor
