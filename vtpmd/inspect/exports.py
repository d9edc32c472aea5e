"""The states in an export of vtpmd's."""

from __future__ import annotations

from pathlib import Path

from vtpmd.inspect.source import DamagedContainer, NotAState, Source
from vtpmd.store import export_seal, importing
from vtpmd.store.directory import StateKeyError
from vtpmd.store.keys import Key
from vtpmd.wire.export_format import DamagedExport, ExportError, ExportFlag
from vtpmd.wire.swtpm_format import Lineage


def export_source(path: Path, key: Key | None) -> Source:
    """Return what an export holds.

    Raises NotAState for one of a later version, DamagedContainer, StateKeyError or OSError.
    """
    place = f"cannot inspect {path}"
    try:
        export = importing.read(path)
        header = export.header
        if header.flags & ExportFlag.AGE:
            raise StateKeyError("it is sealed with age: `vtpmd import` opens it")
        if key is not None and not header.flags:
            raise StateKeyError("it is not sealed, but a key was given; leave out --key")
        states = export_seal.opened(export, key)
    except StateKeyError as error:
        raise StateKeyError(f"{place}: {error}") from error
    except DamagedExport as error:
        raise DamagedContainer(f"{place}: {error}") from error
    except ExportError as error:
        raise NotAState(f"{place}: {error}") from error
    lineage = None
    if header.identity is not None:
        lineage = Lineage(header.identity, header.generation)
    return Source(
        path=str(path),
        kind="export",
        states=states,
        tpm=header.version,
        is_encrypted=bool(header.flags),
        lineage=lineage,
        generation=None if lineage is None else lineage.generation,
    )
