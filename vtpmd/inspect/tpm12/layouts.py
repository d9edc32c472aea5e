"""The structures of a TPM 1.2's states: the tags that they begin with, and their fields. Tables.

Source: TPM Main, part 2, and libtpms' tpm12/, the functions whose names end with ``_Store``. What
depends on a value of the state is in the code that reads these.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from vtpmd.inspect.primitives import Fields


class Tag(NamedTuple):
    """What a structure begins with: one of these numbers, the latest last."""

    type: str
    numbers: tuple[int, ...]
    is_version: bool = False  # of libtpms' own: a number above them is a later libtpms'


# TPM_STRUCTURE_TAG, of the specification's structures.
COUNTER_VALUE: Final = Tag("TPM_COUNTER_VALUE", (0x000E,))
CURRENT_TICKS: Final = Tag("TPM_CURRENT_TICKS", (0x0014,))
NV_ATTRIBUTES: Final = Tag("TPM_NV_ATTRIBUTES", (0x0017,))
NV_DATA_PUBLIC: Final = Tag("TPM_NV_DATA_PUBLIC", (0x0018,))
NV_DATA_SENSITIVE: Final = Tag("TPM_NV_DATA_SENSITIVE", (0x0019,))
PCR_INFO_LONG: Final = Tag("TPM_PCR_INFO_LONG", (0x0006,))
DELEGATIONS: Final = Tag("TPM_DELEGATIONS", (0x001A,))
DELEGATE_PUBLIC: Final = Tag("TPM_DELEGATE_PUBLIC", (0x001B,))
DELEGATE_ROW: Final = Tag("TPM_DELEGATE_TABLE_ROW", (0x001C,))
TRANSPORT_INTERNAL: Final = Tag("TPM_TRANSPORT_INTERNAL", (0x000F,))
TRANSPORT_PUBLIC: Final = Tag("TPM_TRANSPORT_PUBLIC", (0x001E,))
KEY12: Final = Tag("TPM_KEY12", (0x0028,))
DAA_CONTEXT: Final = Tag("TPM_DAA_CONTEXT", (0x002D,))
DAA_ISSUER: Final = Tag("TPM_DAA_ISSUER", (0x002F,))
DAA_TPM: Final = Tag("TPM_DAA_TPM", (0x0032,))
STCLEAR_FLAGS: Final = Tag("TPM_STCLEAR_FLAGS", (0x0020,))
STANY_FLAGS: Final = Tag("TPM_STANY_FLAGS", (0x0021,))
PERMANENT_DATA: Final = Tag("TPM_PERMANENT_DATA", (0x0022,))
# Of the first one some libtpms have written a response behind it.
STCLEAR_DATA: Final = Tag("TPM_STCLEAR_DATA", (0x0023, 0x0024))
STCLEAR_WITH_RESPONSE: Final = 0x0023
STANY_DATA: Final = Tag("TPM_STANY_DATA", (0x0024,))

# libtpms' own.
PERMANENT_ALL: Final = Tag("PERMANENT_ALL", (1,), is_version=True)
PERMANENT_FLAGS: Final = Tag("TPM_PERMANENT_FLAGS", (1, 2), is_version=True)
OWNER_EVICT_KEYS: Final = Tag("OWNER_EVICT_KEYS", (1,), is_version=True)
NV_ENTRIES: Final = Tag("NV_INDEX_ENTRIES", (1, 2), is_version=True)
NV_WITHOUT_UNUSED_DIGESTS: Final = 2  # from this one on
VOLATILE_ALL: Final = Tag("VOLATILE_ALL", (1,), is_version=True)
PARAMETERS: Final = Tag("TPM_PARAMETERS", (1,), is_version=True)
STCLEAR_FLAGS_VERSION: Final = Tag("STCLEAR_FLAGS_VERSION", (1,), is_version=True)
KEY_ENTRIES: Final = Tag("KEY_HANDLE_ENTRIES", (1,), is_version=True)
SHA1_CONTEXT: Final = Tag("SHA1_CONTEXT", (1,), is_version=True)
NV_LOCKS: Final = Tag("NV_INDEX_ENTRIES_VOLATILE", (1,), is_version=True)

PERMANENT_DATA_HEAD: Final[Fields] = (
    ("tpm-proof", "TPM_SECRET"),
    ("ek-reset", "TPM_EK_RESET"),
    ("owner-auth", "TPM_SECRET"),
    ("operator-auth", "TPM_SECRET"),
    ("auth-dir", "TPM_DIGEST"),
)
PERMANENT_DATA_TAIL: Final[Fields] = (
    ("last-family-id", "UINT32"),
    ("no-owner-nv-writes", "UINT32"),
    ("restrict-delegate", "UINT32"),
    ("daa-seed", "TPM_SECRET"),
    ("owner-installed", "BOOL"),
    ("tsc-audit-status", "UINT8"),
    ("allow-load-maintenance-key", "BOOL"),
    ("daa-proof", "TPM_SECRET"),
)
SYMMETRIC_KEY: Final[Fields] = (
    ("tag", "UINT16"),
    ("valid", "BOOL"),
    ("fill", "UINT8"),
    ("key", "AES_KEY"),
)
COUNTER: Final[Fields] = (
    ("label", "TPM_COUNTER_LABEL"),
    ("counter", "UINT32"),
    ("auth", "TPM_SECRET"),
    ("valid", "BOOL"),
)
FAMILY: Final[Fields] = (
    ("label", "UINT8"),
    ("family-id", "UINT32"),
    ("verification-count", "UINT32"),
    ("flags", "TPM_FAMILY_FLAGS"),
    ("valid", "BOOL"),
)
DELEGATIONS_FIELDS: Final[Fields] = (
    ("type", "UINT32"),
    ("per-1", "UINT32"),
    ("per-2", "UINT32"),
)
DELEGATE_PUBLIC_TAIL: Final[Fields] = (
    ("family-id", "UINT32"),
    ("verification-count", "UINT32"),
)
DELEGATE_ROW_TAIL: Final[Fields] = (("auth", "TPM_SECRET"), ("valid", "BOOL"))
KEY_HEAD: Final[Fields] = (
    ("usage", "TPM_KEY_USAGE"),
    ("flags", "TPM_KEY_FLAGS"),
    ("auth-usage", "TPM_AUTH_DATA_USAGE"),
)
KEY_PARAMETERS_HEAD: Final[Fields] = (
    ("algorithm", "TPM_ALGORITHM_ID"),
    ("encryption-scheme", "TPM_ENC_SCHEME"),
    ("signature-scheme", "TPM_SIG_SCHEME"),
)
RSA_PARAMETERS: Final[Fields] = (
    ("key-bits", "UINT32"),
    ("primes", "UINT32"),
    ("exponent", "SIZED_BUFFER"),
)
# Of a key that is not the endorsement key.
PRIVATE_HEAD: Final[Fields] = (
    ("payload", "TPM_PAYLOAD_TYPE"),
    ("usage-auth", "TPM_SECRET"),
    ("migration-auth", "TPM_SECRET"),
)
PRIVATE_TAIL: Final[Fields] = (
    ("public-data-digest", "TPM_DIGEST"),
    ("private-key", "SECRET_SIZED_BUFFER"),
)
KEY_ENTRY_TAIL: Final[Fields] = (
    ("parent-pcr-status", "BOOL"),
    ("control", "TPM_KEY_CONTROL"),
)
PCR_INFO: Final[Fields] = (
    ("selection", "TPM_PCR_SELECTION"),
    ("digest-at-release", "TPM_DIGEST"),
    ("digest-at-creation", "TPM_DIGEST"),
)
PCR_INFO_LONG_FIELDS: Final[Fields] = (
    ("locality-at-creation", "TPM_LOCALITY_SELECTION"),
    ("locality-at-release", "TPM_LOCALITY_SELECTION"),
    ("selection-at-creation", "TPM_PCR_SELECTION"),
    ("selection-at-release", "TPM_PCR_SELECTION"),
    ("digest-at-creation", "TPM_DIGEST"),
    ("digest-at-release", "TPM_DIGEST"),
)
NV_PUBLIC_TAIL: Final[Fields] = (
    ("read-locked", "BOOL"),
    ("write-locked", "BOOL"),
    ("write-defined", "BOOL"),
)
NV_LOCK: Final[Fields] = (("read-locked", "BOOL"), ("write-locked", "BOOL"))
PARAMETERS_FIELDS: Final[Fields] = (
    ("major", "UINT8"),
    ("minor", "UINT8"),
    ("pc-client", "UINT16"),
    ("pcrs", "UINT16"),
    ("rsa-key-bits-max", "UINT16"),
    ("key-handles", "UINT16"),
    ("owner-evict-keys", "UINT16"),
    ("families", "UINT16"),
    ("delegations", "UINT16"),
    ("authorisation-sessions", "UINT16"),
    ("transport-sessions", "UINT16"),
    ("daa-sessions", "UINT16"),
    ("counters", "UINT16"),
    ("saved-sessions", "UINT16"),
    ("nv-bytes-max", "UINT32"),
)
STCLEAR_FLAGS_FIELDS: Final[Fields] = (
    ("deactivated", "BOOL"),
    ("disable-force-clear", "BOOL"),
    ("physical-presence", "BOOL"),
    ("physical-presence-lock", "BOOL"),
    ("global-lock", "BOOL"),
)
STANY_FLAGS_FIELDS: Final[Fields] = (
    ("post-initialise", "BOOL"),
    ("locality-modifier", "UINT32"),
    ("transport-exclusive", "UINT32"),
    ("tos-present", "BOOL"),
    ("state-saved", "BOOL"),
)
STCLEAR_DATA_HEAD: Final[Fields] = (
    ("context-nonce-key", "TPM_NONCE"),
    ("count-id", "UINT32"),
    ("owner-reference", "TPM12_HANDLE"),
    ("disable-reset-lock", "BOOL"),
)
STCLEAR_DATA_MIDDLE: Final[Fields] = (
    ("deferred-physical-presence", "UINT32"),
    ("auth-fail-count", "UINT32"),
    ("auth-fail-time", "UINT32"),
)
STCLEAR_DATA_TAIL: Final[Fields] = (
    ("context-nonce-session", "TPM_NONCE"),
    ("context-count", "UINT32"),
)
AUTH_SESSION: Final[Fields] = (
    ("handle", "TPM12_HANDLE"),
    ("protocol", "TPM_PROTOCOL_ID"),
    ("entity-type", "TPM_ENT_TYPE"),
    ("encryption", "UINT8"),
    ("nonce-even", "TPM_NONCE"),
    ("shared-secret", "TPM_SECRET"),
    ("entity-digest", "TPM_DIGEST"),
)
TRANSPORT_PUBLIC_FIELDS: Final[Fields] = (
    ("attributes", "TPM_TRANSPORT_ATTRIBUTES"),
    ("algorithm", "TPM_ALGORITHM_ID"),
    ("encryption-scheme", "TPM_ENC_SCHEME"),
)
TRANSPORT_TAIL: Final[Fields] = (
    ("handle", "TPM12_HANDLE"),
    ("nonce-even", "TPM_NONCE"),
    ("digest", "TPM_DIGEST"),
)
DAA_ISSUER_FIELDS: Final[Fields] = (
    *((f"digest-{name}", "TPM_DIGEST") for name in ("r0", "r1", "s0", "s1", "n", "gamma")),
    ("generic-q", "DAA_Q"),
)
DAA_TPM_FIELDS: Final[Fields] = (
    *((name, "TPM_DIGEST") for name in ("digest-issuer", "digest-v0", "digest-v1")),
    ("rekey", "TPM_SECRET"),
    ("count", "UINT32"),
)
DAA_CONTEXT_FIELDS: Final[Fields] = (
    ("digest-context", "TPM_DIGEST"),
    ("digest", "TPM_DIGEST"),
    ("context-seed", "TPM_SECRET"),
    ("scratch", "DAA_SCRATCH"),
    ("stage", "UINT8"),
    ("scratch-null", "BOOL"),
)
DAA_JOIN: Final[Fields] = (
    ("u0", "DAA_U0"),
    ("u1", "DAA_U1"),
    ("digest-n0", "TPM_DIGEST"),
)
TICKS: Final[Fields] = (
    ("ticks-us", "UINT64"),
    ("rate", "UINT16"),
    ("nonce", "TPM_NONCE"),
    ("initial-time-us", "UINT64"),
)
SHA1_CONTEXT_FIELDS: Final[Fields] = (
    ("value", "SHA1_VALUE"),
    ("bits-low", "UINT32"),
    ("bits-high", "UINT32"),
    ("buffer", "SHA1_BUFFER"),
    ("buffered", "UINT32"),
)
