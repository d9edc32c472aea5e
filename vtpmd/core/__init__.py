"""The C core for Python: the only importer of ``vtpmd._core``.

Ownership: a ``Store`` has C memory, which goes with ``close()``, with its ``with`` block, or with
the object. All else copies what it is given and returns Python objects. Buffers that state or
records went through are overwritten.

A start needs nothing of delta records, and not all of the engine link: that is imported from
``vtpmd.core.delta`` and ``vtpmd.core.link``.

Threads: all functions may be called from any thread, a ``Store`` by one at a time.
"""

from vtpmd.core.boot import (
    LINK_HEADER_BYTES,
    LINK_PAYLOAD_BYTES_MAX,
    LinkDescriptor,
    LinkHeader,
    LinkKey,
    LinkNames,
    LinkOperation,
    pack_link_anchor,
    pack_link_header,
    pack_link_journal,
    pack_link_serving,
    unpack_link_header,
)
from vtpmd.core.image import (
    DIGEST_BYTES,
    GENERATION_MAX,
    IMAGE_BYTES_MAX,
    IMAGE_TYPES,
    PAGE_BYTES,
    Image,
)
from vtpmd.core.journal import (
    JOURNAL_BYTES_MAX,
    JOURNAL_IDENTITY_BYTES,
    JOURNAL_SECRET_BYTES,
    JOURNAL_SECTOR_BYTES,
    JournalFault,
    Recovery,
    Step,
    journal_base,
    journal_recover,
)
from vtpmd.core.memory import (
    forbid_core_dumps,
)
from vtpmd.core.store import (
    Store,
    StoreBusyError,
    StoreChanges,
    StoreDamagedError,
    StoreError,
    StoreRange,
)

__all__ = [
    "DIGEST_BYTES",
    "GENERATION_MAX",
    "IMAGE_BYTES_MAX",
    "IMAGE_TYPES",
    "JOURNAL_BYTES_MAX",
    "JOURNAL_IDENTITY_BYTES",
    "JOURNAL_SECRET_BYTES",
    "JOURNAL_SECTOR_BYTES",
    "LINK_HEADER_BYTES",
    "LINK_PAYLOAD_BYTES_MAX",
    "PAGE_BYTES",
    "Image",
    "JournalFault",
    "LinkDescriptor",
    "LinkHeader",
    "LinkKey",
    "LinkNames",
    "LinkOperation",
    "Recovery",
    "Step",
    "Store",
    "StoreBusyError",
    "StoreChanges",
    "StoreDamagedError",
    "StoreError",
    "StoreRange",
    "forbid_core_dumps",
    "journal_base",
    "journal_recover",
    "pack_link_anchor",
    "pack_link_header",
    "pack_link_journal",
    "pack_link_serving",
    "unpack_link_header",
]
