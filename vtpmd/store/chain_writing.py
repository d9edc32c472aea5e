"""Adding a backup to a chain, and removing the oldest ones, so that none is lost at any moment.

A link is written under a name that no reader looks at, synced, and renamed. With ``keep``, the
oldest state that stays is then written whole, if it is a delta, the same way; only when that is
durable are the links before it removed, and its delta: one after the other, from the oldest on,
each durably. Whatever a crash leaves of that, ``Chain.leftovers`` knows, and the next backup
removes. It syncs the directory first: what it finds, and says is there, may not have been synced.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from vtpmd.core.delta import delta_encode
from vtpmd.core.image import IMAGE_BYTES_MAX, Image
from vtpmd.errors import VtpmdError
from vtpmd.store import chain as chains
from vtpmd.store import export_seal
from vtpmd.store.chain import (
    EXIT_FOREIGN,
    LOCK_NAME,
    OWN_NAMES,
    TEMPORARY_NAME,
    Chain,
    ChainFile,
)
from vtpmd.store.directory import (
    DIRECTORY_MODE,
    StateDirectoryInUse,
    StateKeyError,
    lock_file,
    sync_directory,
    write_new,
)
from vtpmd.store.export_seal import Age, Seal
from vtpmd.store.exporting import Taken
from vtpmd.store.keys import Key
from vtpmd.wire import export_format
from vtpmd.wire.export_format import (
    ID_BYTES,
    LINK_NUMBER_MAX,
    LINKS_MAX,
    ExportFlag,
    Header,
    Link,
)
from vtpmd.wire.tpm import StateType, epoch_of

FILE_MODE: Final = 0o600


class CannotWrite(VtpmdError):
    """A chain cannot be written; what it had can still be restored."""


class InUse(VtpmdError):
    """Another backup into the same directory is under way."""

    exit_status = 3


class NotItsVtpm(VtpmdError):
    """A vTPM is not the one of the chain, or not what has become of it."""

    exit_status = EXIT_FOREIGN


class Outcome(NamedTuple):
    """What a backup has done."""

    taken: Taken
    newest: ChainFile
    is_new: bool  # else nothing has changed since the newest
    n_points: int  # that can be restored
    removed: tuple[str, ...]  # files


def back_up(
    destination: Path, path: Path, take: Callable[[], Taken], seal: Seal, keep: int | None
) -> Outcome:
    """Add the state that ``take`` finds at a path to a chain; keep as many of its newest ones.

    Without ``keep`` all stay. Raises InUse, NotItsVtpm, CannotWrite, what ``take`` and
    ``Chain.check`` do, another VtpmdError or OSError: then all that could be restored still can.
    """
    if not os.path.lexists(destination):
        take()  # what fails must not leave an empty directory
    with _locked(destination) as fd:
        chain, images = chains.again(destination, lambda: _opened(destination, seal, keep))
        taken = take()
        _check_room(chain, keep)
        added = _added(chain, path, taken, images, seal, fd)
        if added is not None:
            images[added.number] = Image(StateType.PERMANENT, added.number, _state(taken))
            chain = chain._replace(files=(*chain.files, added))
        chain, removed = _trimmed(chain, images, seal, keep, fd)
    points = chain.points()
    return Outcome(taken, points[-1], added is not None, len(points), tuple(removed))


def _state(taken: Taken) -> bytes:
    return taken.states[StateType.PERMANENT]


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Make and lock a directory, if it is a chain or empty; yield its descriptor.

    Raises InUse, ForeignFile, ChainDamaged, CannotWrite or OSError.
    """
    try:
        with suppress(FileExistsError):
            path.mkdir(DIRECTORY_MODE)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(path, error) from error
    try:
        if not OWN_NAMES & chains.names_in(fd):
            chains.read(path).check()  # before a file is made in what is somebody else's
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock_fd = os.open(LOCK_NAME, flags, FILE_MODE, dir_fd=fd)
        try:
            lock_file(str(path), lock_fd)
            _sync(path, fd)
            yield fd
        finally:
            os.close(lock_fd)
    except StateDirectoryInUse:
        raise InUse(
            f"another backup into {path} is under way; wait for it, or give another directory"
        ) from None
    finally:
        os.close(fd)


