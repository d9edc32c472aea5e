"""An export: one vTPM's states in one file, to be kept, sent through a pipe, and imported.

    header, body, SHA-256 of both

``docs/export-format.md`` has the tables. The body is in the clear, or sealed by somebody else:
with a key the header is covered by the seal, and what is in the body begins with its digest. A
state directory has the same, with another magic, while an import is under way. A link of a chain
of backups says behind its header's fields of which chain it is; it has the whole state, or what
makes it of the one before.
"""

from __future__ import annotations

from enum import IntFlag
from hashlib import sha256
from hmac import compare_digest
from struct import Struct

from vtpmd.counted import counted
from vtpmd.errors import VtpmdError
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple
from vtpmd.wire.swtpm_format import STATE_BYTES_MAX
from vtpmd.wire.tpm import GENERATION_GIVEN_MAX, StateType, TpmVersion, epoch_of

if TYPE_CHECKING:
    from typing import Any

MAGIC = b"VTPMEXPT"
MAGIC_PENDING = b"VTPMIMPT"  # an import that is under way, in its state directory
VERSION = 1
# magic, version, header's size, compatible and incompatible flags, export, identity, generation,
# time, TPM, contents, salt, generation to get, files to set aside, their number, and if it is new
HEADER = Struct(">8sHHHH16s16sQQBB6x32sQIIB7x")
LINK = Struct(">16sQ8x")  # chain, number; behind the header of a link
HEADER_BYTES_MAX = 4096  # with what a later version may add
ENTRY = Struct(">II")
DIGEST_BYTES = 32
SALT_BYTES = 32
ID_BYTES = 16
NO_IDENTITY = bytes(ID_BYTES)
RECIPIENTS_MAX = 32
LINKS_MAX = 10_000  # of one chain, all of which each backup reads: a year of hours
# What a seal adds to a body: a tag; age a stanza for each recipient, and a tag for each 64 KiB.
SEAL_BYTES_MAX = 32 * 1024
STATES_BYTES_MAX = DIGEST_BYTES + len(StateType) * (ENTRY.size + STATE_BYTES_MAX)
BODY_BYTES_MAX = STATES_BYTES_MAX + SEAL_BYTES_MAX
EXPORT_BYTES_MAX = HEADER_BYTES_MAX + BODY_BYTES_MAX + DIGEST_BYTES


# The compatible flag: the header says of which chain of backups the export is a link.
IS_LINK = 1
TIME_MAX_S = 253402300799  # the end of the year 9999: no later one is known to calendars
LINK_NUMBER_MAX = 99_999_999  # a name with it sorts by its eight digits; one a second for 3 years


class ExportFlag(IntFlag):
    """The incompatible flags of a header: how the body is sealed, if it is, and what it has."""

    KEY = 1
    AGE = 2
    DELTA = 4  # in place of the permanent state, a delta record that makes it


SEALS = ExportFlag.KEY | ExportFlag.AGE


class ExportError(VtpmdError):
    """A file is no export: ``str()`` says why, and no more."""

    exit_status = 9


class LaterVersion(ExportError):
    """A file may be an export, of a later version."""


class DamagedExport(ExportError):
    """A file is an export, and not as it was written."""

    exit_status = 5

    def __init__(self, what: str) -> None:
        super().__init__(f"it is damaged: {what}; take another copy")


class Link(NamedTuple):
    """Where in a chain of backups an export is."""

    chain: bytes  # its name: random
    number: int  # of the state among those that were backed up, from 1


class Header(NamedTuple):
    """What an export says of itself, in the clear."""

    export: bytes  # its name: random
    identity: bytes | None  # of the vTPM; None: no vtpmd has changed it yet
    generation: int  # of the permanent state
    time_s: int  # when it was made, since 1970
    version: TpmVersion
    kinds: tuple[StateType, ...]  # which states are in it
    flags: ExportFlag = ExportFlag(0)
    salt: bytes = bytes(SALT_BYTES)  # what the key of a sealed body is derived with
    # Of an import that is under way: what the state's generation will be, which files are set aside
    # (bits, in the order of FileNames), which number their names end in then, and whether it is a
    # new TPM, with seeds of its own.
    becomes: int = 0
    aside: int = 0
    aside_number: int = 0
    is_new: bool = False
    link: Link | None = None

    @property
    def sealing(self) -> str | None:
        """How the body is sealed, in a word; None: it is not."""
        seal = self.flags & SEALS
        return seal.name.lower() if seal and seal.name else None

    @property
    def is_delta(self) -> bool:
        """Whether it makes its state of the one before it in its chain."""
        return bool(self.flags & ExportFlag.DELTA)

    @property
    def epoch(self) -> int:
        """The restore epoch that an import begins."""
        return epoch_of(self.becomes)


class Export(NamedTuple):
    """An export, taken apart; what is sealed is still sealed."""

    header: Header
    head: bytes  # the header's bytes
    body: bytes

    def __repr__(self) -> str:
        """Leave the body out."""
        return f"Export({self.header})"


