"""The files that a moving vTPM leaves in its state directory, and what a start makes of them.

What reads and writes them is imported for a vTPM that has some: most have none.
"""

from __future__ import annotations

import os
from functools import cached_property

from vtpmd.light_typing import TYPE_CHECKING, NamedTuple
from vtpmd.store.directory import StateDirectory
from vtpmd.store.in_place import InPlace
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType

if TYPE_CHECKING:
    from vtpmd.store.incoming import Found, IncomingStates
    from vtpmd.store.keys import Key
    from vtpmd.store.owner import OwnerRecord, Record

# Like no identity: whose it is nobody has written down.
NOT_KNOWN = b""


class Granted(NamedTuple):
    """A state that is to be taken up."""

    lineage: bytes  # the identity of its vTPM
    state: bytes

    def digest(self) -> bytes:
        """Return the SHA-256 of the state."""
        from hashlib import sha256

        return sha256(self.state).digest()

    def __repr__(self) -> str:
        """Leave the state out."""
        return f"Granted({self.lineage.hex()})"


class MovingFiles:
    """The owner record, and the states that are on their way in."""

    def __init__(self, directory: StateDirectory, key: Key | None = None) -> None:
        """With a key what holds state is sealed with it, and must be."""
        self._directory = directory
        self._key = key
        self._in_place = InPlace(directory)
        self.names = directory.names

    @cached_property
    def owner(self) -> OwnerRecord:
        """The owner record, with a file or without."""
        from vtpmd.store.owner import OwnerRecord

        return OwnerRecord(self._directory, self._in_place)

    @cached_property
    def incoming(self) -> IncomingStates:
        """The states that are on their way in."""
        from vtpmd.store.incoming import IncomingStates

        return IncomingStates(self._directory, self._in_place, self._key)

    def close(self) -> None:
        """Close what is kept open; it is opened again when it is needed."""
        self._in_place.close()

    def export_permanent(self, place: str) -> dict[str, object]:
        """Return what export-permanent answers: the state that is durable, of a directory's place.

        For a thread of its own, as it takes as long as the disk does. Raises as ``exporting.take``.
        """
        from vtpmd.store import exporting, exporting_asked
        from vtpmd.store.directory import OpenDirectory

        own = self._directory
        with OpenDirectory(place, os.dup(own.directory_fd), own.version) as directory:
            stored = exporting.take_from(directory, self._key)
        return exporting_asked.answer(stored, place, self._key)

    def record(self) -> Record | None:
        """Return what the owner record says; None without a file, and the vTPM is ours.

        Raises VtpmdError.
        """
        return self.owner.read() if self._directory.exists(self.names.owner) else None

    def found(self) -> Found | None:
        """Return what a session has left on its way in, or None. Raises VtpmdError."""
        return self.incoming.find() if self._directory.exists(self.names.incoming) else None

    def is_without_a_state(self) -> bool:
        """Return whether all that this host has of a vTPM is that peers' were not taken here.

        To be asked when no session is under way: one that is open then has ended, and the disk did
        not take it.
        """
        record = self.record()
        if record is None:
            return False
        from vtpmd.store.owner import Outcome

        ends = {line.outcome for line in record.sessions}
        has_state = self._directory.exists(self.names.permanent)
        return bool(ends & {Outcome.OPEN, Outcome.DECLINED, Outcome.RELEASED}) and not has_state

    def granted(self) -> Granted | None:
        """Return the state that take_up() would make the vTPM's; nothing is written.

        Raises VtpmdError.
        """
        found = self.found()
        if found is None or found.state is None or not is_ours(found, self.owner.read()):
            return None
        return Granted(found.lineage, found.state)

    def lineage(self) -> bytes | None:
        """Return the identity of the vTPM whose state the directory holds; None: there is none.

        NOT_KNOWN of a state that no vtpmd has changed yet: swtpm writes no identity. Raises
        StateDirectoryError.
        """
        found = self.stands_at()
        if found is not None:
            return found.identity
        has_state = self._directory.exists(self.names.permanent)
        return NOT_KNOWN if has_state else None

    def stands_at(self) -> Lineage | None:
        """Return where the checkpoint of the directory's own state stands, as far as it says so.

        Raises StateDirectoryError.
        """
        return self._directory.read_lineage()


def is_ours(found: Found, record: Record) -> bool:
    """Return whether what a session has left was granted, and is still to be taken up.

    Once the record says how the session ended, it wins, whatever the file says: the vTPM may have
    been given back, or have moved on, since.
    """
    return found.granted and is_open(found, record)


def is_open(found: Found, record: Record) -> bool:
    """Return whether the record does not say yet how the session ended."""
    from vtpmd.store.owner import Outcome

    line = record.find(found.session.hex())
    return line is None or line.outcome is Outcome.OPEN


def take_up(directory: StateDirectory, files: MovingFiles, key: Key | None) -> bool:
    """After a crash: make a state that was granted the vTPM's, and forget one that was not.

    Return True if there was one to take up. If the TPM has written its own file since, that
    is the newer one. Raises VtpmdError for a granted state that cannot be read; it stays as it is.
    """
    found = files.found()
    if found is None:
        return False
    ours = is_ours(found, files.owner.read())
    if ours:
        if found.state is not None:
            # Those that are left go with a state that this host had before: a guest that boots
            # would find the PCRs of then.
            for name in (files.names.volatile, files.names.savestate, files.names.journal):
                directory.remove(name)
            lineage = Lineage(found.lineage, found.generation)
            directory.write_state(StateType.PERMANENT, found.state, key, lineage)
        files.owner.take(found.session, found.used)
    else:
        forget(files, found)
    files.incoming.remove()
    return ours


def forget(files: MovingFiles, found: Found) -> None:
    """Remember that a session was not granted, unless it is known how it ended."""
    if is_open(found, files.owner.read()):
        files.owner.decline(found.session)
