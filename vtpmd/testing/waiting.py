"""Wait for what shows itself by no event."""

import time
from collections.abc import Callable

WAIT_TIMEOUT_S = 20.0
POLL_S = 0.005


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds. TimeoutError when it does not."""
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"what was waited for has not come in {WAIT_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)
