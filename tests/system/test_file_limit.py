"""A vTPM under a small limit on the size of files, as XAPI's callers of swtpm set: it is served.

Invariant 1 holds without a journal: each change is in the state's file before it is acknowledged.
"""

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.harness.state_files import durable_state
from tests.harness.swtpm_program import OURS, TIMEOUT_S, Place
from tests.support.emulator_client import ControlClient
from tests.support.tpm2 import Handle, Tpm
from vtpmd.store.directory import names_of
from vtpmd.testing.emulator import VTPMD
from vtpmd.testing.program import Program
from vtpmd.wire.tpm import TpmVersion

LIMIT = ["prlimit", "--fsize=262144"]
NV_BYTES = 2000
CHANGES = 12
NAMES = names_of(TpmVersion.TPM_2_0)


def content(number: int) -> bytes:
    return bytes([number + 1]) * NV_BYTES


def fill(tpm: Tpm) -> None:
    for number in range(CHANGES):
        tpm.nv_define(Handle.NV_FIRST + number, NV_BYTES)
        tpm.nv_write(Handle.NV_FIRST + number, content(number))


def assert_filled(tpm: Tpm) -> None:
    for number in range(CHANGES):
        assert tpm.nv_read(Handle.NV_FIRST + number, NV_BYTES) == content(number)


def ignored_signals(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("SigIgn:")).split()[1], 16)


def assert_is_limited(pid: int) -> None:
    """What is served is under the limit, and is not killed by what would be larger."""
    assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (262144, 262144)
    assert ignored_signals(pid) & 1 << (signal.SIGXFSZ - 1)


class LimitedPlace(Place):
    """What is served under the limit, from a directory or a linear file."""

    def __init__(self, directory: Path, tpmstate: str) -> None:
        super().__init__(OURS, directory)
        self.said = ""
        self._tpmstate = tpmstate

    def options(self, *more: str) -> list[str]:
        """Return a command line that serves under the limit."""
        return [*LIMIT, *super().options("--tpmstate", self._tpmstate, *more)]

    @contextmanager
    def serving(self) -> Iterator[tuple[ControlClient, Tpm, int]]:
        """Serve it, and stop it in order; what it says goes to ``self.said``."""
        process = self.start()
        with ControlClient(self.control) as control, closing(control.attach_data()) as data:
            control.init()
            tpm = Tpm(data.transact)
            tpm.startup()
            yield control, tpm, process.pid
            control.shutdown()
        assert process.wait(TIMEOUT_S) == 0
        assert process.stderr is not None
        self.said = process.stderr.read()


@pytest.fixture(params=["dir={}/state", "backend-uri=file://{}/linear"], ids=["dir", "linear"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LimitedPlace]:
    made = LimitedPlace(tmp_path, request.param.format(tmp_path))
    yield made
    made.end()


def test_vtpm_is_served_under_the_limit(place: LimitedPlace, tmp_path: Path) -> None:
    with place.serving() as (control, tpm, pid):
        assert_is_limited(pid)
        fill(tpm)
        assert not (place.state / NAMES.journal).exists()
        control.init()  # a guest's reset says nothing again
        tpm.startup()
        assert_filled(tpm)
    lines = [line for line in place.said.splitlines() if "a new TPM 2.0 was made" not in line]
    is_linear = (tmp_path / "linear").exists()
    assert len(lines) == (0 if is_linear else 1)
    assert is_linear or "RLIMIT_FSIZE) leaves no room for a journal" in lines[0]
    with place.serving() as (_, tpm, _):
        assert_filled(tpm)


@pytest.mark.parametrize("place", ["dir={}/state"], ids=["dir"], indirect=True)
def test_invariant_1_each_change_is_durable_without_a_journal(place: LimitedPlace) -> None:
    """Killed after a response, it has what it acknowledged."""
    process = place.start()
    with ControlClient(place.control) as control, closing(control.attach_data()) as data:
        control.init()
        tpm = Tpm(data.transact)
        tpm.startup()
        fill(tpm)
        before = durable_state(place.state)
        process.kill()
        process.wait(TIMEOUT_S)
    assert durable_state(place.state) == before
    place.control.unlink()
    place.pid_file.unlink()
    with place.serving() as (_, tpm, _):
        assert_filled(tpm)


def test_journal_that_is_there_is_taken_up(tmp_path: Path) -> None:
    """It is larger than the limit: it is read, and folded."""
    place = Place(OURS, tmp_path)
    process = place.start()
    with ControlClient(place.control) as control, closing(control.attach_data()) as data:
        control.init()
        tpm = Tpm(data.transact)
        tpm.startup()
        fill(tpm)
        process.kill()
        process.wait(TIMEOUT_S)
    assert (place.state / NAMES.journal).stat().st_size > 262144
    place.end()
    place.control.unlink()
    place.pid_file.unlink()
    limited = LimitedPlace(tmp_path / "limited", f"dir={place.state}")
    try:
        with limited.serving() as (_, tpm, _):
            assert_filled(tpm)
            assert not (place.state / NAMES.journal).exists()
    finally:
        limited.end()


def test_vtpmd_run_serves_alone_and_says_so(tmp_path: Path) -> None:
    socket = tmp_path / "tpm"
    arguments: list[str | Path] = [*LIMIT, VTPMD, "run", tmp_path / "state", "--socket", socket]
    program = Program("limited", arguments, tmp_path)
    try:
        program.connect(socket).close()
        with ControlClient(socket) as control, closing(control.attach_data()) as data:
            control.init()
            tpm = Tpm(data.transact)
            tpm.startup()
            fill(tpm)
            attached = subprocess.run(
                [VTPMD, "attach", tmp_path / "state"],
                check=False,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
            assert attached.returncode == 1
            assert attached.stderr.startswith("vtpmd: the engine shares no store")
            assert attached.stderr.count("\n") == 1
            assert_filled(tpm)  # served on
            control.shutdown()
        assert program.wait(TIMEOUT_S) == 0
    finally:
        program.kill()
    assert program.output.count("leaves no room for a journal") == 1


def test_what_moves_is_refused_in_a_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*LIMIT, VTPMD, "run", tmp_path / "state", "--manage", tmp_path / "manage"],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1
    assert not done.stdout
    assert done.stderr.count("\n") == 1
    assert "leaves no room for a vtpmd beside" in done.stderr
    assert not os.path.lexists(tmp_path / "state" / "vtpmd.sock")
