"""What a new TPM 1.2 gets of another one's state: NV memory and counters that are not its owner's.

The new TPM is libtpms' own, with an endorsement key of its own, and no owner. Into its permanent
state goes what is kept, byte for byte as libtpms has written it: so an index keeps its
authorisation, its lock and what PCRs it asks for, a counter its value. With that go the flags of
the platform, of which ``nvLocked`` is one: without it all of these guards would be ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha1
from typing import Final

from vtpmd.counted import counted
from vtpmd.errors import VtpmdError
from vtpmd.inspect.certificates import load
from vtpmd.inspect.fates import SETTINGS_12, Fate, Item, Kind
from vtpmd.inspect.identity import CERTIFICATES_12, certified_key, pem_of_a_tpm_12
from vtpmd.inspect.renewal import Piece, bytes_of, decoded, part, settings, spliced
from vtpmd.inspect.sections import CHECKSUM_BYTES
from vtpmd.inspect.tpm12.overview import EK, SRK, nv_entries
from vtpmd.inspect.tpm12.permanent import GPIO, OWNER_READ
from vtpmd.inspect.tree import Node
from vtpmd.inspect.words.tpm12 import PERMANENT_FLAGS
from vtpmd.store import libtpms
from vtpmd.wire.tpm import TpmVersion

DATA_REGISTER: Final = 0x1000_0001  # TPM_NV_INDEX_DIR: TPM Main, part 2, 19.1.1
NUMBER_BYTES: Final = 4
# What the platform has set, and not the owner: what TPM_OwnerClear does not touch (TPM Main, part
# 3, 6.2), and whether the TPM is on.
PLATFORM_FLAGS: Final = frozenset(
    {
        *("disable", "deactivated", "nvLocked", "tpmEstablished"),
        *("physicalPresenceLifetimeLock", "physicalPresenceHWEnable", "physicalPresenceCMDEnable"),
        *("FIPS", "TPMpost", "TPMpostLock"),
    }
)
# Parts of the permanent data that are kept, and those that are the new TPM's own. Of all others it
# is told where they differ.
KEPT: Final = ("auth-dir", "counters")
SECRETS: Final = (
    *("tpm-proof", "ek-reset", "endorsement-key", "srk", "context-key", "delegate-key"),
    *("daa-seed", "daa-proof", "daa-blob-key"),
)
_PLATFORM_MASK: Final = sum(
    1 << bit for bit, name in PERMANENT_FLAGS.items() if name in PLATFORM_FLAGS
)
_BOUND: Final = {
    Kind.ENDORSEMENT_INDEX: CERTIFICATES_12["EK"],
    Kind.PLATFORM_INDEX: CERTIFICATES_12["platform"],
    Kind.GPIO_INDEX: GPIO,
}


def renew(place: str, old: bytes) -> tuple[bytes, list[Item]]:
    """Return the permanent state of a new TPM 1.2, and what became of the old one's things.

    Raises VtpmdError.
    """
    before = decoded(place, old, TpmVersion.TPM_1_2)
    new = libtpms.make(TpmVersion.TPM_1_2)
    fresh = decoded(place, new, TpmVersion.TPM_1_2)
    _check_keys(place, before, fresh)
    indices = [(_index(before, entry), entry) for entry in nv_entries(_part(before, "nv"))]
    kept = [entry for item, entry in indices if item.fate is not Fate.LOST]
    items = [item for item, _ in indices]
    items += [*_register_and_counters(before), *_flags(before, fresh), *_keys(before)]
    items += settings(SETTINGS_12, _data(before), _data(fresh))
    state = spliced(new, _pieces(old, before, fresh, kept))[:-CHECKSUM_BYTES]
    return state + sha1(state, usedforsecurity=False).digest(), items


def _check_keys(place: str, before: Node, fresh: Node) -> None:
    """Raise VtpmdError for a new TPM without an endorsement key of its own."""
    old, new = (_data(root).content("endorsement-key", "public-key") for root in (before, fresh))
    if not new or old == new:
        raise VtpmdError(
            f"{place}: libtpms has made a TPM without an endorsement key; install vtpmd again"
        )


# What becomes of NV indices.


def _index(before: Node, entry: Node) -> Item:
    size = counted(entry.number("public", "data-size") or 0, "byte")
    what = f"NV index {entry.name}, {size}"
    return Item(_kind_of(before, entry), what, entry.name)


def _kind_of(before: Node, entry: Node) -> Kind:
    handle = entry.number("public", "index") or 0
    bound = next((kind for kind, handles in _BOUND.items() if handle in handles), None)
    if bound is not None:
        return bound
    if _is_certificate_of_its_key(before, entry):
        return Kind.KEY_CERTIFICATE
    attributes = entry.number("public", "permission", "attributes") or 0
    is_guarded = attributes & OWNER_READ and any(_data(before).content("owner-auth"))
    return Kind.OWNER_GUARDED if is_guarded else Kind.ORDINARY


def _is_certificate_of_its_key(before: Node, entry: Node) -> bool:
    found = load(entry.content("data"))
    if found is None:
        return False
    return certified_key(found) in [pem_of_a_tpm_12(key) for _, key in _all_keys(before)]


# What becomes of all else.


def _register_and_counters(before: Node) -> Iterator[Item]:
    register = _data(before).content("auth-dir")
    if any(register):
        what = f"NV index {DATA_REGISTER:#010x}, the data integrity register, {len(register)} bytes"
        yield Item(Kind.DATA_REGISTER, what, f"{DATA_REGISTER:#010x}")
    for counter in _data(before, "counters").children:
        if counter.at("valid"):
            handle = f"{int(counter.name):#010x}"
            what = f"monotonic counter {handle}, label {counter.content('label').hex()}"
            yield Item(Kind.MONOTONIC_COUNTER, what, handle)


def _flags(before: Node, fresh: Node) -> Iterator[Item]:
    old, new = (_part(root, "permanent-flags", "flags").meaning.split() for root in (before, fresh))
    kept = [name for name in old if name in PLATFORM_FLAGS]
    yield Item(Kind.PLATFORM_FLAGS, f"flags of the platform, {' '.join(kept) or 'none'}")
    others = [
        name
        for name in PERMANENT_FLAGS.values()
        if name not in PLATFORM_FLAGS and (name in old) != (name in new)
    ]
    if others:
        yield Item(Kind.OTHER_FLAGS, f"other flags, {' '.join(others)}")


def _keys(before: Node) -> Iterator[Item]:
    kinds = {
        EK: (Kind.ENDORSEMENT_KEY, "the endorsement key"),
        SRK: (Kind.STORAGE_ROOT_KEY, "the storage root key"),
    }
    for handle, key in _all_keys(before):
        kind, what = kinds.get(handle, (Kind.OWNER_EVICT_KEY, f"key {handle:#010x}"))
        size = f"{key.words('parameters', 'algorithm')} {key.number('parameters', 'key-bits')}"
        yield Item(kind, f"{what}, {size}", f"{handle:#010x}")


def _all_keys(root: Node) -> Iterator[tuple[int, Node]]:
    """Yield the keys that there are, with their handles: the maker's, and the owner's."""
    for handle, name in ((EK, "endorsement-key"), (SRK, "srk")):
        key = _data(root, name)
        if key.content("public-key"):
            yield handle, key
    for entry in _part(root, "owner-evict-keys", "keys").children:
        yield entry.number("handle") or 0, part(entry, "key")


# The new state.


def _pieces(old: bytes, before: Node, fresh: Node, kept: list[Node]) -> Iterator[Piece]:
    """Yield what the new TPM's state gets of the old one's."""
    for name in KEPT:
        yield Piece(_data(fresh, name), bytes_of(old, _data(before, name)))
    flags = [_part(root, "permanent-flags", "flags") for root in (before, fresh)]
    theirs, ours = (each.number() or 0 for each in flags)
    number = theirs & _PLATFORM_MASK | ours & ~_PLATFORM_MASK
    yield Piece(flags[1], number.to_bytes(NUMBER_BYTES, "big"))
    # In the format of the old ones, which is that of its first field.
    format_ = bytes_of(old, _part(before, "nv", "tag"))
    count = len(kept).to_bytes(NUMBER_BYTES, "big")
    entries = b"".join(bytes_of(old, entry) for entry in kept)
    yield Piece(_part(fresh, "nv"), format_ + count + entries)


def _data(root: Node, *path: str) -> Node:
    return _part(root, "permanent-data", *path)


def _part(root: Node, *path: str) -> Node:
    return part(root, "permanent-all", *path)
