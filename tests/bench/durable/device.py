"""What a commit writes: as the kernel counts it for the process, and as the block device does.

The process's count is of pages that it made dirty (proc(5), /proc/PID/io: write_bytes): whole ones,
and without what the file system writes for itself. The device's count is of everything, but of all
processes; it is taken over short batches, of which a busy neighbour spoils only some.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from tests.bench.chapters.round_trip import Operation
from tests.bench.durable.subjects import Subject
from tests.bench.emulators import BenchError
from tests.bench.stats import Distribution
from tests.support.tpm2 import ReturnCode, parse_response

SECTOR_BYTES = 512  # of block device statistics, whatever the device's own sectors are
SECTORS_WRITTEN = 6  # Linux, Documentation/block/stat.rst


@dataclass(frozen=True, kw_only=True)
class Written:
    """Bytes a commit, batch by batch."""

    by_process: list[float]
    to_device: list[float] | None  # None: the files are on no block device

    def to_json(self) -> dict[str, object]:
        """Return everything that was measured in JSON's types."""
        return {
            "by_process": Distribution.of(self.by_process).to_json(),
            "to_device": Distribution.of(self.to_device).to_json() if self.to_device else None,
        }


def statistics_of(path: Path) -> Path | None:
    """Return the statistics of the block device that a path is on; None when it is on none."""
    number = path.stat().st_dev
    statistics = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    return statistics if statistics.exists() else None


def bytes_by_process(pid: int) -> int:
    """Return what a process has had written to devices; BenchError when this user may not look."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except PermissionError:
        raise BenchError(f"no right to read the counts of process {pid}: run as root") from None
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def bytes_to_device(statistics: Path) -> int:
    """Return what a block device has been given to write."""
    return int(statistics.read_text().split()[SECTORS_WRITTEN]) * SECTOR_BYTES


def commit(subject: Subject, commands: Iterator[bytes], count: int) -> None:
    """Run commands; BenchError when one fails."""
    for command in islice(commands, count):
        return_code = parse_response(subject.data.transact(command)).return_code
        if return_code != ReturnCode.SUCCESS:
            raise BenchError(f"{subject.name}: a commit was answered {return_code:#x}")


def measure(
    subject: Subject, operation: Operation, directory: Path, batches: int, commits: int
) -> Written:
    """Count what an operation writes, in batches of so many commits each."""
    commands = cycle(operation.commands + (operation.others or []))
    statistics = statistics_of(directory)
    by_process, to_device = [], []
    commit(subject, commands, 1)
    for _ in range(batches):
        process_bytes = bytes_by_process(subject.pid)
        device_bytes = bytes_to_device(statistics) if statistics else 0
        commit(subject, commands, commits)
        by_process.append((bytes_by_process(subject.pid) - process_bytes) / commits)
        if statistics:
            to_device.append((bytes_to_device(statistics) - device_bytes) / commits)
    return Written(by_process=by_process, to_device=to_device or None)
