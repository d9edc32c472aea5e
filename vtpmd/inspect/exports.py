"""The states in an export of vtpmd's."""

from __future__ import annotations

from pathlib import Path

from vtpmd.inspect.source import DamagedContainer, NotAState, Source
from vtpmd.store import importing
from vtpmd.store.chain import ChainDamaged
from vtpmd.store.directory import StateKeyError
from vtpmd.store.export_seal import Age, Seal
from vtpmd.store.keys import Key
from vtpmd.wire.export_format import DamagedExport, ExportError
from vtpmd.wire.swtpm_format import Lineage


def export_source(path: Path, seal: Seal) -> Source:
    """Return what an export holds; a delta with the other files of its chain beside it.

    Raises NotAState for one of a later version, DamagedContainer, StateKeyError or OSError.
    """
    place = f"cannot inspect {path}"
    try:
        sealing = importing.read(path).header.sealing
        if sealing == "age" and not isinstance(seal, Age):
            raise StateKeyError("it is sealed with age: `vtpmd import` opens it, and verify")
        if isinstance(seal, Key) and sealing is None:
            raise StateKeyError("it is not sealed, but a key was given; leave out --key")
        header, states = importing.find(path, seal)
    except StateKeyError as error:
        raise StateKeyError(f"{place}: {error}") from error
    except (DamagedExport, ChainDamaged) as error:
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
        is_encrypted=sealing is not None,
        lineage=lineage,
        generation=None if lineage is None else lineage.generation,
    )
