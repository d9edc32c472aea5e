"""The guests that lie in a qcow2 image: what QEMU's savevm keeps, with the vTPM's state.

QEMU's docs/interop/qcow2.rst; numbers are big-endian. A snapshot has a table of its own, which maps
the disk as it was then, and behind that the guest's state, which is a migration stream.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import Final, NamedTuple

MAGIC: Final = b"QFI\xfb"
VERSIONS: Final = (2, 3)
# magic, version, backing file, its length, cluster bits, disk size, encryption, L1 entries, L1
# table, refcount table, its clusters, snapshots, their table
HEADER: Final = Struct(">4sIQIIQIIQQIIQ")
FEATURES: Final = Struct(">Q")  # of version 3: the incompatible ones
EXTENDED_ENTRIES: Final = 1 << 4
UNKNOWN_FEATURES: Final = ~(1 << 0 | 1 << 1 | 1 << 3 | EXTENDED_ENTRIES)  # dirty, corrupt, zstd
# L1 table, its entries, lengths of id and name, s, ns, clock, bytes of the state, of what follows
SNAPSHOT: Final = Struct(">QIHHIIQII")
EXTRA: Final = Struct(">QQ")  # bytes of the state, of the disk
EXTRA_BYTES_MAX: Final = 1024
ALIGNMENT: Final = 8
CLUSTER_BITS: Final = range(9, 22)
SNAPSHOTS_MAX: Final = 4096
ENTRY: Final = Struct(">Q")
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
COMPRESSED: Final = 1 << 62  # QEMU writes no state so
ALL_ZEROS: Final = 1 << 0
# From the end of a state: its devices are there, behind the guest's memory.
WINDOW_BYTES_MAX: Final = 32 << 20


class Qcow2Error(Exception):
    """An image is not as it has to be, or of a kind that is not read."""


class Snapshot(NamedTuple):
    """A guest that was saved into an image."""

    name: str
    state_bytes: int
    disk_bytes: int
    table_offset: int  # of its L1 table
    table_entries: int


class Image:
    """A qcow2 image that is read. Raises Qcow2Error or OSError for what is wrong with it."""

    def __init__(self, fd: int) -> None:
        """Read its header."""
        self._fd = fd
        fields = HEADER.unpack(self._read(0, HEADER.size))
        version, self._cluster_bits, encryption = fields[1], fields[4], fields[6]
        self._disk_bytes, (count, self._snapshots_at) = fields[5], fields[11:13]
        features = 0
        if version >= 3:
            (features,) = FEATURES.unpack(self._read(HEADER.size, FEATURES.size))
        if version not in VERSIONS or features & UNKNOWN_FEATURES or encryption:
            raise Qcow2Error("it is of a version or with features that are not read")
        if self._cluster_bits not in CLUSTER_BITS or count > SNAPSHOTS_MAX:
            raise Qcow2Error("its header is damaged")
        self._count = count
        self._entry_bytes = 16 if features & EXTENDED_ENTRIES else 8
        # How many bits of an address one table of the second level has.
        self._table_bits = 2 * self._cluster_bits - (4 if features & EXTENDED_ENTRIES else 3)

    def snapshots(self) -> list[Snapshot]:
        """Return the snapshots that have a guest's state, in the order in which they were made."""
        found, at = [], self._snapshots_at
        for _ in range(self._count):
            snapshot, at = self._snapshot(at)
            if snapshot.state_bytes:
                found.append(snapshot)
        return found

    def _snapshot(self, at: int) -> tuple[Snapshot, int]:
        """Return the snapshot at an offset, and where the next one is."""
        fields = SNAPSHOT.unpack(self._read(at, SNAPSHOT.size))
        table, entries, id_bytes, name_bytes, *_, state_bytes, extra_bytes = fields
        if extra_bytes > EXTRA_BYTES_MAX:
            raise Qcow2Error("a snapshot in it is damaged")
        rest = self._read(at + SNAPSHOT.size, extra_bytes + id_bytes + name_bytes)
        disk_bytes = self._disk_bytes
        if extra_bytes >= EXTRA.size:
            large, disk_bytes = EXTRA.unpack_from(rest)
            state_bytes = large or state_bytes
        name = rest[extra_bytes + id_bytes :].decode("utf-8", "replace")
        end = at + SNAPSHOT.size + len(rest)
        found = Snapshot(name, state_bytes, disk_bytes, table, entries)
        return found, -(-end // ALIGNMENT) * ALIGNMENT

    def end_of_state(self, snapshot: Snapshot) -> bytes:
        """Return what a saved guest's state ends with."""
        table = 1 << self._table_bits
        begin = -(-snapshot.disk_bytes // table) * table
        at = max(snapshot.state_bytes - WINDOW_BYTES_MAX, 0)
        pieces, cluster = [], 1 << self._cluster_bits
        while at < snapshot.state_bytes:
            address = begin + at
            n_bytes = min(cluster - address % cluster, snapshot.state_bytes - at)
            pieces.append(self._mapped(snapshot, address, n_bytes))
            at += n_bytes
        return b"".join(pieces)

    def _mapped(self, snapshot: Snapshot, address: int, n_bytes: int) -> bytes:
        """Return bytes of one cluster of what a snapshot maps."""
        number = address >> self._table_bits
        if number >= snapshot.table_entries:
            raise Qcow2Error("a snapshot's state is not all there")
        second = self._entry(snapshot.table_offset + number * ENTRY.size) & OFFSET_MASK
        in_table = (address & ((1 << self._table_bits) - 1)) >> self._cluster_bits
        entry = self._entry(second + in_table * self._entry_bytes) if second else 0
        if entry & COMPRESSED:
            raise Qcow2Error("a snapshot's state is compressed")
        place = entry & OFFSET_MASK
        if not place or entry & ALL_ZEROS:
            return bytes(n_bytes)
        return self._read(place + address % (1 << self._cluster_bits), n_bytes)

    def _entry(self, offset: int) -> int:
        (entry,) = ENTRY.unpack(self._read(offset, ENTRY.size))
        return int(entry)

    def _read(self, offset: int, n_bytes: int) -> bytes:
        try:
            found = os.pread(self._fd, n_bytes, offset)
        except (OverflowError, OSError) as error:
            raise Qcow2Error(f"it cannot be read at byte {offset}") from error
        if len(found) < n_bytes:
            raise Qcow2Error(f"it ends before byte {offset + n_bytes}")
        return found
