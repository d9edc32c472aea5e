"""The owner record: whose the vTPM is, and what became of its sessions. The one place that says it.

    tpm2-00.owner   lines of JSON; the first is one sector, which says whose it is, and of which
                    session; then a line for each session that is remembered, and for each fork

docs/owner-record.md has its fields and the table of its transitions. Each transition is durable
when its method returns. One that only changes the first line is written in place, so that its sync
writes no metadata: a disk writes a sector whole. Any other makes the file anew.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum, StrEnum
from hashlib import sha256
from typing import Final, NamedTuple, Protocol

from vtpmd import moment
from vtpmd.errors import VtpmdError
from vtpmd.store.directory import FileNames

OWNER_VERSION: Final = 2
SECTOR_BYTES: Final = 512
# All the lines that there may be, with texts whose every character JSON writes with twelve.
OWNER_BYTES_MAX: Final = 512 * 1024
# What is forgotten cannot be answered for. A source asks within minutes, hops are rarer than that.
SESSIONS_MAX: Final = 64
FORKS_MAX: Final = 64  # each is an operator's decision; a person reads them all
TEXT_LENGTH_MAX: Final = 300  # HOST:PORT, or a peer's names
LOOKS_MAX: Final = 100  # a move writes it four times, in milliseconds
TEXT_LENGTH_CUT: Final = 200  # what is left of a longer one, before the digest of all of it
# Of one session: a capture every microsecond would take an hour to use them up.
GENERATIONS_RESERVED: Final = 1 << 32
GENERATION_MAX: Final = (1 << 63) - 1  # csrc/pages.h


class Whose(StrEnum):
    """Who may execute commands for the vTPM."""

    OURS = "ours"  # this host
    OFFERED = "offered"  # this host only if the peer, when asked, has not taken it
    MOVED = "moved"  # another host, until that says that it lets go of it


class Outcome(StrEnum):
    """What became of a session."""

    OPEN = "open"
    DECLINED = "declined"  # a peer's vTPM, which was not taken
    RELEASED = "released"  # a peer's vTPM, which was given back unused
    TAKEN = "taken"  # a peer's vTPM, which is this host's now
    SENT = "sent"  # ours, which was offered to a peer


class Transition(StrEnum):
    """What changes the record; each has a method of its name."""

    RESERVE = "reserve"
    OFFER = "offer"
    WITHDRAW = "withdraw"
    CONFIRM = "confirm"
    RELEASE = "release"
    EXPECT = "expect"
    DECLINE = "decline"
    TAKE = "take"
    GIVE_BACK = "give_back"
    ARRIVE = "arrive"
    CLAIM = "claim"
    CLAIM_LOCK = "claim_lock"
    RESTORE = "restore"
    REPLACE = "replace"


_ANY: Final = tuple(Whose)
TABLE: Final[dict[tuple[Whose, Transition], Whose]] = {
    (Whose.OURS, Transition.RESERVE): Whose.OURS,
    (Whose.OURS, Transition.OFFER): Whose.OFFERED,
    (Whose.OFFERED, Transition.OFFER): Whose.OFFERED,
    (Whose.OURS, Transition.WITHDRAW): Whose.OURS,
    (Whose.OFFERED, Transition.WITHDRAW): Whose.OURS,
    (Whose.OFFERED, Transition.CONFIRM): Whose.MOVED,
    (Whose.MOVED, Transition.CONFIRM): Whose.MOVED,
    (Whose.OFFERED, Transition.RELEASE): Whose.OURS,
    (Whose.MOVED, Transition.RELEASE): Whose.OURS,
    **{(whose, Transition.EXPECT): whose for whose in _ANY},
    **{(whose, Transition.DECLINE): whose for whose in _ANY},
    **{(whose, Transition.TAKE): Whose.OURS for whose in _ANY},
    **{(whose, Transition.GIVE_BACK): Whose.MOVED for whose in _ANY},
    **{(whose, Transition.ARRIVE): Whose.OURS for whose in _ANY},
    (Whose.OFFERED, Transition.CLAIM): Whose.OURS,
    (Whose.MOVED, Transition.CLAIM): Whose.OURS,
    **{(whose, Transition.CLAIM_LOCK): whose for whose in _ANY},
    **{(whose, Transition.RESTORE): Whose.OURS for whose in _ANY},
    **{(whose, Transition.REPLACE): Whose.OURS for whose in _ANY},
}


class Session(NamedTuple):
    """One session that this host remembers."""

    session: str  # in hexadecimal digits
    outcome: Outcome
    peer: str  # the peer's names; of a SENT one HOST:PORT, where it can be asked
    at: str  # ISO 8601, UTC


class Fork(NamedTuple):
    """An operator took the vTPM without another's word: both may have served it."""

    session: str
    peer: str
    at: str
    export: str = ""  # which one the vTPM was imported from, in hexadecimal digits


