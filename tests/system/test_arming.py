"""What is said, and asked of QEMU, when a vTPM is armed: is it followed, and would COLO be used?

QEMU is a bare one here, without the TPM: what counts is its monitor.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from qemu.qmp import ExecuteError

from tests.harness.handover import Host, assert_whole, make_host, make_pair
from tests.harness.lab import Lab
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Peering
from vtpmd.testing.monitor import Monitor
from vtpmd.testing.program import Program
from vtpmd.testing.waiting import wait_until

FOLLOWING = Peering(credentials=credentials(), follows_qemu=True)


@contextmanager
def qemu_of(lab: Lab, host: Host) -> Iterator[Monitor]:
    """Start a QEMU that the host's vtpmd follows; return another monitor of it."""
    second = lab.new_path("qmp")
    command = [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-machine",
        "none",
        "-nodefaults",
        "-display",
        "none",
    ]
    for path in (host.vtpmd.qmp_path, second):
        command += ["-qmp", f"unix:{path},server=on,wait=off"]
    program = Program("qemu", command, lab.directory)
    try:
        with closing(Monitor(program.connect(second))) as monitor:
            monitor.connect()
            yield monitor
    finally:
        program.kill()


def followed(host: Host) -> object:
    return host.manage.command("query-status")["qemu"]


def test_whether_qemu_is_followed_is_said(lab: Lab) -> None:
    assert followed(make_host(lab)) == "not-asked-for"
    pair = make_pair(lab, source=FOLLOWING)
    answer = pair.source.manage.command("migrate-arm", to=pair.link.address)
    assert answer["qemu"] == "not-reachable"
    assert pair.source.manage.wait_for("VTPM_ARMED", "VTPM_FALL_BACK")["event"] == "VTPM_ARMED"
    assert_whole(pair.source.guest.save())


def test_colo_keeps_from_arming(lab: Lab) -> None:
    pair = make_pair(lab, source=FOLLOWING)
    colo = {"capability": "x-colo", "state": True}
    with qemu_of(lab, pair.source) as qemu:
        wait_until(lambda: followed(pair.source) == "following")
        # From some version on it is refused without a way back.
        way_back = {"capability": "return-path", "state": True}
        qemu.cmd("migrate-set-capabilities", capabilities=[way_back, colo])
        with pytest.raises(ExecuteError, match="x-colo is on"):
            pair.arm()
        assert pair.source.manage.migration() == {"state": "none"}
        qemu.cmd("migrate-set-capabilities", capabilities=[colo | {"state": False}])
        assert pair.arm()["event"] == "VTPM_ARMED"
    wait_until(lambda: followed(pair.source) == "not-reachable")
