"""Build TPM 1.2 commands and parse their responses, for tests.

Numbers and layouts are of the TCG "TPM Main", parts 2 (structures) and 3 (commands). Sessions are
OIAP, and OSAP where a secret goes in. `Tpm12` wraps any transport: a function that takes a command
and gives the response.
"""

import hashlib
import hmac
import os
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

HEADER = struct.Struct(">HII")
Transport = Callable[[bytes], bytes]

DIGEST_BYTES = 20
ANSWER_BYTES = DIGEST_BYTES + 1 + DIGEST_BYTES  # of a session, in a response
NV_INDEX = 0x0001_1101
NV_LOCK = 0xFFFF_FFFF  # an index that is none: who defines it has all guards of NV memory count
SRK, OWNER, TRANSPORT = 0x4000_0000, 0x4000_0001, 0x4000_0003
RSA_BITS = 2048
RSA_EXPONENT = 65537


class Tag(IntEnum):
    """Whether a command carries an authorisation session."""

    COMMAND = 0x00C1
    AUTH1_COMMAND = 0x00C2
    AUTH2_COMMAND = 0x00C3
    RESPONSE = 0x00C4


class Ordinal(IntEnum):
    """TPM_ORD, those that the tests use."""

    OIAP = 0x0A
    OSAP = 0x0B
    TAKE_OWNERSHIP = 0x0D
    EXTEND = 0x14
    PCR_READ = 0x15
    SEAL = 0x17
    UNSEAL = 0x18
    KEY_CONTROL_OWNER = 0x23
    CREATE_WRAP_KEY = 0x1F
    SIGN = 0x3C
    LOAD_KEY_2 = 0x41
    GET_RANDOM = 0x46
    SELF_TEST_FULL = 0x50
    CONTINUE_SELF_TEST = 0x53
    GET_CAPABILITY = 0x65
    PHYSICAL_ENABLE = 0x6F
    PHYSICAL_SET_DEACTIVATED = 0x72
    SET_OPERATOR_AUTH = 0x74
    CREATE_ENDORSEMENT_KEY_PAIR = 0x78
    READ_PUBEK = 0x7C
    SET_ORDINAL_AUDIT_STATUS = 0x8D
    SAVE_STATE = 0x98
    STARTUP = 0x99
    SHA1_START = 0xA0
    SHA1_UPDATE = 0xA1
    NV_DEFINE_SPACE = 0xCC
    NV_WRITE_VALUE = 0xCD
    NV_READ_VALUE = 0xCF
    NV_READ_VALUE_AUTH = 0xD0
    DELEGATE_MANAGE = 0xD2
    CREATE_COUNTER = 0xDC
    INCREMENT_COUNTER = 0xDD
    READ_COUNTER = 0xDE
    ESTABLISH_TRANSPORT = 0xE6
    PHYSICAL_PRESENCE = 0x4000_000A


class StartupType(IntEnum):
    """TPM_STARTUP_TYPE."""

    CLEAR = 1
    STATE = 2
    DEACTIVATED = 3


class Tpm12Error(Exception):
    """The TPM answered a command with an error."""

    def __init__(self, ordinal: int, code: int) -> None:
        super().__init__(f"ordinal {ordinal:#x} answered {code:#x}")
        self.code = code


class Key(NamedTuple):
    """A signing key: as it is wrapped, and its secret."""

    wrapped: bytes
    auth: bytes

    def public(self) -> rsa.RSAPublicKey:
        """Return its public key."""
        at = 4 + 2 + 4 + 1 + len(_key_parameters(0, 0)) + 4  # up to the public key
        (size,) = struct.unpack_from(">I", self.wrapped, at)
        modulus = int.from_bytes(self.wrapped[at + 4 : at + 4 + size], "big")
        return rsa.RSAPublicNumbers(RSA_EXPONENT, modulus).public_key()

    def verify(self, digest: bytes, signature: bytes) -> None:
        """Raise InvalidSignature unless it is this key's signature of a SHA-1 digest."""
        # RSASSA-PKCS1-v1.5 of SHA-1 is what a TPM 1.2 has.
        scheme = utils.Prehashed(hashes.SHA1())  # noqa: S303
        self.public().verify(signature, digest, padding.PKCS1v15(), scheme)


