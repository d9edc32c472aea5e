"""Times of day, as everything here writes them: ISO 8601, UTC."""

from __future__ import annotations

import time

from vtpmd.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Final

MS_PER_S: Final = 1000
TIME_MS_MAX: Final = 253402300799999  # the end of the year 9999


def now() -> str:
    """Return the time, to the second: "2026-11-29T13:30:40Z"."""
    return at_second(int(time.time()))


def at_second(s: int) -> str:
    """Return a time in seconds since 1970, as above. Raises OverflowError: it is none."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(s))


def at_millisecond(ms: int) -> str:
    """Return one in milliseconds: "2026-11-29T13:30:40.125Z". Raises OverflowError."""
    return f"{at_second(ms // MS_PER_S)[:-1]}.{ms % MS_PER_S:03}Z"
