"""The chapters of the bench, in the order of the book.

A chapter is a module with NAME (on the command line), SUMMARY (a line for the help) and `run`. A
new chapter is a new file here and a line in CHAPTERS.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.chapters import (
    durable_writes,
    export,
    keys,
    moving,
    reset,
    round_trip,
    start_up,
    store,
    survive,
)
from tests.bench.report import Result, Settings


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A chapter, as the command line sees it."""

    name: str
    summary: str
    run: Callable[[Settings], Result]


CHAPTERS = tuple(
    Chapter(name=module.NAME, summary=module.SUMMARY, run=module.run)
    for module in (
        round_trip,
        start_up,
        reset,
        store,
        moving,
        keys,
        durable_writes,
        survive,
        export,
    )
)
