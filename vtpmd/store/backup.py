"""swtpm's ``--tpmstate …,backup``: a copy of the permanent state's file, beside it.

    tpm2-00.permall.bak   the file as it was before the last start

swtpm renames the file to this before it writes a new one, so after a crash the copy may be alone.
Here the file is always whole, and the copy is for who wants one: it is made at a start.
"""

from __future__ import annotations

from vtpmd.light_typing import TYPE_CHECKING
from vtpmd.store.directory import StateDirectoryError
from vtpmd.wire.swtpm_format import FILE_BYTES_MAX

if TYPE_CHECKING:
    from vtpmd.store.directory import StateDirectory


def is_alone(directory: StateDirectory) -> bool:
    """Return whether there is a copy of a state, and nothing that it is a copy of."""
    names = directory.names
    others = (names.permanent, names.journal)
    return directory.exists(names.backup) and not any(map(directory.exists, others))


def take_up(directory: StateDirectory) -> bool:
    """Have a copy that is alone be the state, durably. Return whether there was one.

    Raises StateDirectoryError.
    """
    if not is_alone(directory):
        return False
    directory.rename(directory.names.backup, directory.names.permanent)
    return True


def keep(directory: StateDirectory) -> None:
    """Copy the state's file, durably, if it is there. Raises StateDirectoryError."""
    content = directory.read(directory.names.permanent, FILE_BYTES_MAX)
    if content is not None:
        directory.replace(directory.names.backup, content)


def refuse_alone(directory: StateDirectory) -> None:
    """Raise StateDirectoryError where a new TPM would be made beside a copy of another's state."""
    names = directory.names
    if is_alone(directory):
        raise StateDirectoryError(
            f"cannot use state directory {directory.path}: {names.permanent} is missing, and "
            f"{names.backup} is there, which swtpm keeps: start once with --tpmstate …,backup, or "
            "rename it; for a new TPM move it away"
        )
