"""Memory and errors between Python and C."""

import os

from vtpmd._core import ffi, lib

# What the buffers are for fills them; setting them to zero first would touch all of their memory.
allocate = ffi.new_allocator(should_clear_after_alloc=False)


def check_error(result: int) -> None:
    """Raise OSError for a negative result of the C core, which is an errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def check_length(name: str, data: bytes | bytearray, n_bytes: int) -> None:
    """Raise ValueError for data of another length: C would read past its end."""
    if len(data) != n_bytes:
        raise ValueError(f"the {name} has {n_bytes} bytes, not {len(data)}")


def forbid_core_dumps() -> None:
    """Keep this process's memory out of core files and from other processes of its user."""
    if lib.prctl(lib.PR_SET_DUMPABLE, ffi.cast("unsigned long", 0)) != 0:
        raise OSError(ffi.errno, "prctl(PR_SET_DUMPABLE)")
