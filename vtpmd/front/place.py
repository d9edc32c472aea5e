"""Where a vTPM's state is: what ``--tpmstate`` names, opened for an engine."""

from __future__ import annotations

import os

from vtpmd.errors import UsageError, VtpmdError
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple
from vtpmd.store.directory import LINK_NAME, StateDirectory

if TYPE_CHECKING:
    from contextlib import ExitStack

    from vtpmd.front.options import Values
    from vtpmd.store.directory import TpmVersion
    from vtpmd.store.keys import Key
    from vtpmd.store.start import Start

SCHEMES = ("dir", "file")


class Named(NamedTuple):
    """What ``--tpmstate`` names, or TPM_PATH."""

    path: str
    is_linear: bool  # a file or block device, and no directory


def named_place(values: Values) -> Named:
    """Return what is named. Raises UsageError."""
    uri, path = values.get("backend-uri"), values.get("dir")
    if isinstance(uri, str):
        scheme, _, rest = uri.partition("://")
        if scheme not in SCHEMES or not rest:
            raise UsageError(
                f"--tpmstate backend-uri={uri} is not served: use dir://PATH or file://PATH"
            )
        return Named(rest, scheme == "file")
    if path is None:
        path = os.environ.get("TPM_PATH")
    if not path:
        raise UsageError("there is no place for the state: give --tpmstate dir=PATH, or TPM_PATH")
    return Named(str(path), is_linear=False)


def file_mode(values: Values) -> int | None:
    """Return the mode that files are to have, if there is one."""
    return None if values.get("mode") is None else int(values["mode"])


class Sharing(NamedTuple):
    """What ``--migration`` says of storage that hosts share."""

    is_to_come: bool  # QEMU brings the state; until then another host's vTPM may have the lock
    releases: bool  # the lock is let go of once QEMU has been given the state

    @property
    def is_so(self) -> bool:
        """Whether it is shared: then the vTPM moves by QEMU's own migration alone."""
        return self.is_to_come or self.releases

    def flags(self) -> int:
        """Return what the engine is told."""
        from vtpmd.core.boot import LinkSharing

        return (LinkSharing.INCOMING if self.is_to_come else 0) | (
            LinkSharing.RELEASES if self.releases else 0
        )


def sharing(values: Values) -> Sharing:
    """Return what ``--migration`` says."""
    return Sharing(bool(values.get("incoming")), bool(values.get("release-lock-outgoing")))


class Place(NamedTuple):
    """What an engine gets of it."""

    fd: int  # of the directory, or of the file
    lock_fd: int
    link_name: str  # of the engine's own socket; empty where there is no place for one
    begun: Start
    news: str = ""  # what a person should know of it
    header: bytes = b""  # of a linear file, as it was when that was read
    holder: bytes = b""  # what .lock says while this has the lock, on storage that hosts share

    def listen(self, stack: ExitStack) -> int:
        """Return a descriptor of the engine's own socket, or of /dev/null. Raises VtpmdError."""
        if not self.link_name:
            null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, null_fd)
            return null_fd
        from vtpmd.daemon.listener import listen_in

        return stack.enter_context(listen_in(self.fd, self.link_name)).fileno()


def open_place(
    stack: ExitStack, values: Values, version: TpmVersion, key: Key | None, sharing: Sharing
) -> Place:
    """Open and lock it, and make it what a vTPM starts from. Raises VtpmdError or OSError."""
    named = named_place(values)
    if sharing.is_to_come:
        return _open_to_come(stack, named, version)
    mode = file_mode(values)
    keeps_backup = bool(values.get("backup"))
    if named.is_linear:
        if keeps_backup:
            raise UsageError(
                "--tpmstate backup is for a state directory: a file has no place for it"
            )
        from vtpmd.store.linear import LinearFile

        file = stack.enter_context(LinearFile.open(named.path, mode))
        begun = file.start(version, key)
        return Place(file.fd, file.fd, "", begun, header=file.header)
    directory = stack.enter_context(StateDirectory.open(named.path, make=False, version=version))
    directory.write_in_place()
    holder = _hold(stack, directory) if sharing.is_so else b""
    if mode is not None:
        directory.set_file_mode(mode)
    place = _start_directory(stack, directory, key, keeps_backup=keeps_backup)
    return place._replace(link_name="", holder=holder) if sharing.is_so else place


def _hold(stack: ExitStack, directory: StateDirectory) -> bytes:
    """Have other hosts know that the directory is in use, until the stack ends; return how."""
    from vtpmd.store import holder

    mine = holder.this_process()
    stack.callback(holder.give_back, directory.lock_fd, mine)
    holder.write(directory.lock_fd, holder.encode(mine))
    return holder.encode(mine)


def _open_to_come(stack: ExitStack, named: Named, version: TpmVersion) -> Place:
    """Open it, and leave it as it is: it is another host's until the state has come."""
    from vtpmd.store.start import nothing

    begun = nothing(version)
    if named.is_linear:
        from vtpmd.store.linear import LinearFile

        file = stack.enter_context(LinearFile.open(named.path, lock=False))
        return Place(file.fd, file.fd, "", begun._replace(keeps_journal=False))
    opened = StateDirectory.open(named.path, make=False, version=version, lock=False)
    directory = stack.enter_context(opened)
    _refuse_others(directory)
    from vtpmd.store import holder

    record = holder.encode(holder.this_process())
    return Place(directory.directory_fd, directory.lock_fd, "", begun, holder=record)


def _refuse_others(directory: StateDirectory) -> None:
    """Refuse a directory whose owner record says that it is no host's that shares it."""
    from vtpmd.store.moving import MovingFiles

    files = MovingFiles(directory)
    try:
        record = files.record()
    finally:
        files.close()
    if record is not None and not record.is_ours:
        raise VtpmdError(
            f"the vTPM in {directory.path} was given to a host that does not share it: leave out "
            "--migration incoming, or give another directory"
        )


def _start_directory(
    stack: ExitStack, directory: StateDirectory, key: Key | None, *, keeps_backup: bool
) -> Place:
    from vtpmd.store import backup
    from vtpmd.store.moving import MovingFiles
    from vtpmd.store.start import start

    news = ""
    if keeps_backup and backup.take_up(directory):
        news = f"the state in {directory.path} was missing: its backup is in its place"
    files = MovingFiles(directory, key)
    stack.callback(files.close)
    begun = start(directory, files, key, None)
    if keeps_backup:
        backup.keep(directory)
    return Place(directory.directory_fd, directory.lock_fd, LINK_NAME, begun, news)
