"""What is done beside a test, on a thread."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event


@contextmanager
def repeating(step: Callable[[], object]) -> Iterator[None]:
    """Do a step again and again while the block runs; what it has raised is raised at the end."""
    ends = Event()

    def work() -> None:
        while not ends.is_set():
            step()

    with ThreadPoolExecutor(1) as executor:
        working = executor.submit(work)
        try:
            yield
        finally:
            ends.set()
        working.result()
