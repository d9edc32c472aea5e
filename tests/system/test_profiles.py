"""A TPM that is made under swtpm's name has the profile that swtpm's would have.

Debian 12 and 13 have a libtpms without profiles: there it is refused, in a line.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.harness.swtpm_program import OURS, PROGRAMS, TIMEOUT_S, Place
from tests.support.emulator_client import ControlClient
from vtpmd.store.libtpms import INFO_ACTIVE_PROFILE, library
from vtpmd.wire.tpm import TpmVersion

HAS_PROFILES = bool(library().profiles)


def make(place: Place, *options: str) -> None:
    """Have a TPM made, and stop what has made it."""
    process = place.start(*options)
    with ControlClient(place.control) as control:
        control.init()
        control.shutdown()
    assert process.wait(TIMEOUT_S) == 0


def printed(program: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, "socket", "--tpm2", *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def active(program: Path, place: Place) -> Any:
    """Return what a program says of the TPM's profile; nothing without profiles."""
    info = printed(
        *(program, "--print-info", str(INFO_ACTIVE_PROFILE)),
        *("--tpmstate", f"dir={place.state}"),
    )
    assert info.returncode == 0, info.stderr
    return json.loads(info.stdout).get("ActiveProfile")


def test_a_tpm_has_the_profile_of_swtpms_where_none_is_given(tmp_path: Path) -> None:
    """That is the one which every libtpms reads."""
    found = []
    for name, program in PROGRAMS.items():
        place = Place(program, tmp_path / name)
        try:
            make(place)
            found.append(active(OURS, place))
        finally:
            place.end()
    assert found[0] == found[1]
    assert found[0] is None or (HAS_PROFILES and found[0]["Name"] == "null")


def test_a_tpm_has_the_profile_that_is_given(ours: Place) -> None:
    if not HAS_PROFILES:
        done = printed(OURS, *ours.options("--profile", "name=default-v1")[3:])
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "has no profiles: leave it out" in done.stderr
        assert not ours.control.exists()
        return
    make(ours, "--profile", "name=default-v1")
    profile = active(OURS, ours)
    assert profile == active(PROGRAMS["swtpm"], ours)
    assert profile["Name"] == "default-v1"
    again = printed(OURS, *ours.options("--profile", "name=default-v1")[3:])
    assert again.returncode == 1
    assert "for a TPM that is made" in again.stderr
    make(ours)


def test_a_tpm_12_has_none_whatever_is_given(tmp_path: Path) -> None:
    """So swtpm has it, and swtpm_setup 0.10 gives all of them one: on a descriptor."""
    place = Place(OURS, tmp_path, TpmVersion.TPM_1_2)
    try:
        make(place, "--profile", "fd=0")
        make(place, "--profile", "fd=0")
        assert (place.state / place.names.permanent).exists()
    finally:
        place.end()


def test_profiles_are_printed_as_swtpm_prints_them() -> None:
    """An option that swtpm does not know is refused."""
    ours, theirs = (printed(program, "--print-profiles") for program in (OURS, PROGRAMS["swtpm"]))
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert (ours.returncode == 0) == HAS_PROFILES
