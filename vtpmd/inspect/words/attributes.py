"""Words for single bits, and for fields of several: TPMA_… of the specification, libtpms' own."""

from __future__ import annotations

from typing import Final

# TPMA_OBJECT (TPM 2.0 Library, part 2).
OBJECT: Final = {
    1: "fixedTPM",
    2: "stClear",
    4: "fixedParent",
    5: "sensitiveDataOrigin",
    6: "userWithAuth",
    7: "adminWithPolicy",
    8: "firmwareLimited",
    9: "svnLimited",
    10: "noDA",
    11: "encryptedDuplication",
    16: "restricted",
    17: "decrypt",
    18: "sign",
    19: "x509sign",
}
# TPMA_NV: bits 4 to 7 are a type.
NV: Final = {
    0: "PPWRITE",
    1: "OWNERWRITE",
    2: "AUTHWRITE",
    3: "POLICYWRITE",
    10: "POLICY_DELETE",
    11: "WRITELOCKED",
    12: "WRITEALL",
    13: "WRITEDEFINE",
    14: "WRITE_STCLEAR",
    15: "GLOBALLOCK",
    16: "PPREAD",
    17: "OWNERREAD",
    18: "AUTHREAD",
    19: "POLICYREAD",
    25: "NO_DA",
    26: "ORDERLY",
    27: "CLEAR_STCLEAR",
    28: "READLOCKED",
    29: "WRITTEN",
    30: "PLATFORMCREATE",
    31: "READ_STCLEAR",
}
NV_TYPE_SHIFT: Final = 4
NV_TYPE_MASK: Final = 0xF
# TPM_NT.
NV_TYPES: Final = {
    0x0: "ordinary",
    0x1: "counter",
    0x2: "bits",
    0x4: "extend",
    0x8: "pin-fail",
    0x9: "pin-pass",
}
# TPMA_SESSION.
SESSION: Final = {
    0: "continueSession",
    1: "auditExclusive",
    2: "auditReset",
    5: "decrypt",
    6: "encrypt",
    7: "audit",
}
# libtpms' OBJECT_ATTRIBUTES (Global.h), from its lowest bit on.
OBJECT_SLOT: Final = {
    0: "publicOnly",
    1: "epsHierarchy",
    2: "ppsHierarchy",
    3: "spsHierarchy",
    4: "evict",
    5: "primary",
    6: "temporary",
    7: "stClear",
    8: "hmacSeq",
    9: "hashSeq",
    10: "eventSeq",
    11: "ticketSafe",
    12: "firstBlock",
    13: "isParent",
    14: "privateExp",
    15: "occupied",
    16: "derivation",
    17: "external",
}
# libtpms' SESSION_ATTRIBUTES (Global.h), from its lowest bit on.
SESSION_STATE: Final = {
    0: "isPolicy",
    1: "isAudit",
    2: "isBound",
    3: "isCpHashDefined",
    4: "isAuthValueNeeded",
    5: "isPasswordNeeded",
    6: "isPPRequired",
    7: "isTrialPolicy",
    8: "isDaBound",
    9: "isLockoutBound",
    10: "includeAuth",
    11: "checkNvWritten",
    12: "nvWrittenState",
    13: "isTemplateHashDefined",
    14: "isNameHashDefined",
    15: "isParametersHashDefined",
    16: "checkSecureChannel",
    17: "checkReqKey",
    18: "checkTpmKey",
}
# TPMA_LOCALITY, as far as a session can have it.
LOCALITY: Final = {0: "zero", 1: "one", 2: "two", 3: "three", 4: "four"}
