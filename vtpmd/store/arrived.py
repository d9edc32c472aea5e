"""The permanent state that QEMU has brought, where it came: until it has its own file.

``tpm2-00.arrived`` is the engine's (``csrc/engine/room.h`` has its bytes, and why it is there). It
is left by a crash alone. What came and was started then has this file, and maybe no other; what
came and was not started may have it too, and is as good: it is of the vTPM that the directory has,
and later, or of one in a directory that has none.
"""

from __future__ import annotations

from struct import Struct

from vtpmd.light_typing import TYPE_CHECKING
from vtpmd.store import recovery
from vtpmd.wire import swtpm_format

if TYPE_CHECKING:
    from typing import Final

    from vtpmd.store.directory import StateDirectory
    from vtpmd.store.keys import Key
    from vtpmd.wire.swtpm_format import Lineage

MAGIC: Final = b"VTPMDAR1"
HEAD: Final = Struct(">8sQ32s")
FILE_OFFSET: Final = 512
ARRIVED_BYTES: Final = 192 << 10


def take_up(directory: StateDirectory, key: Key | None) -> bool:
    """After a crash: give the state that has come its own file, if it is the latest.

    Return True if it was. Raises StateKeyError or StateDirectoryError; everything is as it was
    then, or can be taken up again.
    """
    content = directory.read(directory.names.arrived, ARRIVED_BYTES)
    if content is None:
        return False
    file = state_file(content)
    is_latest = file is not None and _is_latest(directory, file, key)
    if file is not None and is_latest:
        directory.decode_state(directory.names.arrived, file, key)
        # What is left of them goes with a state that this host had before.
        for name in (directory.names.volatile, directory.names.savestate, directory.names.journal):
            directory.remove(name)
        directory.replace(directory.names.permanent, file)
    directory.remove(directory.names.arrived)
    return is_latest


def state_file(content: bytes) -> bytes | None:
    """Return the state file that has come; None: none has, or not wholly."""
    if len(content) < FILE_OFFSET:
        return None
    from hashlib import sha256

    magic, length, digest = HEAD.unpack_from(content)
    file = content[FILE_OFFSET : FILE_OFFSET + length]
    is_whole = magic == MAGIC and 0 < length == len(file) and sha256(file).digest() == digest
    return file if is_whole else None


def _is_latest(directory: StateDirectory, file: bytes, key: Key | None) -> bool:
    come = _lineage(file)
    if come is None or not directory.exists(directory.names.permanent):
        return come is not None
    ours = directory.read_lineage()
    if ours is None or ours.identity != come.identity:
        return False
    return come.generation > max(ours.generation, recovery.examine(directory, key).generation)


def _lineage(file: bytes) -> Lineage | None:
    try:
        return swtpm_format.read_lineage(file)
    except swtpm_format.FormatError:
        return None