def _sync(path: Path, fd: int) -> None:
    """Have what is there be there for good: who died may have renamed it, and no more.

    Raises CannotWrite.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        raise _failed(path, error) from error


def _opened(path: Path, seal: Seal, keep: int | None) -> tuple[Chain, dict[int, Image]]:
    """Return a chain, and its states that are needed, by their numbers, when all have been opened.

    They are the newest one, and which may be the oldest that stays. There is none where age keeps
    them from who seals. Raises ForeignFile, StateKeyError, ChainDamaged or another VtpmdError.
    """
    chain = chains.read(path).check()
    points = chain.points()
    for each in points[-1:]:
        flags = each.header.flags & export_format.SEALS
        if flags != _flag_of(seal):
            is_with = each.header.sealing or "none"
            raise StateKeyError(
                f"{chain.place(each)} has another kind of seal ({is_with}) than this backup would "
                "have; seal it alike, or give another directory"
            )
    if isinstance(seal, Age):
        return chain, {}
    needed = [*points[-1:], *(() if keep is None else points[-keep:][:2])]
    images: dict[int, Image] = {}
    image: Image | None = None
    for each in points:
        image = chains.image_of(chain, each, image, seal)
        if each in needed:
            images[each.number] = image
    return chain, images


def _check_room(chain: Chain, keep: int | None) -> None:
    """Raise CannotWrite where a chain may not have one more link."""
    if keep is None and len(chain.files) >= LINKS_MAX:
        raise CannotWrite(
            f"{chain.path} has {len(chain.files)} backups, and may have no more; add --keep N, or "
            "give another directory"
        )
    if any(each.number == LINK_NUMBER_MAX for each in chain.files):
        raise CannotWrite(
            f"{chain.path} has used up the numbers of a chain; give another directory"
        )


def _flag_of(seal: Seal) -> ExportFlag:
    if isinstance(seal, Key):
        return ExportFlag.KEY
    return ExportFlag(0) if seal is None else ExportFlag.AGE


def _added(
    chain: Chain, path: Path, taken: Taken, images: dict[int, Image], seal: Seal, fd: int
) -> ChainFile | None:
    """Write a link of what was found, if it has changed. Raises NotItsVtpm or CannotWrite."""
    points = chain.points()
    if not points:
        sync_directory(chain.path.parent)  # in which this one may be new
        link, before = Link(os.urandom(ID_BYTES), 1), None
    else:
        newest = points[-1]
        _check_is_its(chain, newest, path, taken)
        before = images.get(newest.number)
        if _is_same(chain, newest, before, path, taken):
            return None
        link = newest.link._replace(number=newest.number + 1)
    header = Header(
        export=os.urandom(ID_BYTES),
        identity=taken.identity,
        generation=taken.generation,
        time_s=int(time.time()),
        version=taken.version,
        kinds=(StateType.PERMANENT,),
    )
    return _write(chain.path, header, link, before, _state(taken), seal, fd)


def _check_is_its(chain: Chain, newest: ChainFile, path: Path, taken: Taken) -> None:
    """Raise NotItsVtpm where a state cannot be what has become of a chain's newest one."""
    was, place = newest.header, chain.place(newest)
    what = None
    if (taken.version, taken.identity) != (was.version, was.identity):
        what = f"another vTPM than that of {place}, or has no identity, as swtpm leaves it"
    elif epoch_of(taken.generation) != epoch_of(was.generation):
        what = (
            f"of restore epoch {epoch_of(taken.generation)}, and {place} of "
            f"{epoch_of(was.generation)}: it was imported, or QEMU has loaded a snapshot, in "
            "between, and it is a line of its own"
        )
    elif taken.generation < was.generation:
        what = (
            f"of generation {taken.generation}, and {place} of {was.generation}: it is an older "
            "copy, or was put back"
        )
    if what is not None:
        raise NotItsVtpm(f"{path} is {what}; give another directory for its backups")


