"""A vTPM's history: its commits in their order, by what each has changed, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple
from xml.etree.ElementTree import Element

from vtpmd.counted import counted
from vtpmd.inspect.difference import Change
from vtpmd.inspect.history import Commit, with_epochs
from vtpmd.inspect.html.elements import Child, Column, element, mark, part, table

COMMITS_MAX: Final = 256  # that a page has, the last ones: a journal may have some thousand
CHANGES_MAX: Final = 16  # of a commit that are told
ROW_COMMITS: Final = 48  # beside each other: the stylesheet has that number, too
NOTHING: Final = "nothing"
UNTOLD: Final = "untold"
RESTORED: Final = "restored"
COLUMNS: Final = (
    *(Column("generation", "number"), Column("time", "time"), Column("bytes", "number")),
    *(Column("of", "kinds"), Column("what it changed", "rest")),
)


class _Told(NamedTuple):
    """A commit as it is told."""

    number: int  # in the history, from 0 on
    commit: Commit
    epoch: str  # a line, of the first of a restore epoch

    @property
    def kinds(self) -> list[str]:
        """What it has changed, by part; and that an older state was put back by it."""
        # The first one that is told may well go on in an epoch that began before.
        restored = [RESTORED] if self.epoch and self.number else []
        return restored + _kinds(self.commit.changes)


def timeline(commits: Sequence[Commit], generation: int | None) -> Element:
    """Return the part: of a directory, of which the page shows a generation."""
    each = [_Told(number, *pair) for number, pair in enumerate(with_epochs(commits))]
    told = [one for one in each if not one.commit.is_checkpoint]
    kinds = sorted({kind for one in told for kind in one.kinds})
    rows = [(_id(one.number), _row(one, generation)) for one in each]
    return part(
        "history",
        "History",
        element("p", _summary(len(told), is_cut=len(commits) == COMMITS_MAX)),
        *(_lanes(told[at : at + ROW_COMMITS], kinds) for at in range(0, len(told), ROW_COMMITS)),
        table("Commits", COLUMNS, rows),
    )


def _summary(n_commits: int, *, is_cut: bool) -> str:
    if is_cut:
        return f"The last {COMMITS_MAX} generations; vtpmd log has all of them."
    if not n_commits:
        return "There is a checkpoint alone: a journal is folded when a vTPM stops."
    commits = counted(n_commits, "commit")
    return f"{commits} since the checkpoint, in their order; times are UTC, by the host's clock."


def _id(number: int) -> str:
    return f"commit-{number}"


def _kinds(changes: list[Change] | None) -> list[str]:
    """Return what a commit has changed, by part."""
    if changes is None:
        return [UNTOLD]
    return sorted({change.part for change in changes}) or [NOTHING]


def _name(commit: Commit) -> str:
    return "-" if commit.generation is None else str(commit.generation)


def _lanes(told: Sequence[_Told], kinds: Sequence[str]) -> Element:
    """Return commits beside each other, with a lane for each part of a TPM."""
    first, last = _name(told[0].commit), _name(told[-1].commit)
    caption = f"generation {first}" if len(told) == 1 else f"generations {first} to {last}"
    return element(
        "figure",
        element("figcaption", caption),
        element("ul", *(element("li", kind) for kind in kinds), aria_hidden="true"),
        element("ol", *(_column(one, kinds) for one in told)),
        class_="lanes",
    )


def _column(one: _Told, kinds: Sequence[str]) -> Element:
    when = "" if one.commit.time_ms is None else f", {one.commit.when}"
    says = f"generation {_name(one.commit)}{when}: {', '.join(one.kinds)}"
    signs = [
        element("span", class_=f"kind {kind}" if kind in one.kinds else None) for kind in kinds
    ]
    href = f"#{_id(one.number)}"
    return element("li", element("a", *signs, href=href, title=says, aria_label=says))


def _row(one: _Told, generation: int | None) -> tuple[Child, ...]:
    commit = one.commit
    is_here = generation is not None and commit.generation == generation
    kinds = [] if commit.is_checkpoint else one.kinds
    return (
        element("span", mark("this page") if is_here else None, _name(commit)),
        commit.when,
        f"{commit.journal_bytes:,}",
        element("span", *(mark(kind, f"kind {kind}") for kind in kinds)) if kinds else None,
        _lines([one.epoch] * bool(one.epoch) + commit.lines()),
    )


def _lines(texts: Sequence[str]) -> Element:
    """Return lines, CHANGES_MAX at most."""
    items = [element("li", text) for text in texts[:CHANGES_MAX]]
    if len(texts) > CHANGES_MAX:
        items.append(element("li", f"and {len(texts) - CHANGES_MAX:,} more: vtpmd log --json"))
    return element("ul", *items, class_="lines")
