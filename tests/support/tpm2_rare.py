"""TPM 2.0 commands that leave something in a TPM's state which the others of `tpm2` do not.

Numbers and layouts are the specification's, as there.
"""

import struct
from enum import IntEnum

from tests.support.tpm2 import Algorithm, Handle, command, password, pcr_selection, sized


class Code(IntEnum):
    """TPM_CC, those that are used here."""

    HIERARCHY_CONTROL = 0x121
    CLOCK_SET = 0x128
    HIERARCHY_CHANGE_AUTH = 0x129
    PCR_SET_AUTH_POLICY = 0x12C
    SET_PRIMARY_POLICY = 0x12E
    CREATE_PRIMARY = 0x131
    NV_SET_BITS = 0x135
    DEFINE_SPACE = 0x12A
    SET_COMMAND_CODE_AUDIT_STATUS = 0x140
    HMAC_START = 0x15B
    SEQUENCE_UPDATE = 0x15C
    CONTEXT_SAVE = 0x162
    LOAD_EXTERNAL = 0x167
    POLICY_COMMAND_CODE = 0x16C
    START_AUTH_SESSION = 0x176
    POLICY_PCR = 0x17F
    PCR_SET_AUTH_VALUE = 0x183
    HASH_SEQUENCE_START = 0x186
    COMMIT = 0x18B


class SessionType(IntEnum):
    """TPM_SE."""

    HMAC = 0
    POLICY = 1
    TRIAL = 3


AES, CFB, HMAC, KEYEDHASH, SYMCIPHER, ECDAA = 0x0006, 0x0043, 0x0005, 0x0008, 0x0025, 0x001A
SHA384, SHA512, SHA1, RSA, ECC, NULL = 0x000C, 0x000D, 0x0004, 0x0001, 0x0023, Algorithm.NULL
ENDORSEMENT = 0x4000_000B
# fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA
COMMON = 0x0000_0472
SIGN, DECRYPT, RESTRICTED = 1 << 18, 1 << 17, 1 << 16


def hierarchy_change_auth(hierarchy: int, new: bytes, old: bytes = b"") -> bytes:
    """Build TPM2_HierarchyChangeAuth."""
    return command(
        Code.HIERARCHY_CHANGE_AUTH,
        handles=[hierarchy],
        authorizations=[password(old)],
        parameters=sized(new),
    )


def set_primary_policy(hierarchy: int, policy: bytes, algorithm: int, auth: bytes = b"") -> bytes:
    """Build TPM2_SetPrimaryPolicy."""
    return command(
        Code.SET_PRIMARY_POLICY,
        handles=[hierarchy],
        authorizations=[password(auth)],
        parameters=sized(policy) + struct.pack(">H", algorithm),
    )


def hierarchy_control(enable: int, *, state: bool) -> bytes:
    """Build TPM2_HierarchyControl by the platform: of a hierarchy, on or off."""
    return command(
        Code.HIERARCHY_CONTROL,
        handles=[Handle.PLATFORM],
        authorizations=[password()],
        parameters=struct.pack(">IB", enable, state),
    )


def clock_set(time_ms: int, auth: bytes = b"") -> bytes:
    """Build TPM2_ClockSet by the owner."""
    return command(
        Code.CLOCK_SET,
        handles=[Handle.OWNER],
        authorizations=[password(auth)],
        parameters=struct.pack(">Q", time_ms),
    )


def audit_commands(algorithm: int, *codes: int, auth: bytes = b"") -> bytes:
    """Build TPM2_SetCommandCodeAuditStatus by the owner; it sets commands or the algorithm."""
    codes_set = struct.pack(f">I{len(codes)}I", len(codes), *codes)
    return command(
        Code.SET_COMMAND_CODE_AUDIT_STATUS,
        handles=[Handle.OWNER],
        authorizations=[password(auth)],
        parameters=struct.pack(">H", algorithm) + codes_set + struct.pack(">I", 0),
    )


def nv_define_with(
    index: int, size: int, attributes: int, *, policy: bytes = b"", auth: bytes = b"",
    owner: bytes = b"", algorithm: int = Algorithm.SHA256,
) -> bytes:  # fmt: skip
    """Build TPM2_NV_DefineSpace by the owner, of an index with a policy."""
    public = struct.pack(">IHI", index, algorithm, attributes) + sized(policy)
    public += struct.pack(">H", size)
    return command(
        Code.DEFINE_SPACE,
        handles=[Handle.OWNER],
        authorizations=[password(owner)],
        parameters=sized(auth) + sized(public),
    )


def nv_set_bits(index: int, bits: int) -> bytes:
    """Build TPM2_NV_SetBits with the index's own authorisation."""
    return command(
        Code.NV_SET_BITS,
        handles=[index, index],
        authorizations=[password()],
        parameters=struct.pack(">Q", bits),
    )


def pcr_set_auth(pcr: int, auth: bytes) -> bytes:
    """Build TPM2_PCR_SetAuthValue."""
    return command(
        Code.PCR_SET_AUTH_VALUE,
        handles=[pcr],
        authorizations=[password()],
        parameters=sized(auth),
    )


def pcr_set_policy(pcr: int, policy: bytes, algorithm: int) -> bytes:
    """Build TPM2_PCR_SetAuthPolicy."""
    return command(
        Code.PCR_SET_AUTH_POLICY,
        handles=[Handle.PLATFORM],
        authorizations=[password()],
        parameters=sized(policy) + struct.pack(">HI", algorithm, pcr),
    )


