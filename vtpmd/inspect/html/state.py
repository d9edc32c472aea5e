"""The page of what is in a vTPM's state, and of what led there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from xml.etree.ElementTree import Element

from vtpmd.inspect.history import Commit
from vtpmd.inspect.html.document import document
from vtpmd.inspect.html.glance import bytes_decoded, glance, surprises
from vtpmd.inspect.html.keys import audit, hierarchies, objects, sessions
from vtpmd.inspect.html.memory import memory
from vtpmd.inspect.html.pcrs import pcrs
from vtpmd.inspect.html.record import record
from vtpmd.inspect.html.timeline import timeline
from vtpmd.inspect.html.tpm12 import tpm12
from vtpmd.inspect.screen import container_words

HAS_SECRETS: Final = "Secrets are on this page: who reads it can be this TPM."


def state_page(
    known: dict[str, Any], commits: Sequence[Commit] | None, made: str, *, has_secrets: bool = False
) -> bytes:
    """Return the page of what ``overview`` has told, and of a directory's commits."""
    parts: list[Element] = [surprises(known)]
    if known["record"] is not None:
        parts += record(known)
    else:
        for make in (glance, memory, pcrs, hierarchies, tpm12, objects, sessions, audit):
            parts += make(known)
    parts.append(bytes_decoded(known))
    if commits is not None:
        parts.append(timeline(commits, known["generation"]))
    warnings = [HAS_SECRETS] if has_secrets else []
    return document(known["path"], container_words(known), parts, made, warnings)
