"""What a permanent state needs of libtpms, and what a libtpms has to offer. No I/O.

Since 0.10 libtpms makes each TPM 2.0 by a *profile*: what commands and algorithms it has, and the
*format level* that its state is written in. The state says so itself, as PERSISTENT_ALL_Marshal()
in libtpms' NVMarshal.c has it:

    u16 version, u32 magic, u16 minimum version; from version 4 on: u16 length, profile, NUL
    …
    u32 magic

Before version 4, and in the profile named ``null``, a state is of level 1: every libtpms reads it.
A profile is JSON that libtpms has written, whose first members are name and level
(RuntimeProfileFormat() in RuntimeProfile.c). It is searched for them: a start has no time for more.
"""

from __future__ import annotations

from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = bytes.fromhex("ab364723")
HEAD_BYTES = 8
PROFILE_VERSION = 4  # of the state: from this one on it has a profile
LENGTH_BYTES = 2
NULL_PROFILE = "null"
NULL_LEVEL = 1
LEVEL_MAX = 0xFFFF  # also: it is written in a way that only a later libtpms knows
PROFILE_NAME_BYTES_MAX = 32  # libtpms' own limit

_NAME = '{"Name":"'
_LEVEL = '","StateFormatLevel":'


class Needs(NamedTuple):
    """What a libtpms must have to read a state."""

    level: int  # 1 to LEVEL_MAX; 0: that is not known
    profile: str

    def __str__(self) -> str:
        if self.level == LEVEL_MAX:
            return "a format that only a later libtpms has"
        return f"format level {self.level}, profile {self.profile}"


UNKNOWN = Needs(0, "")


class Library(NamedTuple):
    """What a libtpms has."""

    version: str  # such as 0.9.2
    profiles: dict[str, int]  # with the level of each; none before 0.10

    @property
    def level(self) -> int:
        """The highest format level that it reads."""
        return max(self.profiles.values(), default=NULL_LEVEL)

    def reads(self, needs: Needs) -> bool:
        """Return whether it has what a state needs, so far as that is known."""
        name, _, _ = needs.profile.partition(":")  # "custom:" and a name of somebody's own
        is_known = name in (self.profiles or (NULL_PROFILE,)) or not needs.level
        return needs.level <= self.level and is_known

    def __str__(self) -> str:
        if not self.profiles:
            return (
                f"libtpms {self.version}, which reads format level {NULL_LEVEL} and has no profiles"
            )
        names = ", ".join(self.profiles)
        return (
            f"libtpms {self.version}, which reads format levels to {self.level} and has the "
            f"profiles {names}"
        )


def library_of(version: str, info: str) -> Library:
    """Return what a libtpms has, of what TPMLIB_GetInfo() says of its AvailableProfiles."""
    return Library(version, dict(_profiles(info)))


def active_of(info: str) -> Needs:
    """Return what a TPM needs whose ActiveProfile this is, as TPMLIB_GetInfo() says it.

    Without one it is a TPM of libtpms 0.9, or has never been on.
    """
    return next((Needs(level, name) for name, level in _profiles(info)), UNKNOWN)


def needs_of(permanent: bytes) -> Needs:
    """Return what a permanent state needs; UNKNOWN for one that does not begin and end as one."""
    version, minimum = (int.from_bytes(permanent[at : at + 2], "big") for at in (0, 6))
    is_whole = permanent[2:6] == MAGIC == permanent[-4:]
    if not is_whole or minimum > version:
        return UNKNOWN
    if minimum > PROFILE_VERSION:
        return Needs(LEVEL_MAX, "")
    if version < PROFILE_VERSION:
        return Needs(NULL_LEVEL, NULL_PROFILE)
    return active_of(_sized(permanent[HEAD_BYTES:]).rstrip(b"\0").decode("ascii", "replace"))


def needs_by(level: int, profile: bytes) -> Needs:
    """Return what another host says that a state needs; who has no such profile does not read it.

    ``profile`` is a name, and zeros.
    """
    name = profile.rstrip(b"\0").decode("ascii", "replace")
    return Needs(level, name if _is_name(name) else "?") if level else UNKNOWN


def _sized(permanent: bytes) -> bytes:
    length = int.from_bytes(permanent[:LENGTH_BYTES], "big")
    return permanent[LENGTH_BYTES : LENGTH_BYTES + length]


def _profiles(info: str) -> Iterator[tuple[str, int]]:
    """Yield the name and the level of each profile in what libtpms has written."""
    for profile in info.split(_NAME)[1:]:
        name, _, rest = profile.partition(_LEVEL)
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        if _is_name(name) and 0 < len(digits) <= len(str(LEVEL_MAX)):
            yield name, min(int(digits), LEVEL_MAX)


def _is_name(name: str) -> bool:
    return 0 < len(name) <= PROFILE_NAME_BYTES_MAX and name.isascii() and name.isprintable()