def start_session(
    kind: SessionType,
    algorithm: int = Algorithm.SHA256,
    *,
    cipher: bool,
    bound_to: int = Handle.NULL,
) -> bytes:
    """Build TPM2_StartAuthSession, unsalted; with a ``cipher`` it can encrypt."""
    symmetric = struct.pack(">HHH", AES, 128, CFB) if cipher else struct.pack(">H", NULL)
    return command(
        Code.START_AUTH_SESSION,
        handles=[Handle.NULL, bound_to],
        parameters=sized(bytes(range(16)))
        + sized(b"")
        + struct.pack(">B", kind)
        + symmetric
        + struct.pack(">H", algorithm),
    )


def policy_pcr(session: int, pcr: int) -> bytes:
    """Build TPM2_PolicyPCR of a PCR as it is."""
    return command(Code.POLICY_PCR, handles=[session], parameters=sized(b"") + pcr_selection([pcr]))


def policy_command_code(session: int, code: int) -> bytes:
    """Build TPM2_PolicyCommandCode."""
    return command(Code.POLICY_COMMAND_CODE, handles=[session], parameters=struct.pack(">I", code))


def context_save(handle: int) -> bytes:
    """Build TPM2_ContextSave."""
    return command(Code.CONTEXT_SAVE, handles=[handle])


def hash_sequence_start(algorithm: int, auth: bytes = b"") -> bytes:
    """Build TPM2_HashSequenceStart; of algorithm NULL it is an event sequence."""
    return command(Code.HASH_SEQUENCE_START, parameters=sized(auth) + struct.pack(">H", algorithm))


def hmac_start(key: int, algorithm: int, auth: bytes = b"") -> bytes:
    """Build TPM2_HMAC_Start with a key."""
    return command(
        Code.HMAC_START,
        handles=[key],
        authorizations=[password()],
        parameters=sized(auth) + struct.pack(">H", algorithm),
    )


def sequence_update(handle: int, data: bytes, auth: bytes = b"") -> bytes:
    """Build TPM2_SequenceUpdate."""
    return command(
        Code.SEQUENCE_UPDATE,
        handles=[handle],
        authorizations=[password(auth)],
        parameters=sized(data),
    )


def commit(key: int) -> bytes:
    """Build TPM2_Commit with an ECDAA key, of no points."""
    return command(
        Code.COMMIT,
        handles=[key],
        authorizations=[password()],
        parameters=sized(sized(b"") * 2) + sized(b"") + sized(b""),
    )


def create_primary_of(
    template: bytes, *, auth: bytes = b"", data: bytes = b"", hierarchy: int = Handle.OWNER,
    hierarchy_auth: bytes = b"",
) -> bytes:  # fmt: skip
    """Build TPM2_CreatePrimary of an object with ``auth`` and sealed ``data``."""
    parameters = sized(sized(auth) + sized(data)) + sized(template) + sized(b"")
    return command(
        Code.CREATE_PRIMARY,
        handles=[hierarchy],
        authorizations=[password(hierarchy_auth)],
        parameters=parameters + struct.pack(">I", 0),
    )


def load_external_public(public: bytes, hierarchy: int = Handle.NULL) -> bytes:
    """Build TPM2_LoadExternal of a public area alone."""
    return command(
        Code.LOAD_EXTERNAL, parameters=sized(b"") + sized(public) + struct.pack(">I", hierarchy)
    )


def _public(type_: int, attributes: int, parameters: bytes, unique: bytes) -> bytes:
    head = struct.pack(">HHI", type_, Algorithm.SHA256, attributes) + sized(b"")
    return head + parameters + unique


AES_128_CFB = struct.pack(">HHH", AES, 128, CFB)
# A restricted decryption key, as a storage key is one, without a scheme.
RSA_STORAGE = _public(
    *(RSA, COMMON | DECRYPT | RESTRICTED),
    AES_128_CFB + struct.pack(">HHI", NULL, 2048, 0),
    sized(b""),
)
ECC_STORAGE = _public(
    *(ECC, COMMON | DECRYPT | RESTRICTED),
    AES_128_CFB + struct.pack(">HHH", NULL, 0x0003, NULL),
    sized(b"") * 2,
)
ECDAA_KEY = _public(
    *(ECC, COMMON | SIGN),
    struct.pack(">HHHHHH", NULL, ECDAA, Algorithm.SHA256, 0, 0x0010, NULL),
    sized(b"") * 2,
)
HMAC_KEY = _public(
    *(KEYEDHASH, COMMON | SIGN),
    struct.pack(">HH", HMAC, Algorithm.SHA256),
    sized(b""),
)
# Sealed data: neither signs nor decrypts, and its data comes from outside.
SEALED = _public(KEYEDHASH, COMMON & ~(1 << 5), struct.pack(">H", NULL), sized(b""))
SYMMETRIC_KEY = _public(SYMCIPHER, COMMON | DECRYPT, AES_128_CFB, sized(b""))
RSA_PUBLIC = _public(
    *(RSA, SIGN | (1 << 6)),
    struct.pack(">HHHI", NULL, NULL, 2048, 0),
    sized(b"\xc5" * 256),
)
