"""Build TPM 2.0 commands and parse their responses, for tests and benches.

Numbers and layouts are of the TCG "Trusted Platform Module Library", parts 2 (structures) and 3
(commands). Authorisation is by password sessions only; the guest's workload has the HMAC sessions.
`Tpm` wraps any transport: a function that takes a command and gives the response.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

HEADER = struct.Struct(">HII")
Transport = Callable[[bytes], bytes]


class Tag(IntEnum):
    """TPM_ST: whether a command carries authorisation sessions."""

    NO_SESSIONS = 0x8001
    SESSIONS = 0x8002


class CommandCode(IntEnum):
    """TPM_CC, those that the tests use."""

    EVICT_CONTROL = 0x120
    NV_UNDEFINE_SPACE = 0x122
    CLEAR = 0x126
    PCR_ALLOCATE = 0x12B
    NV_DEFINE_SPACE = 0x12A
    CREATE_PRIMARY = 0x131
    NV_INCREMENT = 0x134
    NV_EXTEND = 0x136
    NV_WRITE = 0x137
    DICTIONARY_ATTACK_LOCK_RESET = 0x139
    DICTIONARY_ATTACK_PARAMETERS = 0x13A
    PCR_RESET = 0x13D
    SELF_TEST = 0x143
    STARTUP = 0x144
    SHUTDOWN = 0x145
    NV_READ = 0x14E
    SIGN = 0x15D
    FLUSH_CONTEXT = 0x165
    NV_READ_PUBLIC = 0x169
    READ_PUBLIC = 0x173
    GET_CAPABILITY = 0x17A
    GET_RANDOM = 0x17B
    PCR_READ = 0x17E
    READ_CLOCK = 0x181
    PCR_EXTEND = 0x182


class ReturnCode(IntEnum):
    """TPM_RC, those that the tests expect by name."""

    SUCCESS = 0x000
    INITIALIZE = 0x100
    FAILURE = 0x101
    NV_RANGE = 0x146
    NV_UNINITIALIZED = 0x14A
    NV_DEFINED = 0x14C
    BAD_TAG = 0x01E
    COMMAND_SIZE = 0x142
    COMMAND_CODE = 0x143
    CANCELED = 0x909
    LOCKOUT = 0x921
    RETRY = 0x922
    AUTH_FAIL_SESSION_1 = 0x98E
    HANDLE_1 = 0x18B


class Algorithm(IntEnum):
    """TPM_ALG_ID, those that the tests use."""

    RSA = 0x0001
    SHA1 = 0x0004
    SHA256 = 0x000B
    NULL = 0x0010
    RSASSA = 0x0014
    ECDSA = 0x0018
    ECC = 0x0023


class Handle(IntEnum):
    """Permanent handles, and the first handle of each range that tests choose from."""

    NV_FIRST = 0x0100_0000
    OWNER = 0x4000_0001
    NULL = 0x4000_0007
    PASSWORD_SESSION = 0x4000_0009
    LOCKOUT = 0x4000_000A
    PLATFORM = 0x4000_000C
    TRANSIENT_FIRST = 0x8000_0000
    PERSISTENT_FIRST = 0x8100_0000


class StartupType(IntEnum):
    """TPM_SU."""

    CLEAR = 0
    STATE = 1


class Property(IntEnum):
    """TPM_PT, those that the tests read."""

    PERMANENT = 0x200
    STARTUP_CLEAR = 0x201
    LOCKOUT_COUNTER = 0x20E
    MAX_AUTH_FAIL = 0x20F
    LOCKOUT_INTERVAL_S = 0x210
    LOCKOUT_RECOVERY_S = 0x211


class NvAttribute(IntEnum):
    """TPMA_NV bits."""

    OWNER_WRITE = 1 << 1
    AUTH_WRITE = 1 << 2
    COUNTER = 1 << 4
    EXTEND = 1 << 6
    OWNER_READ = 1 << 17
    AUTH_READ = 1 << 18
    NO_DICTIONARY_ATTACK = 1 << 25


NV_ORDINARY = (
    NvAttribute.OWNER_WRITE
    | NvAttribute.AUTH_WRITE
    | NvAttribute.OWNER_READ
    | NvAttribute.AUTH_READ
    | NvAttribute.NO_DICTIONARY_ATTACK
)
NV_COUNTER = NV_ORDINARY | NvAttribute.COUNTER
NV_CHAIN = NV_ORDINARY | NvAttribute.EXTEND
NV_CHUNK_BYTES_MAX = 1024  # libtpms' MAX_NV_BUFFER_SIZE: what one NV_Read or NV_Write moves

SUBMISSIONS_MAX = 80  # of one command that the TPM answers with TPM_RC_RETRY
PROPERTIES_CAPABILITY = 6  # TPM_CAP_TPM_PROPERTIES
PCR_SELECTION_BYTES = 3  # 24 PCRs, a bit each
SIGNING_KEY_ATTRIBUTES = (
    0x0004_0072  # fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, sign
)
NIST_P256 = 0x0003


class TpmError(Exception):
    """A TPM answered a command with an error."""

    def __init__(self, command_code: int, return_code: int) -> None:
        try:
            name = CommandCode(command_code).name
        except ValueError:
            name = f"command {command_code:#x}"
        super().__init__(f"{name} failed with TPM_RC {return_code:#x}")
        self.command_code = command_code
        self.return_code = return_code


@dataclass(frozen=True, kw_only=True)
class Response:
    """A response, its header taken apart; `body` is what follows the header."""

    tag: int
    return_code: int
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Clock:
    """TPMS_TIME_INFO: milliseconds since start, milliseconds over all lives, and the counts."""

    time_ms: int
    clock_ms: int
    reset_count: int
    restart_count: int
    safe: bool


@dataclass(frozen=True, kw_only=True)
class EccPoint:
    """An affine point on NIST P-256, also used for the two numbers of an ECDSA signature."""

    x: int
    y: int


class Reader:
    """Take big-endian fields off the front of a response's body; IndexError when it is short."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        piece = self._data[self._offset : self._offset + size]
        if len(piece) != size:
            raise IndexError(f"response ends at {len(self._data)}, {size} more bytes expected")
        self._offset += size
        return piece

    def unsigned(self, size: int) -> int:
        """Return the next `size` bytes as an unsigned number."""
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        """Return the content of a TPM2B: a 16-bit length, then as many bytes."""
        return self.take(self.unsigned(2))

    @property
    def rest(self) -> bytes:
        """What has not been taken yet."""
        return self._data[self._offset :]