def command(ordinal: int, parameters: bytes = b"", tag: int = Tag.COMMAND) -> bytes:
    """Build a command."""
    return HEADER.pack(tag, HEADER.size + len(parameters), ordinal) + parameters


def startup(kind: StartupType = StartupType.CLEAR) -> bytes:
    """Build TPM_Startup."""
    return command(Ordinal.STARTUP, struct.pack(">H", kind))


def save_state() -> bytes:
    """Build TPM_SaveState."""
    return command(Ordinal.SAVE_STATE)


def get_random(size: int) -> bytes:
    """Build TPM_GetRandom."""
    return command(Ordinal.GET_RANDOM, struct.pack(">I", size))


def pcr_read(pcr: int) -> bytes:
    """Build TPM_PcrRead."""
    return command(Ordinal.PCR_READ, struct.pack(">I", pcr))


def pcr_extend(pcr: int, digest: bytes) -> bytes:
    """Build TPM_Extend."""
    return command(Ordinal.EXTEND, struct.pack(">I", pcr) + digest)


def get_capability(capability: int, sub: bytes = b"") -> bytes:
    """Build TPM_GetCapability."""
    return command(Ordinal.GET_CAPABILITY, struct.pack(">I", capability) + _sized(sub))


def nv_define(
    index: int,
    size: int,
    attributes: int = 0x1,
    *,
    auth: bytes = bytes(DIGEST_BYTES),
    read_by: tuple[bytes, bytes] = (bytes(3), bytes(DIGEST_BYTES)),
) -> bytes:
    """Build TPM_NV_DefineSpace, without the owner: of a TPM whose NV memory is not locked.

    ``read_by`` are PCRs, as bits, and the digest that they have to have for a read.
    """
    any_pcr = struct.pack(">H3sB", 3, bytes(3), 0x1F) + bytes(DIGEST_BYTES)
    pcrs = struct.pack(">H3sB", 3, read_by[0], 0x1F) + read_by[1]
    public = struct.pack(">HI", 0x0018, index) + pcrs + any_pcr
    public += struct.pack(">HI3sI", 0x0017, attributes, bytes(3), size)
    return command(Ordinal.NV_DEFINE_SPACE, public + auth)


def nv_write(index: int, data: bytes, offset: int = 0) -> bytes:
    """Build TPM_NV_WriteValue."""
    return command(Ordinal.NV_WRITE_VALUE, struct.pack(">II", index, offset) + _sized(data))


def nv_read(index: int, size: int, offset: int = 0) -> bytes:
    """Build TPM_NV_ReadValue."""
    return command(Ordinal.NV_READ_VALUE, struct.pack(">III", index, offset, size))


def physical_presence(flags: int) -> bytes:
    """Build TSC_PhysicalPresence."""
    return command(Ordinal.PHYSICAL_PRESENCE, struct.pack(">H", flags))


