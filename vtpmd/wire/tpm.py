"""What the control channel, state files and sessions say of a TPM: versions, results, states."""

from __future__ import annotations

from enum import IntEnum

from vtpmd.light_typing import NamedTuple

# That another host may give, or QEMU: beyond it a vTPM would soon have no numbers left, of which a
# session takes 2^32. csrc/pages.h has the same.
GENERATION_GIVEN_MAX = 1 << 62
# Of one epoch of a vTPM's: a state that is imported begins the next one, and so does a snapshot
# that QEMU loads, in C (csrc/epoch.h has the same). There is room for 4096, each with 262144
# sessions; the last EPOCHS_OF_IMPORTS are begun by imports alone.
EPOCH_GENERATIONS = 1 << 50
EPOCHS_OF_IMPORTS = 256


def epoch_of(generation: int) -> int:
    """Return of which restore epoch a generation is: 0 until an older state was put back."""
    return generation // EPOCH_GENERATIONS


def next_epoch(generation: int) -> int | None:
    """Return the first generation of the epoch after a generation's; None: there are no more."""
    first = (epoch_of(generation) + 1) * EPOCH_GENERATIONS
    return first if first < GENERATION_GIVEN_MAX else None


class TpmVersion(IntEnum):
    """Which TPM it is, as the engine and peers have it (``enum version_number``)."""

    TPM_1_2 = 1
    TPM_2_0 = 2

    @property
    def facts(self) -> VersionFacts:
        """What vtpmd has to know of it."""
        return _FACTS[self]


class VersionFacts(NamedTuple):
    """What differs between the versions; csrc/version.h has what the engine has to know."""

    word: str  # for people
    prefix: str  # swtpm's, of the names of state files
    # TPM_Startup or TPM2_Startup, of each of swtpm's flags.
    startups: dict[str, bytes]


_FACTS = {
    TpmVersion.TPM_1_2: VersionFacts(
        "1.2",
        "tpm-00",
        {
            "startup-clear": bytes.fromhex("00c1 0000000c 00000099 0001"),
            "startup-state": bytes.fromhex("00c1 0000000c 00000099 0002"),
            "startup-deactivated": bytes.fromhex("00c1 0000000c 00000099 0003"),
        },
    ),
    TpmVersion.TPM_2_0: VersionFacts(
        "2.0",
        "tpm2-00",
        {
            "startup-clear": bytes.fromhex("8001 0000000c 00000144 0000"),
            "startup-state": bytes.fromhex("8001 0000000c 00000144 0001"),
        },
    ),
}


class Result(IntEnum):
    """The results that responses carry: TPM 1.2's codes, as libtpms and swtpm use them."""

    SUCCESS = 0x000
    BAD_PARAMETER = 0x003
    FAIL = 0x009
    BAD_ORDINAL = 0x00A
    KEYNOTFOUND = 0x00D
    IOERROR = 0x01F
    DECRYPT_ERROR = 0x021
    BAD_KEY_PROPERTY = 0x028
    BAD_DATASIZE = 0x02B
    BAD_VERSION = 0x02E
    BAD_LOCALITY = 0x03D
    RETRY = 0x800


class StateType(IntEnum):
    """The types of state blob."""

    PERMANENT = 1
    VOLATILE = 2
    SAVESTATE = 3
