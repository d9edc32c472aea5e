"""The sections of libtpms' states: what they begin with, and their fields. Tables alone.

Source: libtpms' NVMarshal.c, from 0.6 to after 0.10. What depends on a version or a value of the
state is in the code that reads these. Version: the latest that is known.
"""

from __future__ import annotations

from typing import Final

from vtpmd.inspect.primitives import Fields
from vtpmd.inspect.reader import Section

NV_INDEX: Final = Section("NV_INDEX", 0x2547265A, 2)
DRBG_STATE: Final = Section("DRBG_STATE", 0x6FE83EA1, 2)
PCR_POLICY: Final = Section("PCR_POLICY", 0x176BE626, 2)
ORDERLY_DATA: Final = Section("ORDERLY_DATA", 0x56657887, 2)
PCR_SAVE: Final = Section("PCR_SAVE", 0x7372EABC, 2)
PCR: Final = Section("PCR", 0xE95F0387, 2)
PCR_AUTHVALUE: Final = Section("PCR_AUTHVALUE", 0x6BE82EAF, 2)
STATE_CLEAR_DATA: Final = Section("STATE_CLEAR_DATA", 0x98897667, 2)
STATE_RESET_DATA: Final = Section("STATE_RESET_DATA", 0x01102332, 4)
PRIME: Final = Section("BN_PRIME_T", 0x2FE736AB, 2)
PRIVATE_EXPONENT: Final = Section("PRIVATE_EXPONENT_T", 0x0854EAB2, 2)
ANY_HASH_STATE: Final = Section("ANY_HASH_STATE", 0x349D494B, 2)
HASH_STATE: Final = Section("HASH_STATE", 0x562878A2, 2)
HASH_OBJECT: Final = Section("HASH_OBJECT", 0xB874FE38, 3)
OBJECT: Final = Section("OBJECT", 0x75BE73AF, 4)
ANY_OBJECT: Final = Section("ANY_OBJECT", 0xFE9A3974, 2)
SESSION: Final = Section("SESSION", 0x44BE9F45, 2)
SESSION_SLOT: Final = Section("SESSION_SLOT", 0x3664AEBC, 2)
VOLATILE_STATE: Final = Section("VOLATILE_STATE", 0x45637889, 4)
PA_COMPILE_CONSTANTS: Final = Section("PA_COMPILE_CONSTANTS", 0xC9EA6431, 3)
PERSISTENT_DATA: Final = Section("PERSISTENT_DATA", 0x12213443, 5)
INDEX_ORDERLY_RAM: Final = Section("INDEX_ORDERLY_RAM", 0x5346FEAB, 2)
USER_NVRAM: Final = Section("USER_NVRAM", 0x094F22C3, 2)
PERSISTENT_ALL: Final = Section("PERSISTENT_ALL", 0xAB364723, 4)

# The digests that a hash sequence computes, by algorithm: their state's section, the bytes of one
# of its numbers, and how many there are.
HASH_STATES: Final = {
    0x0004: (Section("tpmHashStateSHA1", 0x19D46F50, 2), 4, 5),
    0x000B: (Section("tpmHashStateSHA256", 0x6EA059D0, 2), 4, 8),
    0x000C: (Section("tpmHashStateSHA384", 0x14814B08, 2), 8, 8),
    0x000D: (Section("tpmHashStateSHA512", 0x269E8AE0, 2), 8, 8),
}

