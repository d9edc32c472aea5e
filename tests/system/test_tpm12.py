"""A TPM 1.2, served as swtpm serves it: beside what test_interop.py and others have of both.

Invariant 1: a response to a command that changed NV leaves only after the change is durable.
Invariant 2: never a fresh TPM in place of a damaged, hidden or foreign one.
Invariant 12: what a guest has saved to sleep is there when it wakes up, and not otherwise.
"""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.swtpm_program import OURS, PROGRAMS, TIMEOUT_S, Place
from tests.support import states
from tests.support.emulator_client import (
    INIT_DELETE_VOLATILE,
    Blob,
    ControlClient,
)
from tests.support.tpm12 import NV_INDEX, StartupType, Tpm12, Tpm12Error, get_random
from vtpmd.store.directory import names_of
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType, TpmVersion

NAMES = names_of(TpmVersion.TPM_1_2)
VTPMD = OURS.with_name("vtpmd")
OWNER, STORAGE, USAGE, DIGEST = (letter * 20 for letter in (b"o", b"s", b"k", b"d"))
SECRET = b"kept over all of it"
INVALID_POSTINIT = 0x26

MakePlace = Callable[[str], Place]


class Served(NamedTuple):
    """A TPM that is on, and what speaks with it."""

    control: ControlClient
    tpm: Tpm12


@pytest.fixture
def make_place(tmp_path: Path) -> Iterator[MakePlace]:
    numbers, made = count(), []

    def make(program: str) -> Place:
        made.append(Place(PROGRAMS[program], tmp_path / str(next(numbers)), TpmVersion.TPM_1_2))
        return made[-1]

    yield make
    for each in made:
        each.end()


@contextmanager
def served(place: Place) -> Iterator[Served]:
    """Start a place's program; it is stopped in the end, and only then not asked again."""
    process = place.start()
    with ControlClient(place.control) as control, closing(control.attach_data()) as data:
        yield Served(control, Tpm12(data.transact))
        if process.poll() is None:
            control.shutdown()
    process.wait(TIMEOUT_S)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)


def move(first: Place, second: Place) -> None:
    if second.state.exists():
        second.state.rmdir()
    first.state.rename(second.state)


def test_owner_and_key_stay_whoever_serves(make_place: MakePlace) -> None:
    """Made under vtpmd, used under swtpm, and again under vtpmd."""
    first, second = make_place("vtpmd"), make_place("swtpm")
    with served(first) as (control, tpm):
        control.init()
        tpm.startup()
        tpm.enable()
        control.stop()
        control.init()
        tpm.startup()
        tpm.create_endorsement_key()
        tpm.take_ownership(OWNER, STORAGE)
        key = tpm.create_key(STORAGE, USAGE)
        key.verify(DIGEST, tpm.sign(tpm.load_key(key, STORAGE), DIGEST, USAGE))
    move(first, second)
    with served(second) as (control, tpm):
        control.init()
        tpm.startup()
        key.verify(DIGEST, tpm.sign(tpm.load_key(key, STORAGE), DIGEST, USAGE))
    move(second, first)
    with served(first) as (control, tpm):
        control.init()
        tpm.startup()
        key.verify(DIGEST, tpm.sign(tpm.load_key(key, STORAGE), DIGEST, USAGE))


def test_invariant_1_what_was_acknowledged_is_there_after_a_crash(make_place: MakePlace) -> None:
    place = make_place("vtpmd")
    process = place.start()
    with ControlClient(place.control) as control, closing(control.attach_data()) as data:
        control.init()
        tpm = Tpm12(data.transact)
        tpm.startup()
        tpm.nv_define(NV_INDEX, len(SECRET))
        tpm.nv_write(NV_INDEX, SECRET)
        process.send_signal(signal.SIGKILL)
        process.wait(TIMEOUT_S)
    assert (place.state / NAMES.journal).exists()
    told = json.loads(run(VTPMD, "status", "--json", place.state).stdout)
    assert told["journal"] is True
    assert told["tpm"] == "1.2"
    for command in ("recover", "owner"):
        assert run(VTPMD, command, place.state).returncode == 0
    folded = run(VTPMD, "fold", place.state)
    assert folded.returncode == 0, folded.stderr
    files = {path.name for path in place.state.iterdir()}
    assert files == {".lock", NAMES.permanent, "vtpmd.link"}
    swtpm = make_place("swtpm")
    (place.state / "vtpmd.link").unlink()
    move(place, swtpm)
    with served(swtpm) as (control, tpm):
        control.init()
        tpm.startup()
        assert tpm.nv_read(NV_INDEX, len(SECRET)) == SECRET


@pytest.fixture
def asleep(make_place: MakePlace) -> Path:
    """A directory whose TPM was stored and stopped as its guest slept: it has each state."""
    place = make_place("vtpmd")
    with served(place) as (control, tpm):
        control.init()
        tpm.startup()
        tpm.save_state()
        control.store_volatile()
    assert all((place.state / NAMES.state(kind)).exists() for kind in StateType)
    return place.state


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    state = swtpm_format.decode_file(file.read_bytes())
    file.write_bytes(swtpm_format.encode_file(change(state)))


