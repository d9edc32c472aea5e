"""To what a vtpmd can be attached, of what swtpm's command line starts: README.md's table."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.lab import Lab
from tests.harness.swtpm_program import OURS, TIMEOUT_S, Place
from tests.support.documents import Row, tables
from tests.support.emulator_client import ControlClient
from tests.system.test_run import run_to_its_end
from vtpmd.testing.emulator import ATTACHED, VTPMD
from vtpmd.testing.program import Program

README = Path(__file__).parents[2] / "README.md"
FILE_BYTES = 4 << 20


ROWS: list[Row] = [
    row for rows in tables(README.read_text()).values() for row in rows if "started with" in row
]


def _file(place: Place) -> list[str]:
    place.state.rmdir()
    with place.state.open("wb") as file:
        file.truncate(FILE_BYTES)
    return place.options("--tpmstate", f"backend-uri=file://{place.state}")


STARTS: dict[str, Callable[[Place], list[str]]] = {
    "`--tpmstate dir=DIR`": Place.options,
    "and `--chroot ROOT --runas USER`": lambda place: place.options(
        "--chroot", "/", "--runas", str(os.geteuid())
    ),
    "and `--migration release-lock-outgoing,incoming`": lambda place: place.options(
        "--migration", "release-lock-outgoing"
    ),
    "`--tpmstate backend-uri=file://PATH`": _file,
    "under a limit on the size of files (`RLIMIT_FSIZE`) of 256 KiB": lambda place: [
        *("prlimit", "--fsize=262144"),
        *place.options(),
    ],
}
# What is said where there is more to it than that there is no link.
WORDS = {
    "and `--migration release-lock-outgoing,incoming`": "for storage that hosts share",
    "`--tpmstate backend-uri=file://PATH`": "takes it: vtpmd inspect, verify, export, backup\n",
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(OURS, tmp_path)
    yield made
    made.end()


def test_the_table_has_a_row_for_each_way_that_is_tried() -> None:
    assert [row["started with"] for row in ROWS] == list(STARTS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["as by"]))
def test_vtpmd_is_attached_where_the_table_says_so(row: Row, place: Place, lab: Lab) -> None:
    """Where it is not, that is said in a line; and the vTPM can be looked into."""
    process = place.start_by(STARTS[row["started with"]](place))
    with ControlClient(place.control) as control:
        control.attach_data()
        control.init()
        if row["`vtpmd attach`"].startswith("yes"):
            program = Program("attach", [VTPMD, "attach", place.state], lab.directory)
            lab.kill_at_end(program)
            program.wait_for_output(ATTACHED)
        else:
            done = run_to_its_end(place.state, command="attach")
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            if row["started with"] in WORDS:
                assert WORDS[row["started with"]] in done.stderr
        for command, *words in (
            ("inspect",),
            ("verify",),
            ("export", "--out", lab.new_path("export")),
            ("backup", lab.new_path("backup")),
        ):
            done = run_to_its_end(place.state, *words, command=str(command))
            assert done.returncode == 0, done.stderr
        control.shutdown()
    assert process.wait(TIMEOUT_S) == 0


def test_one_that_waits_for_a_vtpm_is_named(place: Place) -> None:
    """It has no lock yet, by which others are found, and says nothing of itself in the directory.

    Another user than root cannot see it, and is told that there may be one.
    """
    process = place.start("--migration", "incoming,release-lock-outgoing")
    done = run_to_its_end(place.state, command="attach")
    who = f"vtpmd: vtpmd-engine (process {process.pid}) has the state directory without its lock: "
    assert (done.returncode, done.stderr.startswith(who)) == (1, True), done.stderr
    assert done.stderr.count("\n") == 1
