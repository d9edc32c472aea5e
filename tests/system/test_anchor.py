"""The anchor with real daemons: what was put back is refused, what only crashed is not.

Invariants of the design that are checked: 1 (a response leaves after the anchor, too, has seen the
change) and 2 (never an older TPM, or a fresh one, in place of the last).
"""

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from tests.harness.command import vtpmd
from tests.harness.handover import Host as MovingHost
from tests.harness.handover import (
    Pair,
    assert_serves,
    assert_serves_nothing,
    assert_tail,
    make_host,
)
from tests.harness.lab import Lab
from tests.harness.owners import assert_refuses_to_boot, freeze, hand_over, reconnected
from tests.harness.raw_guest import Facts
from tests.support.emulator_client import Blob, ControlClient
from tests.support.tpm2 import NV_COUNTER, ReturnCode, Tpm, TpmError
from vtpmd.store.anchor import SLOTS, Anchor, Mark
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Emulator, EmulatorKind, Peering
from vtpmd.testing.waiting import wait_until
from vtpmd.wire import swtpm_format

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
INDEX = 0x01500030
KEYS = pytest.mark.parametrize("is_sealed", [False, True], ids=["plain", "sealed"])


class Host:
    """A state directory with an anchor elsewhere, and maybe a key."""

    def __init__(self, lab: Lab, *, is_sealed: bool = False) -> None:
        self.lab = lab
        self.state = lab.new_path("state")
        self.anchor = lab.new_path("anchor")
        self.key: tuple[str, ...] = ()
        if is_sealed:
            path = lab.key_file("17" * 32)
            self.key = ("--key", f"file={path},mode=aes-256-cbc")

    @property
    def options(self) -> tuple[str, ...]:
        return (*self.key, "--anchor", str(self.anchor))

    @contextmanager
    def powered(self) -> Iterator[tuple[Emulator, ControlClient, Tpm]]:
        """Serve the vTPM, started, to a client of both sockets."""
        emulator = self.lab.emulator(VTPMD, self.state, options=self.options)
        with ControlClient(emulator.control_path) as control:
            data = control.attach_data()
            control.init()
            tpm = Tpm(data.transact)
            tpm.startup()
            yield emulator, control, tpm

    def mark(self) -> Mark | None:
        """Return what the anchor says."""
        return self._read_anchor()[0]

    def serial(self) -> int:
        """Return how often the anchor was written."""
        return self._read_anchor()[1]

    def _read_anchor(self) -> tuple[Mark | None, int]:
        """Read it beside the daemon that holds it."""
        copy = self.lab.new_path("anchor")
        shutil.copy(self.anchor, copy)
        with Anchor.open(copy, self.state, is_new=False) as anchor:
            return anchor.mark, anchor.serial

    def refused(self, *options: str) -> tuple[int, str]:
        """Start a vtpmd that must not start, which changes nothing."""
        before = files(self.state), files(self.anchor.parent)
        ended = vtpmd("run", self.state, *(options or self.options))
        assert len(ended.error.splitlines()) == 1
        assert (files(self.state), files(self.anchor.parent)) == before
        return ended.status, ended.error

    def work(self) -> int:
        """Count one up; return what the counter says."""
        with self.powered() as (emulator, _, tpm):
            counter = self.increment(tpm)
            assert emulator.stop() == 0
        return counter

    @staticmethod
    def increment(tpm: Tpm) -> int:
        """Make the counter if it is not there, and count one up."""
        try:
            tpm.nv_increment(INDEX)
        except TpmError:
            tpm.nv_define(INDEX, 8, NV_COUNTER)
            tpm.nv_increment(INDEX)
        return tpm.nv_counter(INDEX)


def files(directory: Path) -> dict[str, bytes]:
    """Return the content of the files of a directory, but for logs and locks."""
    if not directory.exists():
        return {}
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.is_file() and path.name != ".lock"
    }


