"""What an export has of a vTPM that runs, with the volatile state: its vtpmd was asked.

The engine copies its TPM's states of one moment, under its lock: the guest's commands wait for that
copy alone. What the copy has of the permanent state was acknowledged; what is in the state
directory after that, and synced before it counts (``exporting_asked``), goes on from it: so it is
durable, too.
"""

from __future__ import annotations

import binascii
import string
from typing import Any, Final, NamedTuple

from vtpmd.counted import counted
from vtpmd.errors import VtpmdError
from vtpmd.store.exporting import Taken
from vtpmd.wire.export_format import ID_BYTES
from vtpmd.wire.swtpm_format import STATE_BYTES_MAX
from vtpmd.wire.tpm import GENERATION_GIVEN_MAX, StateType

NAMES: Final = {kind.name.lower(): kind for kind in StateType}
NEEDED: Final = frozenset({StateType.PERMANENT, StateType.VOLATILE})
TEXT_LENGTH_MAX: Final = (STATE_BYTES_MAX + 2) // 3 * 4  # of a state in base64


class Copied(NamedTuple):
    """What a vtpmd has answered to export-states."""

    identity: bytes | None  # None: no vtpmd has changed it yet
    generation: int
    states: dict[StateType, bytes]

    def __repr__(self) -> str:
        """Leave the states out."""
        return f"Copied({self.generation})"


def decode(answer: Any) -> Copied:
    """Return what was answered; nothing of it is trusted. Raises ValueError for what is none."""
    try:
        states = {NAMES[name]: _state(text) for name, text in answer["states"].items()}
        copied = Copied(_identity(answer["identity"]), answer["generation"], states)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("a member is missing, or of another kind") from error
    if type(copied.generation) is not int or not 0 <= copied.generation <= GENERATION_GIVEN_MAX:
        raise ValueError("its generation is none")
    if not states.keys() >= NEEDED:
        raise ValueError("a state is missing")
    return copied


def take(copied: Copied, stored: Taken, place: str) -> Taken:
    """Return what was copied, as it is durable: it is in what was ``stored`` at a place after it.

    Raises VtpmdError where that is another vTPM's, or has not come as far.
    """
    if stored.identity != copied.identity or stored.generation < copied.generation:
        raise VtpmdError(
            f"cannot export {place}: what is stored there is not what the vtpmd that was asked "
            f"runs; see `vtpmd status {place}`, and ask again"
        )
    return stored._replace(states=copied.states, generation=copied.generation)


def _identity(text: str | None) -> bytes | None:
    if text is None:
        return None
    if len(text) != 2 * ID_BYTES or not set(text) <= set(string.hexdigits):
        raise ValueError("its identity is none")
    return bytes.fromhex(text)


def _state(text: str) -> bytes:
    if len(text) > TEXT_LENGTH_MAX:
        raise ValueError("a state is too long")
    state = binascii.a2b_base64(text, strict_mode=True)
    if not 0 < len(state) <= STATE_BYTES_MAX:
        raise ValueError(f"a state has {counted(len(state), 'byte')}")
    return state
