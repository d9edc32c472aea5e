"""The bench measures real emulators end to end, and its client refuses what it cannot measure."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.bench import __main__ as bench
from tests.bench.chapters import CHAPTERS, Chapter, export, keys, round_trip, survive
from tests.bench.chapters.reset import Step as ResetStep
from tests.bench.chapters.round_trip import Operation, Placement
from tests.bench.durable import device, library
from tests.bench.durable.recovery import Left
from tests.bench.durable.subjects import (
    APPEND,
    NUMBER,
    OPERATIONS,
    SYNCED_SWTPM,
    appending,
    prepare,
)
from tests.bench.durable.subjects import EMULATORS as DURABLE_EMULATORS
from tests.bench.durable.subjects import Size as DurableSize
from tests.bench.emulators import SWTPM, VTPMD, BenchError, Emulator, cores, running
from tests.bench.moving.guests import WITHOUT_LOAD, GuestTpm
from tests.bench.moving.hand_over import Step
from tests.bench.moving.load import Activity, Size
from tests.bench.moving.pair import Mode
from tests.bench.report import Result
from tests.harness.lab import Lab
from tests.support import tpm2
from tests.support.emulator_client import ControlClient, DataSocket
from vtpmd.testing.disk import Disk
from vtpmd.testing.program import Program
from vtpmd.wire.swtpm_format import LINEAGE_BYTES

USAGE_STATUS = 2
# The longest takes a minute beside little else, and shares two cores with whatever there is.
CHAPTER_TIMEOUT_S = 600
WRITTEN_BYTES = 1 << 16
# Of a hand-over, as the source's session reports them.
PHASES = {
    "source: write the owner record",
    "source: capture",
    "source: encode",
    "source: retire",
    "destination: apply the tail",
    "destination: wait for the grant",
    "destination: start the TPM",
}
NV_INDEX = tpm2.Handle.NV_FIRST + 0x50_0000


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the C client."""
    return round_trip.build_client(tmp_path_factory.mktemp("client"))


@pytest.fixture
def data_socket(tmp_path: Path) -> Iterator[DataSocket]:
    """Give the data socket of an swtpm that is ready for TPM commands."""
    with running(SWTPM, tmp_path) as started, ControlClient(started.control) as control:
        data = control.attach_data()
        control.init()
        tpm2.Tpm(data.transact).startup()
        data.socket.setblocking(True)
        yield data


def measure(client: Path, data: DataSocket, *commands: bytes) -> dict[str, list[list[float]]]:
    """Measure a sample of three, in two rounds, and return the samples by subject."""
    core = cores()[0]
    operation = Operation(name="tried", commands=list(commands), samples_per_round=3)
    placement = Placement(name="one core", client_core=core, emulator_core=core)
    return round_trip.measure(client, operation, placement, {"swtpm": data}, 2).rounds_ns


def test_client_gives_every_sample_of_every_round(client: Path, data_socket: DataSocket) -> None:
    measured = measure(client, data_socket, tpm2.get_random(32), tpm2.pcr_read(0))
    assert set(measured) == {"swtpm", "echo"}
    for rounds in measured.values():
        assert [len(samples) for samples in rounds] == [3, 3]
        assert all(sample > 0 for samples in rounds for sample in samples)


def test_client_lets_lists_of_commands_take_turns(client: Path, data_socket: DataSocket) -> None:
    """A sample behind the five that warm up is the sixth: of the second list."""
    tpm = tpm2.Tpm(data_socket.transact)
    tpm.nv_define(NV_INDEX, 1)
    commands, others = ([tpm2.nv_write(NV_INDEX, content)] for content in (b"a", b"b"))
    core = cores()[0]
    operation = Operation(name="tried", commands=commands, others=others, samples_per_round=1)
    placement = Placement(name="one core", client_core=core, emulator_core=core)
    round_trip.measure(client, operation, placement, {"swtpm": data_socket}, 1)
    assert tpm.nv_read(NV_INDEX, 1) == b"b"


def test_client_refuses_a_response_code(client: Path, data_socket: DataSocket) -> None:
    """0x911 is TPM_RC_REFERENCE_H1: the second handle is of no loaded object."""
    with pytest.raises(BenchError, match=r"tried: client: swtpm: .*code 0x911$"):
        measure(client, data_socket, tpm2.evict_control(0x8000_0000, 0x8100_0000))


