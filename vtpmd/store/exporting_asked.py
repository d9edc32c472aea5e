"""What a vtpmd answers to export-permanent: the durable state, for who has its socket alone.

The vtpmd reads its state directory as ``exporting`` does, and answers a state file of what it has
found, as a start would find it with the journal folded: encrypted with the directory's key, if it
has one. So the key is not needed to ask, and is needed to take what was answered.
"""

from __future__ import annotations

import binascii
from typing import Any, Final

from vtpmd.counted import counted
from vtpmd.store import owner
from vtpmd.store.directory import KEY_REMEDIES, StateKeyError, names_of
from vtpmd.store.exporting import Taken
from vtpmd.store.keys import Key
from vtpmd.store.owner import OwnerRecordError, Record
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import FILE_BYTES_MAX, STATE_BYTES_MAX, FormatError, Lineage
from vtpmd.wire.tpm import GENERATION_GIVEN_MAX, StateType, TpmVersion

VERSIONS: Final = {version.facts.word: version for version in TpmVersion}
TEXT_LENGTH_MAX: Final = (FILE_BYTES_MAX + 2) // 3 * 4  # of a state file in base64


def answer(taken: Taken, directory: str, key: Key | None) -> dict[str, object]:
    """Return the answer of the vtpmd that serves a directory, which is encrypted with ``key``."""
    lineage = None if taken.identity is None else Lineage(taken.identity, taken.generation)
    material, iv = (None, b"") if key is None else (key.material, key.new_iv())
    state = taken.states[StateType.PERMANENT]
    file = swtpm_format.encode_file(state, lineage, key=material, iv=iv)
    return {
        "directory": directory,
        "tpm": taken.version.facts.word,
        "owner": None if taken.record is None else owner.encode(taken.record).decode(),
        "file": binascii.b2a_base64(file, newline=False).decode(),
    }


def decode(answered: Any, key: Key | None) -> tuple[str, Taken]:
    """Return a directory, and what is in it; nothing of what was answered is trusted.

    ``key`` is what the directory is encrypted with. Raises ValueError for what is no answer, or
    StateKeyError.
    """
    try:
        directory, version = answered["directory"], VERSIONS[answered["tpm"]]
        record, file = _record(answered["owner"], version), _file(answered["file"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("a member is missing, or of another kind") from error
    if not isinstance(directory, str):
        raise ValueError("its directory is none")
    try:
        lineage = swtpm_format.read_lineage(file)
        state = swtpm_format.decode_file(file, key=None if key is None else key.material)
    except FormatError as error:
        remedy = KEY_REMEDIES.get(type(error))
        if remedy is None:
            raise ValueError(f"its file: {error}") from error
        raise StateKeyError(f"cannot export the vTPM: {error}; {remedy}") from error
    _check(lineage, state)
    return directory, Taken(
        version=version,
        states={StateType.PERMANENT: bytes(state)},
        identity=None if lineage is None else lineage.identity,
        generation=0 if lineage is None else lineage.generation,
        is_served=True,
        record=record,
    )


def _file(text: str) -> bytes:
    if len(text) > TEXT_LENGTH_MAX:
        raise ValueError("its file is too long")
    return binascii.a2b_base64(text, strict_mode=True)


def _record(text: str | None, version: TpmVersion) -> Record | None:
    """Return the owner record that is answered; None where that could not be read."""
    if text is None:
        return None
    try:
        return owner.parse(text.encode(), names_of(version).owner)
    except OwnerRecordError as error:
        raise ValueError("its owner record is none") from error


def _check(lineage: Lineage | None, state: bytes) -> None:
    """Raise ValueError for a state that no vTPM has."""
    if lineage is not None and lineage.continued:
        raise ValueError("a journal continues its file")
    if lineage is not None and not 0 < lineage.generation <= GENERATION_GIVEN_MAX:
        raise ValueError("its generation is none")
    if not 0 < len(state) <= STATE_BYTES_MAX:
        raise ValueError(f"its state has {counted(len(state), 'byte')}")
