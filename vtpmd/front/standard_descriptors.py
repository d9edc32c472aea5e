"""The descriptors that every program is started with, and may have been started without."""

from __future__ import annotations

import os


def open_standard_descriptors() -> None:
    """Open what is closed of 0, 1 and 2: lines for people must not go into a file of the vTPM's."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
