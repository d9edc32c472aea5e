"""Who has the lock on a state directory, by a record in ``.lock``: for storage that hosts share.

Where a file system keeps locks on each host by itself, two of them may have the lock at once. What
the file says both can read. docs/state-format.md has its bytes, and the table.
"""

from __future__ import annotations

import os
from enum import Enum
from functools import cache

from vtpmd import moment
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple
from vtpmd.store.directory import LOCK_BYTES_MAX as HOLDER_BYTES
from vtpmd.store.directory import StateDirectoryInUse

if TYPE_CHECKING:
    from typing import Final

MAGIC: Final = b"vtpmlock1"
HELD, FREE = b"held", b"free"
BOOT_BYTES: Final = 36
HOST_BYTES_MAX: Final = 64  # of a name, as gethostname(2) has it
NAMESPACE: Final = "/proc/self/ns/pid"
# Of all fields but the last the bytes that each takes; a line feed follows each.
_FIELDS: Final = (len(MAGIC), len(HELD), BOOT_BYTES, 32, 20, 10, 20, 20, HOST_BYTES_MAX)
_NO_MACHINE: Final = "-" * 32  # has none, and is no other's
_START_TIME: Final = 19  # of the fields of /proc/PID/stat behind the program's name


class Place(NamedTuple):
    """Where a process runs."""

    boot: str  # of the kernel, new each time that it starts
    machine: str
    namespace: int  # of process numbers: a container's are its own
    host: str  # its name, for people


class Holder(NamedTuple):
    """A process that has, or had, the lock."""

    is_held: bool  # else it has given the directory back
    place: Place
    pid: int
    started: int  # in ticks since the kernel's start: a number may come to be another process'
    since: str  # ISO 8601, UTC


class Found(Enum):
    """What the record says, as this process sees it."""

    NOTHING = "nothing: the file is empty, as swtpm's is"
    FREE = "given back"
    OVER = "this host's, whose process has ended, or which was started again since"
    LIVES = "this host's, whose process lives"
    ELSEWHERE = "another host's, or another container's"
    DAMAGED = "not readable"


class Asked(Enum):
    """What is to be done with the directory."""

    START = "use"
    CLAIM = "claim"


class Do(Enum):
    """What becomes of that."""

    SERVE = "served"
    REFUSE = "refused"


TABLE: Final[dict[tuple[Found, bool, Asked], Do]] = {
    # Whoever has the lock is there, whatever else is written.
    **{(found, False, asked): Do.REFUSE for found in Found for asked in Asked},
    **{(found, True, Asked.START): Do.SERVE for found in (Found.NOTHING, Found.FREE, Found.OVER)},
    **{(found, True, Asked.CLAIM): Do.SERVE for found in (Found.NOTHING, Found.FREE, Found.OVER)},
    # It has the lock, too: the file system has let both have it.
    (Found.LIVES, True, Asked.START): Do.REFUSE,
    (Found.LIVES, True, Asked.CLAIM): Do.REFUSE,
    (Found.ELSEWHERE, True, Asked.START): Do.REFUSE,
    (Found.ELSEWHERE, True, Asked.CLAIM): Do.SERVE,
    (Found.DAMAGED, True, Asked.START): Do.REFUSE,
    (Found.DAMAGED, True, Asked.CLAIM): Do.SERVE,
}