def sized(data: bytes) -> bytes:
    """Marshal a TPM2B."""
    return struct.pack(">H", len(data)) + data


def password(auth: bytes = b"") -> bytes:
    """Marshal a password authorisation."""
    return struct.pack(">IHB", Handle.PASSWORD_SESSION, 0, 0) + sized(auth)


def command(
    code: int,
    *,
    handles: Sequence[int] = (),
    authorizations: Sequence[bytes] = (),
    parameters: bytes = b"",
) -> bytes:
    """Marshal a command; it carries sessions exactly when `authorizations` are given."""
    body = b"".join(struct.pack(">I", handle) for handle in handles)
    if authorizations:
        area = b"".join(authorizations)
        body += struct.pack(">I", len(area)) + area
    tag = Tag.SESSIONS if authorizations else Tag.NO_SESSIONS
    return HEADER.pack(tag, HEADER.size + len(body) + len(parameters), code) + body + parameters


def parse_response(response: bytes) -> Response:
    """Split a response; ValueError when its length field does not match its length."""
    if len(response) < HEADER.size:
        raise ValueError(f"a response has at least {HEADER.size} bytes, this one {len(response)}")
    tag, size, code = HEADER.unpack_from(response)
    if size != len(response):
        raise ValueError(f"response says {size} bytes and has {len(response)}")
    return Response(tag=tag, return_code=code, body=response[HEADER.size :])


def startup(kind: StartupType = StartupType.CLEAR) -> bytes:
    """Build TPM2_Startup."""
    return command(CommandCode.STARTUP, parameters=struct.pack(">H", kind))


def shutdown(kind: StartupType = StartupType.CLEAR) -> bytes:
    """Build TPM2_Shutdown."""
    return command(CommandCode.SHUTDOWN, parameters=struct.pack(">H", kind))


def self_test(*, full: bool = True) -> bytes:
    """Build TPM2_SelfTest."""
    return command(CommandCode.SELF_TEST, parameters=struct.pack(">B", full))