@KEYS
def test_invariant_1_the_anchor_has_seen_each_acknowledged_commit(
    lab: Lab, is_sealed: bool
) -> None:
    host = Host(lab, is_sealed=is_sealed)
    generation = -1
    with host.powered() as (_, control, tpm):
        for _ in range(6):
            host.increment(tpm)
            mark = host.mark()
            assert mark is not None
            state = swtpm_format.decode_blob(control.get_state_blob(Blob.PERMANENT))
            assert mark.digest == sha256(state).digest()
            assert mark.generation > generation
            generation = mark.generation


@KEYS
def test_stops_and_crashes_are_gone_on_from(lab: Lab, is_sealed: bool) -> None:
    host = Host(lab, is_sealed=is_sealed)
    counters = [host.work() for _ in range(2)]
    for _ in range(3):
        with host.powered() as (emulator, _, tpm):
            counters.append(host.increment(tpm))
            emulator.kill()
    counters.append(host.work())
    assert counters == list(range(counters[0], counters[0] + 6))


def put_back(host: Host, older: Path) -> None:
    """Put an older copy of the whole directory in its place."""
    shutil.rmtree(host.state)
    shutil.copytree(older, host.state)


def empty(host: Host, older: Path) -> None:
    """Leave nothing: without the anchor, the guest would get a new TPM."""
    for path in host.state.iterdir():
        path.unlink()
    assert older.exists()


@KEYS
@pytest.mark.parametrize(
    ("harm", "reason"),
    [(put_back, "an older or another state"), (empty, "holds nothing")],
    ids=["put back", "emptied"],
)
def test_invariant_2_what_was_put_back_is_refused(
    lab: Lab, is_sealed: bool, harm: Callable[[Host, Path], None], reason: str
) -> None:
    host = Host(lab, is_sealed=is_sealed)
    host.work()
    older = lab.new_path("older")
    shutil.copytree(host.state, older)
    host.work()
    newer = lab.new_path("newer")
    shutil.copytree(host.state, newer)
    harm(host, older)
    status, line = host.refused()
    assert status == 6
    assert reason in line
    put_back(host, newer)
    host.work()


def test_canary_without_the_anchor_it_would_not_be_seen(lab: Lab) -> None:
    host = Host(lab)
    first = host.work()
    older = lab.new_path("older")
    shutil.copytree(host.state, older)
    host.work()
    put_back(host, older)
    with ControlClient(lab.emulator(VTPMD, host.state).control_path) as control:
        data = control.attach_data()
        control.init()
        tpm = Tpm(data.transact)
        tpm.startup()
        assert tpm.nv_counter(INDEX) == first


def test_an_older_state_is_trusted_when_told_to(lab: Lab) -> None:
    """By vtpmd recover, which shows it first; or by emptying the anchor."""
    host = Host(lab)
    first = host.work()
    older = lab.new_path("older")
    shutil.copytree(host.state, older)
    for way in ("recover", "empty"):
        host.work()
        put_back(host, older)
        assert host.refused()[0] == 6
        if way == "recover":
            ended = vtpmd("recover", host.state, "--anchor", host.anchor)
            assert ended.status == 6
            assert "it was put back" in ended.output
            ended = vtpmd("recover", host.state, "--anchor", host.anchor, "--restore")
            assert ended.status == 0
        else:
            host.anchor.write_bytes(b"")
        assert host.work() == first + 1


def test_an_anchor_that_is_not_there_is_not_made_for_a_vtpm_that_is(lab: Lab) -> None:
    """What should hold it may not be mounted."""
    host = Host(lab)
    host.work()
    host.anchor.unlink()
    status, line = host.refused()
    assert status == 1
    assert "mount what holds it, or make an empty file" in line
    host.anchor.touch()
    host.work()


def test_what_swtpm_has_done_since_is_not_trusted_by_itself(lab: Lab) -> None:
    host = Host(lab)
    host.work()
    with ControlClient(lab.emulator(SWTPM, host.state).control_path) as control:
        data = control.attach_data()
        control.init()
        tpm = Tpm(data.transact)
        tpm.startup()
        tpm.nv_increment(INDEX)
        control.shutdown()
    assert host.refused()[0] == 6