@pytest.mark.parametrize(
    "response", [b"\x80\x01\0\0\0\x0b\0\0\0\0" + b"xx", b"\x80\x01\0\0\0\x09\0\0\0\0", b""]
)
def test_client_refuses_what_is_no_response(client: Path, response: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(response)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(BenchError, match="tried: client: swtpm: "):
            measure(client, DataSocket(ours), tpm2.get_random(32))


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "1 1 0 0 00",
        "1 1 0 0 0g a=3",
        "1 1 0 0 +1 a=3",
        "1 1 0 0 000 a=3",
        "x 1 0 0 00 a=3",
        "1 1 0 0 00 a",
        "1 1 0 0 00/00/00 a=3",
    ],
)
def test_client_refuses_a_wrong_command_line(client: Path, arguments: str) -> None:
    done = subprocess.run([client, *arguments.split()], capture_output=True, text=True, timeout=20)
    assert done.returncode == USAGE_STATUS
    assert done.stdout == ""
    assert "usage: client " in done.stderr


def test_an_emulator_that_ends_is_reported_with_its_last_line(tmp_path: Path) -> None:
    broken = Emulator(
        name="broken", command=lambda _state, _control: ["sh", "-c", "echo why; exit 7"]
    )
    with (
        pytest.raises(BenchError, match=r"^broken ended with status 7: why$"),
        running(broken, tmp_path) as started,
    ):
        started.connect()


def test_what_a_process_writes_is_counted(tmp_path: Path) -> None:
    """For the process that made pages dirty, and for the device."""
    if (statistics := device.statistics_of(tmp_path)) is None:
        pytest.skip("the temporary directory is on no block device")
    before = (device.bytes_by_process(os.getpid()), device.bytes_to_device(statistics))
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(WRITTEN_BYTES))
        file.flush()
        os.fsync(file.fileno())
    assert device.bytes_by_process(os.getpid()) - before[0] >= WRITTEN_BYTES
    assert device.bytes_to_device(statistics) - before[1] >= WRITTEN_BYTES


def test_what_is_on_no_block_device_has_no_statistics() -> None:
    assert device.statistics_of(Path("/proc")) is None


def test_libtpms_alone_has_every_command_change_the_state(tmp_path: Path) -> None:
    """A second write of the same 8 bytes changes nothing, and an index that is not there fails."""
    state_file = prepare(VTPMD, tmp_path, DurableSize.SMALL)
    for commands, message in (
        ([tpm2.nv_write(NUMBER, bytes(8))], "a command changed nothing"),
        ([tpm2.nv_write(NV_INDEX - 1, bytes(8))], "the TPM refused a command"),
    ):
        tried = Operation(name="tried", commands=commands)
        with pytest.raises(BenchError, match=f"^tried: library: {message}$"):
            library.measure(tmp_path, state_file, tried, 3)
    assert library.measure(tmp_path, state_file, OPERATIONS[0], 3).count == 3


def test_the_append_writes_a_sector_for_each_command(tmp_path: Path) -> None:
    with appending(tmp_path) as floor:
        tpm2.Tpm(floor.data.transact).nv_increment(NV_INDEX)
        tpm2.Tpm(floor.data.transact).nv_increment(NV_INDEX)
    sector = 512
    content = (tmp_path / floor.name).read_bytes()
    assert content.rstrip(b"\0") == b"\1" * sector + b"\2" * sector


@pytest.mark.parametrize("synced", [True, False])
def test_the_synced_swtpm_loses_nothing_with_the_power(lab: Lab, synced: bool) -> None:
    """And swtpm as Debian has it does: that is why there is the other one."""
    disk = Disk(lab.directory / "disk")
    lab.close_at_end(disk)
    emulator = SYNCED_SWTPM if synced else SWTPM
    state = disk.path / "state"
    state.mkdir()
    program = Program("swtpm", emulator.command(state, lab.directory / "tpm"), lab.directory)
    program.connect(lab.directory / "tpm").close()
    try:
        with ControlClient(lab.directory / "tpm") as control:
            tpm = tpm2.Tpm(control.attach_data().transact)
            control.init()
            tpm.startup()
            tpm.nv_define(NV_INDEX, 8)
            disk.lose_power()
    finally:
        program.kill()
    disk.repair()
    found = state / "tpm2-00.permall"
    assert (found.exists() and found.stat().st_size > 0) == synced


