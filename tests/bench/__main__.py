"""The command line of `scripts/bench`."""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from tests.bench import machine, report
from tests.bench.chapters import CHAPTERS, Chapter
from tests.bench.emulators import ROOT, BenchError
from tests.support.emulator_client import ControlError
from tests.support.tpm2 import TpmError

RESULTS = ROOT / "bench/results"
# What ends a chapter with a line for a person; anything else is a fault of the bench.
FAILURES = (BenchError, ControlError, TpmError, OSError, subprocess.SubprocessError)

EPILOG = """\
example:
  scripts/bench round-trip --quick

exit status:
  0  measured; whether the targets were met is in the tables and in the results
  1  something could not be measured; the last line says what
  2  the command line is wrong

The results go to bench/results/TIME.json: facts about the machine and every percentile.
"""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; leave the process with status 2 when it is wrong."""
    chapters = "\n".join(f"  {chapter.name:<14} {chapter.summary}" for chapter in CHAPTERS)
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=f"Measure vtpmd beside swtpm.\n\nchapters, all by default:\n{chapters}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [chapter.name for chapter in CHAPTERS]
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help=", ".join(names))
    parser.add_argument("--json", action="store_true", help="print the results as JSON, no tables")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, to try it")
    parsed = parser.parse_args(arguments)
    for name in parsed.chapters:
        if name not in names:
            parser.error(f"there is no chapter {name}; there are {', '.join(names)}")
    return parsed


def measure(chapter: Chapter, *, quick: bool) -> report.Result:
    """Measure one chapter in a directory that is removed afterwards."""
    print(f"bench: {chapter.name}: {chapter.summary}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="vtpmd-bench-") as scratch:
        return chapter.run(report.Settings(quick=quick, scratch=Path(scratch)))


def write_results(results: dict[str, object], start: datetime) -> Path:
    """Write the results to a file named after the time of the start and return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{start:%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def main(arguments: list[str]) -> int:
    """Measure the chapters that were asked for; return the exit status."""
    options = parse_arguments(arguments)
    start = datetime.now(UTC)
    results: dict[str, object] = {
        "time": start.isoformat(timespec="seconds"),
        "quick": options.quick,
        "machine": machine.facts(),
    }
    for chapter in CHAPTERS:
        if options.chapters and chapter.name not in options.chapters:
            continue
        try:
            result = measure(chapter, quick=options.quick)
        except FAILURES as error:
            print(f"bench: {chapter.name} could not be measured: {error}", file=sys.stderr)
            return 1
        results[chapter.name] = result.to_json()
        if not options.json:
            report.show(result)
    path = write_results(results, start)
    print(f"bench: results are in {path}", file=sys.stderr)
    if options.json:
        print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
