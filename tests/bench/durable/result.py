"""The tables, targets and data of the chapter about durable writes."""

from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.chapters.round_trip import Measured, Operation, Placement, build_client
from tests.bench.chapters.round_trip import measure as measure_round_trips
from tests.bench.durable import device
from tests.bench.durable.device import Written
from tests.bench.durable.subjects import (
    APPEND,
    EMULATORS,
    OPERATIONS,
    OURS,
    REFERENCES,
    Size,
    Subject,
    all_subjects,
    prepare,
)
from tests.bench.emulators import ROOT, Emulator, cores
from tests.bench.report import Result, Settings, Table, Target
from tests.bench.stats import Distribution, pooled

NAMES = tuple(emulator.name for emulator in EMULATORS)
PERCENTS = (50.0, 99.0)
ROUNDS = 30
SAMPLES_PER_ROUND = 50
BATCHES = {each.name: 6 for each in REFERENCES}
BATCHES |= {each.name: 80 for each in OURS}  # enough to fill a journal twice
BATCHES_QUICK = dict.fromkeys(BATCHES, 2)
COMMITS_PER_BATCH = 50
RATIO_MAX = 0.2
WRITTEN_BYTES_MAX = 4096


@dataclass(frozen=True, kw_only=True)
class Commits:
    """What was measured of one operation at one size of the state."""

    size: Size
    timed: Measured
    written: dict[str, Written]  # by subject

    @property
    def name(self) -> str:
        """The size and the operation, for people."""
        return f"{self.size}: {self.timed.operation.name}"

    def ratio(self, subject: Emulator, reference: Emulator, percent: float) -> float:
        """How a percentile of a subject's times compares with a reference's."""
        ours, theirs = (self.timed.of(each.name) for each in (subject, reference))
        return ours.percentiles[percent] / theirs.percentiles[percent]

    def to_json(self) -> dict[str, object]:
        """Return everything that was measured in JSON's types; times are in nanoseconds."""
        return {
            "size": self.size,
            "operation": self.timed.operation.name,
            "commit_ns": {name: self.timed.of(name).to_json() for name in self.timed.rounds_ns},
            "written_bytes": {name: each.to_json() for name, each in self.written.items()},
        }


def time_operation(
    client: Path, subjects: list[Subject], operation: Operation, rounds: int
) -> Measured:
    """Let the subjects take turns at an operation."""
    placement = Placement(name="durable", client_core=cores()[-1], emulator_core=cores()[0])
    return measure_round_trips(
        client,
        replace(operation, samples_per_round=SAMPLES_PER_ROUND),
        placement,
        {subject.name: subject.data for subject in subjects},
        rounds,
    )


def measure_size(client: Path, settings: Settings, size: Size) -> list[Commits]:
    """Measure every operation at one size of the state."""
    directory = settings.scratch / size.name
    state_file = prepare(directory / "prepared", size)
    rounds = ROUNDS // 10 if settings.quick else ROUNDS
    batches = BATCHES_QUICK if settings.quick else BATCHES
    with all_subjects(directory, state_file) as subjects:
        return [
            Commits(
                size=size,
                timed=time_operation(client, subjects, operation, rounds),
                written={
                    subject.name: device.measure(
                        subject, operation, directory, batches[subject.name], COMMITS_PER_BATCH
                    )
                    for subject in subjects
                    if subject.name in batches
                },
            )
            for operation in OPERATIONS
        ]


def times_table(all_commits: list[Commits]) -> Table:
    """Lay out how long commits take."""
    rows = []
    for commits in all_commits:
        described = [commits.timed.of(name) for name in (*NAMES, APPEND)]
        row = [f"{figure / 1000:.0f}" for each in described for figure in (each.p50, each.p99)]
        rows.append([commits.name, *row])
    columns = ["µs", *(cell for name in (*NAMES, APPEND) for cell in (f"{name}\np50", "\np99"))]
    note = "swtpm does not sync; synced: with the syncs that its source has compiled out; "
    note += "append: of a sector to a file, and fdatasync, which is the floor of what is durable"
    return Table(title="durable commits", columns=columns, rows=rows, note=note)


def ratios_table(all_commits: list[Commits]) -> Table:
    """Lay out how vtpmd's times compare with swtpm's."""
    pairs = [(ours, reference) for ours in OURS for reference in REFERENCES]
    rows = [
        [
            commits.name,
            *(f"{commits.ratio(*pair, percent):.3f}" for pair in pairs for percent in PERCENTS),
        ]
        for commits in all_commits
    ]
    columns = ["ratio"]
    for ours, reference in pairs:
        columns += [f"{ours.name} /\n{reference.name}\np50", "\n\np99"]
    return Table(title="beside swtpm", columns=columns, rows=rows)


def append_times(all_commits: list[Commits]) -> Distribution:
    """Describe the floor over the whole run, in nanoseconds."""
    return pooled([samples for each in all_commits for samples in each.timed.rounds_ns[APPEND]])


def written_table(all_commits: list[Commits]) -> Table:
    """Lay out what commits write."""
    rows = []
    for commits in all_commits:
        row = [commits.name]
        for written in commits.written.values():
            process, device = Distribution.of(written.by_process), described(written.to_device)
            figures = [process.p50, *([device.p50, device.mean] if device else [])]
            row += [f"{figure / 1024:.1f}" for figure in figures] + ["-"] * (3 - len(figures))
        rows.append(row)
    columns = ["KiB"]
    for name in all_commits[0].written:
        columns += [f"{name}\npages\np50", "\ndevice\np50", "\n\nmean"]
    note = "pages: that the process made dirty; device: all that it was given, also by others; "
    note += f"p50: of batches of {COMMITS_PER_BATCH}; mean: with what comes once in many commits"
    return Table(title="written a commit", columns=columns, rows=rows, note=note)


def described(samples: list[float] | None) -> Distribution | None:
    """Describe samples, if there are any."""
    return Distribution.of(samples) if samples else None


def targets(all_commits: list[Commits]) -> list[Target]:
    """Hold what a commit costs at 85 KB of state against what swtpm's does."""
    found = []
    for commits in all_commits:
        if commits.size is not Size.MEDIUM:
            continue
        for ours in OURS:
            what = f"{commits.name}: {ours.name}"
            found += [
                Target(
                    what=f"{what} / {reference.name}, p{percent:.0f}",
                    unit="",
                    measured=commits.ratio(ours, reference, percent),
                    limit=RATIO_MAX,
                )
                for reference in REFERENCES
                for percent in PERCENTS
            ]
            written = commits.written[ours.name]
            found.append(
                Target(
                    what=f"{what}, written",
                    unit="B",
                    measured=Distribution.of(written.to_device or written.by_process).p50,
                    limit=WRITTEN_BYTES_MAX,
                )
            )
    return found


def measure(settings: Settings) -> Result:
    """Measure the chapter; BenchError when that fails."""
    client = build_client(ROOT / "build/bench")
    all_commits = [commits for size in Size for commits in measure_size(client, settings, size)]
    return Result(
        tables=[times_table(all_commits), ratios_table(all_commits), written_table(all_commits)],
        targets=targets(all_commits),
        data={
            "commits": [commits.to_json() for commits in all_commits],
            "append_ns": append_times(all_commits).to_json(),
        },
    )
