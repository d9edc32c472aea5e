"""TPM_HANDLE: the permanent handles by name, and the ranges (TPM 2.0 Library, part 2)."""

from __future__ import annotations

from typing import Final

PERMANENT_HANDLES: Final = {
    0x4000_0000: "SRK",
    0x4000_0001: "owner",
    0x4000_0002: "revoke",
    0x4000_0003: "transport",
    0x4000_0004: "operator",
    0x4000_0005: "admin",
    0x4000_0006: "EK",
    0x4000_0007: "null",
    0x4000_0008: "unassigned",
    0x4000_0009: "password",
    0x4000_000A: "lockout",
    0x4000_000B: "endorsement",
    0x4000_000C: "platform",
    0x4000_000D: "platform-nv",
}
# TPM_HT, the highest byte.
HANDLE_TYPES: Final = {
    0x00: "PCR",
    0x01: "NV index",
    0x02: "HMAC session",
    0x03: "policy session",
    0x40: "permanent",
    0x80: "transient object",
    0x81: "persistent object",
    0x90: "attached component",
}
HANDLE_TYPE_SHIFT: Final = 24

HT_PCR: Final = 0x00
HT_NV_INDEX: Final = 0x01
HT_PERSISTENT: Final = 0x81
UNASSIGNED: Final = 0x4000_0008
OWNER: Final = 0x4000_0001
