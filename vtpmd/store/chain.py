"""A chain of backups: a directory of exports, of which one continues the other.

    00000001-20261129T012127Z-g40.full     an export of the whole state
    00000002-20261129T022127Z-g57.delta    what makes the next state of that, and so on

Each says in its header of which chain it is, and its number there; names are for people, and not
believed. A state is restored from the whole one before it, or its own, and all deltas since. A link
that is there twice, whole and as a delta, and deltas before the first whole one, are left over of
removing the oldest (``chain_writing.py``). Nothing is locked or written here: what is removed while
it is read is looked for again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from vtpmd.core.delta import DeltaError, DeltaMismatchError, delta_apply
from vtpmd.core.image import IMAGE_BYTES_MAX, Image
from vtpmd.counted import counted
from vtpmd.errors import VtpmdError
from vtpmd.store import export_seal
from vtpmd.store.directory import StateKeyError, read_regular_file
from vtpmd.store.export_seal import Seal
from vtpmd.wire import export_format
from vtpmd.wire.export_format import (
    DIGEST_BYTES,
    EXPORT_BYTES_MAX,
    LINKS_MAX,
    DamagedExport,
    Export,
    ExportError,
    ExportFlag,
    Header,
    LaterVersion,
    Link,
)
from vtpmd.wire.tpm import StateType, epoch_of

_T = TypeVar("_T")

LOCK_NAME: Final = ".vtpmd-backup.lock"
TEMPORARY_NAME: Final = ".vtpmd-backup.tmp"  # a link, until it is whole
OWN_NAMES: Final = frozenset((LOCK_NAME, TEMPORARY_NAME))
FILES_MAX: Final = LINKS_MAX + 2  # with a new one, and the oldest one written whole
TRIES_MAX: Final = 100
PAUSE_S: Final = 0.02
EXIT_DAMAGED: Final = 5
EXIT_FOREIGN: Final = 10
EXIT_NO_GENERATION: Final = 12


class ChainDamaged(VtpmdError):
    """A chain is not as it was written."""

    exit_status = EXIT_DAMAGED


class ForeignFile(VtpmdError):
    """A directory has what is not of its chain."""

    exit_status = EXIT_FOREIGN


class NoSuchLink(VtpmdError):
    """A chain has no state of the generation that was asked for."""

    exit_status = EXIT_NO_GENERATION


class _Changed(Exception):
    """Somebody has removed a link, or added one, while a chain was read."""


class ChainFile(NamedTuple):
    """A link of a chain, and the file that it is in."""

    name: str
    header: Header
    link: Link
    n_bytes: int

    @property
    def number(self) -> int:
        """Where in the chain it is."""
        return self.link.number


class Chain(NamedTuple):
    """What a directory of backups has."""

    path: Path
    files: tuple[ChainFile, ...]  # by their numbers, a whole one before a delta
    problems: tuple[VtpmdError, ...]  # what each says is wrong

    def points(self) -> list[ChainFile]:
        """Return what can be restored, oldest first; without problems its numbers have no gap."""
        found: dict[int, ChainFile] = {}
        for each in self.files:
            if found or not each.header.is_delta:
                found.setdefault(each.number, each)
        return list(found.values())

    def leftovers(self) -> list[ChainFile]:
        """Return what an interrupted removal has left."""
        names = {each.name for each in self.points()}
        return [each for each in self.files if each.name not in names]

    def place(self, file: ChainFile) -> str:
        """Return where a link is, for people."""
        return _place(self.path, file.name)

    def check(self) -> Chain:
        """Return this, if nothing is wrong with it. Raises ForeignFile, ChainDamaged and others."""
        for problem in self.problems:
            raise problem
        return self

    def way_to(self, file: ChainFile) -> list[ChainFile]:
        """Return the links that make a state: a whole one, and deltas. Raises ChainDamaged."""
        found: dict[Link, ChainFile] = {}
        for each in self.files:
            found.setdefault(each.link, each)
        way = [file]
        while (last := way[-1]).header.is_delta:
            before = found.get(last.link._replace(number=last.number - 1))
            if before is None:
                raise ChainDamaged(
                    f"{self.place(last)} needs link {last.number - 1} of its chain, which is "
                    "missing or damaged; put it back from another copy, or restore an earlier "
                    "one with --at"
                )
            way.append(before)
        return way[::-1]


def shown(name: str) -> str:
    """Return a file's name, which anybody may have given it, for a line."""
    return "".join(char if char.isprintable() else "?" for char in name)


def _place(path: Path, name: str) -> str:
    return f"{path}/{shown(name)}"


