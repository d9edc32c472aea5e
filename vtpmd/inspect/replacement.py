"""What a new TPM gets of another one's state: NV memory that is not bound to the old identity.

The new TPM is libtpms' own, with seeds of its own. Into its permanent state go the NV indices that
are kept, byte for byte as libtpms has written them: so a counter keeps its value, and an index its
name, locks and authorisation, which no command of a TPM could set. What is not named here stays
behind. libtpms has to take the result before it counts.

All of this is of a TPM 2.0; ``tpm12/replacement.py`` has a TPM 1.2's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from vtpmd.counted import counted
from vtpmd.errors import VtpmdError
from vtpmd.inspect import contents
from vtpmd.inspect.certificates import load
from vtpmd.inspect.fates import ALWAYS, SETTINGS, Fate, Item, Kind
from vtpmd.inspect.identity import CERTIFICATES, certified_key, key_in
from vtpmd.inspect.nv import OWNER_READ, RAM_HEADER_BYTES
from vtpmd.inspect.primitives import SU_DA_USED, SU_NONE, nv_type
from vtpmd.inspect.public import banks_of, banks_words
from vtpmd.inspect.renewal import Piece, bytes_of, decoded, part, settings, spliced
from vtpmd.inspect.tpm12 import replacement as tpm12
from vtpmd.inspect.tree import Node
from vtpmd.inspect.words.handles import HT_NV_INDEX, HT_PERSISTENT
from vtpmd.store import libtpms
from vtpmd.store.libtpms import States
from vtpmd.wire import state_level
from vtpmd.wire.tpm import StateType, TpmVersion

# TCG, TPM 2.0 Keys for Device Identity and Attestation: NV indices of IDevID and IAK certificates.
DEVICE_IDENTITY: Final = range(0x01C9_0000, 0x01CA_0000)
ORDERLY, CLEAR_AT_STARTUP, WRITTEN = 1 << 26, 1 << 27, 1 << 29  # of TPMA_NV
SU_BYTES: Final = 2
SEEDS: Final = ("endorsement-seed", "owner-seed", "platform-seed")
CUSTOM: Final = "custom"  # the only profile that is more than a name


_BOUND: Final = {
    Kind.ENDORSEMENT_INDEX: CERTIFICATES["EK"],
    Kind.PLATFORM_INDEX: CERTIFICATES["platform"],
    Kind.DEVICE_INDEX: DEVICE_IDENTITY,
}
_NV_TYPES: Final = {
    kind.value: kind
    for kind in (
        *(Kind.ORDINARY, Kind.COUNTER, Kind.BITS),
        *(Kind.EXTEND, Kind.PIN_TRIES, Kind.PIN_USES),
    )
}


class Replaced(NamedTuple):
    """A new TPM's permanent state, and what became of each thing of the old one."""

    states: States
    items: tuple[Item, ...]

    def __repr__(self) -> str:
        """Leave the states out."""
        return f"Replaced({self.items})"


def replace(path: str, version: TpmVersion, old_states: States) -> Replaced:
    """Make a new TPM with what can be kept of the permanent state of another one, from a path.

    libtpms takes the old state, and the new one. Raises VtpmdError.
    """
    place = f"cannot replace the TPM in {path}"
    renew = tpm12.renew if version is TpmVersion.TPM_1_2 else _renew
    new, items = renew(place, old_states[StateType.PERMANENT])
    states = {StateType.PERMANENT: new}
    refusal = libtpms.ask(version, states=states).refusal
    if refusal is not None:
        raise VtpmdError(f"{place}: {refusal}; import it with --identity copy")
    items += [Item(kind, what) for kind, what in ALWAYS[version].items()]
    return Replaced(states, tuple(sorted(items, key=lambda item: list(Fate).index(item.fate))))


def _renew(place: str, old: bytes) -> tuple[bytes, list[Item]]:
    """Return the state of a new TPM 2.0, and what became of the old one's things."""
    before = decoded(place, old, TpmVersion.TPM_2_0)
    new = libtpms.make(TpmVersion.TPM_2_0, _profile_of(old, before))
    fresh = decoded(place, new, TpmVersion.TPM_2_0)
    _check_seeds(place, fresh)
    indices = [(_index(before, entry), entry) for entry in contents.entries(before, HT_NV_INDEX)]
    kept = [entry for item, entry in indices if item.fate is not Fate.LOST]
    items = [item for item, _ in indices]
    items += [*_banks_and_settings(before, fresh), *_objects(before)]
    return spliced(new, _pieces(old, before, fresh, kept)), items


def _check_seeds(place: str, fresh: Node) -> None:
    """Raise VtpmdError for a new TPM that has no seeds, of which everybody could make its keys."""
    data = _part(fresh, "persistent-data")
    if not all(any(data.content(name)) for name in SEEDS):
        raise VtpmdError(f"{place}: libtpms has made a TPM without seeds; install vtpmd again")


def _profile_of(state: bytes, before: Node) -> str | None:
    """Return the profile of a state, as libtpms is told of it; None: the one that all have."""
    name = state_level.needs_of(state).profile
    if name in ("", state_level.NULL_PROFILE):
        return None
    if name.partition(":")[0] == CUSTOM:
        return str(before.at("persistent-all", "profile"))
    return f'{{"Name":"{name}"}}'