def test_a_directory_is_right_by_what_libtpms_says_of_a_tpm_1_2(asleep: Path) -> None:
    """Of each of its states; a libtpms that was asked of a TPM 2.0 would refuse them all."""
    assert run(VTPMD, "fold", asleep).returncode == 0
    recovered = run(VTPMD, "recover", asleep)
    assert (recovered.returncode, recovered.stderr) == (0, "")
    assert "nothing is wrong" in recovered.stdout
    printed = run(OURS, "socket", "--print-info", "1", "--tpmstate", f"dir={asleep}")
    assert json.loads(printed.stdout)["TPMSpecification"]["family"] == "1.2"


@pytest.mark.parametrize(
    "change",
    [states.damaged, lambda _: states.LATER],
    ids=["altered", "of a TPM 2.0 that a later libtpms made"],
)
def test_invariant_2_a_permanent_state_that_libtpms_refuses_is_damaged(
    asleep: Path, change: Callable[[bytes], bytes]
) -> None:
    """It is never said to be too new: a TPM 1.2 is of no format level."""
    rewrite(asleep / NAMES.permanent, change)
    before = {path.name: path.read_bytes() for path in asleep.glob("tpm-00.*")}
    folded, recovered = (run(VTPMD, command, asleep) for command in ("fold", "recover"))
    assert (folded.returncode, recovered.returncode) == (5, 7)
    for said in (folded.stderr, recovered.stdout):
        assert f"{NAMES.permanent} is damaged: libtpms refuses it with 0x" in said
    printed = run(OURS, "socket", "--print-info", "1", "--tpmstate", f"dir={asleep}")
    assert printed.returncode == 1
    assert "is damaged" in printed.stderr
    assert {path.name: path.read_bytes() for path in asleep.glob("tpm-00.*")} == before


def test_invariant_2_states_without_the_permanent_one_are_damaged(asleep: Path) -> None:
    (asleep / NAMES.permanent).unlink()
    folded = run(VTPMD, "fold", asleep)
    assert folded.returncode == 5
    assert f"{NAMES.volatile} is damaged: libtpms refuses it with 0x" in folded.stderr


@pytest.mark.parametrize("kind", [StateType.VOLATILE, StateType.SAVESTATE])
def test_another_state_that_libtpms_refuses_is_given_up_alone(
    asleep: Path, kind: StateType
) -> None:
    name = NAMES.state(kind)
    rewrite(asleep / name, states.damaged)
    assert run(VTPMD, "fold", asleep).returncode == 5
    recovered = run(VTPMD, "recover", asleep)
    assert recovered.returncode == 5
    assert f"would be lost: {name}: the guest begins with a reset" in recovered.stdout
    assert run(VTPMD, "recover", "--restore", asleep).returncode == 0
    assert not (asleep / name).exists()
    assert run(VTPMD, "fold", asleep).returncode == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_guest_that_sleeps_gets_its_pcrs_back(make_place: MakePlace, program: str) -> None:
    """As QEMU has it: a reset, and the same program or one that was started anew."""
    place = make_place(program)
    with served(place) as (control, tpm):
        control.init()
        tpm.startup()
        tpm.extend(5, DIGEST)
        before = tpm.pcr(5)
        tpm.save_state()
        control.stop()
        control.init()
        tpm.startup(StartupType.STATE)
        assert tpm.pcr(5) == before
        tpm.save_state()
    assert (place.state / NAMES.savestate).exists()
    with served(place) as (control, tpm):
        control.init()
        tpm.startup(StartupType.STATE)
        assert tpm.pcr(5) == before
    assert not (place.state / NAMES.savestate).exists()


@pytest.mark.parametrize("destination", PROGRAMS)
@pytest.mark.parametrize("source", PROGRAMS)
def test_a_guest_moves_as_it_sleeps_and_wakes_up(
    make_place: MakePlace, source: str, destination: str
) -> None:
    first, second = make_place(source), make_place(destination)
    with served(first) as (giving, theirs), served(second) as (taking, tpm):
        giving.init()
        theirs.startup()
        theirs.extend(5, DIGEST)
        before = theirs.pcr(5)
        theirs.save_state()
        pass_on(giving, taking)
        taking.stop()
        taking.init()
        tpm.startup(StartupType.STATE)
        assert tpm.pcr(5) == before


def pass_on(giving: ControlClient, taking: ControlClient) -> None:
    for kind in Blob:
        if blob := giving.get_state_blob(kind):  # as QEMU does
            taking.set_state_blob(kind, blob)
    taking.init(INIT_DELETE_VOLATILE)