def encode_header(header: Header, magic: bytes = MAGIC) -> bytes:
    """Return a header's bytes."""
    link = b"" if header.link is None else LINK.pack(*header.link)
    fields = HEADER.pack(
        *(magic, VERSION, HEADER.size + len(link), IS_LINK if link else 0, header.flags),
        *(header.export, header.identity or NO_IDENTITY, header.generation, header.time_s),
        *(header.version, sum(1 << kind - 1 for kind in header.kinds)),
        *(header.salt, header.becomes, header.aside, header.aside_number, header.is_new),
    )
    return fields + link


def encode(head: bytes, body: bytes) -> bytes:
    """Return the whole file."""
    return head + body + sha256(head + body).digest()


def decode(content: bytes, magic: bytes = MAGIC) -> Export:
    """Take a file apart; nothing of it is trusted. Raises ExportError."""
    if not content.startswith(magic) or len(content) < HEADER.size + DIGEST_BYTES:
        raise ExportError("it is no export of vtpmd's")
    _, version, header_bytes, compatible, flags, *fields = HEADER.unpack_from(content)
    if version != VERSION or flags & ~sum(ExportFlag):
        raise LaterVersion("it is an export of a later version of vtpmd: update this one")
    if len(content) > EXPORT_BYTES_MAX:
        raise DamagedExport(f"it has more than {EXPORT_BYTES_MAX} bytes")
    end = len(content) - DIGEST_BYTES
    if not HEADER.size <= header_bytes <= min(HEADER_BYTES_MAX, end):
        raise DamagedExport(f"its header has {counted(header_bytes, 'byte')}")
    if not compare_digest(sha256(content[:end]).digest(), content[end:]):
        raise DamagedExport("its checksum is not that of its bytes")
    head = content[:header_bytes]
    link = _link(head) if compatible & IS_LINK else None
    return Export(_header(flags, fields, link), head, content[header_bytes:end])


def _link(head: bytes) -> Link:
    """Return where in a chain an export is. Raises DamagedExport."""
    if len(head) < HEADER.size + LINK.size:
        raise DamagedExport("its header ends before it says of which chain it is")
    link = Link(*LINK.unpack_from(head, HEADER.size))
    if not 0 < link.number <= LINK_NUMBER_MAX:
        raise DamagedExport(f"it is link {link.number} of its chain, which is none")
    return link


def _header(flags: int, fields: list[Any], link: Link | None) -> Header:
    """Return what a header's numbers say. Raises DamagedExport."""
    export, identity, generation, time_s, tpm, contents, salt, becomes, *of_import = fields
    if tpm not in tuple(TpmVersion):
        raise DamagedExport(f"it has a TPM of version {tpm}")
    kinds = tuple(kind for kind in StateType if contents & 1 << kind - 1)
    if StateType.PERMANENT not in kinds or contents >> len(StateType):
        raise DamagedExport(f"it says that it has the states {contents:#x}")
    if max(generation, becomes) > GENERATION_GIVEN_MAX:
        raise DamagedExport(f"it is of generation {generation}, which is none")
    if time_s > TIME_MAX_S:
        raise DamagedExport(f"it was made {time_s} seconds after 1970, which is no time")
    if flags & SEALS == SEALS:
        raise DamagedExport("it is sealed in two ways")
    if flags & ExportFlag.DELTA and (link is None or link.number == 1 or len(kinds) > 1):
        raise DamagedExport("it is a delta, and of no permanent state before it")
    known = None if identity == NO_IDENTITY else identity
    made = export, known, generation, time_s, TpmVersion(tpm), kinds
    *aside, is_new = of_import
    header = Header(*made, ExportFlag(flags), salt, becomes, *aside)
    return header._replace(link=link, is_new=bool(is_new))


def encode_states(head: bytes, states: dict[StateType, bytes]) -> bytes:
    """Return what a body holds, of the states behind a header of these bytes.

    In place of the permanent state it may be a delta record.
    """
    entries = (ENTRY.pack(kind, len(states[kind])) + states[kind] for kind in sorted(states))
    return sha256(head).digest() + b"".join(entries)


def decode_states(export: Export, opened: bytes) -> dict[StateType, bytes]:
    """Return the states of an export whose body has been opened. Raises DamagedExport."""
    if not compare_digest(opened[:DIGEST_BYTES], sha256(export.head).digest()):
        raise DamagedExport("its body is not that of its header")
    states, offset = {}, DIGEST_BYTES
    for kind in export.header.kinds:
        if len(opened) - offset < ENTRY.size:
            raise DamagedExport(f"the {kind.name.lower()} state is missing")
        found, n_bytes = ENTRY.unpack_from(opened, offset)
        offset += ENTRY.size
        state = opened[offset : offset + n_bytes]
        if found != kind or not 0 < n_bytes <= STATE_BYTES_MAX or len(state) != n_bytes:
            raise DamagedExport(f"where the {kind.name.lower()} state begins is none")
        states[kind] = state
        offset += n_bytes
    if offset != len(opened):
        raise DamagedExport("something follows the last state")
    return states
