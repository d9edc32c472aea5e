"""What ``vtpmd export`` and ``vtpmd backup`` have of a vTPM whose vtpmd is asked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from vtpmd.cli.management_client import ManagementError, ManagementRefusal, connect, line

if TYPE_CHECKING:
    from vtpmd.store.exporting import Taken
    from vtpmd.store.keys import Key

VOLATILE, PERMANENT = "export-states", "export-permanent"

# Those of a vtpmd's refusals that mean the same to who asks: the key, what is damaged, no vTPM.
SAME_STATUSES = (4, 5, 9)


def take(manage: Path, key: Key | None, *, with_volatile: bool = False) -> tuple[Path, Taken]:
    """Return the state directory behind a management socket, and the states of its vTPM.

    That is the permanent state that is durable; with the volatile one, both of one moment of the
    TPM, which runs. ``key`` is what the directory is encrypted with. Raises ManagementError,
    StateKeyError, or VtpmdError where what is stored is not what runs.
    """
    from vtpmd.store import exporting_asked, exporting_live

    answers = asyncio.run(_ask(manage, [*([VOLATILE] if with_volatile else []), PERMANENT]))
    command = PERMANENT
    try:
        directory, stored = exporting_asked.decode(answers[PERMANENT], key)
        if not with_volatile:
            return Path(line(directory)), stored
        command = VOLATILE
        copied = exporting_live.decode(answers[VOLATILE])
    except ValueError as error:
        raise ManagementError(
            f"vtpmd on {manage} answers {command} with what this vtpmd cannot read: {line(error)}; "
            "use the same version of both"
        ) from error
    place = line(directory)
    return Path(place), exporting_live.take(copied, stored, place)


async def _ask(manage: Path, commands: list[str]) -> dict[str, object]:
    """Return the answers to commands, one after the other: what is stored counts at the end."""
    async with connect(manage, lambda *_: None) as client:
        try:
            return {command: await client.execute(command) for command in commands}
        except ManagementRefusal as error:
            if error.its_status in SAME_STATUSES:
                error.exit_status = error.its_status
            raise
