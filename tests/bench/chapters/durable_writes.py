"""Chapter: what it costs to have each change of NV memory on the disk before it is acknowledged.

The emulators have the same state and take turns on the same disk, and with them a process that does
no more than append a sector and sync. Each write has other content than the one before it: one that
changes nothing is not stored. Beside them libtpms alone is timed: what it takes, and the append, is
what a commit is made of.
"""

from tests.bench.report import Result, Settings

NAME = "durable-writes"
SUMMARY = "NV commits: time beside swtpm's, bytes to the device; starts after a crash"


def run(settings: Settings) -> Result:
    """Measure the chapter."""
    from tests.bench.durable import result  # not needed for --help, which runs before the set-up

    return result.measure(settings)
