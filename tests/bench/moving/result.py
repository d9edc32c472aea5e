"""The tables, targets and data of the chapter about moving."""

from itertools import product
from typing import NamedTuple

from qemu.qmp import QMPError

from tests.bench.emulators import BenchError
from tests.bench.moving import armed, guests
from tests.bench.moving.armed import Throughput
from tests.bench.moving.guests import GuestTpm, Migrations
from tests.bench.moving.hand_over import Step
from tests.bench.moving.load import Activity, Size, prepare
from tests.bench.moving.pair import Mode, Moved, move, move_floor
from tests.bench.report import Result, Settings, Table, Target
from tests.bench.stats import Distribution
from vtpmd.testing.migration import MigrationFailedError
from vtpmd.testing.workload import WorkloadFailedError

# The tail's p99 is a target, so it has to be more than the slowest of a few.
REPEATS = 100
REPEATS_QUICK = 2
MIGRATIONS = 20
TURNS = 20
TAIL_BYTES_MAX = 1024
SHARE_P50_RATIO_MAX = 1.6  # to the floor's
SHARE_P99_RATIO_MAX = 1.3  # the same, where that is more than
SHARE_P99_MAX_US = 2000
DOWNTIME_EXCESS_MAX_MS = 1
TOTAL_TIME_RATIO_MAX = 1.02
THROUGHPUT_LOSS_MAX_PERCENT = 5


class Case(NamedTuple):
    """Between what a vTPM moves, how much state it has, and what the guest does with it."""

    mode: Mode
    size: Size
    activity: Activity


HandOvers = dict[Case, list[Moved]]


def hand_over_all(settings: Settings) -> HandOvers:
    """Move vTPMs of all kinds, in turn; the floor's tail is as long as the one just before."""
    states = {size: prepare(settings.scratch / size.name, size) for size in Size}
    found: HandOvers = {Case(*case): [] for case in product(Mode, Size, Activity)}
    for _ in range(REPEATS_QUICK if settings.quick else REPEATS):
        for case, moved in found.items():
            if case.mode is Mode.FLOOR:
                tail = found[case._replace(mode=Mode.TAIL)][-1].hand_over
                moved.append(move_floor(tail.moved_bytes, case.activity))
            else:
                moved.append(move(case.mode, states[case.size], case.activity))
    return found


def bytes_of(moved: list[Moved]) -> Distribution:
    """Describe what QEMU's stream carried, in bytes."""
    return Distribution.of([each.hand_over.moved_bytes for each in moved])


def share_of(moved: list[Moved]) -> Distribution:
    """Describe the vTPM's share of the downtime, in microseconds."""
    return Distribution.of([each.hand_over.share_us for each in moved])


def step_of(moved: list[Moved], step: Step) -> Distribution:
    """Describe a step, in microseconds."""
    return Distribution.of([each.hand_over.steps_us[step] for each in moved])


def phases_of(moved: list[Moved]) -> dict[str, Distribution]:
    """Describe the phases that the source's session reported, in microseconds."""
    names = {name: None for each in moved for name in each.phases_us}
    return {
        name: Distribution.of([each.phases_us[name] for each in moved if name in each.phases_us])
        for name in names
    }


def stop_and_copy_table(hand_overs: HandOvers) -> Table:
    """Lay out bytes and time of all hand-overs."""
    rows = []
    for size, activity, mode in product(Size, Activity, Mode):
        moved = hand_overs[Case(mode, size, activity)]
        carried, share = bytes_of(moved), share_of(moved)
        figures = [carried.p50, carried.p99, carried.percentiles[100.0]]
        figures += [share.p50, share.p99, share.percentiles[100.0]]
        name = f"{size}, {activity}: {mode}"
        floor = share_of(hand_overs[Case(Mode.FLOOR, size, activity)])
        ratios = [f"{share.p50 / floor.p50:.2f}", f"{share.p99 / floor.p99:.2f}"]
        rows.append([name, str(len(moved)), *(f"{figure:.0f}" for figure in figures), *ratios])
    columns = [
        "",
        "hand-\novers",
        "bytes\np50",
        "\np99",
        "\nmax",
        "share, µs\np50",
        "\np99",
        "\nmax",
    ]
    columns += ["ratio\np50", "\np99"]
    note = "share: what QEMU waits for at both control sockets, without the stream between them; "
    note += "floor: two C processes with the same messages and sizes, and no TPM; ratio: to it"
    return Table(title="stop-and-copy, at the sockets", columns=columns, rows=rows, note=note)


