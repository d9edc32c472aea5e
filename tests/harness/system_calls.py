"""What system calls a process is in, as Linux tells in /proc."""

import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Of poll() a negative number, of ppoll() no address.
_WITHOUT_LIMIT = {0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0}


def numbers_of(names: set[str]) -> dict[str, int]:
    """Ask the compiler for the numbers of the calls that there are."""
    text = "#include <sys/syscall.h>\n" + "".join(f"call {n} __NR_{n}\n" for n in names)
    command = ["gcc", "-E", "-P", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    found = re.findall(r"^call (\w+) (\d+)$", done.stdout, re.MULTILINE)
    return {name: int(number) for name, number in found}


class Poll(NamedTuple):
    """A poll() or ppoll() that a thread waits in."""

    n_descriptors: int
    has_limit: bool


@functools.cache
def _poll_numbers() -> frozenset[int]:
    return frozenset(numbers_of({"poll", "ppoll"}).values())


def polls(process: int) -> Iterator[Poll]:
    """Yield what the threads of a process wait in. PermissionError if that is not to be seen."""
    for task in Path(f"/proc/{process}/task").iterdir():
        number, *arguments = (task / "syscall").read_text().split()
        if number.isdigit() and int(number) in _poll_numbers():
            n_descriptors, limit = (int(word, 16) for word in arguments[1:3])
            yield Poll(n_descriptors, limit not in _WITHOUT_LIMIT)
