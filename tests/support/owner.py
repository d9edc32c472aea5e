"""The owner record's first sector, written as the engine does it (csrc/engine/recorder.c)."""

import os

from vtpmd.store.directory import StateDirectoryError
from vtpmd.store.owner import OwnerRecord, Sector


def write_offer(record: OwnerRecord, session: bytes) -> None:
    """Have the record say, durably, that the vTPM is offered; StateDirectoryError if that fails."""
    with record.offering(session) as sector:
        if sector is None:
            return
        error = write(sector)
    record.end_offering(is_durable=error is None)
    if error is not None:
        raise StateDirectoryError(f"cannot update the owner record: {error.strerror}")


def write(sector: Sector) -> OSError | None:
    """Write what was handed out; return why that failed."""
    try:
        os.pwrite(sector.descriptor, sector.content, 0)
        os.fdatasync(sector.descriptor)
    except OSError as error:
        return error
    return None