class Record(NamedTuple):
    """What the owner record says. With no file it is OURS."""

    whose: Whose = Whose.OURS
    session: str = ""  # OFFERED, MOVED: of which session
    since: str = ""
    generation: int = 0  # none above it has been used
    sessions: tuple[Session, ...] = ()
    forks: tuple[Fork, ...] = ()

    def find(self, session: str) -> Session | None:
        """Return what is remembered of a session."""
        return next((line for line in self.sessions if line.session == session), None)

    @property
    def is_ours(self) -> bool:
        """Whether this host may execute commands, whatever a peer says."""
        return self.whose is Whose.OURS

    @property
    def peer(self) -> str:
        """Whom it was offered or given to, for people; where to ask, if it was SENT."""
        found = self.find(self.session)
        return "" if found is None else found.peer


class OwnerRecordError(VtpmdError):
    """The record cannot be read, or does not allow what is asked of it; it is as it was."""

    exit_status = 5


class Readable(Protocol):
    """Where the record is read."""

    names: FileNames

    def read(self, name: str, bytes_max: int) -> bytes | None:
        """Return a file's content, or None."""


class Directory(Readable, Protocol):
    """Where the record is kept: a state directory."""

    def replace(self, name: str, content: bytes) -> None:
        """Replace a file, durably."""

    def remove(self, name: str) -> None:
        """Remove a file, durably, if it is there."""


class InPlace(Protocol):
    """What writes into a file that is there."""

    def overwrite(self, name: str, offset: int, content: bytes) -> None:
        """Write into a file, durably."""

    def opened(self, name: str) -> AbstractContextManager[int]:
        """Open a file for somebody else to write into; return its descriptor."""

    def keep_open(self, name: str) -> None:
        """Keep a file open for the writes that come."""

    def forget(self, name: str) -> None:
        """Keep it open no longer."""


class Disk(Enum):
    """Whether the disk says what the record does."""

    AS_SAID = "it does"
    IN_DOUBT = "a write has failed: it may say what the record did before"
    HANDED_OUT = "somebody else writes the first sector: as IN_DOUBT until that is over"
    REPLACED = "as HANDED_OUT, into a file that is no more: the one that is there does"


class Sector(NamedTuple):
    """What somebody else is to write to the file's start, durably."""

    content: bytes
    descriptor: int  # of the file


