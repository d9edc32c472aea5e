"""The tables, targets and data of the chapter about durable writes."""

from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.chapters.round_trip import Measured, Operation, Placement, build_client
from tests.bench.chapters.round_trip import measure as measure_round_trips
from tests.bench.durable import device, library, recovery
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
    plain_state,
)
from tests.bench.emulators import ROOT, cores
from tests.bench.report import Result, Settings, Table, Target
from tests.bench.stats import Distribution, pooled

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
    library_ns: Distribution  # libtpms alone
    written: dict[str, Written]  # by subject

    @property
    def name(self) -> str:
        """The size and the operation, for people."""
        return f"{self.size}: {self.timed.operation.name}"

    def ratio(self, subject: str, reference: str, percent: float) -> float:
        """How a percentile of a subject's times compares with a reference's."""
        ours, theirs = self.timed.of(subject), self.timed.of(reference)
        return ours.percentiles[percent] / theirs.percentiles[percent]

    def to_json(self) -> dict[str, object]:
        """Return everything that was measured in JSON's types; times are in nanoseconds."""
        return {
            "size": self.size,
            "operation": self.timed.operation.name,
            "library_ns": self.library_ns.to_json(),
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
    rounds = ROUNDS // 10 if settings.quick else ROUNDS
    batches = BATCHES_QUICK if settings.quick else BATCHES
    samples = library.SAMPLES_QUICK if settings.quick else library.SAMPLES
    with all_subjects(directory, size) as subjects:
        return [
            Commits(
                size=size,
                timed=time_operation(client, subjects, operation, rounds),
                library_ns=library.measure(directory, plain_state(directory), operation, samples),
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


def table(size: Size, all_commits: list[Commits]) -> Table:
    """Lay out what was measured at one size of the state."""
    rows = []
    for commits in all_commits:
        if commits.size is not size:
            continue
        for name in (*(emulator.name for emulator in EMULATORS), APPEND):
            times = commits.timed.of(name)
            row = [f"{commits.timed.operation.name}: {name}"]
            row += [f"{times.p50 / 1000:.0f}", f"{times.p99 / 1000:.0f}"]
            for reference in REFERENCES:
                ratios = [commits.ratio(name, reference.name, percent) for percent in PERCENTS]
                row += [f"{ratio:.2f}" for ratio in ratios]
            rows.append(row + written_cells(commits.written.get(name)))
    columns = ["", "µs\np50", "\np99"]
    columns += ["ratio\np50", "\np99", "synced\np50", "\np99"]
    columns += ["KiB\np50", "\nmean", "dev.\np50"]
    note = "append: of a sector, and fdatasync. Ratio: to swtpm, which does not sync; synced: to "
    note += "one with the syncs that its source has, compiled out. KiB a commit: pages that a "
    note += "process made dirty, in short batches, and in all with what comes once in many "
    note += "commits; dev.: all that the device was given, also by others"
    return Table(title=f"durable commits, {size} of state", columns=columns, rows=rows, note=note)


def written_cells(written: Written | None) -> list[str]:
    """Return what a commit writes in KiB: pages, the same with folds, and to the device."""
    if written is None:
        return ["", "", ""]
    pages, to_device = Distribution.of(written.by_process), written.to_device
    figures = [pages.p50, pages.mean, *([Distribution.of(to_device).p50] if to_device else [])]
    return [f"{figure / 1024:.3g}" for figure in figures] + ["-"] * (3 - len(figures))


def library_table(all_commits: list[Commits]) -> Table:
    """Lay out commits beside what they are made of."""
    return library.table([library.row(c.size, c.library_ns, c.timed) for c in all_commits])


def append_times(all_commits: list[Commits]) -> Distribution:
    """Describe the append over the whole run, in nanoseconds."""
    return pooled([samples for each in all_commits for samples in each.timed.rounds_ns[APPEND]])


def targets(all_commits: list[Commits]) -> list[Target]:
    """Hold what a commit costs against its parts, and at 85 KB of state against swtpm's."""
    found: list[Target] = []
    for commits in all_commits:
        if commits.timed.operation.name == OPERATIONS[0].name:
            found += library.targets(commits.size, commits.library_ns, commits.timed)
    for commits in all_commits:
        if commits.size is not Size.MEDIUM:
            continue
        for ours in OURS:
            what = f"{commits.name}: {ours.name}"
            found += [
                Target(
                    what=f"{what} / {reference.name}, p{percent:.0f}",
                    unit="",
                    measured=commits.ratio(ours.name, reference.name, percent),
                    limit=RATIO_MAX,
                )
                for reference in REFERENCES
                for percent in PERCENTS
            ]
            pages = Distribution.of(commits.written[ours.name].by_process)
            found += [
                Target(what=what + how, unit="B", measured=figure, limit=WRITTEN_BYTES_MAX)
                for how, figure in ((", written", pages.p50), (", with folds", pages.mean))
            ]
    return found


def measure(settings: Settings) -> Result:
    """Measure the chapter; BenchError when that fails."""
    client = build_client(ROOT / "build/bench")
    all_commits = [commits for size in Size for commits in measure_size(client, settings, size)]
    all_starts = recovery.measure(settings)
    return Result(
        tables=[
            *(table(size, all_commits) for size in Size),
            library_table(all_commits),
            recovery.table(all_starts),
        ],
        targets=[*targets(all_commits), *recovery.targets(all_starts)],
        data={
            "commits": [commits.to_json() for commits in all_commits],
            "append_ns": append_times(all_commits).to_json(),
            "starts": [starts.to_json() for starts in all_starts],
        },
    )