@cache
def here() -> Place:
    """Return where this process runs; to be asked before another root directory is entered."""
    machine = _read("/etc/machine-id")
    if len(machine) != len(_NO_MACHINE) or not machine.isalnum():
        machine = _NO_MACHINE
    host = os.uname().nodename.encode(errors="replace")[:HOST_BYTES_MAX].decode(errors="replace")
    # One that may not be read is nobody else's either.
    boot = _read("/proc/sys/kernel/random/boot_id") or os.urandom(BOOT_BYTES // 2).hex()
    return Place(boot, machine, _namespace(), host)


def _read(path: str) -> str:
    """Return what a file of the kernel's, or of /etc, begins with; nothing if it is not there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, HOLDER_BYTES).decode(errors="replace").strip()
        finally:
            os.close(fd)
    except OSError:
        return ""


def _namespace() -> int:
    try:
        return os.stat(NAMESPACE).st_ino
    except OSError:
        return 0


def this_process() -> Holder:
    """Return the record of this process, as of now."""
    pid = os.getpid()
    return Holder(True, here(), pid, _start_time(pid) or 0, moment.now())


def _start_time(pid: int) -> int | None:
    """Return when a process was started, or None where that cannot be read."""
    _, found, fields = _read(f"/proc/{pid}/stat").rpartition(") ")
    return int(fields.split()[_START_TIME]) if found else None


def encode(holder: Holder) -> bytes:
    """Return the bytes of a record."""
    place = holder.place
    texts = (
        place.boot.ljust(BOOT_BYTES),
        place.machine,
        f"{place.namespace:020}",
        f"{holder.pid:010}",
        f"{holder.started:020}",
        holder.since,
    )
    fields = [MAGIC, HELD if holder.is_held else FREE, *(text.encode("ascii") for text in texts)]
    fields.append(place.host.encode()[:HOST_BYTES_MAX].ljust(HOST_BYTES_MAX))
    content = b"".join(field + b"\n" for field in fields)
    return content.ljust(HOLDER_BYTES - 1) + b"\n"


def decode(content: bytes) -> Holder:
    """Return what a record says. Raises ValueError for what is none."""
    if len(content) != HOLDER_BYTES:
        raise ValueError("its length is wrong")
    fields, at = [], 0
    for length in _FIELDS:
        fields.append(content[at : at + length])
        at += length + 1
        if content[at - 1 : at] != b"\n":
            raise ValueError("a field does not end")
    magic, state, *texts = fields
    boot, machine, namespace, pid, started, since, host = (
        text.decode(errors="replace").strip() for text in texts
    )
    numbers = (namespace, pid, started)
    if magic != MAGIC or state not in (HELD, FREE) or content[at:].strip(b" ") != b"\n":
        raise ValueError("it is of another version")
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise ValueError("a number is none")
    if not all(text.isprintable() for text in (boot, machine, since, host)):
        raise ValueError("a text is none")
    place = Place(boot, machine, int(namespace), host)
    return Holder(state == HELD, place, int(pid), int(started), since)


def find(content: bytes, seen_from: Place | None = None) -> tuple[Found, Holder | None]:
    """Return what the bytes of the file say, as it is seen from here, and whom they name."""
    if not content:
        return Found.NOTHING, None
    try:
        holder = decode(content)
    except ValueError:
        return Found.DAMAGED, None
    if not holder.is_held:
        return Found.FREE, holder
    return _where(holder, seen_from or here()), holder


def look(lock_fd: int) -> tuple[Found, Holder | None]:
    """Return the same of the open file. Raises OSError."""
    return find(os.pread(lock_fd, HOLDER_BYTES + 1, 0))


def _where(holder: Holder, now: Place) -> Found:
    then = holder.place
    if now.boot == then.boot:
        if now.namespace != then.namespace:
            return Found.ELSEWHERE
        return Found.LIVES if _lives(holder) else Found.OVER
    if then.machine != _NO_MACHINE and (now.machine, now.host) == (then.machine, then.host):
        return Found.OVER
    return Found.ELSEWHERE


def _lives(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    started = _start_time(holder.pid)
    return holder.pid != os.getpid() and started in (holder.started, None)


def check(path: str | os.PathLike[str], lock_fd: int, asked: Asked, *, is_locked: bool) -> None:
    """Raise StateDirectoryInUse if a directory is not to be used, by the record in its ``.lock``.

    One that is this host's, and over, is said to be that. Raises OSError, too.
    """
    found, holder = look(lock_fd)
    if TABLE[found, is_locked, asked] is Do.SERVE:
        if found is Found.OVER and holder is not None:
            give_back(lock_fd, holder)
        return
    claim = f"vtpmd owner {path} --claim"
    if holder is None:
        raise StateDirectoryInUse(
            f"state directory {path} may be in use: its .lock is no record of vtpmd's; if no "
            f"other host uses it: {claim}"
        )
    if found is Found.ELSEWHERE:
        raise StateDirectoryInUse(
            f"state directory {path} is in use by {describe(holder)}: stop it there, or, if that "
            f"is gone for good: {claim}"
        )
    raise StateDirectoryInUse(
        f"state directory {path} is in use by {describe(holder)}; stop that first, or give another "
        "one"
    )


def describe(holder: Holder) -> str:
    """Return who it is, for people."""
    return f"host {holder.place.host}, process {holder.pid}, since {holder.since}"


def write(lock_fd: int, content: bytes) -> None:
    """Put a record, or none, into the file, durably. Raises OSError."""
    os.pwrite(lock_fd, content, 0)
    os.ftruncate(lock_fd, len(content))
    os.fdatasync(lock_fd)


def give_back(lock_fd: int, holder: Holder) -> None:
    """Say that this process has it no more, durably. Raises OSError."""
    write(lock_fd, encode(holder._replace(is_held=False)))
