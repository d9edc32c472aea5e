"""The report of a move: as JSON, and as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vtpmd.cli.management_client import Round, Session
from vtpmd.cli.moving_verdict import Ending, Report
from vtpmd.counted import counted, grouped
from vtpmd.daemon.qmp import Migration

# Rounds that are printed one by one; JSON has them all.
FIRST_ROUNDS: Final = 8
LAST_ROUNDS: Final = 4

Row = tuple[str, str, str]


def as_json(report: Report) -> dict[str, object]:
    """Return the report as what JSON can say."""
    return {
        "ending": report.ending.value,
        "reason": report.reason,
        "guest": None if report.guest is None else _guest_json(report.guest, report.run_state),
        "vtpm": None if report.vtpm is None else _vtpm_json(report.vtpm),
    }


def _guest_json(guest: Migration, run_state: str | None) -> dict[str, object]:
    return {
        "status": guest.status.value,
        "run-state": run_state,
        "error": guest.error,
        "passes": guest.passes,
        "ram-transferred-bytes": guest.ram_transferred_bytes,
        "ram-total-bytes": guest.ram_total_bytes,
        "setup-ms": guest.setup_ms,
        "total-ms": guest.total_ms,
        "downtime-ms": guest.downtime_ms,
    }


def _vtpm_json(vtpm: Session) -> dict[str, object]:
    return {
        "session": vtpm.session,
        "state": vtpm.state,
        "outcome": vtpm.outcome,
        "reason": vtpm.reason,
        "refusal": vtpm.refusal,
        "qemu": vtpm.qemu,
        "peer-qemu": vtpm.peer_qemu,
        "rounds": [
            {
                "round": each.number,
                "bytes": each.record_bytes,
                "permanent-generation": each.permanent_generation,
                "volatile-generation": each.volatile_generation,
                "acknowledged-us": each.acknowledged_us,
            }
            for each in vtpm.rounds
        ],
        "tail-bytes": vtpm.tail_bytes,
        "phases-us": dict(vtpm.phases_us),
        "digests": {
            name: {"at-freeze": digest, "after-load": digest if is_verified(vtpm) else None}
            for name, digest in vtpm.digests.items()
        },
    }


def is_verified(vtpm: Session) -> bool:
    """Whether the destination's digests are the source's: else it would not have been granted."""
    return vtpm.outcome in ("granted", "handed-over")


def text(report: Report) -> str:
    """Return the report for people: a line, then a table."""
    table = list(rows(report))
    name_width = max((len(name) for name, _, _ in table), default=0)
    number_width = max((len(number) for _, number, _ in table), default=0)
    lines = [
        f"  {name:<{name_width}}  {number:>{number_width}}  {remark}".rstrip()
        for name, number, remark in table
    ]
    first = heading(report)
    return "\n".join([f"{first[0].upper()}{first[1:]}.", "", *lines])


def heading(report: Report) -> str:
    """Say in one line what became of the guest and its vTPM."""
    because = "" if report.reason is None else f": {report.reason}"
    match report.ending:
        case Ending.TAIL:
            return "the guest has moved, and its vTPM beside it: both run at the destination"
        case Ending.WHOLE_BLOBS:
            return f"the guest has moved, with its vTPM's whole state in QEMU's stream{because}"
        case Ending.UNKNOWN:
            return f"it is not known where the guest and its vTPM are{because}"
        case Ending.INTERRUPTED if report.guest is None:
            return f"interrupted before QEMU began to migrate{because}"
        case Ending.INTERRUPTED:
            return f"interrupted, {_here(report.run_state)}{because}"
        case Ending.FAILED if report.run_state is None:
            return f"the guest has not moved{because}"
        case Ending.FAILED:
            return f"the guest has not moved, {_here(report.run_state)}{because}"


def _here(run_state: str | None) -> str:
    if run_state is None:
        return "QEMU's migration has ended at the source"
    return f"the guest is {run_state} at the source"


def rows(report: Report) -> Iterator[Row]:
    """Yield what was moved and how long it took: name, number, remark."""
    if report.vtpm is not None:
        yield from _vtpm_rows(report.vtpm)
    if report.guest is not None:
        yield from _guest_rows(report.guest)
    if report.vtpm is not None:
        for name, duration_us in report.vtpm.phases_us.items():
            yield name, f"{duration_us / 1000:.3f} ms", ""
        yield from _digest_rows(report.vtpm)


def _vtpm_rows(vtpm: Session) -> Iterator[Row]:
    middle = vtpm.rounds[FIRST_ROUNDS:-LAST_ROUNDS]
    for each in vtpm.rounds[:FIRST_ROUNDS]:
        yield _round_row(each)
    if middle:
        yield f"vTPM, {counted(len(middle), 'round')} more", _bytes(_total(middle)), ""
    for each in vtpm.rounds[FIRST_ROUNDS + len(middle) :]:
        yield _round_row(each)
    if len(vtpm.rounds) > 1:
        yield "vTPM, beside QEMU's stream", _bytes(_total(vtpm.rounds)), ""
    if vtpm.tail_bytes is not None:
        yield "vTPM, in QEMU's stream", _bytes(vtpm.tail_bytes), "the sealed tail"


def _round_row(each: Round) -> Row:
    name = "base" if each.number == 1 else f"round {each.number}"
    remark = f"generations {each.permanent_generation} and {each.volatile_generation}"
    if each.acknowledged_us is not None:
        remark += f", acknowledged in {each.acknowledged_us / 1000:.1f} ms"
    return f"vTPM, {name}", _bytes(each.record_bytes), remark


def _guest_rows(guest: Migration) -> Iterator[Row]:
    if guest.ram_transferred_bytes is not None:
        moved = _bytes(guest.ram_transferred_bytes)
        passes = counted(guest.passes or 0, "pass", "passes")
        yield "guest memory, in QEMU's stream", moved, f"in {passes}"
    if guest.total_ms is not None:
        yield "QEMU's total time", f"{guest.total_ms} ms", ""
    if guest.downtime_ms is not None:
        yield "QEMU's downtime", f"{guest.downtime_ms} ms", ""


def _digest_rows(vtpm: Session) -> Iterator[Row]:
    remark = "at the freeze and after load" if is_verified(vtpm) else "at the freeze"
    for name, digest in vtpm.digests.items():
        yield f"digest, {name} state", f"{digest[:8]}…{digest[-8:]}", remark


def _total(rounds: tuple[Round, ...]) -> int:
    return sum(each.record_bytes for each in rounds)


def _bytes(count: int) -> str:
    return grouped(count, "byte")