class Tpm12:
    """Run commands over a transport and return what their responses say.

    Every method raises Tpm12Error when the TPM answers an error, ValueError or struct.error when
    the response is not well formed, and what the transport raises.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def execute(self, built: bytes) -> bytes:
        """Run a built command; return what follows the response's header."""
        response = self._transport(built)
        _, size, code = HEADER.unpack_from(response)
        if size != len(response):
            raise ValueError(f"a response of {len(response)} bytes says that it has {size}")
        if code != 0:
            raise Tpm12Error(HEADER.unpack_from(built)[2], code)
        return response[HEADER.size :]

    def startup(self, kind: StartupType = StartupType.CLEAR) -> None:
        """Start the TPM."""
        self.execute(startup(kind))

    def save_state(self) -> None:
        """Save the state, as before a sleep."""
        self.execute(save_state())

    def random(self, size: int) -> bytes:
        """Return random bytes, `size` or fewer."""
        return _unsized(self.execute(get_random(size)))

    def pcr(self, number: int) -> bytes:
        """Return the value of a PCR."""
        return self.execute(pcr_read(number))

    def extend(self, pcr: int, digest: bytes) -> None:
        """Extend a PCR."""
        self.execute(pcr_extend(pcr, digest))

    def nv_define(self, index: int, size: int) -> None:
        """Define an NV index."""
        self.execute(nv_define(index, size))

    def nv_write(self, index: int, data: bytes) -> None:
        """Write an NV index from its start."""
        self.execute(nv_write(index, data))

    def nv_read(self, index: int, size: int) -> bytes:
        """Read an NV index from its start."""
        return _unsized(self.execute(nv_read(index, size)))

    def nv_lock(self) -> None:
        """Have all that guards NV memory count from now on."""
        self.execute(nv_define(NV_LOCK, 0))

    def nv_read_auth(self, index: int, size: int, auth: bytes) -> bytes:
        """Read an NV index from its start, with its own authorisation."""
        parameters = struct.pack(">III", index, 0, size)
        return _unsized(self._authorised(Ordinal.NV_READ_VALUE_AUTH, b"", parameters, auth))

    def nv_write_by_owner(self, index: int, data: bytes, owner_auth: bytes) -> None:
        """Write an NV index from its start, with the owner's authorisation."""
        parameters = struct.pack(">II", index, 0) + _sized(data)
        self._authorised(Ordinal.NV_WRITE_VALUE, b"", parameters, owner_auth)

    def set_operator_auth(self, auth: bytes) -> None:
        """Set the operator's authorisation; somebody is physically there."""
        self.execute(command(Ordinal.SET_OPERATOR_AUTH, auth))

    def enable(self) -> None:
        """Enable and activate the TPM, as firmware does; it is active from its next start on."""
        for flags in (0x0020, 0x0008):  # may be said by software; is there
            self.execute(physical_presence(flags))
        self.execute(command(Ordinal.PHYSICAL_ENABLE))
        self.execute(command(Ordinal.PHYSICAL_SET_DEACTIVATED, b"\0"))

    def create_endorsement_key(self) -> None:
        """Make the endorsement key, as a vendor does."""
        self.execute(
            command(
                Ordinal.CREATE_ENDORSEMENT_KEY_PAIR,
                os.urandom(DIGEST_BYTES) + _key_parameters(0x0003, 0x0001),
            )
        )

    def take_ownership(self, owner_auth: bytes, srk_auth: bytes) -> None:
        """Become the owner; there is an endorsement key."""
        endorsement = self._endorsement_key()
        parameters = struct.pack(">H", 0x0005)  # TPM_PID_OWNER
        for auth in (owner_auth, srk_auth):
            parameters += _sized(endorsement.encrypt(auth, _OAEP))
        parameters += _key(0x0011, 0x0003, 0x0001)
        self._authorised(Ordinal.TAKE_OWNERSHIP, b"", parameters, owner_auth)

    def create_key(self, srk_auth: bytes, auth: bytes) -> Key:
        """Make a signing key under the storage root key."""
        session = self._osap(0x0004, SRK, srk_auth)
        parameters = session.hide(auth) + _xor(auth, sha1(session.auth + session.odd))
        parameters += _key(0x0010, 0x0001, 0x0002)
        handles = struct.pack(">I", SRK)
        return Key(self._finish(Ordinal.CREATE_WRAP_KEY, handles, parameters, session), auth)

    def create_counter(self, owner_auth: bytes, auth: bytes, label: bytes) -> int:
        """Make a monotonic counter, of a label of four bytes; return its handle."""
        session = self._osap(0x0002, OWNER, owner_auth)
        parameters = session.hide(auth) + label
        answer = self._finish(Ordinal.CREATE_COUNTER, b"", parameters, session)
        return int.from_bytes(answer[:4], "big")

    def counter(self, handle: int) -> tuple[bytes, int]:
        """Return a monotonic counter's label, and its value."""
        answer = self.execute(command(Ordinal.READ_COUNTER, struct.pack(">I", handle)))
        label, value = struct.unpack(">4sI", answer[2:])
        return label, value

    def increment(self, handle: int, auth: bytes) -> int:
        """Increment a monotonic counter, of its authorisation; return its value."""
        parameters = struct.pack(">I", handle)
        answer = self._authorised(Ordinal.INCREMENT_COUNTER, b"", parameters, auth)
        return int.from_bytes(answer[6:10], "big")

    def seal(self, secret: bytes, srk_auth: bytes, auth: bytes) -> bytes:
        """Seal a secret under the storage root key, to no PCR; return the sealed blob."""
        session = self._osap(0x0004, SRK, srk_auth)
        parameters = session.hide(auth) + _sized(b"") + _sized(secret)
        return self._finish(Ordinal.SEAL, struct.pack(">I", SRK), parameters, session)

    def unseal(self, blob: bytes, srk_auth: bytes, auth: bytes) -> bytes:
        """Return what is in a sealed blob."""
        sessions = [self._oiap(each) for each in (srk_auth, auth)]
        return _unsized(self._finish(Ordinal.UNSEAL, struct.pack(">I", SRK), blob, *sessions))

    def keep_key(self, handle: int, key: Key, owner_auth: bytes) -> None:
        """Have the owner alone evict a loaded key: it is in the permanent state then."""
        at = 4 + 2 + 4 + 1  # of its parameters, and its public part
        end = at + len(_key_parameters(0, 0)) + 4  # there is no PCR info
        (size,) = struct.unpack_from(">I", key.wrapped, end)
        public = key.wrapped[at : end - 4] + key.wrapped[end : end + 4 + size]
        self._authorised(
            Ordinal.KEY_CONTROL_OWNER,
            struct.pack(">I", handle),
            public + struct.pack(">I?", 1, True),
            owner_auth,
        )

    def audit(self, ordinal: int, owner_auth: bytes) -> None:
        """Have a command audited."""
        parameters = struct.pack(">I?", ordinal, True)
        self._authorised(Ordinal.SET_ORDINAL_AUDIT_STATUS, b"", parameters, owner_auth)

    def oiap(self) -> None:
        """Start a session, and leave it open."""
        self.execute(command(Ordinal.OIAP))

    def osap(self, srk_auth: bytes) -> None:
        """Start a session of the storage root key, and leave it open."""
        self._osap(0x0004, SRK, srk_auth)

    def establish_transport(self, auth: bytes) -> None:
        """Start a transport session, in the clear, and leave it open."""
        public = struct.pack(">HIIH", 0x001E, 0, 0, 0)
        parameters = struct.pack(">I", TRANSPORT) + public + _sized(auth)
        self.execute(command(Ordinal.ESTABLISH_TRANSPORT, parameters))

    def create_family(self, label: int) -> None:
        """Make a family of delegations, of a TPM without an owner."""
        parameters = struct.pack(">II", 0, 1) + _sized(bytes([label]))
        self.execute(command(Ordinal.DELEGATE_MANAGE, parameters))

    def sha1_start(self, data: bytes) -> None:
        """Begin a digest, and leave it open; `data` is some times 64 bytes."""
        self.execute(command(Ordinal.SHA1_START))
        self.execute(command(Ordinal.SHA1_UPDATE, _sized(data)))

    def capability(self, capability: int, sub: bytes = b"") -> bytes:
        """Return what TPM_GetCapability says."""
        return _unsized(self.execute(get_capability(capability, sub)))

    def endorsement_key(self) -> rsa.RSAPublicKey:
        """Return the endorsement key's public part."""
        return self._endorsement_key()

    def load_key(self, key: Key, srk_auth: bytes) -> int:
        """Load a key; return its handle."""
        parent = struct.pack(">I", SRK)
        answer = self._authorised(Ordinal.LOAD_KEY_2, parent, key.wrapped, srk_auth)
        return int.from_bytes(answer[:4], "big")

    def sign(self, handle: int, digest: bytes, auth: bytes) -> bytes:
        """Sign a SHA-1 digest; return the signature."""
        key = struct.pack(">I", handle)
        return _unsized(self._authorised(Ordinal.SIGN, key, _sized(digest), auth))

    def _osap(self, entity_type: int, entity: int, secret: bytes) -> "_Session":
        odd = os.urandom(DIGEST_BYTES)
        parameters = struct.pack(">HI", entity_type, entity) + odd
        answer = self.execute(command(Ordinal.OSAP, parameters))
        handle, even, even_osap = answer[:4], answer[4:24], answer[24:44]
        return _Session(handle, even, os.urandom(DIGEST_BYTES), _hmac(secret, even_osap + odd))

    def _endorsement_key(self) -> rsa.RSAPublicKey:
        answer = self.execute(command(Ordinal.READ_PUBEK, bytes(DIGEST_BYTES)))
        modulus = _unsized(answer[len(_key_parameters(0, 0)) :])
        return rsa.RSAPublicNumbers(RSA_EXPONENT, int.from_bytes(modulus, "big")).public_key()

    def _oiap(self, auth: bytes) -> "_Session":
        answer = self.execute(command(Ordinal.OIAP))
        return _Session(answer[:4], answer[4:24], os.urandom(DIGEST_BYTES), auth)

    def _authorised(self, ordinal: int, handles: bytes, parameters: bytes, auth: bytes) -> bytes:
        """Run a command in a session of its own; return the response's parameters."""
        return self._finish(ordinal, handles, parameters, self._oiap(auth))

    def _finish(
        self, ordinal: int, handles: bytes, parameters: bytes, *sessions: "_Session"
    ) -> bytes:
        covered = sha1(struct.pack(">I", ordinal) + parameters)
        body = handles + parameters
        for session in sessions:
            mac = _hmac(session.auth, covered + session.even + session.odd + b"\0")
            body += session.handle + session.odd + b"\0" + mac
        tag = Tag.AUTH1_COMMAND if len(sessions) == 1 else Tag.AUTH2_COMMAND
        answer = self.execute(command(ordinal, body, tag))
        end = len(answer) - len(sessions) * ANSWER_BYTES
        found = answer[:end]
        # A handle is not covered.
        covers = found[4:] if ordinal in (Ordinal.LOAD_KEY_2, Ordinal.KEY_CONTROL_OWNER) else found
        covered = sha1(struct.pack(">II", 0, ordinal) + covers)
        for number, session in enumerate(sessions):
            session.check(answer[end + number * ANSWER_BYTES :][:ANSWER_BYTES], covered)
        return found


