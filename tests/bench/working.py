"""Time what a TPM's client does, again and again, beside what may delay it."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import TypeVar

from tests.support.beside import repeating

What = TypeVar("What", bound=StrEnum)


@contextmanager
def working(
    actions: Mapping[What, Callable[[], object]], times: Mapping[What, list[float]]
) -> Iterator[None]:
    """Do all actions in turn while the block runs, on a thread; keep the ms that each takes."""

    def do_all() -> None:
        for what, action in actions.items():
            before_ns = time.perf_counter_ns()
            action()
            times[what].append((time.perf_counter_ns() - before_ns) / 1e6)

    with repeating(do_all):
        yield
