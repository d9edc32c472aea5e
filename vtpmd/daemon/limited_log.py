"""Log lines that somebody, or a full disk, can cause: a flood of them must not fill the disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

# Counted anew after this. Twenty lines a minute of 200 bytes are 6 MB a day.
INTERVAL_S: Final = 60.0


def log_failure(log: logging.Logger, what: str, error: BaseException) -> None:
    """Write what nobody has foreseen; of a system's error one line, but for who debugs."""
    is_plain = isinstance(error, OSError) and not log.isEnabledFor(logging.DEBUG)
    log.error("%s: %s", what, error, exc_info=None if is_plain else error)


class LimitedLog:
    """Writes at most so many lines in INTERVAL_S, and says with the next one what was left out."""

    def __init__(self, log: logging.Logger, lines_max: int) -> None:
        self._log = log
        self._lines_max = lines_max
        self._began_s = time.monotonic()
        self._n_lines = 0

    def write(self, level: int, text: str, *, exc_info: bool = False) -> None:
        """Write a line, unless there were too many."""
        now_s = time.monotonic()
        if now_s - self._began_s >= INTERVAL_S:
            if (n_left_out := self._n_lines - self._lines_max) > 0:
                self._log.warning("%d more lines such as the next were left out", n_left_out)
            self._began_s, self._n_lines = now_s, 0
        self._n_lines += 1
        if self._n_lines <= self._lines_max:
            self._log.log(level, "%s", text, exc_info=exc_info)


class NewsLog:
    """Writes what is new: what is tried again and again fails in the same way for hours."""

    def __init__(self, log: Callable[[str, str], None]) -> None:
        """Take what writes a line at its level, such as log.error."""
        self._log = log
        self._said: str | None = None

    def write(self, text: str) -> None:
        """Write a line, unless it is the last one again."""
        if text != self._said:
            self._said = text
            self._log("%s", text)