def _is_same(
    chain: Chain, newest: ChainFile, image: Image | None, path: Path, taken: Taken
) -> bool:
    """Return whether nothing has changed since the newest one. Raises NotItsVtpm for a fork."""
    has_number = taken.generation != 0 and taken.generation == newest.header.generation
    if image is None:
        return has_number  # it cannot be opened here
    is_same = image.data == _state(taken)
    if has_number and not is_same:
        raise NotItsVtpm(
            f"{path} and {chain.place(newest)} are both of generation {taken.generation}, and "
            "differ: of two copies of the vTPM each has gone on; give another directory for its "
            "backups"
        )
    return is_same


def _trimmed(
    chain: Chain, images: dict[int, Image], seal: Seal, keep: int | None, fd: int
) -> tuple[Chain, list[str]]:
    """Remove all but the newest ones, and what is left over; return what stays, and what does not.

    Raises CannotWrite.
    """
    points = chain.points()
    oldest = points[0] if keep is None else points[-keep:][0]
    doomed = [each for each in chain.files if each.number < oldest.number]
    doomed += [each for each in chain.leftovers() if each not in doomed]
    files = [each for each in chain.files if each not in doomed]
    if oldest.header.is_delta:
        header = oldest.header._replace(export=os.urandom(ID_BYTES))
        state = images[oldest.number].data
        whole = _write(chain.path, header, oldest.link, None, state, seal, fd)
        files[files.index(oldest)] = whole
        doomed.append(oldest)
    for each in sorted(doomed, key=lambda each: (each.number, not each.header.is_delta)):
        try:
            with suppress(FileNotFoundError):
                os.unlink(each.name, dir_fd=fd)
            os.fsync(fd)
        except OSError as error:
            raise _failed(chain.place(each), error) from error
    return chain._replace(files=tuple(files)), [each.name for each in doomed]


def _write(
    path: Path, header: Header, link: Link, before: Image | None, state: bytes, seal: Seal, fd: int
) -> ChainFile:
    """Write a link, durably; a whole one without a state before it. Raises CannotWrite."""
    header = header._replace(flags=ExportFlag(0), link=link)
    content = state
    if before is not None and max(len(before.data), len(state)) <= IMAGE_BYTES_MAX:
        content = delta_encode(before, Image(StateType.PERMANENT, link.number, state))
        header = header._replace(flags=ExportFlag.DELTA)
    file = export_seal.sealed(header, {StateType.PERMANENT: content}, seal)
    written = export_format.decode(file).header
    name = _name_of(written, link)
    try:
        with suppress(FileNotFoundError):
            os.unlink(TEMPORARY_NAME, dir_fd=fd)
        write_new(TEMPORARY_NAME, file, FILE_MODE, fd)
        os.rename(TEMPORARY_NAME, name, src_dir_fd=fd, dst_dir_fd=fd)
        os.fsync(fd)
    except OSError as error:
        with suppress(OSError):
            os.unlink(TEMPORARY_NAME, dir_fd=fd)
        raise _failed(path / name, error) from error
    return ChainFile(name, written, link, len(file))


def _name_of(header: Header, link: Link) -> str:
    """Return what a link's file is called: names sort as the links do."""
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(header.time_s))
    kind = "delta" if header.is_delta else "full"
    return f"{link.number:08}-{when}-g{header.generation}.{kind}"


def _failed(path: Path | str, error: OSError) -> CannotWrite:
    return CannotWrite(
        f"cannot write {path}: {error.strerror}; put that right, or give another directory"
    )