class OwnerRecord:
    """The record of one state directory, and its only writer; but for what it hands out.

    All methods raise VtpmdError: OwnerRecordError for what the table or the session forbids, with
    nothing written; StateDirectoryError when the disk fails. The disk may say either then, and this
    object what it said before: the next transition first writes that again.
    """

    def __init__(
        self, directory: Directory, in_place: InPlace, now: Callable[[], str] | None = None
    ) -> None:
        self._directory = directory
        self._in_place = in_place
        self._now = now or moment.now
        self._record: Record | None = None  # what it says, once that is known
        self._rest: bytes | None = None  # what follows the first sector on the disk, if known
        self._disk = Disk.AS_SAID
        self._before = Record()  # what it said when something was handed out

    def read(self) -> Record:
        """Return what it says."""
        if self._record is None:
            content = self._directory.read(self._directory.names.owner, OWNER_BYTES_MAX)
            self._record = parse(content, self._directory.names.owner)
            if content == encode(self._record):  # a person may have edited it
                self._rest = content[SECTOR_BYTES:]
        return self._record

    def _known(self) -> Record:
        """Return what it says, and make sure that the disk says so, too."""
        known = self.read()
        if self._disk in (Disk.IN_DOUBT, Disk.HANDED_OUT):
            self._write(known, encode(known))
        return known

    # The source's.

    def reserve(self, session: bytes, peer: str, used: int) -> int:
        """Begin a session with a peer, as the owner; make sure that no generation is used twice.

        ``used`` is the highest that is known to have been used. Return what all that come in the
        session must be above.
        """
        known = self._known()
        self._check_new(known, session)
        floor = max(used, known.generation)
        if floor + GENERATIONS_RESERVED > GENERATION_MAX:
            raise OwnerRecordError(
                "the vTPM's generation numbers are used up: no session can begin"
            )
        line = Session(session.hex(), Outcome.SENT, name_text(peer), self._now())
        self._go(
            Transition.RESERVE,
            generation=floor + GENERATIONS_RESERVED,
            sessions=_with(known, line),
        )
        return floor

    @contextmanager
    def offering(self, session: bytes) -> Iterator[Sector | None]:
        """Hand out what says that it is this host's only if the peer has not taken it.

        Until end_offering() whose it is does not change. None: it is said, or being written.
        """
        known = self.read() if self._disk is Disk.HANDED_OUT else self._known()
        offered = self._offered(known, session)
        if offered is None:
            yield None
            return
        if self._rest is None:
            self._write(known, encode(known))
        rest, self._rest, self._disk = self._rest, None, Disk.IN_DOUBT
        with self._in_place.opened(self._directory.names.owner) as descriptor:
            self._before, self._record = known, offered
            self._rest, self._disk = rest, Disk.HANDED_OUT
            yield Sector(encode(offered, b""), descriptor)

    def end_offering(self, *, is_durable: bool) -> None:
        """What was handed out is written, or that has failed; it is no longer touched."""
        is_so = (is_durable or self._disk is Disk.REPLACED) and self._rest is not None
        if not is_durable and self._disk is Disk.HANDED_OUT:
            self._record, self._rest = self._before, None
        self._disk = Disk.AS_SAID if is_so else Disk.IN_DOUBT

    def _offered(self, known: Record, session: bytes) -> Record | None:
        """Return what the record is to say; None: it does."""
        if known.whose is Whose.OFFERED:
            self._check_session(known, session, Transition.OFFER)
            return None
        line = known.find(session.hex())
        if line is None or line.outcome is not Outcome.SENT:
            raise OwnerRecordError("the vTPM is offered in a session that was not begun")
        return self._after(known, Transition.OFFER, session=session.hex())

    def is_offered(self, session: bytes) -> bool:
        """Return whether the disk is known to say so already."""
        known = self.read()
        is_so = (known.whose, known.session) == (Whose.OFFERED, session.hex())
        return is_so and self._disk in (Disk.AS_SAID, Disk.REPLACED)

    def withdraw(self, session: bytes) -> None:
        """The session ended without a Grant, or the guest runs on: it is this host's.

        Nothing happens unless it was offered in this session.
        """
        known = self._known()
        if known.whose is Whose.OFFERED and known.session == session.hex():
            self._go(Transition.WITHDRAW, session="")

    def confirm(self, session: bytes) -> None:
        """The peer has said that it has the vTPM."""
        known = self._known()
        self._check_session(known, session, Transition.CONFIRM)
        if known.whose is not Whose.MOVED:
            self._go(Transition.CONFIRM)

    def release(self, session: bytes) -> None:
        """The peer has said that it has let go of it, for ever: it is this host's."""
        self._check_session(self._known(), session, Transition.RELEASE)
        self._go(Transition.RELEASE, session="")

    # The destination's.

    def expect(self, session: bytes, peer: str) -> None:
        """A peer has begun a session: who may ask for its outcome is known from now on."""
        known = self._known()
        self._check_new(known, session)
        line = Session(session.hex(), Outcome.OPEN, name_text(peer), self._now())
        self._go(Transition.EXPECT, sessions=_with(known, line))

    def decline(self, session: bytes) -> None:
        """The session ended here without a Grant: what a peer sent will never be served."""
        self._end(Transition.DECLINE, session, Outcome.DECLINED)

    def take(self, session: bytes, used: int) -> int:
        """The peer has granted it: it is this host's. ``used`` and the result as in reserve()."""
        floor = max(used, self._known().generation)
        # Whatever number it came with, it has come.
        generation = min(floor + GENERATIONS_RESERVED, GENERATION_MAX)
        self._end(Transition.TAKE, session, Outcome.TAKEN, generation=generation, new_session="")
        return floor

    def check_give_back(self, session: bytes) -> None:
        """Raise OwnerRecordError where give_back() would; nothing is written."""
        self._line_to_end(self.read(), Transition.GIVE_BACK, session, Outcome.RELEASED)

    def give_back(self, session: bytes) -> None:
        """What was granted has not been used here, and is the peer's again."""
        self._end(Transition.GIVE_BACK, session, Outcome.RELEASED, new_session=session.hex())

    # Either side's.

    def arrive(self) -> None:
        """The vTPM has come whole, by QEMU's stream: whoever migrated or restored it decided."""
        if self._known().whose is not Whose.OURS:
            self._go(Transition.ARRIVE, session="")

    def claim(self) -> Fork:
        """An operator takes it without the peer's word; that is never forgotten."""
        known = self._known()
        fork = Fork(known.session, known.peer, self._now())
        self._go(Transition.CLAIM, session="", forks=_with_fork(known, fork))
        return fork

    def claim_lock(self, holder: str) -> Fork:
        """An operator takes its lock without the word of who has that, on shared storage."""
        known = self._known()
        fork = Fork("", name_text(holder), self._now())
        self._go(Transition.CLAIM_LOCK, forks=_with_fork(known, fork))
        return fork

    def check_restore(self) -> None:
        """Raise OwnerRecordError where restore() would; nothing is written."""
        _with_import(self.read(), Fork("", "", ""))

    def restore(self, export: bytes, what: str, used: int) -> None:
        """An operator has imported it: what was exported may be served elsewhere, too.

        Of imports the last is remembered: what was imported before is set aside. No generation up
        to ``used`` will be used.
        """
        known = self._known()
        fork = Fork("", name_text(what), self._now(), export.hex())
        self._go(
            Transition.RESTORE,
            session="",
            generation=max(known.generation, used),
            forks=_with_import(known, fork),
        )

    def replace(self, used: int) -> None:
        """An operator has put another vTPM here, a new one, of which ``used`` is the generation.

        Of the one before nothing is said but what became of its sessions: their peers may ask.
        """
        self._go(Transition.REPLACE, session="", generation=used, forks=())

    def _end(
        self,
        transition: Transition,
        session: bytes,
        outcome: Outcome,
        generation: int | None = None,
        new_session: str | None = None,
    ) -> None:
        """Remember what became of a peer's session."""
        known = self._known()
        found = self._line_to_end(known, transition, session, outcome)
        if found.outcome is outcome and transition is not Transition.TAKE:
            return
        line = found._replace(outcome=outcome, at=self._now())
        self._go(
            transition,
            generation=known.generation if generation is None else generation,
            session=known.session if new_session is None else new_session,
            sessions=_with(known, line),
        )

    def _line_to_end(
        self, known: Record, transition: Transition, session: bytes, outcome: Outcome
    ) -> Session:
        """Return a session's line, whose outcome this may be. Raises OwnerRecordError."""
        found = known.find(session.hex()) or Session(session.hex(), Outcome.OPEN, "", "")
        if found.outcome is outcome and transition is not Transition.TAKE:
            return found
        if found.outcome not in _ENDS_FROM[outcome]:
            raise OwnerRecordError(
                f"the session was {found.outcome} before: it cannot be {outcome} now"
            )
        if found.outcome is Outcome.TAKEN and known.whose is not Whose.OURS:
            raise OwnerRecordError(
                f"the vTPM has left since it was taken in that session: no {transition}"
            )
        return found

    def _check_new(self, known: Record, session: bytes) -> None:
        if known.find(session.hex()) is not None:
            raise OwnerRecordError("there was a session of that name before")

    def _check_session(self, known: Record, session: bytes, transition: Transition) -> None:
        if known.session != session.hex():
            raise OwnerRecordError(
                f"the owner record says {known.whose} of another session: no {transition}"
            )

    def _go(
        self,
        transition: Transition,
        *,
        session: str | None = None,
        generation: int | None = None,
        sessions: tuple[Session, ...] | None = None,
        forks: tuple[Fork, ...] | None = None,
    ) -> None:
        """Make a transition, durably."""
        after = self._after(
            self._known(),
            transition,
            session=session,
            generation=generation,
            sessions=sessions,
            forks=forks,
        )
        self._write(after, encode(after))

    def _after(
        self,
        known: Record,
        transition: Transition,
        *,
        session: str | None = None,
        generation: int | None = None,
        sessions: tuple[Session, ...] | None = None,
        forks: tuple[Fork, ...] | None = None,
    ) -> Record:
        """Return what the record says after a transition."""
        whose = TABLE.get((known.whose, transition))
        if whose is None:
            raise OwnerRecordError(f"the owner record says {known.whose}: no {transition}")
        if session is None:
            session = known.session
        is_handed_out = self._disk in (Disk.HANDED_OUT, Disk.REPLACED)
        if is_handed_out and (whose, session) != (known.whose, known.session):
            raise OwnerRecordError(f"the owner record is being written: no {transition} now")
        is_as_before = known.since and (whose, session) == (known.whose, known.session)
        return Record(
            whose=whose,
            session=session,
            since=known.since if is_as_before else self._now(),
            generation=known.generation if generation is None else generation,
            sessions=known.sessions if sessions is None else sessions,
            forks=known.forks if forks is None else forks,
        )

    def _write(self, record: Record, content: bytes) -> None:
        name, disk = self._directory.names.owner, self._disk
        is_handed_out = disk in (Disk.HANDED_OUT, Disk.REPLACED)
        on_disk, self._rest = self._rest, None
        self._disk = Disk.HANDED_OUT if is_handed_out else Disk.IN_DOUBT  # until it is durable
        if content[SECTOR_BYTES:] == on_disk and disk is not Disk.HANDED_OUT:
            self._in_place.overwrite(name, 0, content[:SECTOR_BYTES])
        else:
            self._directory.replace(name, content)
        self._record, self._rest = record, content[SECTOR_BYTES:]
        self._disk = Disk.REPLACED if is_handed_out else Disk.AS_SAID