def test_bench_measures_every_chapter_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "measure", lambda _, *, quick: Result(data={"quick": quick}))
    assert bench.main(["--quick", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (written,) = tmp_path.iterdir()
    assert json.loads(written.read_text()) == printed
    assert {chapter.name for chapter in CHAPTERS} <= set(printed)


@pytest.mark.timeout(CHAPTER_TIMEOUT_S)
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_bench_measures_a_chapter(chapter: Chapter) -> None:
    """Each in a test of its own: together they took longer than a test may."""
    CHECKS[chapter.name](json.loads(json.dumps(bench.measure(chapter, quick=True).data)))


def check_round_trip(measured: dict[str, Any]) -> None:
    """Both emulators were measured, and what the sockets alone take."""
    for operation in measured["operations"]:
        assert set(operation["round_trip_ns"]) == {"swtpm", "vtpmd", "echo"}


def check_start_up(measured: dict[str, Any]) -> None:
    """Every process's memory was looked at."""
    processes = {name for each in measured["memory_kib"] for name in each}
    assert processes == {"swtpm", "vtpmd"}


def check_reset(measured: dict[str, Any]) -> None:
    """Each step of both emulators was."""
    for steps in measured["resets_us"].values():
        assert set(steps) == set(ResetStep)
    assert set(measured["resets_us"]) == {"swtpm", "vtpmd"}


def check_store(measured: dict[str, Any]) -> None:
    """Something was."""
    assert measured["changes"]


def check_durable_writes(measured: dict[str, Any]) -> None:
    """Each subject committed at each size, and swtpm rewrote all of its state each time."""
    commits = {(each["size"], each["operation"]): each for each in measured["commits"]}
    assert set(commits) == set(product(DurableSize, (each.name for each in OPERATIONS)))
    names = {emulator.name for emulator in DURABLE_EMULATORS}
    for (size, _), each in commits.items():
        assert set(each["commit_ns"]) == names | {APPEND, "echo"}
        assert set(each["written_bytes"]) == names
        assert 0 < each["library_ns"]["percentiles"]["50"] < each["commit_ns"]["vtpmd"]["mean"]
        state_bytes = int(size.removesuffix(" KB")) * 1000
        written = each["written_bytes"][SWTPM.name]["by_process"]["percentiles"]["50"]
        # On a file system without a block device a process writes nothing.
        assert written > state_bytes or each["written_bytes"][SWTPM.name]["to_device"] is None
    for starts in measured["starts"]:
        assert set(starts["starts_ms"]) == set(Left)


def check_moving(measured: dict[str, Any]) -> None:
    """A tail is shorter than blobs, every guest has migrated, and a session made its rounds."""
    medians = {
        (each["size"], each["activity"], each["mode"]): each["stream_bytes"]["percentiles"]["50"]
        for each in measured["hand_overs"]
    }
    assert set(medians) == set(product(Size, Activity, Mode))
    for size, activity in product(Size, Activity):
        swtpm, blobs, tail, floor = (medians[size, activity, mode] for mode in Mode)
        assert floor == tail < swtpm == blobs - LINEAGE_BYTES  # which says whose it is
    for each in measured["hand_overs"]:
        assert set(each["phases_us"]) == (PHASES if each["mode"] == Mode.TAIL else set())
        assert all(each["steps_us"][step]["mean"] > 0 for step in (Step.GET_PERMANENT, Step.INIT))
    guests = {(each["activity"], each["tpm"]): each for each in measured["migrations"]}
    assert set(guests) == set(product(Activity, GuestTpm)) - set(
        product([Activity.LOAD], WITHOUT_LOAD)
    )
    for (_, tpm), each in guests.items():
        assert all(run["passes"] > 0 for run in each["migrations"])
        assert all(bool(run["share_us"]) == (tpm != GuestTpm.NONE) for run in each["migrations"])
        assert all(bool(run["tail_bytes"]) == (tpm == GuestTpm.VTPMD) for run in each["migrations"])
    assert measured["throughput"]["rounds"] > len(measured["throughput"]["armed_per_s"])


def check_keys(measured: dict[str, Any]) -> None:
    """Every guest has migrated under every load, and vtpmd's vTPM as a tail."""
    guests = {(each["load"], each["tpm"]): each["migrations"] for each in measured["migrations"]}
    tpms = (GuestTpm.SWTPM, GuestTpm.VTPMD)
    assert set(guests) == set(product((keys.IDLE, *keys.LOADS), tpms))
    for (_, tpm), migrations in guests.items():
        assert all(bool(run["tail_bytes"]) == (tpm == GuestTpm.VTPMD) for run in migrations)


def check_survive(measured: dict[str, Any]) -> None:
    """All that is timed was answered, beside a vtpmd that is killed and beside one that is not."""
    answers = measured["answers_ms"]
    assert set(answers) == set(survive.When)
    for answered in answers.values():
        assert {what: each["count"] > 0 for what, each in answered.items()} == dict.fromkeys(
            survive.What, True
        )


def check_export(measured: dict[str, Any]) -> None:
    """All that is timed was answered, beside exports of each kind and beside none."""
    answers = measured["answers_ms"]
    assert set(answers) == set(export.When)
    for answered in answers.values():
        assert {what: each["count"] > 0 for what, each in answered.items()} == dict.fromkeys(
            export.What, True
        )


CHECKS = {
    "round-trip": check_round_trip,
    "start-up": check_start_up,
    "reset": check_reset,
    "store": check_store,
    "moving": check_moving,
    "keys": check_keys,
    "durable-writes": check_durable_writes,
    "survive": check_survive,
    "export": check_export,
}


def test_an_unknown_chapter_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench.main(["no-such-chapter"])
    assert error.value.code == USAGE_STATUS
    assert "there is no chapter no-such-chapter" in capsys.readouterr().err
