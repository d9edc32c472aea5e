"""What a TPM 1.2 alone has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final
from xml.etree.ElementTree import Element

from vtpmd.inspect.html.elements import Child, Column, element, facts, part, table, words

COUNTERS: Final = (
    *(Column("counter", "code"), Column("label", "code"), Column("value", "number")),
    Column("authorisation"),
)
FLAGS: Final = {"flags": "Permanent flags", "flags-until-reset": "Flags until a reset"}


def tpm12(known: dict[str, Any]) -> Iterator[Element]:
    """Yield the part, of a TPM 1.2."""
    own = known["tpm12"]
    if own is None:
        return
    pairs = [
        (name.replace("-", " "), _word(value))
        for name, value in own.items()
        if value is not None and not isinstance(value, dict | list)
    ]
    rows = [(None, _counter(each)) for each in own["counters"]]
    yield part(
        "tpm12",
        "TPM 1.2",
        facts(pairs),
        *(
            element("p", f"{title} that are set: ", words(_set(own[name])))
            for name, title in FLAGS.items()
            if own[name] is not None
        ),
        table("Monotonic counters", COUNTERS, rows) if rows else None,
    )


def _set(flags: dict[str, bool]) -> list[str]:
    return [name for name, is_on in flags.items() if is_on] or ["none"]


def _counter(known: dict[str, Any]) -> tuple[Child, ...]:
    auth = "set" if known["auth-set"] else "empty"
    return (known["handle"], known["label"], known["value"], auth)


def _word(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
