"""swtpm's ``--tpmstate …,backup``, which is newer than Debian's swtpm: its permall.bak."""

import subprocess
from contextlib import closing

from tests.harness.swtpm_program import OURS, TIMEOUT_S, Place
from tests.support.emulator_client import ControlClient
from tests.support.tpm2 import Handle, Tpm

NV_INDEX = Handle.NV_FIRST + 3
FILES = ("tpm2-00.permall", "tpm2-00.permall.bak")


def serve(place: Place, *more: str) -> tuple[bool, str]:
    """Serve a state, and stop; return whether it had the index, which it has then, and what was
    said."""
    process = place.start(*more)
    with ControlClient(place.control) as control, closing(control.attach_data()) as data:
        control.init()
        tpm = Tpm(data.transact)
        tpm.startup()
        had = tpm.nv_is_defined(NV_INDEX)
        if not had:
            tpm.nv_define(NV_INDEX, 8)
        control.shutdown()
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    return had, errors


def with_backup(place: Place) -> tuple[str, str]:
    return "--tpmstate", f"dir={place.state},backup"


def refusal(command: list[str]) -> str:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=None
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_backup_is_what_the_start_found(ours: Place) -> None:
    permanent, backup = (ours.state / name for name in FILES)
    assert serve(ours, *with_backup(ours))[0] is False
    assert not backup.exists()
    found = permanent.read_bytes()
    assert serve(ours)[0] is True
    assert not backup.exists()
    found = permanent.read_bytes()
    assert serve(ours, *with_backup(ours))[0] is True
    assert backup.read_bytes() == found != permanent.read_bytes()
    assert backup.stat().st_mode == permanent.stat().st_mode


def test_backup_that_is_alone_is_gone_on_from_or_refused(ours: Place) -> None:
    permanent, backup = (ours.state / name for name in FILES)
    serve(ours)
    permanent.rename(backup)
    content = backup.read_bytes()
    assert ".bak is there" in refusal(ours.options())
    vtpmd = str(OURS.with_name("vtpmd"))
    assert ".bak is there" in refusal([vtpmd, "run", str(ours.state), "--socket", "s"])
    assert backup.read_bytes() == content
    assert not permanent.exists()
    had, errors = serve(ours, *with_backup(ours))
    assert had is True
    assert errors.count("\n") == 1 and "its backup is in its place" in errors
    assert backup.read_bytes() == content


def test_linear_file_has_no_place_for_one(ours: Place) -> None:
    uri = f"backend-uri=file://{ours.directory / 'linear'},backup"
    assert "backup is for a state directory" in refusal(ours.options("--tpmstate", uri))
    assert not (ours.directory / "linear").exists()
