"""swtpm's ``--tpmstate …,backup``: a copy of the permanent state's file, beside it.

    tpm2-00.permall.bak   the file as it was before the last start

swtpm renames the file to this before it writes a new one, so after a crash the copy may be alone.
Here the file is always whole, and the copy is for who wants one: it is made at a start.
"""

from __future__ import annotations

from vtpmd.light_typing import TYPE_CHECKING
from vtpmd.store.directory import JOURNAL_NAME, PERMANENT_NAME, StateDirectoryError
from vtpmd.wire.swtpm_format import FILE_BYTES_MAX

if TYPE_CHECKING:
    from vtpmd.store.directory import StateDirectory

BACKUP_NAME = f"{PERMANENT_NAME}.bak"


def is_alone(directory: StateDirectory) -> bool:
    """Return whether there is a copy of a state, and nothing that it is a copy of."""
    others = (PERMANENT_NAME, JOURNAL_NAME)
    return directory.exists(BACKUP_NAME) and not any(map(directory.exists, others))


def take_up(directory: StateDirectory) -> bool:
    """Have a copy that is alone be the state, durably. Return whether there was one.

    Raises StateDirectoryError.
    """
    if not is_alone(directory):
        return False
    directory.rename(BACKUP_NAME, PERMANENT_NAME)
    return True


def keep(directory: StateDirectory) -> None:
    """Copy the state's file, durably, if it is there. Raises StateDirectoryError."""
    content = directory.read(PERMANENT_NAME, FILE_BYTES_MAX)
    if content is not None:
        directory.replace(BACKUP_NAME, content)


def refuse_alone(directory: StateDirectory) -> None:
    """Raise StateDirectoryError where a new TPM would be made beside a copy of another's state."""
    if is_alone(directory):
        raise StateDirectoryError(
            f"cannot use state directory {directory.path}: {PERMANENT_NAME} is missing, and "
            f"{BACKUP_NAME} is there, which swtpm keeps: start once with --tpmstate …,backup, or "
            "rename it; for a new TPM move it away"
        )