def is_chain(path: Path) -> bool:
    """Return whether a directory has a link of a chain, or had one. Raises OSError."""
    with _opened(path) as fd:
        names = names_in(fd)
        if LOCK_NAME in names:
            return True
        for name in sorted(names):
            try:
                if _read_file(fd, name).header.link is not None:
                    return True
            except (OSError, ExportError):
                continue
    return False


def read(path: Path) -> Chain:
    """Return the chain in a directory; all of each file is checked, but what is sealed.

    Raises VtpmdError where it is changed all the time, or OSError.
    """
    return again(path, lambda: _read_once(path))


def restore(
    path: Path, seal: Seal, *, at: int | None = None, name: str | None = None
) -> tuple[Header, dict[StateType, bytes]]:
    """Return the newest state of a chain, the one of a generation, or of a file, and its header.

    The header is that of an export of this state alone. Raises ExportError where there is no
    backup, NoSuchLink, StateKeyError, ChainDamaged, another VtpmdError or OSError.
    """

    def restore_once() -> tuple[Header, dict[StateType, bytes]]:
        chain = _read_once(path)
        file = _chosen(chain, at, name)
        first, *deltas = chain.way_to(file)
        image = image_of(chain, first, None, seal)
        for each in deltas:
            image = image_of(chain, each, image, seal)
        header = file.header._replace(flags=file.header.flags & ~ExportFlag.DELTA, link=None)
        states = {StateType.PERMANENT: image.data}
        return header, states

    return again(path, restore_once)


def image_of(chain: Chain, file: ChainFile, before: Image | None, seal: Seal) -> Image:
    """Return the state of a link, which a delta makes of the one ``before``.

    Raises StateKeyError, ChainDamaged or another VtpmdError.
    """
    place = chain.place(file)
    with _opened(chain.path) as fd:
        try:
            export = _read_file(fd, file.name)
        except FileNotFoundError:
            raise _Changed from None
    if export.header != file.header:
        raise _Changed
    try:
        state = export_seal.opened(export, seal)[StateType.PERMANENT]
    except StateKeyError as error:
        raise StateKeyError(f"{place}: {error}") from error
    except DamagedExport as error:
        raise ChainDamaged(f"{place}: {error}") from error
    if not file.header.is_delta:
        return Image(StateType.PERMANENT, file.number, state)
    if before is None or before.generation != file.number - 1:
        raise ChainDamaged(f"{place} needs link {file.number - 1}, which cannot be restored")
    return _applied(place, file, before, state)


def _applied(place: str, file: ChainFile, before: Image, record: bytes) -> Image:
    """Return what a delta makes. Raises ChainDamaged."""
    try:
        if len(before.data) <= IMAGE_BYTES_MAX:
            image = delta_apply(before, record)
            if image.generation == file.number:
                return image
    except DeltaMismatchError as error:
        raise ChainDamaged(
            f"{place} does not continue the link before it, which is of another copy of the "
            "chain; take both from one copy, or restore an earlier one with --at"
        ) from error
    except DeltaError as error:
        raise ChainDamaged(f"{place} is damaged: {error}") from error
    raise ChainDamaged(f"{place} is damaged: it is not the delta that it says; take another copy")


def again(path: Path, once: Callable[[], _T]) -> _T:
    """Return what ``once`` makes of a chain, when nothing was removed meanwhile.

    Raises what it does, or VtpmdError.
    """
    for _ in range(TRIES_MAX):
        try:
            return once()
        except _Changed:
            time.sleep(PAUSE_S)
    raise VtpmdError(f"{path} is changed all the time; wait for the backups into it, and try again")


def _chosen(chain: Chain, at: int | None, name: str | None) -> ChainFile:
    """Return the link that was asked for. Raises NoSuchLink, ChainDamaged or ExportError."""
    if all(isinstance(problem, ForeignFile) for problem in chain.problems) and not chain.files:
        raise ExportError("it has no backup; give the directory of a chain, or an export")
    if name is not None:
        found = [each for each in chain.files if each.name == name]
    elif at is not None:
        found = [each for each in chain.points() if each.header.generation == at]
    elif chain.problems:
        what = f"{chain.problems[0]} (or name the one to restore: its file, or --at GENERATION)"
        raise ChainDamaged(what)
    else:
        found = chain.points()[-1:]
    if len(found) == 1 and at in (None, found[0].header.generation):
        return found[0]
    how_many = counted(len(found), "backup") if found else "no backup"
    raise NoSuchLink(
        f"{chain.path} has {how_many} of generation {at}; give the file of one: "
        f"`vtpmd verify {chain.path}` lists them"
    )


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a directory. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def names_in(fd: int) -> set[str]:
    """Return what an open directory has. Raises OSError."""
    return set(os.listdir(fd))


