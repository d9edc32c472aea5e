"""How long this thread has a processor at most, before another has its turn.

Source: ``csrc/slice.h``.
"""

from __future__ import annotations

from vtpmd._core import lib


def be_short() -> None:
    """Go before others after waiting, for what is short. It does nothing before Linux 6.12."""
    lib.slice_be_short()


def be_usual() -> None:
    """Go as others do again."""
    lib.slice_be_usual()
