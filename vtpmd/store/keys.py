"""The key of a state directory: read as swtpm's ``--key`` names it, and derived from for the rest.

    --key file=PATH|fd=N[,format=hex|binary][,mode=MODE][,remove]
    --key pwdfile=PATH|pwdfd=N[,kdf=pbkdf2|sha512][,mode=MODE][,remove]

The migration key is read alike, and nothing is derived from it.

The state files are encrypted with the key itself, as swtpm does it. What is vtpmd's own has a key
derived for that one purpose, with HKDF-SHA256 (RFC 5869). Sources: swtpm's ``common.c``
(parse_key_options) and ``key.c``. Where swtpm would quietly take another key than was meant (of two
files, or of half the length), this refuses.
"""

import errno
import os
import stat
import sys
from functools import partial
from typing import Final, NamedTuple

from vtpmd.closing import Closing
from vtpmd.errors import UsageError, VtpmdError

MODES: Final = {"aes-cbc": 16, "aes-128-cbc": 16, "aes-256-cbc": 32}  # bytes of the key
FORMATS: Final = ("hex", "binary")
KDFS: Final = ("pbkdf2", "sha512")
# Options that swtpm has, too: what it takes, as an empty password, is taken with a warning.
SWTPMS_OPTIONS: Final = ("--key", "--migration-key")
SOURCES: Final = ("file", "fd", "pwdfile", "pwdfd")

# swtpm's: "0x", the digits of the longest key and a newline are all that it reads.
KEY_FILE_BYTES_MAX: Final = 2 + 64 + 1
# A limit where swtpm has none: beyond this a file is no password.
PASSWORD_BYTES_MAX: Final = 64 * 1024
PBKDF2_SALT: Final = b"swtpm"
PBKDF2_ROUNDS: Final = 1000

# What keys are derived for: HKDF's "info".
INFO_JOURNAL: Final = b"vtpmd journal"
INFO_INCOMING: Final = b"vtpmd incoming state"
INFO_INCOMING_HEAD: Final = b"vtpmd incoming head"
INFO_EXPORT: Final = b"vtpmd export"
DERIVED_BYTES: Final = 32


class KeySource(NamedTuple):
    """Where a key comes from: the value of ``--key``, or of another ``option``."""

    option: str
    source: str  # one of SOURCES
    place: str  # a path, or the number of a descriptor
    key_bytes: int
    format: str
    kdf: str
    remove: bool

    def __str__(self) -> str:
        """Name the place, for people."""
        return self.place if self.source.endswith("file") else f"descriptor {self.place}"