def _read_file(fd: int, name: str) -> Export:
    """Return the export in a file. Raises ExportError or OSError."""
    return export_format.decode(read_regular_file(fd, name, EXPORT_BYTES_MAX))


def _read_once(path: Path) -> Chain:
    """Return the chain in a directory now. Raises _Changed, VtpmdError or OSError."""
    files: list[ChainFile] = []
    problems: list[VtpmdError] = []
    with _opened(path) as fd:
        names = names_in(fd) - OWN_NAMES
        if len(names) > FILES_MAX:
            raise VtpmdError(
                f"{path} has more than {FILES_MAX} files; begin another chain, with --keep N"
            )
        for name in sorted(names):
            try:
                files.append(_file_of(path, name, fd))
            except VtpmdError as error:
                problems.append(error)
        if names_in(fd) - OWN_NAMES != names:
            raise _Changed
    files.sort(key=lambda each: (each.number, each.header.is_delta, each.name))
    problems += _strangers(path, files) or _breaks(path, files)
    return Chain(path, tuple(files), tuple(problems))


def _file_of(path: Path, name: str, fd: int) -> ChainFile:
    """Return a link. Raises _Changed, ChainDamaged, ForeignFile or LaterVersion."""
    place = _place(path, name)
    try:
        export = _read_file(fd, name)
    except FileNotFoundError:
        raise _Changed from None
    except DamagedExport as error:
        raise ChainDamaged(f"{place}: {error}") from error
    except LaterVersion as error:
        raise LaterVersion(f"{place}: {error}") from error
    except OSError as error:
        raise ChainDamaged(
            f"{place} cannot be read: {error.strerror}; put right what keeps it, or move away "
            "what is no backup"
        ) from error
    except ExportError as error:
        raise ForeignFile(
            f"{place} is no link of a chain of backups: {error}; give a directory of the chain's "
            "own, or move it away"
        ) from error
    header = export.header
    if header.link is None:
        raise ForeignFile(
            f"{place} is an export by itself, and no link of a chain of backups; give a directory "
            "of the chain's own, or move it away"
        )
    n_bytes = len(export.head) + len(export.body) + DIGEST_BYTES
    return ChainFile(name, header, header.link, n_bytes)


def _strangers(path: Path, files: list[ChainFile]) -> list[VtpmdError]:
    """Return which links are not of the chain of the first one."""
    problems: list[VtpmdError] = []
    for each in files[1:]:
        first, header = files[0].header, each.header
        whats = (
            (each.link.chain != files[0].link.chain, "another chain"),
            (header.version != first.version, "another version of TPM"),
            (header.identity != first.identity, "another vTPM"),
            (header.sealing != first.sealing, "another kind of seal"),
            (epoch_of(header.generation) != epoch_of(first.generation), "another restore epoch"),
        )
        what = next((what for is_so, what in whats if is_so), None)
        if what is not None:
            it, other = _place(path, each.name), _place(path, files[0].name)
            says = f"{it} is of {what} than {other}; move one of them to a directory of its own"
            problems.append(ForeignFile(says))
    return problems


def _breaks(path: Path, files: list[ChainFile]) -> list[VtpmdError]:
    """Return where links do not continue each other."""
    problems: list[VtpmdError] = []
    if files and all(each.header.is_delta for each in files):
        first = _place(path, files[0].name)
        problems.append(
            ChainDamaged(
                f"the whole state that {first} is a delta to is missing: put it back from another "
                "copy of the chain"
            )
        )
    for before, after in pairwise(files):
        what = _break(before, after)
        if what is not None:
            it, other = _place(path, after.name), _place(path, before.name)
            problems.append(
                ChainDamaged(
                    f"{it} does not continue {other}: {what}; put right what is missing or too "
                    "much, or give another directory"
                )
            )
    return problems


def _break(before: ChainFile, after: ChainFile) -> str | None:
    """Return why a link is not the next one, if so."""
    was, now = before.header, after.header
    if before.number == after.number:
        if was.is_delta == now.is_delta:
            return f"both are link {after.number}"
        return None if was.generation == now.generation else "they are of two states"
    if after.number != before.number + 1:
        return f"link {before.number + 1} is missing"
    if now.generation and now.generation <= was.generation:
        return f"it is of generation {now.generation}, after {was.generation}"
    return None
