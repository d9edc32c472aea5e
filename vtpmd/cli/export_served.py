"""What ``vtpmd export`` has of a vTPM that runs, with the volatile state."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from vtpmd.cli.management_client import ManagementError, connect

if TYPE_CHECKING:
    from vtpmd.store.exporting import Taken
    from vtpmd.store.keys import Key


def take(manage: Path, path: Path, key: Key | None) -> Taken:
    """Return the states of the TPM that runs behind a management socket, of one moment.

    ``path`` is where its permanent state is, encrypted with ``key``. Raises ManagementError, or
    what ``exporting_live.take`` does.
    """
    from vtpmd.store import exporting_live

    try:
        copied = exporting_live.decode(asyncio.run(_ask(manage)))
    except ValueError as error:
        raise ManagementError(
            f"vtpmd on {manage} answers export-states with what this vtpmd cannot read: {error}; "
            "use the same version of both"
        ) from error
    return exporting_live.take(copied, path, key)


async def _ask(manage: Path) -> object:
    async with connect(manage, lambda *_: None) as client:
        return await client.execute("export-states")