def steps_table(hand_overs: HandOvers, activity: Activity) -> Table:
    """Lay out the steps of the largest state's hand-overs."""
    rows = []
    for step in Step:
        row: list[str] = [step]
        for mode in Mode:
            taken = step_of(hand_overs[Case(mode, Size.LARGE, activity)], step)
            row += [f"{taken.p50:.0f}", f"{taken.p99:.0f}"] if taken.p50 else ["-", "-"]
        rows.append(row)
    columns = ["µs", *(cell for mode in Mode for cell in (f"{mode}\np50", "\np99"))]
    title = f"steps of stop-and-copy, {Size.LARGE}, {activity}"
    return Table(title=title, columns=columns, rows=rows, note="-: not called, as there is no blob")


def phases_table(hand_overs: HandOvers) -> Table:
    """Lay out the phases of a tail, as vtpmd reports them."""
    cases = [Case(Mode.TAIL, size, activity) for size, activity in product(Size, Activity)]
    described = [phases_of(hand_overs[case]) for case in cases]
    rows = []
    for name in described[0]:
        each = [phases[name] for phases in described]
        rows.append([name, *(f"{figure:.0f}" for one in each for figure in (one.p50, one.p99))])
    columns = ["µs"]
    for case in cases:
        columns += [f"{case.size}, {case.activity}\np50", "\np99"]
    note = "by the daemons' own clocks; the wait for the grant contains what the source does for it"
    return Table(title="phases of a tail", columns=columns, rows=rows, note=note)


def total_time_ratio(migrations: Migrations, activity: Activity, tpm: GuestTpm) -> float:
    """Return how a guest's median migration time compares with the guest without a TPM."""
    reference = guests.total_ms(migrations[Activity.IDLE, GuestTpm.NONE])
    return guests.total_ms(migrations[activity, tpm]).p50 / reference.p50


def guests_table(migrations: Migrations) -> Table:
    """Lay out the migrations of guests."""
    rows = []
    for (activity, tpm), migrated in migrations.items():
        total, downtime = guests.total_ms(migrated), guests.downtime_ms(migrated)
        share = None if tpm is GuestTpm.NONE else guests.share_us(migrated)
        tails = [each.tail_bytes for each in migrated if each.tail_bytes is not None]
        rows.append(
            [
                f"{activity}: {tpm}",
                f"{total.p50:.0f}",
                f"{total.percentiles[25.0]:.0f}-{total.percentiles[75.0]:.0f}",
                f"{total_time_ratio(migrations, activity, tpm):.3f}",
                f"{downtime.p50:.0f}",
                f"{downtime.percentiles[100.0]:.0f}",
                *([f"{share.p50:.0f}", f"{share.p99:.0f}"] if share else ["-", "-"]),
                f"{Distribution.of(tails).p50:.0f}" if tails else "-",
                f"{max(tails)}" if tails else "-",
            ]
        )
    runs = len(migrations[Activity.IDLE, GuestTpm.NONE])
    columns = ["", "total, ms\np50", "\nmiddle half", "ratio", "downtime, ms\np50", "\nmax"]
    columns += ["share, µs\np50", "\np99", "tail, bytes\np50", "\nmax"]
    note = "ratio: of p50 to the idle guest without a TPM; without a TPM there is no load; "
    note += "share: what both QEMUs wait for on the control channel while the guest stands still"
    title = f"migrations of a guest by QEMU, {runs} of each kind"
    return Table(title=title, columns=columns, rows=rows, note=note)


def throughput_table(throughput: Throughput) -> Table:
    """Lay out what a guest gets done while a session is armed, and while none is."""
    rows = []
    for name, unit, spread in (
        ("unarmed", 1000, Distribution.of(throughput.unarmed)),
        ("armed", 1000, Distribution.of(throughput.armed)),
        ("loss, %", 1, throughput.loss_percent),
    ):
        percentiles = [spread.p50, spread.percentiles[25.0], spread.percentiles[75.0]]
        rows.append([name, *(f"{figure / unit:.1f}" for figure in percentiles)])
    note = f"{len(throughput.armed)} turns of each, {throughput.rounds} rounds, {Size.LARGE}; far "
    note += "percentiles mean that other programs ran, and that the figures are of no use"
    columns = ["1000 commands / s", "p50", "p25", "p75"]
    return Table(title=f"throughput: {armed.MIX.name}", columns=columns, rows=rows, note=note)