class _Session(NamedTuple):
    handle: bytes
    even: bytes
    odd: bytes
    auth: bytes

    def hide(self, secret: bytes) -> bytes:
        """Return a secret as it goes in, of a session that was made with another one."""
        return _xor(secret, sha1(self.auth + self.even))

    def check(self, answer: bytes, covered: bytes) -> None:
        """Raise ValueError unless what a response ends with is authorised."""
        even, goes_on, theirs = answer[:20], answer[20:21], answer[21:]
        ours = _hmac(self.auth, covered + even + self.odd + goes_on)
        if not hmac.compare_digest(theirs, ours):
            raise ValueError("the response is not authorised")


# As a TPM 1.2 has it.
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), b"TCPA")  # noqa: S303


def _key_parameters(encryption: int, signature: int) -> bytes:
    """TPM_KEY_PARMS, of RSA keys."""
    parameters = struct.pack(">III", RSA_BITS, 2, 0)
    return struct.pack(">IHH", 0x0001, encryption, signature) + _sized(parameters)


def _key(usage: int, encryption: int, signature: int) -> bytes:
    """TPM_KEY without a key: what is to be made."""
    head = bytes([1, 1, 0, 0]) + struct.pack(">HIB", usage, 0, 1)  # the secret is always asked for
    return head + _key_parameters(encryption, signature) + bytes(4 + 4 + 4)


def _sized(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _unsized(data: bytes) -> bytes:
    (size,) = struct.unpack_from(">I", data)
    if len(data) < 4 + size:
        raise ValueError(f"{size} bytes are announced, and there are {len(data) - 4}")
    return data[4 : 4 + size]


def sha1(data: bytes) -> bytes:
    """Return what a TPM 1.2 has for all digests."""
    return hashlib.sha1(data, usedforsecurity=False).digest()


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, "sha1").digest()


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
