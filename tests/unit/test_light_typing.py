"""Named tuples without ``typing`` are as those that it makes."""

from __future__ import annotations  # as whoever has them is to

import typing
from typing import Any

import pytest

from vtpmd import light_typing


def make(base: Any) -> Any:
    """Return a class with all that ours have."""

    class Pair(base):  # type: ignore[misc]
        """Two."""

        first: int
        second: bytes = b"2"

        @property
        def total(self) -> int:
            return int(self.first) + len(self.second)

        def __repr__(self) -> str:
            return f"Pair of {self.first}"

    return Pair


NAMES = (
    "__name__",
    "__qualname__",
    "__module__",
    "__doc__",
    "__slots__",
    "_fields",
    "_field_defaults",
)
Light, Typed = make(light_typing.NamedTuple), make(typing.NamedTuple)


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_alike(name: str) -> None:
    """Also in what is said of them."""
    assert getattr(Light, name) == getattr(Typed, name)


def test_values_are_alike() -> None:
    """They are tuples, with the class's methods."""
    light, typed = Light(1), Typed(1)
    assert light == typed == (1, b"2")
    assert light._replace(second=b"") == typed._replace(second=b"")
    assert light._asdict() == typed._asdict()
    assert (light.total, repr(light)) == (typed.total, repr(typed))
    assert not hasattr(light, "__dict__")
