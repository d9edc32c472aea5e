"""Numbers with what they count, as a person writes them: one of a thing is no plural."""

from __future__ import annotations


def counted(count: int, one: str, many: str = "") -> str:
    """Return "1 byte", or "2 bytes"; ``many`` is what more of ``one`` are called, if not so."""
    return f"{count} {noun(count, one, many)}"


def grouped(count: int, one: str, many: str = "") -> str:
    """Return the same, with a comma between thousands."""
    return f"{count:,} {noun(count, one, many)}"


def noun(count: int, one: str, many: str = "") -> str:
    """Return what stands after a count."""
    return one if count == 1 else many or f"{one}s"
