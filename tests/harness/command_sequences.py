"""Commands to a TPM, made of a seed: valid ones, invalid ones, and hostile ones."""

from collections.abc import Callable, Iterator
from random import Random
from struct import Struct

from tests.support import tpm2, tpm12
from tests.support.tpm2 import CommandCode, Handle, NvAttribute, StartupType

HEADER = Struct(">HII")  # tag, size, command code
COMMAND_BYTES_MAX = 4096
INDICES = [Handle.NV_FIRST + 0x80 + number for number in range(6)]
PCRS = range(24)
NV_SIZES = (0, 1, 8, 32, 64, 2048, 2049, 65535)
HANDLES = (
    *(0x8000_0000, 0x8000_0001, 0x8000_0002, 0x8100_0001, 0x8100_0002, 0x0300_0000),
    *(Handle.OWNER, 0x4000_000B, 0x4000_000C, 0x4000_0010, 0, 16, 0x0180_0000, 0xFFFF_FFFF),
)
# Of commands whose answer to the same state is the same: no key, no clock, no random number.
REPEATABLE = (
    *(CommandCode.PCR_READ, CommandCode.PCR_EXTEND, CommandCode.PCR_RESET),
    *(CommandCode.NV_READ, CommandCode.NV_READ_PUBLIC, CommandCode.NV_WRITE),
    *(CommandCode.NV_DEFINE_SPACE, CommandCode.NV_UNDEFINE_SPACE),
    *(CommandCode.SELF_TEST, CommandCode.STARTUP, CommandCode.SHUTDOWN),
)
REPEATABLE_12 = (
    *(tpm12.Ordinal.PCR_READ, tpm12.Ordinal.EXTEND, tpm12.Ordinal.GET_CAPABILITY),
    *(tpm12.Ordinal.NV_DEFINE_SPACE, tpm12.Ordinal.NV_WRITE_VALUE, tpm12.Ordinal.NV_READ_VALUE),
    *(tpm12.Ordinal.STARTUP, tpm12.Ordinal.SAVE_STATE, tpm12.Ordinal.PHYSICAL_PRESENCE),
)