def get_random(size: int) -> bytes:
    """Build TPM2_GetRandom for `size` bytes; the TPM gives at most 64."""
    return command(CommandCode.GET_RANDOM, parameters=struct.pack(">H", size))


def pcr_selection(pcrs: Sequence[int], algorithm: int = Algorithm.SHA256) -> bytes:
    """Marshal a TPML_PCR_SELECTION of one bank."""
    bits = sum(1 << pcr for pcr in pcrs).to_bytes(PCR_SELECTION_BYTES, "little")
    return struct.pack(">IHB", 1, algorithm, PCR_SELECTION_BYTES) + bits


def pcr_read(pcr: int) -> bytes:
    """Build TPM2_PCR_Read of one PCR's SHA-256 bank."""
    return command(CommandCode.PCR_READ, parameters=pcr_selection([pcr]))


def pcr_extend(pcr: int, digest: bytes) -> bytes:
    """Build TPM2_PCR_Extend with a SHA-256 digest."""
    parameters = struct.pack(">IH", 1, Algorithm.SHA256) + digest
    return command(
        CommandCode.PCR_EXTEND, handles=[pcr], authorizations=[password()], parameters=parameters
    )


def pcr_reset(pcr: int) -> bytes:
    """Build TPM2_PCR_Reset; at locality 0 only PCR 16 and 23 can be reset."""
    return command(CommandCode.PCR_RESET, handles=[pcr], authorizations=[password()])


def pcr_allocate(pcrs: Sequence[int]) -> bytes:
    """Build TPM2_PCR_Allocate of the SHA-256 bank; until a reset no state can be saved then."""
    return command(
        CommandCode.PCR_ALLOCATE,
        handles=[Handle.PLATFORM],
        authorizations=[password()],
        parameters=pcr_selection(pcrs),
    )


def get_capability(capability: int, first: int, count: int) -> bytes:
    """Build TPM2_GetCapability."""
    parameters = struct.pack(">III", capability, first, count)
    return command(CommandCode.GET_CAPABILITY, parameters=parameters)


def nv_define(index: int, size: int, attributes: int = NV_ORDINARY, auth: bytes = b"") -> bytes:
    """Build TPM2_NV_DefineSpace under the owner; `size` is 8 for a counter."""
    public = struct.pack(">IHI", index, Algorithm.SHA256, attributes) + sized(b"")
    public += struct.pack(">H", size)
    return command(
        CommandCode.NV_DEFINE_SPACE,
        handles=[Handle.OWNER],
        authorizations=[password()],
        parameters=sized(auth) + sized(public),
    )


def nv_undefine(index: int) -> bytes:
    """Build TPM2_NV_UndefineSpace by the owner."""
    return command(
        CommandCode.NV_UNDEFINE_SPACE, handles=[Handle.OWNER, index], authorizations=[password()]
    )


def nv_write(index: int, data: bytes, offset: int = 0, auth: bytes = b"") -> bytes:
    """Build TPM2_NV_Write with the index's own authorisation."""
    return command(
        CommandCode.NV_WRITE,
        handles=[index, index],
        authorizations=[password(auth)],
        parameters=sized(data) + struct.pack(">H", offset),
    )


def nv_read(index: int, size: int, offset: int = 0, auth: bytes = b"") -> bytes:
    """Build TPM2_NV_Read with the index's own authorisation."""
    return command(
        CommandCode.NV_READ,
        handles=[index, index],
        authorizations=[password(auth)],
        parameters=struct.pack(">HH", size, offset),
    )


def nv_increment(index: int) -> bytes:
    """Build TPM2_NV_Increment with the index's own authorisation."""
    return command(CommandCode.NV_INCREMENT, handles=[index, index], authorizations=[password()])


def nv_extend(index: int, data: bytes) -> bytes:
    """Build TPM2_NV_Extend with the index's own authorisation."""
    return command(
        CommandCode.NV_EXTEND,
        handles=[index, index],
        authorizations=[password()],
        parameters=sized(data),
    )


def nv_read_public(index: int) -> bytes:
    """Build TPM2_NV_ReadPublic."""
    return command(CommandCode.NV_READ_PUBLIC, handles=[index])


