"""What has a close() is closed by its with block."""

from __future__ import annotations

from vtpmd.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self


class Closing:
    """A base for what holds a descriptor, memory or a secret until it is closed."""

    def close(self) -> None:
        """Let go of it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