# What a session must have been for an outcome to be true.
_ENDS_FROM: Final = {
    Outcome.DECLINED: (Outcome.OPEN,),
    Outcome.TAKEN: (Outcome.OPEN, Outcome.TAKEN),
    Outcome.RELEASED: (Outcome.OPEN, Outcome.TAKEN),
}


def _with(known: Record, line: Session) -> tuple[Session, ...]:
    """Return the sessions with one more. For that one is forgotten, but never the one that counts.

    The oldest of the peer that has the most: one that begins sessions without end makes this host
    forget its own.
    """
    others = [each for each in known.sessions if each.session != line.session]
    while len(others) >= SESSIONS_MAX:
        old = [each for each in others if each.session != known.session]
        # Of equals the one that was counted first, which has the oldest.
        ((crowd, _),) = Counter(each.peer for each in old).most_common(1)
        others.remove(next(each for each in old if each.peer == crowd))
    return (*others, line)


def _with_fork(known: Record, fork: Fork) -> tuple[Fork, ...]:
    if len(known.forks) == FORKS_MAX:
        raise OwnerRecordError(f"the vTPM was claimed {FORKS_MAX} times: no more are remembered")
    return (*known.forks, fork)


def _with_import(known: Record, fork: Fork) -> tuple[Fork, ...]:
    """Return the forks with one more, in place of that of the import before."""
    claims = tuple(each for each in known.forks if not each.export)
    return _with_fork(known._replace(forks=claims), fork)


