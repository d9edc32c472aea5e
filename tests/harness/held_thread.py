"""Hold one thread of a process, as a scheduler might: the others run on (ptrace(2), as root)."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

PTRACE_SEIZE = 0x4206  # linux/ptrace.h
PTRACE_INTERRUPT = 0x4207
PTRACE_DETACH = 17
WALL = 0x40000000  # __WALL: also for a thread that is not the first

_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_ptrace.restype = ctypes.c_long


@contextmanager
def thread_stands_still(thread: int) -> Iterator[None]:
    """Have a thread not scheduled while the block runs. OSError where it cannot be held."""
    _do(PTRACE_SEIZE, thread)
    try:
        _do(PTRACE_INTERRUPT, thread)
        os.waitpid(thread, WALL)
        yield
    finally:
        _do(PTRACE_DETACH, thread)


def _do(request: int, thread: int) -> None:
    if _ptrace(request, thread, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
