"""Empty passwords, which swtpm takes: the same keys from them, whichever program served before.

Whoever makes a key anew with vtpmd's own options is refused one: tests/unit/test_keys.py.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.swtpm_program import OURS, PROGRAMS, TIMEOUT_S, Place
from tests.support.emulator_client import Blob, ControlClient
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType

WARNING = "is empty: anybody has this key"
MODES = ["", ",mode=aes-cbc", ",mode=aes-256-cbc", ",mode=aes-256-cbc,kdf=sha512"]
BOTH_WAYS = [("swtpm", "vtpmd"), ("vtpmd", "swtpm")]


@pytest.fixture(params=BOTH_WAYS, ids="-".join)
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Place]]:
    """Give a test a place that one program serves, and one that the other serves after it."""
    made = [Place(PROGRAMS[name], tmp_path / name) for name in request.param]
    yield made
    for place in made:
        place.end()


def start(
    place: Place, option: str, mode: str, *, by_descriptor: bool = False
) -> subprocess.Popen[str]:
    """Start it with a password that is empty; ours alone says so."""
    path = place.directory / "password"
    path.touch(0o600)
    with path.open("rb") as file:
        source = f"pwdfd={file.fileno()}" if by_descriptor else f"pwdfile={path}"
        fds = (file.fileno(),) if by_descriptor else ()
        process = place.start("--log", "file=log", option, source + mode, fds=fds)
    with ControlClient(place.control) as control:
        assert control.get_config() == (1 if option == "--key" else 2)
    assert process.stderr is not None
    if place.program == OURS:
        line = process.stderr.readline()
        assert WARNING in line and option in line
    return process


def end(place: Place, process: subprocess.Popen[str]) -> None:
    with ControlClient(place.control) as control:
        control.shutdown()
    assert process.wait(TIMEOUT_S) == 0


def permanent(place: Place) -> bytes:
    """Return the state that is served, as libtpms marshalled it."""
    with ControlClient(place.control) as control:
        control.init()
        return swtpm_format.decode_blob(control.get_state_blob(Blob.PERMANENT))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by_descriptor", [False, True], ids=["pwdfile", "pwdfd"])
def test_state_with_an_empty_password_is_the_others_too(
    places: list[Place], mode: str, by_descriptor: bool
) -> None:
    first, second = places
    process = start(first, "--key", mode, by_descriptor=by_descriptor)
    states = [permanent(first)]
    end(first, process)
    file = first.names.state(StateType.PERMANENT)
    assert states[0] not in (first.state / file).read_bytes()
    shutil.copy(first.state / file, second.state / file)
    start(second, "--key", mode)
    states.append(permanent(second))
    assert states[0] == states[1]


@pytest.mark.parametrize("mode", MODES)
def test_blob_under_an_empty_migration_password_is_the_others_too(
    places: list[Place], mode: str
) -> None:
    first, second = places
    start(first, "--migration-key", mode, by_descriptor=True)
    start(second, "--migration-key", mode)
    with ControlClient(first.control) as source, ControlClient(second.control) as destination:
        source.init()
        blob = source.get_state_blob(Blob.PERMANENT)
        destination.set_state_blob(Blob.PERMANENT, blob)
        destination.init()
        assert destination.get_config() == 2
    with pytest.raises(swtpm_format.KeyNeeded):
        swtpm_format.decode_blob(blob)
