"""What a guest writes into its TPM's NV memory, and what the TPM owes it after a crash.

One command runs at a time. So there are exactly two states in which a TPM may come back: the one
that the guest was answered, and the one that the command without an answer makes of it.
"""

import hashlib
from random import Random
from typing import NamedTuple

from tests.support import tpm2
from tests.support.tpm2 import Handle, Tpm, TpmError

FIRST_INDEX = Handle.NV_FIRST + 0x50_0000
NUMBERS = range(FIRST_INDEX, FIRST_INDEX + 4)  # of 8 bytes each
BLOCK = FIRST_INDEX + 0x10  # as much as one command writes
COUNTER = FIRST_INDEX + 0x11
CHAIN = FIRST_INDEX + 0x12  # one that is extended
COMING_AND_GOING = FIRST_INDEX + 0x13  # defined and undefined in turn
BALLAST = range(FIRST_INDEX + 0x100, FIRST_INDEX + 0x108)  # behind which everything else shifts
BALLAST_BYTES = 2048

NUMBER_BYTES = 8
BLOCK_BYTES = tpm2.NV_CHUNK_BYTES_MAX

# How often each kind of command comes: writes of a number and of the block, increments, extends,
# definitions.
MIXED = (60, 10, 15, 10, 5)
LARGE = (10, 75, 5, 5, 5)


class Contents(NamedTuple):
    """The NV memory that is written to."""

    numbers: tuple[int, ...]
    block: int  # the number that fills it
    counter: int
    chain: bytes
    defined: bool  # whether the index that comes and goes is there


class Step(NamedTuple):
    """A command, and the NV memory that it leaves."""

    command: bytes
    makes: Contents


class WriteLostError(Exception):
    """A TPM has lost what it acknowledged, or has what it was never sent."""


class NvLoad:
    """A guest's NV writes, increments, extends and definitions, in an order that a seed gives.

    `owed` is what the TPM has acknowledged. `unanswered` is None, or the NV memory that the
    command without a good answer would leave. `weights` may be changed at any time.
    """

    def __init__(self, random: Random) -> None:
        self.owed = Contents((0,) * len(NUMBERS), 0, 0, bytes(32), False)
        self.unanswered: Contents | None = None
        self.acknowledged = 0
        self.weights = MIXED
        self._random = random
        self._number = 0

    def define(self, tpm: Tpm) -> None:
        """Make the indices in a fresh TPM."""
        for index in BALLAST:
            tpm.nv_define(index, BALLAST_BYTES)
            tpm.nv_write(index, self._random.randbytes(BALLAST_BYTES))
        for index in NUMBERS:
            tpm.nv_define(index, NUMBER_BYTES)
            tpm.nv_write(index, bytes(NUMBER_BYTES))
        tpm.nv_define(BLOCK, BLOCK_BYTES)
        tpm.nv_write(BLOCK, bytes(BLOCK_BYTES))
        tpm.nv_define(COUNTER, NUMBER_BYTES, tpm2.NV_COUNTER)
        tpm.nv_increment(COUNTER)
        tpm.nv_define(CHAIN, len(self.owed.chain), tpm2.NV_CHAIN)
        tpm.nv_extend(CHAIN, b"first")
        self.owed = contents(tpm)

    def step(self, tpm: Tpm) -> None:
        """Run one command; raises what the transport raises, or TpmError.

        An error leaves open what is in NV memory: the next `check` finds out.
        """
        chosen = self._choose()
        self.unanswered = chosen.makes
        tpm.execute(chosen.command)
        self.owed, self.unanswered = chosen.makes, None
        self.acknowledged += 1

    def check(self, tpm: Tpm) -> None:
        """Read everything, and go on from there; WriteLostError when it is not what is owed."""
        found = contents(tpm)
        if found not in (self.owed, self.unanswered):
            raise WriteLostError(_differences(found, self.owed, self.unanswered))
        self.owed, self.unanswered = found, None

    def _choose(self) -> Step:
        self._number += 1
        kinds = (self._write_number, self._write_block, self._increment, self._extend, self._toggle)
        (kind,) = self._random.choices(kinds, weights=self.weights)
        return kind()

    def _write_number(self) -> Step:
        which = self._random.randrange(len(NUMBERS))
        numbers = list(self.owed.numbers)
        numbers[which] = self._number
        command = tpm2.nv_write(NUMBERS[which], self._number.to_bytes(NUMBER_BYTES, "big"))
        return Step(command, self.owed._replace(numbers=tuple(numbers)))

    def _write_block(self) -> Step:
        return Step(
            tpm2.nv_write(BLOCK, _block(self._number)), self.owed._replace(block=self._number)
        )

    def _increment(self) -> Step:
        makes = self.owed._replace(counter=self.owed.counter + 1)
        return Step(tpm2.nv_increment(COUNTER), makes)

    def _extend(self) -> Step:
        data = self._number.to_bytes(NUMBER_BYTES, "big")
        chain = hashlib.sha256(self.owed.chain + data).digest()
        return Step(tpm2.nv_extend(CHAIN, data), self.owed._replace(chain=chain))

    def _toggle(self) -> Step:
        if self.owed.defined:
            command = tpm2.nv_undefine(COMING_AND_GOING)
        else:
            command = tpm2.nv_define(COMING_AND_GOING, BLOCK_BYTES)
        return Step(command, self.owed._replace(defined=not self.owed.defined))


def contents(tpm: Tpm) -> Contents:
    """Read the NV memory that a load writes to; WriteLostError when an index is not there."""
    try:
        numbers = [tpm.nv_counter(index) for index in NUMBERS]
        block = tpm.nv_read(BLOCK, BLOCK_BYTES)
        number = int.from_bytes(block[:NUMBER_BYTES], "big")
        if block != _block(number):
            raise WriteLostError("the block was written in part")
        return Contents(
            numbers=tuple(numbers),
            block=number,
            counter=tpm.nv_counter(COUNTER),
            chain=tpm.nv_read(CHAIN, 32),
            defined=tpm.nv_is_defined(COMING_AND_GOING),
        )
    except TpmError as error:
        raise WriteLostError(f"an index cannot be read: {error}") from error


def _block(number: int) -> bytes:
    return number.to_bytes(NUMBER_BYTES, "big") * (BLOCK_BYTES // NUMBER_BYTES)


def _differences(found: Contents, owed: Contents, unanswered: Contents | None) -> str:
    differences = [
        f"{name}: found {getattr(found, name)}, acknowledged {getattr(owed, name)}"
        + (f", not answered {getattr(unanswered, name)}" if unanswered else "")
        for name in Contents._fields
        if getattr(found, name) != getattr(owed, name)
    ]
    return "; ".join(differences)