def fork_text(fork: Fork) -> str:
    """Return why there may be two of the vTPM, for people."""
    if fork.export:
        return (
            f"imported at {fork.at} from {fork.peer}: what that was exported of may have been "
            "served since, too"
        )
    return (
        f"claimed at {fork.at} without the word of {fork.peer or 'the other host'}, which may have "
        "served it, too"
    )


def name_text(name: str) -> str:
    """Return a peer's names as the record has them; names that differ stay different.

    What is too long, or not printable, ends in the digest of all of it.
    """
    if len(name) <= TEXT_LENGTH_MAX and name.isprintable():
        return name
    shown = "".join(c if c.isprintable() else "?" for c in name[:TEXT_LENGTH_CUT])
    return f"{shown}… (SHA-256 {sha256(name.encode(errors='surrogatepass')).hexdigest()})"


def encode(record: Record, rest: bytes | None = None) -> bytes:
    """Return the bytes of the file; ``rest`` are those after its first sector, if known."""
    first = {
        "version": OWNER_VERSION,
        "whose": record.whose,
        "session": record.session,
        "since": record.since,
        "generation": record.generation,
    }
    sector = (json.dumps(first).ljust(SECTOR_BYTES - 1) + "\n").encode()
    if rest is not None:
        return sector + rest
    lines = [json.dumps(line._asdict()) for line in record.sessions]
    lines += [json.dumps({"fork": fork._asdict()}) for fork in record.forks]
    return sector + "".join(line + "\n" for line in lines).encode()


