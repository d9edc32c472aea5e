"""What a start takes from ``typing``, without its import: that and ``re`` are a sixth of a start.

Modules that a start imports take these from here, all else of ``typing`` under TYPE_CHECKING, and
have ``from __future__ import annotations``, so that no annotation is evaluated.
"""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False  # but for type checkers, which know it by its name

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:

    class _NamedTupleType(type):
        """Makes a tuple with named fields of a class that says what they are, as typing does."""

        def __new__(cls, name: str, _bases: tuple[type, ...], body: dict[str, object]) -> type:
            fields = body["__annotations__"]
            defaults = [body.pop(field) for field in fields if field in body]
            plain = namedtuple(name, fields, defaults=defaults, module=body["__module__"])
            return type(name, (plain,), {**body, "__slots__": ()})

    NamedTuple = type.__new__(_NamedTupleType, "NamedTuple", (), {})