def stop_and_copy_targets(hand_overs: HandOvers) -> list[Target]:
    """Return what tail and whole blobs have to reach."""
    targets = []
    for size, activity in product(Size, Activity):
        swtpm, whole, tail, floor = (hand_overs[Case(mode, size, activity)] for mode in Mode)
        where = f"{size}, {activity}"
        what = f"{where}: tail: p50"
        measured = bytes_of(tail).p50
        targets.append(Target(what=what, unit="B", measured=measured, limit=TAIL_BYTES_MAX))
        targets += share_targets(where, share_of(tail), share_of(swtpm), share_of(floor))
        what = f"{where}: whole blobs: share: p50, to swtpm's"
        measured, limit = share_of(whole).p50, share_of(swtpm).p50
        targets.append(Target(what=what, unit="µs", measured=measured, limit=limit))
    return targets


def share_targets(
    where: str, share: Distribution, swtpm: Distribution, floor: Distribution
) -> list[Target]:
    """Return what the share of the downtime of a vTPM that moves as a tail has to reach."""
    what = f"{where}: share"
    p99 = max(SHARE_P99_MAX_US, SHARE_P99_RATIO_MAX * floor.p99)
    limits = {
        f"p50, to {SHARE_P50_RATIO_MAX} x floor": (share.p50, SHARE_P50_RATIO_MAX * floor.p50),
        "p50, to swtpm's": (share.p50, swtpm.p50),
        f"p99, to {SHARE_P99_MAX_US} µs or {SHARE_P99_RATIO_MAX} x floor": (share.p99, p99),
    }
    return [
        Target(what=f"{what}: {name}", unit="µs", measured=measured, limit=limit)
        for name, (measured, limit) in limits.items()
    ]


def guest_targets(migrations: Migrations, throughput: Throughput) -> list[Target]:
    """Return what the guest may notice."""
    targets = [
        Target(
            what=f"total migration time, {activity}: ratio to no TPM",
            unit="",
            measured=total_time_ratio(migrations, activity, GuestTpm.VTPMD),
            limit=TOTAL_TIME_RATIO_MAX,
        )
        for activity in Activity
    ]
    floor = guests.share_us(migrations[Activity.IDLE, GuestTpm.FLOOR])
    for activity in Activity:
        swtpm, vtpmd = (
            guests.share_us(migrations[activity, tpm]) for tpm in (GuestTpm.SWTPM, GuestTpm.VTPMD)
        )
        targets += share_targets(f"with QEMU, {activity}", vtpmd, swtpm, floor)
    downtime = Target(
        what="QEMU's downtime, idle: p50, to no TPM's and 1 ms",
        unit="ms",
        measured=guests.downtime_ms(migrations[Activity.IDLE, GuestTpm.VTPMD]).p50,
        limit=guests.downtime_ms(migrations[Activity.IDLE, GuestTpm.NONE]).p50
        + DOWNTIME_EXCESS_MAX_MS,
    )
    loss = Target(
        what="throughput lost while armed: p50",
        unit="%",
        measured=throughput.loss_percent.p50,
        limit=THROUGHPUT_LOSS_MAX_PERCENT,
    )
    return [*targets, downtime, loss]


def hand_overs_to_json(hand_overs: HandOvers) -> list[dict[str, object]]:
    """Return all hand-overs in JSON's types."""
    return [
        {
            **case._asdict(),
            "stream_bytes": bytes_of(moved).to_json(),
            "share_us": share_of(moved).to_json(),
            "steps_us": {step: step_of(moved, step).to_json() for step in Step},
            "phases_us": {name: each.to_json() for name, each in phases_of(moved).items()},
        }
        for case, moved in hand_overs.items()
    ]


def migrations_to_json(migrations: Migrations) -> list[dict[str, object]]:
    """Return all migrations of guests in JSON's types."""
    return [
        {"activity": activity, "tpm": tpm, "migrations": [each.to_json() for each in migrated]}
        for (activity, tpm), migrated in migrations.items()
    ]


def measure(settings: Settings) -> Result:
    """Measure the chapter; BenchError when a vTPM or a guest does not move as it should."""
    try:
        state_file = prepare(settings.scratch / "throughput", Size.LARGE)
        throughput = armed.measure(state_file, 2 if settings.quick else TURNS)
        migrations = guests.measure(1 if settings.quick else MIGRATIONS)
        hand_overs = hand_over_all(settings)
    except (RuntimeError, QMPError, MigrationFailedError, WorkloadFailedError) as error:
        raise BenchError(str(error)) from error
    return Result(
        tables=[
            stop_and_copy_table(hand_overs),
            *(steps_table(hand_overs, activity) for activity in Activity),
            phases_table(hand_overs),
            guests_table(migrations),
            throughput_table(throughput),
        ],
        targets=[*stop_and_copy_targets(hand_overs), *guest_targets(migrations, throughput)],
        data={
            "hand_overs": hand_overs_to_json(hand_overs),
            "migrations": migrations_to_json(migrations),
            "throughput": throughput.to_json(),
        },
    )