def look(directory: Readable) -> Record:
    """Return what the record says, of which somebody else may be the writer. Raises VtpmdError.

    What is read while a sector is written may be part of each: what is read twice alike is not.
    """
    name = directory.names.owner
    before = directory.read(name, OWNER_BYTES_MAX)
    for _ in range(LOOKS_MAX):
        content = directory.read(name, OWNER_BYTES_MAX)
        if content == before:
            return parse(content, name)
        before = content
    raise OwnerRecordError(f"{name} is written all the time: ask again")


def parse(content: bytes | None, name: str) -> Record:
    """Return what the bytes of the file say; no file: OURS. Raises OwnerRecordError."""
    if content is None:
        return Record()
    try:
        return _parse(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OwnerRecordError(
            f"{name} cannot be read, so whose the vTPM is, is not known: restore the file, "
            "or remove it if no other host runs this guest"
        ) from error


def _parse(content: bytes) -> Record:
    if len(content) > OWNER_BYTES_MAX:
        raise ValueError("it is too long")
    first, *rest = (json.loads(line) for line in content.decode().splitlines())
    if first["version"] == 1:
        return _parse_first_version(first)
    if first["version"] != OWNER_VERSION:
        raise ValueError("it is of another version")
    sessions = [_session(line) for line in rest if "fork" not in line]
    forks = [_fork(line["fork"]) for line in rest if "fork" in line]
    session, since = _texts(first, ("session", "since"))
    whose = Whose(first["whose"])
    names = [line.session for line in sessions]
    if session not in ([""] if whose is Whose.OURS else names):
        raise ValueError("whose it is does not agree with the sessions")
    if len(names) > SESSIONS_MAX or len(forks) > FORKS_MAX or len(set(names)) != len(names):
        raise ValueError("it has too many lines")
    generation = _generation(first["generation"])
    return Record(whose, session, since, generation, tuple(sessions), tuple(forks))


def _parse_first_version(first: dict[str, object]) -> Record:
    """Read what vtpmd 0.1 wrote: it knew no session, so nobody can be asked."""
    generation, moved = _generation(first["generation"]), first["handed-over"]
    if moved is None:
        return Record(generation=generation)
    if not isinstance(moved, dict):
        raise TypeError("handed-over")
    to, at = _texts(moved, ("to", "at"))
    line = Session(_UNKNOWN, Outcome.OPEN, to, at)
    return Record(Whose.MOVED, _UNKNOWN, at, generation, (line,))


_UNKNOWN: Final = "unknown"
_SESSION: Final = re.compile(rf"[0-9a-f]{{32}}|{_UNKNOWN}")


def _session(line: dict[str, object]) -> Session:
    session, peer, at = _texts(line, ("session", "peer", "at"))
    if not _SESSION.fullmatch(session):
        raise ValueError("a session's name is none")
    return Session(session, Outcome(str(line["outcome"])), peer, at)


def _fork(fields: dict[str, object]) -> Fork:
    """Return a fork; vtpmd 0.1 knew no exports."""
    return Fork(*_texts({"export": "", **fields}, Fork._fields))


def _texts(fields: dict[str, object], names: tuple[str, ...]) -> list[str]:
    found = [fields[name] for name in names]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) != len(names):
        raise TypeError("a text is none")
    if any(len(text) > TEXT_LENGTH_MAX or not text.isprintable() for text in texts):
        raise ValueError("a text in it is none")
    return texts


def _generation(value: object) -> int:
    if type(value) is not int or not 0 <= value <= GENERATION_MAX:
        raise ValueError("the generation is none")
    return value