def ecc_signing_template() -> bytes:
    """Marshal the TPMT_PUBLIC of an unrestricted ECDSA P-256 signing key."""
    template = struct.pack(">HHI", Algorithm.ECC, Algorithm.SHA256, SIGNING_KEY_ATTRIBUTES)
    template += sized(b"") + struct.pack(">H", Algorithm.NULL)
    template += struct.pack(">HHHH", Algorithm.ECDSA, Algorithm.SHA256, NIST_P256, Algorithm.NULL)
    return template + sized(b"") + sized(b"")


def rsa_signing_template(key_bits: int = 2048) -> bytes:
    """Marshal the TPMT_PUBLIC of an unrestricted RSASSA signing key, exponent 65537."""
    template = struct.pack(">HHI", Algorithm.RSA, Algorithm.SHA256, SIGNING_KEY_ATTRIBUTES)
    template += sized(b"") + struct.pack(">H", Algorithm.NULL)
    template += struct.pack(">HHHI", Algorithm.RSASSA, Algorithm.SHA256, key_bits, 0)
    return template + sized(b"")


def create_primary(template: bytes, auth: bytes = b"", hierarchy: int = Handle.OWNER) -> bytes:
    """Build TPM2_CreatePrimary of a key with `auth`."""
    sensitive = sized(sized(auth) + sized(b""))
    return command(
        CommandCode.CREATE_PRIMARY,
        handles=[hierarchy],
        authorizations=[password()],
        parameters=sensitive + sized(template) + sized(b"") + struct.pack(">I", 0),
    )


def evict_control(handle: int, persistent: int) -> bytes:
    """Build TPM2_EvictControl by the owner: make a transient object persistent."""
    return command(
        CommandCode.EVICT_CONTROL,
        handles=[Handle.OWNER, handle],
        authorizations=[password()],
        parameters=struct.pack(">I", persistent),
    )


def flush_context(handle: int) -> bytes:
    """Build TPM2_FlushContext of a transient object or a session."""
    return command(CommandCode.FLUSH_CONTEXT, parameters=struct.pack(">I", handle))


def read_public(handle: int) -> bytes:
    """Build TPM2_ReadPublic."""
    return command(CommandCode.READ_PUBLIC, handles=[handle])


def ecdsa_sign(handle: int, digest: bytes, auth: bytes = b"") -> bytes:
    """Build TPM2_Sign of a SHA-256 digest, with the key's own ECDSA scheme."""
    no_ticket = struct.pack(">HI", 0x8024, Handle.NULL) + sized(b"")  # TPM_ST_HASHCHECK
    parameters = sized(digest) + struct.pack(">H", Algorithm.NULL) + no_ticket
    return command(
        CommandCode.SIGN, handles=[handle], authorizations=[password(auth)], parameters=parameters
    )


def lockout_parameters(max_tries: int, recovery_s: int, lockout_recovery_s: int) -> bytes:
    """Build TPM2_DictionaryAttackParameters."""
    return command(
        CommandCode.DICTIONARY_ATTACK_PARAMETERS,
        handles=[Handle.LOCKOUT],
        authorizations=[password()],
        parameters=struct.pack(">III", max_tries, recovery_s, lockout_recovery_s),
    )


