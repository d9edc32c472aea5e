"""swtpm's command line, ``swtpm socket …``, read as getopt_long(3) and swtpm read it.

An option may be abbreviated, its value is a list of ``key=value`` or ``key``; what is not known is
an error. Nothing here looks at what a value names: no file, no descriptor. Sources: swtpm 0.10's
swtpm.c (option table), common.c (the keys of each) and options.c (how a list is read).
"""

from __future__ import annotations

from vtpmd.errors import UsageError
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

Value = str | int | bool
# What of an option's keys was given.
Values = dict[str, Value]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    # How the value of a key is read: a function, or BOOLEAN for one that needs none.
    Keys = dict[str, Callable[[str], Value]]

MODE_MAX = 0o7777
NUMBER_MAX = 2**31 - 1


def _text(text: str) -> str:
    return text


def _number(text: str) -> int:
    """Read what strtol(3) reads: decimal, octal after 0, hexadecimal after 0x."""
    digits = text.strip().lower()
    base = 16 if digits.startswith("0x") else 8 if len(digits) > 1 and digits[0] == "0" else 10
    number = int(digits, base)
    if not -NUMBER_MAX <= number <= NUMBER_MAX:
        raise ValueError("it is too large")
    return number


def _mode(text: str) -> int:
    mode = int(text, 8)
    if not 0 <= mode <= MODE_MAX:
        raise ValueError("it is no file mode")
    return mode


def boolean(text: str) -> bool:
    """Return whether this is true: all that is not, is false."""
    return text.lower() in ("true", "1")


_KEY: Keys = {
    "file": _text,
    "fd": _number,
    "pwdfile": _text,
    "pwdfd": _number,
    "mode": _text,
    "format": _text,
    "kdf": _text,
    "remove": boolean,
}
_SOCKET: Keys = {
    "type": _text,
    "path": _text,
    "port": _number,
    "bindaddr": _text,
    "ifname": _text,
    "fd": _number,
    "mode": _mode,
    "uid": _text,
    "gid": _text,
}

# The options whose value is a list, with its keys.
LISTS: dict[str, Keys] = {
    "ctrl": {**_SOCKET, "clientfd": _number, "terminate": boolean},
    "flags": {
        "not-need-init": boolean,
        "startup-clear": boolean,
        "startup-state": boolean,
        "startup-none": boolean,
        "startup-deactivated": boolean,
        "disable-auto-shutdown": boolean,
    },
    "key": _KEY,
    "locality": {"reject-locality-4": boolean, "allow-set-locality": boolean},
    "log": {
        "file": _text,
        "fd": _number,
        "level": _number,
        "prefix": _text,
        "truncate": boolean,
    },
    "migration": {"incoming": boolean, "release-lock-outgoing": boolean},
    "migration-key": _KEY,
    "pid": {"file": _text, "fd": _number},
    "profile": {
        "name": _text,
        "profile": _text,
        "file": _text,
        "fd": _number,
        "remove-disabled": _text,
    },
    "seccomp": {"action": _text},
    "server": {**_SOCKET, "disconnect": boolean},
    "tpmstate": {
        "dir": _text,
        "backend-uri": _text,
        "mode": _mode,
        "lock": boolean,
        "backup": boolean,
        "fsync": boolean,
    },
}
# Those whose value is one word or number.
WORDS: Keys = {"port": _number, "fd": _number, "runas": _text, "chroot": _text}
WORDS["print-info"] = _number
FLAGS = (
    "tpm2",
    "terminate",
    "daemon",
    "help",
    "version",
    "print-capabilities",
    "print-states",
    "print-profiles",
)
NAMES = (*LISTS, *WORDS, *FLAGS)
LETTERS = {
    "d": "daemon",
    "h": "help",
    "p": "port",
    "f": "fd",
    "t": "terminate",
    "r": "runas",
    "R": "chroot",
    "v": "version",
}


class Given(NamedTuple):
    """What a command line says."""

    lists: dict[str, Values]
    words: dict[str, Value]
    flags: set[str]


def parse(arguments: Sequence[str]) -> Given:
    """Read a command line, without the program's name and without ``socket``.

    An option that comes again takes the place of the one before. Raises UsageError.
    """
    given = Given({}, {}, set())
    for name, value in _options(iter(arguments)):
        if value is None:
            given.flags.add(name)
        elif name in LISTS:
            given.lists[name] = _list(name, value)
        else:
            given.words[name] = _read(f"--{name}", WORDS[name], value)
    return given


def _options(arguments: Iterator[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each option with its value, or None where it takes none."""
    for word in arguments:
        if word.startswith("--") and word != "--":
            text, equals, value = word[2:].partition("=")
            name = _long(text)
            yield name, _value(name, value if equals else None, arguments)
        elif word.startswith("-") and word not in ("-", "--"):
            yield from _letters(word[1:], arguments)
        else:
            stray = next(arguments, None) if word == "--" else word
            if stray is not None:
                raise UsageError(f"unknown parameter {stray!r}: options begin with --")


def _letters(word: str, arguments: Iterator[str]) -> Iterator[tuple[str, str | None]]:
    for at, letter in enumerate(word, start=1):
        name = LETTERS.get(letter)
        if name is None:
            raise UsageError(f"unknown option -{letter}: see --help")
        if name in FLAGS:
            yield name, None
            continue
        yield name, _value(name, word[at:] or None, arguments)
        return


def _long(text: str) -> str:
    if text in NAMES:
        return text
    found = [name for name in NAMES if name.startswith(text)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"unknown option --{text}: see --help")
    raise UsageError(f"--{text} may be {', '.join(f'--{name}' for name in sorted(found))}")


def _value(name: str, value: str | None, arguments: Iterator[str]) -> str | None:
    if name in FLAGS:
        if value is not None:
            raise UsageError(f"--{name} takes no value")
        return None
    if value is None:
        value = next(arguments, None)
    if value is None:
        raise UsageError(f"--{name} needs a value")
    return value


def _list(name: str, text: str) -> Values:
    """Return what a list has; of a key that comes again swtpm takes the first."""
    keys = LISTS[name]
    values: Values = {}
    for part in _parts(text):
        key, equals, value = part.partition("=")
        if key not in keys:
            raise UsageError(f"--{name}: unknown {key!r}; use {', '.join(keys)}")
        read = keys[key]
        if not value and (equals or read is not boolean):
            raise UsageError(f"--{name} {key} needs a value")
        values.setdefault(key, _read(f"--{name} {key}", read, value if equals else "true"))
    return values


def _parts(text: str) -> Iterator[str]:
    """Split a list at its commas, but for those inside of braces."""
    start = depth = 0
    for at, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if char == "," and depth <= 0:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def _read(what: str, read: Callable[[str], Value], value: str) -> Value:
    try:
        return read(value)
    except ValueError:
        raise UsageError(f"{what}={value}: this is no number that it takes") from None
