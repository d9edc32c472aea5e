"""The arguments of commands that start a vTPM, in tables: for argparse, and to do without it.

A command line that is written plainly is read here: argparse, with what it imports, would be a
quarter of a start. What is not plain, or wrong, is argparse's to read, and to complain of.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

from vtpmd.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    # What add_argument() takes: a name, and keywords.
    Arguments = dict[str, dict[str, Any]]
    # What a command is given.
    Options = argparse.Namespace | SimpleNamespace

LOG_LEVELS = ("error", "warning", "info", "debug")
NAME_LENGTH_MAX = 64  # it goes into log lines and QEMU's process title
NAME_MARKS = "_.+:-"
UUID_GROUPS = [8, 4, 4, 4, 12]  # digits
HEXADECIMAL = set("0123456789abcdefABCDEF")


def plain_path(value: str) -> str:
    """Return a path as pathlib writes it, without that if it is written so already."""
    return value if value == os.path.normpath(value) else str(pathlib_path(value))


def pathlib_path(value: str) -> Path:
    """Return a path. Most vTPMs start with options that need none: pathlib takes its time."""
    from pathlib import Path

    return Path(value)


def _name(value: str) -> str:
    if not (0 < len(value) <= NAME_LENGTH_MAX and is_made_of(value, NAME_MARKS)):
        raise refusal(
            f"{value!r} is no name: use up to {NAME_LENGTH_MAX} letters, digits and _.+:-"
        )
    return value


def _uuid(value: str) -> str:
    groups = value.split("-")
    if [len(group) for group in groups] != UUID_GROUPS or not set("".join(groups)) <= HEXADECIMAL:
        raise refusal(f"{value!r} is no UUID, such as 8f2c0d6e-5a5b-4c1e-9d1a-3f0c7d1f2b11")
    return value.lower()


def _log_level(value: str) -> str:
    key, _, level = value.partition("=")
    if key != "level" or level not in LOG_LEVELS:
        known = ", ".join(LOG_LEVELS)
        raise refusal(f"{value!r}: use level= and one of {known}")
    return level


def refusal(reason: str) -> Exception:
    """Return what argparse takes as the reason why a value is wrong."""
    from argparse import ArgumentTypeError

    return ArgumentTypeError(reason)


def is_made_of(value: str, marks: str) -> bool:
    """Return whether there are only ASCII letters, digits and these marks. re takes its time."""
    return value.isascii() and all(char.isalnum() or char in marks for char in value)


# Each as argparse's add_argument() takes it: also what is added for ``vtpmd attach``.
KEY_ARGUMENT: Arguments = {
    "--key": {
        "metavar": "KEY",
        "help": "encrypt the state on the disk: file=PATH, fd=N, pwdfile=PATH or pwdfd=N, and "
        "mode=, format=, kdf= and remove as swtpm has them",
    },
}
# About the guest, the log, and moving to and from other hosts.
DAEMON_ARGUMENTS: Arguments = {
    "--name": {"type": _name, "help": "the guest's name: in log lines and in QEMU's arguments"},
    "--uuid": {"type": _uuid, "help": "the guest's UUID: in QEMU's arguments"},
    "--listen": {"metavar": "HOST:PORT", "help": "wait here for vTPMs that other hosts send"},
    "--tls-creds": {
        "metavar": "DIR",
        "type": plain_path,
        "help": "certificates for both directions, laid out as for QEMU's tls-creds-x509",
    },
    "--allow": {
        "metavar": "NAME",
        "action": "append",
        "default": [],
        "help": "a peer that may send or take vTPMs: a name in its certificate; may be repeated",
    },
    "--qmp": {
        "metavar": "PATH",
        "type": plain_path,
        "help": "follow QEMU on this monitor's UNIX socket",
    },
    "--manage": {
        "metavar": "PATH",
        "type": plain_path,
        "help": "take commands on this UNIX socket, in QMP",
    },
    "--log": {
        "metavar": "level=LEVEL",
        "type": _log_level,
        "default": "level=info",
        "help": f"what is written to standard error: {', '.join(LOG_LEVELS)} (default: level=info)",
    },
}


def add_arguments(parser: argparse.ArgumentParser, arguments: Arguments) -> None:
    """Add the arguments of a table to a command."""
    for name, keywords in arguments.items():
        parser.add_argument(name, **keywords)


def read_plain(words: Sequence[str], arguments: Arguments) -> SimpleNamespace | None:
    """Return what argparse would make of a command's words, or None if that has to be asked.

    Plain are the options of the table by their whole names, each with its value, and as many other
    words as it has positional arguments; all of them right, and none that begins with a dash.
    """
    given: dict[str, list[str]] = {}
    positional = [name for name in arguments if not name.startswith("-")]
    rest = iter(words)
    for word in rest:
        name, has_value, value = word.partition("=")
        if not word.startswith("-"):
            name, value = positional.pop(0) if positional else "", word
        elif arguments.get(name, {}).get("action") == "store_true":
            if has_value:
                return None
        elif not has_value:
            value = next(rest, "-")
            if value.startswith("-"):
                return None
        if name not in arguments:
            return None
        given.setdefault(name, []).append(value)
    if positional:
        return None
    try:
        values = [_value(keywords, given.get(name)) for name, keywords in arguments.items()]
    except Exception:  # of any type, as argparse takes it
        return None
    names = [name.lstrip("-").replace("-", "_") for name in arguments]
    return SimpleNamespace(**dict(zip(names, values, strict=True)))


def _value(keywords: dict[str, Any], words: list[str] | None) -> Any:
    """Return an argument's value, of the words given for it if any. Raises what its type does."""
    convert, default = keywords.get("type", str), keywords.get("default")
    if keywords.get("action") == "store_true":
        return words is not None
    if words is None:
        return convert(default) if isinstance(default, str) else default
    values = [convert(word) for word in words]
    return values if keywords.get("action") == "append" else values[-1]