class Sequence:
    """Commands to a TPM 2.0, one after the other, as a seed has them."""

    repeatable: tuple[int, ...] = REPEATABLE

    def __init__(self, random: Random) -> None:
        """`random` makes the choices."""
        self._random = random
        self._kinds = self._all_kinds()

    @classmethod
    def is_repeatable(cls, command: bytes) -> bool:
        """Return whether the whole response to a command is the same in two TPMs of one state."""
        return len(command) >= HEADER.size and HEADER.unpack_from(command)[2] in cls.repeatable

    def _all_kinds(self) -> list[tuple[int, Callable[[], bytes]]]:
        return [
            (8, self._pcr),
            (12, self._nv),
            (4, self._capability),
            (3, self._key),
            (4, self._handle),
            (2, self._power),
            (3, self._nobody_knows),
        ]

    def commands(self, number: int) -> Iterator[bytes]:
        """Yield so many commands; each begins with a size that is its own."""
        weights = [weight for weight, _ in self._kinds]
        for _ in range(number):
            ((_, make),) = self._random.choices(self._kinds, weights)
            command = make()
            if self._random.random() < 0.4:
                command = self._altered(command)
            yield command

    def _pcr(self) -> bytes:
        pcr = self._random.choice(PCRS)
        digest = self._random.randbytes(32)
        return self._random.choice(
            [tpm2.pcr_read(pcr), tpm2.pcr_extend(pcr, digest), tpm2.pcr_reset(pcr)]
        )

    def _nv(self) -> bytes:
        index, size = self._random.choice(INDICES), self._random.choice(NV_SIZES)
        offset, auth = self._random.choice((0, 0, 1, 31)), self._random.choice((b"", b"", b"x"))
        attributes = self._random.choice(
            [tpm2.NV_ORDINARY, int(sum(self._random.sample(list(NvAttribute), 3)))]
        )
        data = self._random.randbytes(min(size, 1024))
        return self._random.choice(
            [
                tpm2.nv_define(index, min(size, 65535), attributes, auth),
                tpm2.nv_write(index, data, offset, auth),
                tpm2.nv_read(index, min(size, 1024), offset, auth),
                tpm2.nv_undefine(index),
                tpm2.nv_increment(index),
                tpm2.nv_extend(index, data),
                tpm2.nv_read_public(index),
            ]
        )

    def _capability(self) -> bytes:
        # Not the variable properties: some are the time's.
        capability, first = self._random.choice(
            [(0, 0), (1, 0x0100_0000), (1, 0x8000_0000), (2, 0x11F), (5, 0), (6, 0x100), (8, 0)]
        )
        return tpm2.get_capability(capability, first, self._random.choice((1, 5, 200)))

    def _key(self) -> bytes:
        template = tpm2.ecc_signing_template()
        return self._random.choice(
            [
                tpm2.create_primary(template, self._random.choice((b"", b"auth"))),
                tpm2.create_primary(template, b"", self._random.choice(HANDLES)),
                tpm2.ecdsa_sign(self._random.choice(HANDLES), bytes(32)),
                tpm2.evict_control(self._random.choice(HANDLES), self._random.choice(HANDLES)),
            ]
        )

    def _handle(self) -> bytes:
        handle = self._random.choice(HANDLES)
        return self._random.choice([tpm2.flush_context(handle), tpm2.read_public(handle)])

    def _power(self) -> bytes:
        kind = self._random.choice(list(StartupType))
        return self._random.choice(
            [tpm2.startup(kind), tpm2.shutdown(kind), tpm2.self_test(full=False)]
        )

    def _nobody_knows(self) -> bytes:
        body = self._random.randbytes(self._random.choice((0, 1, 4, 40, 300)))
        code = self._random.choice((self._random.randrange(0x11F, 0x1A0), 0, 0xFFFF_FFFF))
        tag = self._random.choice((0x8001, 0x8002, 0, 0x00C1))
        return HEADER.pack(tag, HEADER.size + len(body), code) + body

    def _altered(self, command: bytes) -> bytes:
        """Flip a bit, cut, or add; its size is put right, and a clear-all is left out."""
        altered = bytearray(command)
        match self._random.randrange(3):
            case 0:
                place = self._random.randrange(8 * (len(altered) - 6)) + 48
                altered[place // 8] ^= 1 << place % 8
            case 1:
                del altered[self._random.randrange(HEADER.size, len(altered) + 1) :]
            case 2:
                altered += self._random.randbytes(self._random.choice((1, 2, 100)))
        altered[2:6] = len(altered).to_bytes(4, "big")
        return bytes(altered)


class Sequence12(Sequence):
    """Commands to a TPM 1.2."""

    repeatable = REPEATABLE_12

    def _all_kinds(self) -> list[tuple[int, Callable[[], bytes]]]:
        return [
            (8, self._pcr),
            (12, self._nv),
            (4, self._capability),
            (2, self._power),
            (2, self._presence),
            (3, self._nobody_knows),
        ]

    def _pcr(self) -> bytes:
        pcr = self._random.choice((*PCRS, 24, 0xFFFF_FFFF))
        digest = self._random.randbytes(tpm12.DIGEST_BYTES)
        return self._random.choice([tpm12.pcr_read(pcr), tpm12.pcr_extend(pcr, digest)])

    def _nv(self) -> bytes:
        index = tpm12.NV_INDEX + self._random.randrange(4)
        size, offset = self._random.choice((0, 1, 8, 64, 5000)), self._random.choice((0, 1, 63))
        data = self._random.randbytes(min(size, 64))
        return self._random.choice(
            [
                tpm12.nv_define(index, size, self._random.choice((0, 1, 2, 4, 0x1_0000))),
                tpm12.nv_write(index, data, offset),
                tpm12.nv_read(index, size, offset),
            ]
        )

    def _capability(self) -> bytes:
        # Not those that count down, or are the time's.
        capability, sub = self._random.choice(
            [
                (1, bytes(4)),
                (4, bytes([0, 0, 1, 8])),
                (5, bytes([0, 0, 1, 3])),
                (6, b""),
                (0xD, b""),
            ]
        )
        return tpm12.get_capability(capability, sub)

    def _power(self) -> bytes:
        kind = self._random.choice(list(tpm12.StartupType))
        return self._random.choice([tpm12.startup(kind), tpm12.save_state()])

    def _presence(self) -> bytes:
        return tpm12.physical_presence(self._random.choice((0x0020, 0x0008, 0x0010, 0x0003)))

    def _nobody_knows(self) -> bytes:
        body = self._random.randbytes(self._random.choice((0, 1, 4, 40, 300)))
        code = self._random.choice((self._random.randrange(0x100, 0x200), 0, 0xFFFF_FFFF))
        tag = self._random.choice((0x00C1, 0x00C2, 0x00C3, 0, 0x8001))
        return HEADER.pack(tag, HEADER.size + len(body), code) + body