# What becomes of NV indices.


def _index(before: Node, entry: Node) -> Item:
    public = entry.find("index", "public") or entry
    attributes = public.number("attributes") or 0
    kind = _kind_of(before, entry, attributes)
    size = counted(public.number("data-size") or 0, "byte")
    what = f"NV index {entry.name}, {nv_type(attributes)}, {size}"
    return Item(kind, what, entry.name, has_policy=bool(public.content("auth-policy")))


def _kind_of(before: Node, entry: Node, attributes: int) -> Kind:
    handle = entry.number("handle") or 0
    type_ = _NV_TYPES.get(nv_type(attributes))
    bound = next((kind for kind, handles in _BOUND.items() if handle in handles), None)
    if bound is not None:
        return bound
    if _is_certificate_of_its_key(before, entry):
        return Kind.KEY_CERTIFICATE
    if type_ is None:
        return Kind.UNKNOWN_INDEX
    if type_ is Kind.COUNTER:
        return Kind.ORDERLY_COUNTER if attributes & ORDERLY else type_
    if attributes & (ORDERLY | CLEAR_AT_STARTUP):
        return Kind.UNTIL_RESET
    if not attributes & WRITTEN:
        return Kind.UNWRITTEN
    is_guarded = type_ is Kind.ORDINARY and _is_owners_secret(before, entry, attributes)
    return Kind.OWNER_GUARDED if is_guarded else type_


def _is_certificate_of_its_key(before: Node, entry: Node) -> bool:
    found = load(entry.content("data"))
    if found is None:
        return False
    keys = (key_in(each) for each in contents.entries(before, HT_PERSISTENT))
    return certified_key(found) in [key.pem for key in keys if key is not None]


def _is_owners_secret(before: Node, entry: Node, attributes: int) -> bool:
    """Return whether nobody reads it without the owner's authorisation, which is set."""
    data = entry.find("data")
    is_set = bool(before.content("persistent-all", "persistent-data", "owner-auth"))
    return bool(attributes & OWNER_READ and is_set and data is not None and data.is_secret)


# What becomes of all else.


def _banks_and_settings(before: Node, fresh: Node) -> Iterator[Item]:
    data, new = (_part(root, "persistent-data") for root in (before, fresh))
    banks = banks_of(data.find("pcr-allocated"))
    yield Item(Kind.PCR_BANKS, f"PCRs that are on, {banks_words(banks)}")
    yield from settings(SETTINGS, data, new)


def _objects(before: Node) -> Iterator[Item]:
    for each in contents.persistent_objects(before):
        size = each["curve"] or each["key-bits"] or ""
        what = (
            f"persistent object {each['handle']}, {each['type']} {size}".rstrip()
            + f", of the {each['hierarchy']} hierarchy"
        )
        yield Item(Kind.PERSISTENT_OBJECT, what, each["handle"])


# The new state.


def _pieces(old: bytes, before: Node, fresh: Node, kept: list[Node]) -> Iterator[Piece]:
    """Yield what the new TPM's state gets of the old one's."""
    yield Piece(
        _part(fresh, "persistent-data", "pcr-allocated"),
        bytes_of(old, _part(before, "persistent-data", "pcr-allocated")),
    )
    handles = {entry.name for entry in kept}
    in_ram = _part(before, "orderly-ram", "entries")
    orderly = [entry for entry in in_ram.children if entry.name in handles]
    # An orderly counter is as it was at the last TPM2_Shutdown; else it has to be known that there
    # was none, so that it is set to what is surely no lower than it was.
    if orderly and before.number("persistent-all", "persistent-data", "orderly-state") in (
        *(SU_NONE, SU_DA_USED),
    ):
        state = _part(fresh, "persistent-data", "orderly-state")
        yield Piece(state, SU_NONE.to_bytes(SU_BYTES, "big"))
    ram_bytes = fresh.number("persistent-all", "orderly-ram", "ram-bytes") or 0
    yield Piece(_part(fresh, "orderly-ram", "entries"), _ram(old, orderly, ram_bytes))
    entries = b"".join(bytes_of(old, entry) for entry in kept)
    yield Piece(_part(fresh, "user-nvram", "entries"), entries + bytes(4))
    # A counter that is defined anew begins above all that there have been.
    counters = (
        each.number("persistent-all", "user-nvram", "counter-max") for each in (before, fresh)
    )
    highest = max(count or 0 for count in counters)
    yield Piece(_part(fresh, "user-nvram", "counter-max"), highest.to_bytes(8, "big"))


def _ram(old: bytes, entries: list[Node], ram_bytes: int) -> bytes:
    """Return orderly indices as a permanent state has them; an end only where there is room."""
    used = sum(RAM_HEADER_BYTES + len(entry.content("data")) for entry in entries)
    end = bytes(4) if used + RAM_HEADER_BYTES <= ram_bytes else b""
    return b"".join(bytes_of(old, entry) for entry in entries) + end


def _part(root: Node, *path: str) -> Node:
    return part(root, "persistent-all", *path)