class Key(Closing):
    """A key of 16 or 32 bytes. ``close()``, or the end of its ``with`` block, overwrites it."""

    def __init__(self, material: bytearray) -> None:
        self.material = material

    def __repr__(self) -> str:
        return f"Key({len(self.material)} bytes)"

    def derive(self, info: bytes, salt: bytes = b"") -> bytes:
        """Return the key of DERIVED_BYTES for one purpose, which ``info`` names."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        derivation = HKDF(algorithm=SHA256(), length=DERIVED_BYTES, salt=salt or None, info=info)
        return derivation.derive(bytes(self.material))

    def journal_secret(self) -> bytes:
        """Return what the journal is sealed with."""
        return self.derive(INFO_JOURNAL)

    def new_iv(self) -> bytes:
        """Return a random IV for one encryption of a state file or blob."""
        return os.urandom(len(self.material))

    def close(self) -> None:
        """Overwrite the key. It must not be used any more."""
        self.material[:] = bytes(len(self.material))


def parse_key_source(text: str, option: str = "--key") -> KeySource:
    """Return what the value of an ``option`` says. Raises UsageError."""
    return key_source(_split(text, option), option)


def key_source(options: dict[str, str], option: str) -> KeySource:
    """Return what the value of an ``option`` says, by its parts. Raises UsageError."""
    for name, value in options.items():
        if not value:
            raise UsageError(f"{option} {name}= has no value")
    given = [name for name in SOURCES if name in options]
    if len(given) != 1:
        raise UsageError(f"{option} needs one of {', '.join(f'{name}=' for name in SOURCES)}")
    (source,) = given
    place = options[source]
    if source.endswith("fd") and not (place.isascii() and place.isdigit()):
        raise UsageError(f"{option} {source}={place}: this is no number of a descriptor")
    foreign = "kdf" if source in ("file", "fd") else "format"
    if foreign in options:
        raise UsageError(f"{option} {foreign}= does not go with {source}=")
    choice = partial(_choice, option, options)
    return KeySource(
        option,
        source,
        place,
        MODES[choice("mode", tuple(MODES), "aes-cbc")],
        choice("format", FORMATS, "hex"),
        choice("kdf", KDFS, "pbkdf2"),
        choice("remove", ("true", "false"), "false") == "true",
    )


def read_key(source: KeySource) -> Key:
    """Read a key; with ``remove`` its file is gone then.

    A descriptor is read to its end and closed. Raises VtpmdError, which says nothing of the key.
    """
    is_password = source.source.startswith("pwd")
    try:
        content, mode = _read(
            source, PASSWORD_BYTES_MAX + 1 if is_password else KEY_FILE_BYTES_MAX + 1
        )
    except OSError as error:
        raise VtpmdError(
            f"cannot read the key from {source}: {error.strerror}; check {source.option}"
        ) from error
    try:
        if is_password:
            material = _from_password(content, source)
        elif source.format == "binary":
            material = bytearray(content)
        else:
            material = _from_hex(content, source)
        if len(material) != source.key_bytes:
            raise VtpmdError(
                f"the key in {source} has {8 * len(material)} bits, and mode= asks for "
                f"{8 * source.key_bytes}; give the right file, or another mode="
            )
    finally:
        content[:] = bytes(len(content))
    _warn_of_readers(source, mode)
    if source.remove and source.source.endswith("file"):
        _remove(source)
    return Key(material)


def _split(text: str, option: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if name not in (*SOURCES, "mode", "format", "kdf", "remove"):
            raise UsageError(f"{option} has no {name!r}")
        if name in options:
            raise UsageError(f"{option} has {name!r} twice")
        options[name] = value if equals or name != "remove" else "true"
    return options


def _choice(
    option: str, options: dict[str, str], name: str, known: tuple[str, ...], default: str
) -> str:
    value = options.get(name, default)
    if value not in known:
        raise UsageError(f"{option} {name}={value}: use one of {', '.join(known)}")
    return value


def _read(source: KeySource, bytes_max: int) -> tuple[bytearray, int]:
    """Return what is there, at most so many bytes, and the mode of what that is in."""
    if source.source.endswith("file"):
        fd = os.open(source.place, os.O_RDONLY | os.O_CLOEXEC)
    else:
        fd = int(source.place)
        # Else it is no descriptor that this process was given, but one of its own.
        if not os.get_inheritable(fd):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    content = bytearray()
    try:
        mode = os.fstat(fd).st_mode
        while len(content) < bytes_max and (piece := os.read(fd, bytes_max - len(content))):
            content += piece
    finally:
        os.close(fd)
    return content, mode


def _warn_of_readers(source: KeySource, mode: int) -> None:
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        _warn(f"every user may read the key in {source}; chmod o-r it")


def _warn(warning: str) -> None:
    print(f"vtpmd: warning: {warning}", file=sys.stderr)


def _from_password(password: bytearray, source: KeySource) -> bytearray:
    """Return the key that a password makes, with the newline at its end if it has one."""
    if len(password) > PASSWORD_BYTES_MAX:
        what = f"has more than {PASSWORD_BYTES_MAX} bytes"
        raise VtpmdError(f"the password in {source} {what}; check {source.option}")
    if not password:
        if source.option not in SWTPMS_OPTIONS:
            raise VtpmdError(f"the password in {source} is empty; check {source.option}")
        _warn(f"the password in {source} is empty: anybody has this key; check {source.option}")
    import hashlib

    if source.kdf == "sha512":
        return bytearray(hashlib.sha512(password).digest()[: source.key_bytes])
    key = hashlib.pbkdf2_hmac("sha512", password, PBKDF2_SALT, PBKDF2_ROUNDS, source.key_bytes)
    return bytearray(key)


def _from_hex(content: bytearray, source: KeySource) -> bytearray:
    """Return the key that hexadecimal digits make; they end at the first blank or the end."""
    digits = content[:KEY_FILE_BYTES_MAX].split(b"\0")[0]
    if digits[:1].isspace():
        digits = bytearray()
    words = digits.removeprefix(b"0x").split(maxsplit=1)
    try:
        # int() and fromhex() would take blanks and underscores, too.
        if not words or not words[0].isalnum():
            raise ValueError
        return bytearray.fromhex(words[0].decode("ascii"))
    except (ValueError, UnicodeDecodeError):
        raise VtpmdError(
            f"the key in {source} is not in hexadecimal digits; give format=binary if it is not "
            "meant to be"
        ) from None


def _remove(source: KeySource) -> None:
    from pathlib import Path

    try:
        Path(source.place).unlink()
    except OSError as error:
        raise VtpmdError(
            f"cannot remove the key file {source}: {error.strerror}; remove it, or leave out remove"
        ) from error