def test_an_anchor_serves_one_vtpm(lab: Lab) -> None:
    """While it is in use, and afterwards."""
    first, second = Host(lab), Host(lab)
    second.anchor = first.anchor
    with first.powered() as (emulator, _, tpm):
        first.increment(tpm)
        ended = vtpmd("run", second.state, *second.options)
        assert ended.status == 3
        assert f"anchor {first.anchor} is in use" in ended.error
        assert emulator.stop() == 0
    lone = Host(lab)
    second.anchor = lone.anchor
    second.work()
    second.anchor = first.anchor
    status, line = second.refused()
    assert status == 1
    assert "is another vTPM's" in line


def test_invariant_1_a_commit_that_the_anchor_has_not_seen_is_not_acknowledged(lab: Lab) -> None:
    """The TPM says so until the guest restarts; then it goes on, and nothing is lost."""
    host = Host(lab)
    with host.powered() as (emulator, control, tpm):
        counter = host.increment(tpm)
        (engine,) = emulator.engines()
        # The state's file and the journal's first records end before that; a slot does not.
        resource.prlimit(engine, resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        with pytest.raises(TpmError) as failure:
            for _ in range(2):
                host.increment(tpm)
                counter += 1
        assert failure.value.return_code == ReturnCode.FAILURE
        resource.prlimit(
            engine, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        control.init()
        tpm.startup()
        assert tpm.nv_counter(INDEX) in (counter, counter + 1)
        host.increment(tpm)
        assert "cannot write the anchor: File too large" in emulator.program.output
        assert emulator.stop() == 0
    host.work()


@KEYS
def test_a_vtpm_that_arrives_takes_its_anchor_along(lab: Lab, is_sealed: bool) -> None:
    """The anchor is that of the host: it trusts what the source has granted, also after a crash."""
    host = Host(lab, is_sealed=is_sealed)
    peering = Peering(credentials=credentials())
    source = lab.peer(peering)
    destination = lab.peer(peering, host.state, host.options)
    guest = lab.raw_guest(source)
    guest.boot()
    manage = lab.management(source)
    assert manage.arm(destination.address)["event"] == "VTPM_ARMED"
    guest.work()
    blobs = guest.save()
    assert_tail(blobs)
    arrived = lab.raw_guest(destination)
    arrived.load(blobs)
    manage.wait_for("VTPM_HANDED_OVER")
    facts = arrived.facts()
    destination.kill()
    with host.powered() as (emulator, _, tpm):
        assert tpm.nv_read(0x01500001, 64) == facts.nv
        host.increment(tpm)
        assert emulator.stop() == 0
    host.work()


NO_LIMIT = resource.RLIM_INFINITY
SLOT_1_BYTES = 4000  # a file of so many bytes ends before the anchor's second slot


def limit_files(host: MovingHost, bytes_max: int) -> None:
    """Have an engine's writes beyond so many bytes fail."""
    (engine,) = host.vtpmd.engines()
    resource.prlimit(engine, resource.RLIMIT_FSIZE, (bytes_max, NO_LIMIT))


def pair_with_way_back(lab: Lab, host: Host, slot: int) -> Pair:
    """Return a pair whose armed vTPM was at its destination before, which has a journal of it.

    The anchor there is written in that slot next.
    """
    first = lab.peer(Peering(credentials=credentials()), host.state, host.options)
    source, there = MovingHost(first, lab.management(first), lab.raw_guest(first)), make_host(lab)
    source.guest.boot()
    pair = Pair(source, there, lab.link(there.vtpmd))
    assert pair.arm()["event"] == "VTPM_ARMED"
    while host.serial() % SLOTS == slot:
        source.guest.work()
    hand_over(pair)
    for _ in range(3):
        there.guest.work()  # the state is one that the first host has not had
    source = reconnected(lab, source)
    source.guest.control.stop()  # as a QEMU says that starts
    assert (host.state / "tpm2-00.journal").exists()
    back = Pair(there, source, lab.link(first))
    assert back.arm()["event"] == "VTPM_ARMED"
    there.guest.work()
    return back


def load_in_vain(pair: Pair, bytes_max: int) -> None:
    """Give the vTPM to a destination that is granted it, but cannot write down all it has to."""
    blobs = freeze(pair)
    limit_files(pair.destination, bytes_max)
    pair.destination.guest.load(blobs)
    program = pair.destination.vtpmd.program
    wait_until(lambda: "commands wait, and it is tried again" in program.output)


def granted_in_vain(lab: Lab, slot: int) -> tuple[Host, Facts]:
    """Return a host that lost power before what it was granted was taken up, and its facts."""
    host = Host(lab)
    pair = pair_with_way_back(lab, host, slot)
    facts = pair.source.guest.facts()
    load_in_vain(pair, SLOT_1_BYTES)
    pair.destination.vtpmd.kill()
    return host, facts


@pytest.mark.parametrize("slot", [0, 1], ids=["announced", "not announced"])
def test_invariant_2_granted_vtpm_starts_when_the_anchor_had_not_seen_it(
    lab: Lab, slot: int
) -> None:
    """The power fails when its old journal may be gone, and only tpm2-00.incoming has its state."""
    host, facts = granted_in_vain(lab, slot)
    with host.powered() as (emulator, _, tpm):
        assert tpm.nv_read(0x01500001, 64) == facts.nv
        assert emulator.stop() == 0
    host.work()


@pytest.mark.parametrize("slot", [0, 1], ids=["announced", "not announced"])
def test_vtpm_that_goes_back_leaves_a_directory_that_starts(lab: Lab, slot: int) -> None:
    """It may go back at once if nothing was begun; else when the anchor can be written."""
    host = Host(lab)
    pair = pair_with_way_back(lab, host, slot)
    load_in_vain(pair, SLOT_1_BYTES)
    pair.source.guest.resume()
    if slot == 0:
        wait_until(lambda: "cannot be given back yet" in pair.destination.vtpmd.program.output)
        assert_serves_nothing(pair.source.guest)
        limit_files(pair.destination, NO_LIMIT)
        pair.source.guest.resume()
    wait_until(lambda: pair.source.manage.migration()["outcome"] == "go-on")
    assert_serves(pair.source.guest)
    assert pair.destination.vtpmd.stop() == 0
    destination = lab.peer(Peering(credentials=credentials()), host.state, host.options)
    there = MovingHost(destination, lab.management(destination), lab.raw_guest(destination))
    assert_refuses_to_boot(there)
    # It is the same vTPM's still, and takes it again.
    assert pair.source.manage.arm(destination.address)["event"] == "VTPM_ARMED"
    hand_over(pair._replace(destination=reconnected(lab, there)))


@pytest.mark.parametrize("command", ["fold", "rekey"])
@pytest.mark.parametrize("slot", [0, 1], ids=["announced", "not announced"])
def test_anchor_hears_of_what_is_taken_up_without_a_start(
    lab: Lab, command: str, slot: int
) -> None:
    """What recover and owner --claim advise does not make a state that nothing is wrong with."""
    host, facts = granted_in_vain(lab, slot)
    before = host.key
    new_key: tuple[str, ...] = ()
    if command == "rekey":
        path = lab.key_file("17" * 32)
        host.key = ("--key", f"file={path},mode=aes-256-cbc")
        new_key = ("--new-key", host.key[1])
    for _ in range(2):  # the second time there is nothing left to do
        ended = vtpmd(command, host.state, *before, *new_key, "--anchor", host.anchor)
        assert ended.status == 0, ended
    with host.powered() as (emulator, _, tpm):
        assert tpm.nv_read(0x01500001, 64) == facts.nv
        assert emulator.stop() == 0
