"""A process that dies at any step of what it writes, as by kill -9: in this process, to be fast.

Steps are its system calls that change a file or a directory, or sync one. At the one that is chosen
nothing is done, and no code of the program runs any more: what it catches is no `Killed`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHANGES = (
    *("open", "rename", "link", "unlink", "mkdir", "fchmod"),
    *("pwrite", "fsync", "fdatasync"),
)
CACHE_NAME = "__pycache__"


class Killed(BaseException):
    """The process is gone."""


class Steps:
    """The steps that a program has done, up to the one at which it dies."""

    def __init__(self, last: int | None) -> None:
        self.done = 0
        self._last = last

    def wrapped(self, name: str) -> Callable[..., Any]:
        """Return a system call that counts, and at last kills."""
        real: Callable[..., Any] = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            is_step = name != "open" or bool(arguments[1] & (os.O_CREAT | os.O_WRONLY))
            # pytest makes one for each module, where that is imported for the first time.
            if is_step and not str(arguments[0]).endswith(CACHE_NAME):
                if self.done == self._last:
                    raise Killed
                self.done += 1
            return real(*arguments, **more)

        return call


@contextmanager
def dying(at: int | None) -> Iterator[Steps]:
    """Have what runs in the block die at a step, from 0; with None only count."""
    steps = Steps(at)
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, steps.wrapped(name))
        yield steps