PERSISTENT_DATA_HEAD: Final[Fields] = (
    ("disable-clear", "BOOL"),
    ("owner-policy-algorithm", "TPM_ALG_ID"),
    ("endorsement-policy-algorithm", "TPM_ALG_ID"),
    ("lockout-policy-algorithm", "TPM_ALG_ID"),
    ("owner-policy", "TPM2B_DIGEST"),
    ("endorsement-policy", "TPM2B_DIGEST"),
    ("lockout-policy", "TPM2B_DIGEST"),
    ("owner-auth", "TPM2B_AUTH"),
    ("endorsement-auth", "TPM2B_AUTH"),
    ("lockout-auth", "TPM2B_AUTH"),
    ("endorsement-seed", "TPM2B_SEED"),
    ("owner-seed", "TPM2B_SEED"),
    ("platform-seed", "TPM2B_SEED"),
    ("platform-proof", "TPM2B_PROOF"),
    ("owner-proof", "TPM2B_PROOF"),
    ("endorsement-proof", "TPM2B_PROOF"),
    ("total-reset-count", "UINT64"),
    ("reset-count", "UINT32"),
)
PERSISTENT_DATA_LOCKOUT: Final[Fields] = (
    ("failed-tries", "UINT32"),
    ("tries-max", "UINT32"),
    ("recovery-time-s", "UINT32"),
    ("lockout-recovery-s", "UINT32"),
    ("lockout-auth-enabled", "BOOL"),
)
PERSISTENT_DATA_AUDIT: Final[Fields] = (
    ("audit-algorithm", "TPM_ALG_ID"),
    ("audit-counter", "UINT64"),
    ("algorithm-set", "UINT32"),
    ("firmware-version-1", "UINT32"),
    ("firmware-version-2", "UINT32"),
)
SEED_LEVELS: Final[Fields] = (
    ("endorsement-seed-level", "SEED_COMPAT_LEVEL"),
    ("owner-seed-level", "SEED_COMPAT_LEVEL"),
    ("platform-seed-level", "SEED_COMPAT_LEVEL"),
)
SELF_HEAL_TIMERS: Final[Fields] = (
    ("self-heal-timer-ms", "UINT64"),
    ("lockout-timer-ms", "UINT64"),
    ("time-ms", "UINT64"),
)
STATE_CLEAR_HEAD: Final[Fields] = (
    ("owner-enabled", "BOOL"),
    ("endorsement-enabled", "BOOL"),
    ("platform-nv-enabled", "BOOL"),
    ("platform-policy-algorithm", "TPM_ALG_ID"),
    ("platform-policy", "TPM2B_DIGEST"),
    ("platform-auth", "TPM2B_AUTH"),
)
STATE_RESET_HEAD: Final[Fields] = (
    ("null-proof", "TPM2B_PROOF"),
    ("null-seed", "TPM2B_SEED"),
    ("clear-count", "UINT32"),
    ("object-context-id", "UINT64"),
)
STATE_RESET_COUNTS: Final[Fields] = (
    ("context-counter", "UINT64"),
    ("command-audit-digest", "TPM2B_DIGEST"),
    ("restart-count", "UINT32"),
    ("pcr-counter", "UINT32"),
)
COMMIT: Final[Fields] = (
    ("commit-counter", "UINT64"),
    ("commit-nonce", "TPM2B_AUTH"),
)
OBJECT_PUBLIC_HEAD: Final[Fields] = (
    ("name-algorithm", "TPM_ALG_ID"),
    ("attributes", "TPMA_OBJECT"),
    ("auth-policy", "TPM2B_DIGEST"),
)
NV_PUBLIC: Final[Fields] = (
    ("index", "TPM_HANDLE"),
    ("name-algorithm", "TPM_ALG_ID"),
    ("attributes", "TPMA_NV"),
    ("auth-policy", "TPM2B_DIGEST"),
    ("data-size", "UINT16"),
)
OBJECT_NAMES: Final[Fields] = (
    ("qualified-name", "TPM2B_NAME"),
    ("evict-handle", "TPM_HANDLE"),
    ("name", "TPM2B_NAME"),
)
SENSITIVE: Final[Fields] = (
    ("auth", "TPM2B_AUTH"),
    ("seed", "TPM2B_SEED"),
)
HASH_OBJECT_HEAD: Final[Fields] = (
    ("type", "TPM_ALG_ID"),
    ("name-algorithm", "TPM_ALG_ID"),
    ("attributes", "TPMA_OBJECT"),
    ("auth", "TPM2B_AUTH"),
)
SESSION_HEAD: Final[Fields] = (
    ("attributes", "SESSION_ATTRIBUTES"),
    ("pcr-counter", "UINT32"),
    ("start-time-ms", "UINT64"),
    ("timeout-ms", "UINT64"),
)
SESSION_COMMAND: Final[Fields] = (
    ("command", "TPM_CC"),
    ("hash-algorithm", "TPM_ALG_ID"),
    ("locality", "TPMA_LOCALITY"),
)
SESSION_KEYS: Final[Fields] = (
    ("key", "TPM2B_AUTH"),
    ("tpm-nonce", "TPM2B_NONCE"),
    ("bound-or-hash", "SESSION_U1"),
    ("digest", "SESSION_U2"),
)
VOLATILE_HEAD: Final[Fields] = (
    ("exclusive-audit-session", "TPM_HANDLE"),
    ("time-ms", "UINT64"),
    ("platform-enabled", "BOOL"),
    ("pcr-reconfigured", "BOOL"),
    ("drtm-handle", "TPM_HANDLE"),
    ("drtm-before-startup", "BOOL"),
    ("startup-at-locality-3", "BOOL"),
)
VOLATILE_POWER: Final[Fields] = (
    ("power-was-lost", "BOOL"),
    ("orderly-state-before", "TPM_SU"),
    ("nv-is-usable", "BOOL"),
    ("platform-unique", "TPM2B_AUTH"),
)
VOLATILE_STARTED: Final[Fields] = (
    ("manufactured", "BOOL"),
    ("initialized", "BOOL"),
)
COMMAND_SESSION: Final[Fields] = (
    ("handle", "TPM_HANDLE"),
    ("attributes", "TPMA_SESSION"),
    ("associated-handle", "TPM_HANDLE"),
    ("caller-nonce", "TPM2B_NONCE"),
    ("auth", "TPM2B_AUTH"),
)
COMMAND_SESSION_INDICES: Final[Fields] = (
    ("encrypt-session", "TPM_HANDLE"),
    ("decrypt-session", "TPM_HANDLE"),
    ("audit-session", "TPM_HANDLE"),
)
SESSION_ARRAY_TAIL: Final[Fields] = (
    ("oldest-saved-session", "UINT32"),
    ("free-session-slots", "UINT32"),
)
FAILURE_FLAGS: Final[Fields] = (
    ("in-failure-mode", "BOOL"),
    ("established", "BOOL"),
)
FAILURE: Final[Fields] = (
    ("function", "UINT32"),
    ("line", "UINT32"),
    ("code", "UINT32"),
)
REAL_TIME: Final[Fields] = (
    ("real-time-before-ms", "UINT64"),
    ("tpm-time-ms", "UINT64"),
)
CLOCK_RATE: Final[Fields] = (
    ("timer-reset", "BOOL"),
    ("timer-stopped", "BOOL"),
    ("adjust-rate", "UINT32"),
    ("saved-at-ms", "UINT64"),
)
SEEDS: Final[Fields] = (
    ("endorsement-seed", "TPM2B_SEED"),
    ("owner-seed", "TPM2B_SEED"),
    ("platform-seed", "TPM2B_SEED"),
)
SUSPENSION: Final[Fields] = (
    ("host-monotonic-ms", "UINT64"),
    ("suspended-ms", "UINT64"),
    ("last-system-time-ms", "UINT64"),
    ("last-reported-time-ms", "UINT64"),
)
