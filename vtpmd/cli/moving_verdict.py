"""What became of a guest and its vTPM, as far as it was seen. No I/O.

Who has seen what: QEMU here says ``completed`` only when the destination has loaded all, as the
capability return-path is set; vtpmd here says ``granted`` when it has let the vTPM go, and
``handed-over`` when the destination's vtpmd has said that the TPM runs there. Nothing is called
moved on less than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vtpmd.cli.management_client import Session
from vtpmd.daemon.qemu_events import MigrationState
from vtpmd.daemon.qmp import Migration


class Ending(StrEnum):
    """What became of the guest and its vTPM."""

    TAIL = "tail"  # both run at the destination; QEMU's stream carried a tail
    WHOLE_BLOBS = "whole-blobs"  # the destination has loaded both from QEMU's stream
    FAILED = "failed"  # neither has moved
    UNKNOWN = "unknown"  # what was seen tells of no place where both are
    INTERRUPTED = "interrupted"  # neither has moved, as somebody wished


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of a move."""

    guest: Migration | None = None  # QEMU's last word; None: it was not told to migrate, or is lost
    qemu_lost: str | None = None  # why QEMU cannot say what became of a migration that it began
    run_state: str | None = None  # of the guest here, where QEMU's migration has not completed
    vtpm: Session | None = None  # None: there was no session
    vtpmd_lost: str | None = None  # why vtpmd cannot say what became of the session
    whole_blobs: str | None = None  # why QEMU's stream carries all of the vTPM's state
    refused: str | None = None  # why a move with whole blobs was not tried, or was given up
    interrupted: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """What happened."""

    ending: Ending
    reason: str | None = None  # why it is not a move with a tail
    guest: Migration | None = None  # None: QEMU's migration was not started, or QEMU is lost
    run_state: str | None = None  # of the guest here, where QEMU's migration has not completed
    vtpm: Session | None = None  # None: there was no session


def verdict(seen: Seen) -> Report:
    """Say what became of a guest and its vTPM."""
    ending, reason = _judge(seen)
    return Report(
        ending=ending, reason=reason, guest=seen.guest, run_state=seen.run_state, vtpm=seen.vtpm
    )


def _judge(seen: Seen) -> tuple[Ending, str | None]:
    if seen.qemu_lost is not None:
        return Ending.UNKNOWN, _without_qemu(seen)
    if seen.guest is None:
        return _not_moved(seen), seen.refused
    if seen.guest.status is MigrationState.COMPLETED:
        return _completed(seen)
    return _not_completed(seen, seen.guest)


def _not_moved(seen: Seen) -> Ending:
    return Ending.INTERRUPTED if seen.interrupted else Ending.FAILED


def _without_qemu(seen: Seen) -> str:
    if seen.vtpm is not None and seen.vtpm.outcome == "handed-over":
        return f"{seen.qemu_lost}; the vTPM runs at the destination: see whether its guest does"
    return f"{seen.qemu_lost}; see on both sides where the guest runs"


def _completed(seen: Seen) -> tuple[Ending, str | None]:
    vtpm = seen.vtpm
    if vtpm is None or seen.whole_blobs is not None:
        return Ending.WHOLE_BLOBS, seen.whole_blobs
    match vtpm.outcome:
        case "handed-over":
            return Ending.TAIL, None
        case "granted":
            return Ending.UNKNOWN, (
                "QEMU's migration has completed and the vTPM was granted, but nothing was heard of "
                "the destination's vtpmd since: see there; `vtpmd owner DIR --ask` asks it"
            )
        case "go-on":
            return Ending.FAILED, (
                "QEMU's migration has completed, but the destination has not taken the vTPM "
                f"({vtpm.reason or 'no reason given'}); see its QEMU, and let the guest go on here "
                "with QEMU's cont"
            )
    if seen.vtpmd_lost is None and vtpm.tail_bytes is None:
        return Ending.WHOLE_BLOBS, (
            "QEMU took it although a session was armed: vtpmd did not see QEMU migrate; is its "
            "--qmp another monitor of this QEMU?"
        )
    said = seen.vtpmd_lost or "vtpmd does not say what became of the vTPM"
    return Ending.UNKNOWN, f"QEMU's migration has completed, but {said}; see the destination"


def _not_completed(seen: Seen, guest: Migration) -> tuple[Ending, str]:
    vtpm = seen.vtpm
    said = seen.refused or _words_of_qemu(guest)
    if vtpm is not None and vtpm.outcome in ("granted", "handed-over"):
        return Ending.UNKNOWN, (
            f"{said}; the destination has not given the vTPM back: stop the guest there; "
            "`vtpmd owner DIR --ask` asks it"
        )
    if vtpm is None or seen.whole_blobs is not None or vtpm.outcome == "fall-back":
        return _not_moved(seen), said
    if vtpm.outcome == "go-on":
        return _not_moved(
            seen
        ), f"{said}; the vTPM goes on here: {vtpm.reason or 'no reason given'}"
    if seen.vtpmd_lost is None and vtpm.tail_bytes is None:
        return _not_moved(seen), said
    lost = seen.vtpmd_lost or "vtpmd does not say that the vTPM goes on here; see its log"
    return Ending.UNKNOWN, f"{said}; {lost}"


def _words_of_qemu(guest: Migration) -> str:
    if guest.status is MigrationState.CANCELLED:
        return "QEMU's migration was cancelled"
    return guest.error or "QEMU gives no reason; the destination's QEMU may have printed one"
