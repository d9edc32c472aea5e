"""What a chapter returns, and how it is shown."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE_WIDTH = 120  # columns, where there is no terminal that has its own


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a chapter is told: whether to be quick, and a directory of its own to work in."""

    quick: bool
    scratch: Path


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure to reach: the measured one must not exceed the limit, in the same unit."""

    what: str
    unit: str
    measured: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the measured figure is within the limit."""
        return self.measured <= self.limit


@dataclass(frozen=True, kw_only=True)
class Result:
    """A chapter's tables and targets for the reader, and everything measured as JSON's types."""

    data: dict[str, object]
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Return data and targets in JSON's types; the tables show no more than these."""
        targets = [asdict(target) | {"met": target.met} for target in self.targets]
        return {"targets": targets, "data": self.data}


def target_table(targets: list[Target]) -> Table:
    """Lay the targets out as a table."""
    rows = [
        [
            target.what,
            f"{target.measured:.5g} {target.unit}".rstrip(),
            f"{target.limit:.5g} {target.unit}".rstrip(),
            "met" if target.met else "MISSED",
        ]
        for target in targets
    ]
    return Table(title="targets", columns=["", "measured", "at most", ""], rows=rows)


def show(result: Result) -> None:
    """Print a chapter's tables on standard output."""
    from rich import box  # not needed for --help, which runs before the set-up
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    tables = [*result.tables, target_table(result.targets)] if result.targets else result.tables
    for table in tables:
        rich_table = RichTable(
            title=table.title,
            caption=table.note,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE,
        )
        first, *others = table.columns
        rich_table.add_column(first, no_wrap=True)
        for column in others:
            rich_table.add_column(column, justify="right")
        for row in table.rows:
            rich_table.add_row(*row)
        console.print(rich_table)