def test_invariant_12_a_saved_state_serves_once(make_place: MakePlace) -> None:
    """A guest that woke up and went on cannot go back to the PCRs from before that."""
    first, second = make_place("vtpmd"), make_place("vtpmd")
    with served(first) as (giving, theirs), served(second) as (taking, tpm):
        giving.init()
        theirs.startup()
        theirs.save_state()
        assert giving.get_state_blob(Blob.SAVESTATE)
        theirs.extend(5, DIGEST)
        assert not giving.get_state_blob(Blob.SAVESTATE)
        assert not (first.state / NAMES.savestate).exists()
        pass_on(giving, taking)
        taking.stop()
        taking.init()
        with pytest.raises(Tpm12Error):
            tpm.startup(StartupType.STATE)


def test_invariant_12_a_saved_state_that_nobody_saved_is_not_taken(make_place: MakePlace) -> None:
    """It is given all the same by swtpm's of today, and by who would have the guest's PCRs back."""
    first, second = make_place("vtpmd"), make_place("vtpmd")
    with served(first) as (giving, theirs), served(second) as (taking, tpm):
        giving.init()
        theirs.startup()
        theirs.save_state()
        stale = giving.get_state_blob(Blob.SAVESTATE)
        assert stale
        theirs.extend(5, DIGEST)
        for kind in (Blob.PERMANENT, Blob.VOLATILE):
            taking.set_state_blob(kind, giving.get_state_blob(kind) or b"")
        taking.set_state_blob(Blob.SAVESTATE, stale)
        taking.init(INIT_DELETE_VOLATILE)
        assert tpm.pcr(5) == theirs.pcr(5)
        taking.stop()
        taking.init()
        with pytest.raises(Tpm12Error):
            tpm.startup(StartupType.STATE)
        assert not (second.state / NAMES.savestate).exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_flags_start_it_up(make_place: MakePlace, program: str) -> None:
    place = make_place(program)
    place.start("--flags", "not-need-init,startup-clear")
    with ControlClient(place.control) as control, closing(control.attach_data()) as data:
        tpm = Tpm12(data.transact)
        assert len(tpm.random(8)) == 8
        with pytest.raises(Tpm12Error) as caught:
            tpm.startup()
        assert caught.value.code == INVALID_POSTINIT


@pytest.mark.parametrize("program", PROGRAMS)
def test_answers_of_a_tpm_that_is_off_and_its_capabilities(
    make_place: MakePlace, program: str
) -> None:
    with served(make_place(program)) as (control, tpm):
        assert control.get_capability() & 0xFFFF == 0x7FFF
        with pytest.raises(Tpm12Error) as caught:
            tpm.execute(get_random(4))
        assert caught.value.code == 0x9  # TPM_FAIL


def test_invariant_2_a_directory_is_not_taken_for_another_tpms(
    make_place: MakePlace, tmp_path: Path
) -> None:
    place = make_place("vtpmd")
    with served(place) as (control, _):
        control.init()
    for command in ([*place.options(), "--tpm2"], [VTPMD, "run", "--tpm", "2.0", place.state]):
        done = run(*command)
        assert done.returncode == 1
        assert "holds a TPM 1.2, not a TPM 2.0" in done.stderr
        assert done.stderr.count("\n") == 1
    both = tmp_path / "both"
    both.mkdir()
    for version in TpmVersion:
        (both / names_of(version).permanent).write_bytes(b"")
    for command in (["run"], ["fold"], ["recover"], ["status"]):
        done = run(VTPMD, *command, both)
        assert "holds a TPM 1.2 and a TPM 2.0" in done.stderr
        assert done.stderr.count("\n") == 1
    assert {path.name for path in both.iterdir()} <= {
        *(names_of(version).permanent for version in TpmVersion),
        ".lock",
    }


def test_invariant_2_no_new_tpm_beside_a_copy_of_one(make_place: MakePlace) -> None:
    """What swtpm leaves when it could not put its state's file in place."""
    place = make_place("vtpmd")
    (place.state / NAMES.backup).write_bytes(b"what is left")
    done = run(*place.options())
    assert done.returncode == 1
    assert NAMES.backup in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (place.state / NAMES.permanent).exists()


def test_run_makes_one_where_it_is_told_to_and_goes_on_with_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for options, says in ((["--tpm", "1.2"], "vtpmd: a new TPM 1.2 was made"), ([], "")):
        process = subprocess.Popen(
            [VTPMD, "run", state, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"-chardev ")
            with ControlClient(state / "vtpmd.sock") as control:
                with closing(control.attach_data()) as data:
                    control.init()
                    Tpm12(data.transact).startup()
                control.shutdown()
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            _, errors = process.communicate()
        assert errors.decode().startswith(says)
        assert errors.count(b"\n") == bool(says)
    assert (state / NAMES.permanent).exists()
    done = run(VTPMD, "run", "--tpm", "3.0", state)
    assert done.returncode == 2
    assert "is no version of a TPM" in done.stderr
