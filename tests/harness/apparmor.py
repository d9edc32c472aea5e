"""An AppArmor profile, as its own parser takes it, and what it has to allow: by file access.

For kernels without AppArmor: what a program was seen to do is compared with the profile's rules.
The parser gives each rule as a regular expression with a mask; the first is of the profile's name.
"""

import re
import subprocess
from collections.abc import Iterable
from enum import IntFlag
from pathlib import Path
from typing import NamedTuple

from tests.harness.fresh_root import TIMEOUT_S, FreshRoot

FEATURES = "/etc/apparmor.d/abi/3.0"  # what the kernel is taken to mediate
_RULE = re.compile(r"^rule: ([(/].*?)  ->  .*?(?P<deny> deny\b.*)? \(0x(?P<mask>[0-9a-f]+)/", re.M)
_OF_OTHERS = re.compile(
    r"\\x(?!00)"
)  # bytes that are in no file's rule: of D-Bus, signals, sockets
_OTHERS_SHIFT = 14  # whoever owns the file: the owner's are below


class May(IntFlag):
    """What is allowed of a file, as the kernel's masks have it."""

    EXECUTE = 1
    WRITE = 2
    READ = 4
    LOCK = 0x20
    MAP = 0x40  # as code


class Access(NamedTuple):
    """What a program has done to a file."""

    path: str  # absolute, without links; a directory's ends with a slash
    may: May
    call: str  # the system call, for people


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    may: May
    denies: bool


class Profile:
    """The rules of a profile."""

    def __init__(self, root: FreshRoot, path: Path) -> None:
        """Have them from the parser of a root, which has the files that the profile includes."""
        found = _RULE.finditer(_dump(root, path, "-D", "rule-exprs"))
        _, *self._rules = [_rule(each) for each in found if not _OF_OTHERS.search(each[1])]
        text = _dump(root, path, "--debug")
        self.capabilities = _line(text, "Capabilities").split()
        # In one line, or, by the parser of AppArmor 4, in one for each.
        lines = "\n".join(re.findall(r"^[Nn]etwork\b.*$", text, re.M))
        families = re.findall(r"(\w+) \{ ([^}]*) \}", lines)
        self._sockets = {(family, kind) for family, kinds in families for kind in kinds.split()}

    def refused(self, accesses: Iterable[Access]) -> list[Access]:
        """Return what it does not allow."""
        return [each for each in accesses if each.may & ~self._allowed(each.path)]

    def refused_sockets(self, sockets: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
        """Return the kinds of sockets, as ("inet", "stream"), that it does not allow."""
        return set(sockets) - self._sockets

    def _allowed(self, path: str) -> May:
        allowed = denied = May(0)
        for rule in self._rules:
            if rule.pattern.fullmatch(path):
                if rule.denies:
                    denied |= rule.may
                else:
                    allowed |= rule.may
        return allowed & ~denied


def _dump(root: FreshRoot, path: Path, *options: str) -> str:
    """Return what the parser has to say of a profile, which is long."""
    command = root.command("apparmor_parser", "-Q", "-K", "-T", "-M", FEATURES, *options, path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return done.stdout + done.stderr


def _rule(found: re.Match[str]) -> _Rule:
    mask = int(found["mask"], 16) >> _OTHERS_SHIFT
    return _Rule(re.compile(found[1]), May(mask & sum(May)), denies=found["deny"] is not None)


def _line(text: str, name: str) -> str:
    """Return what the parser says of something, which it says once."""
    (value,) = re.findall(rf"^{name}:\s*(.*)$", text, re.M)
    return str(value)