class Tpm:
    """Run commands over a transport and return what their responses say.

    Every method raises TpmError when the TPM answers an error, ValueError or IndexError when the
    response is not well formed, and what the transport raises.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def execute(self, built: bytes) -> bytes:
        """Run a built command; return the response's parameters, without handles and sessions.

        A response with sessions still has its handle in front when the command returns one.
        TPM_RC_RETRY is answered by sending again, as Linux and TSS2 do: libtpms gives it when a
        key under dictionary-attack protection is first used.
        """
        for _ in range(SUBMISSIONS_MAX):
            response = parse_response(self._transport(built))
            if response.return_code != ReturnCode.RETRY:
                break
        if response.return_code != ReturnCode.SUCCESS:
            raise TpmError(HEADER.unpack_from(built)[2], response.return_code)
        return response.body

    def execute_with_sessions(self, built: bytes) -> Reader:
        """Run a command that has sessions and returns no handle; return its parameters."""
        reader = Reader(self.execute(built))
        return Reader(reader.take(reader.unsigned(4)))

    def startup(self, kind: StartupType = StartupType.CLEAR) -> None:
        """Start the TPM."""
        self.execute(startup(kind))

    def shutdown(self, kind: StartupType = StartupType.CLEAR) -> None:
        """Prepare the TPM for losing power."""
        self.execute(shutdown(kind))

    def random(self, size: int) -> bytes:
        """Return random bytes, `size` or fewer."""
        return Reader(self.execute(get_random(size))).sized()

    def pcr(self, number: int) -> bytes:
        """Return the value of a PCR's SHA-256 bank."""
        reader = Reader(self.execute(pcr_read(number)))
        reader.take(4 + len(pcr_selection([number])) + 4)  # update counter, selection, count
        return reader.sized()

    def extend(self, pcr: int, digest: bytes) -> None:
        """Extend a PCR's SHA-256 bank."""
        self.execute(pcr_extend(pcr, digest))

    def clock(self) -> Clock:
        """Return the TPM's clock and counts."""
        reader = Reader(self.execute(command(CommandCode.READ_CLOCK)))
        return Clock(
            time_ms=reader.unsigned(8),
            clock_ms=reader.unsigned(8),
            reset_count=reader.unsigned(4),
            restart_count=reader.unsigned(4),
            safe=bool(reader.unsigned(1)),
        )

    def property(self, which: Property) -> int:
        """Return one of the TPM's properties."""
        reader = Reader(self.execute(get_capability(PROPERTIES_CAPABILITY, which, 1)))
        reader.take(1 + 4 + 4)  # more data, capability, count
        if reader.unsigned(4) != which:
            raise ValueError(f"the TPM has no property {which:#x}")
        return reader.unsigned(4)

    def nv_define(
        self, index: int, size: int, attributes: int = NV_ORDINARY, auth: bytes = b""
    ) -> None:
        """Define an NV index."""
        self.execute(nv_define(index, size, attributes, auth))

    def nv_write(self, index: int, data: bytes, auth: bytes = b"") -> None:
        """Write an NV index from its start, in as many commands as it needs."""
        for offset in range(0, len(data), NV_CHUNK_BYTES_MAX):
            chunk = data[offset : offset + NV_CHUNK_BYTES_MAX]
            self.execute(nv_write(index, chunk, offset, auth))

    def nv_read(self, index: int, size: int, auth: bytes = b"") -> bytes:
        """Read an NV index from its start, in as many commands as it needs."""
        content = b""
        while len(content) < size:
            chunk = min(size - len(content), NV_CHUNK_BYTES_MAX)
            built = nv_read(index, chunk, len(content), auth)
            content += self.execute_with_sessions(built).sized()
        return content

    def nv_increment(self, index: int) -> None:
        """Increment an NV counter."""
        self.execute(nv_increment(index))

    def nv_counter(self, index: int) -> int:
        """Return an NV counter's value."""
        return int.from_bytes(self.nv_read(index, 8), "big")

    def nv_extend(self, index: int, data: bytes) -> None:
        """Extend an NV index."""
        self.execute(nv_extend(index, data))

    def nv_is_defined(self, index: int) -> bool:
        """Return whether there is an NV index."""
        try:
            self.execute(nv_read_public(index))
        except TpmError as error:
            if error.return_code != ReturnCode.HANDLE_1:
                raise
            return False
        return True

    def create_primary(self, template: bytes, auth: bytes = b"") -> int:
        """Create a primary key under the owner; return its transient handle."""
        return Reader(self.execute(create_primary(template, auth))).unsigned(4)

    def make_persistent(self, handle: int, persistent: int) -> None:
        """Copy a transient object to a persistent handle."""
        self.execute(evict_control(handle, persistent))

    def flush(self, handle: int) -> None:
        """Remove a transient object or a session."""
        self.execute(flush_context(handle))

    def ecc_public(self, handle: int) -> EccPoint:
        """Return the public point of a key made from `ecc_signing_template`."""
        public = Reader(Reader(self.execute(read_public(handle))).sized())
        public.take(len(ecc_signing_template()) - len(sized(b"")) * 2)
        return _point(public)

    def ecdsa_sign(self, handle: int, digest: bytes, auth: bytes = b"") -> EccPoint:
        """Sign a SHA-256 digest; return the signature's r and s as x and y."""
        reader = self.execute_with_sessions(ecdsa_sign(handle, digest, auth))
        reader.take(2 + 2)  # signature algorithm, hash
        return _point(reader)


def _point(reader: Reader) -> EccPoint:
    return EccPoint(
        x=int.from_bytes(reader.sized(), "big"), y=int.from_bytes(reader.sized(), "big")
    )
