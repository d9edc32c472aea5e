"""Permanent states that libtpms has made, of several format levels; what is right and what is not.

``states/README.md`` says how the files were made.
"""

from hashlib import sha1
from operator import itemgetter
from pathlib import Path

from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType, TpmVersion

_FILES = Path(__file__).with_name("states")
LEVEL_1 = swtpm_format.decode_file((_FILES / "level-1.permall").read_bytes())
LEVEL_7 = swtpm_format.decode_file((_FILES / "level-7.permall").read_bytes())
# A TPM that was used, and what it had in memory then.
BUSY = swtpm_format.decode_file((_FILES / "busy.permall").read_bytes())
BUSY_VOLATILE = swtpm_format.decode_file((_FILES / "busy.volatilestate").read_bytes())
BUSY_OLD = swtpm_format.decode_file((_FILES / "busy-0.7.permall").read_bytes())
BUSY_OLD_VOLATILE = swtpm_format.decode_file((_FILES / "busy-0.7.volatilestate").read_bytes())
BUSY_7 = swtpm_format.decode_file((_FILES / "busy-7.permall").read_bytes())
BUSY_7_VOLATILE = swtpm_format.decode_file((_FILES / "busy-7.volatilestate").read_bytes())

# What there is to decode.
STATES = {
    "level 1": (LEVEL_1, StateType.PERMANENT),
    "level 7": (LEVEL_7, StateType.PERMANENT),
    "busy": (BUSY, StateType.PERMANENT),
    "busy, volatile": (BUSY_VOLATILE, StateType.VOLATILE),
    "busy, old": (BUSY_OLD, StateType.PERMANENT),
    "busy, old, volatile": (BUSY_OLD_VOLATILE, StateType.VOLATILE),
    "busy, level 7": (BUSY_7, StateType.PERMANENT),
    "busy, level 7, volatile": (BUSY_7_VOLATILE, StateType.VOLATILE),
}

# Of a TPM 1.2.
TPM12 = {
    f"1.2 {name}, {kind.name.lower()}": (
        swtpm_format.decode_file((_FILES / f"{name}-1.2.{suffix}").read_bytes()),
        kind,
    )
    for name, suffix, kind in (
        ("new", "permall", StateType.PERMANENT),
        ("busy", "permall", StateType.PERMANENT),
        ("busy", "volatilestate", StateType.VOLATILE),
        ("busy", "savestate", StateType.SAVESTATE),
    )
}
BUSY_12, BUSY_12_VOLATILE, BUSY_12_SAVED = list(map(itemgetter(0), TPM12.values()))[1:]

# Each state that is right, its type, and the TPM's version.
ALL = {name: (*each, TpmVersion.TPM_2_0) for name, each in STATES.items()}
ALL |= {name: (*each, TpmVersion.TPM_1_2) for name, each in TPM12.items()}

# Of a level that no libtpms has so far: its profile says so, and all else is LEVEL_7.
LATER = LEVEL_7.replace(b'"StateFormatLevel":7', b'"StateFormatLevel":9')

# Where the seed of the endorsement hierarchy is in LEVEL_1: 64 bytes, which may be any.
SEED_AT = 532
MARK_BYTES = 8
# Where the data integrity register is in BUSY_12.
REGISTER_AT = 84
DIGEST_BYTES = 20


def different(n: int) -> list[bytes]:
    """Return states that are right, and differ in a few bytes: a sector of a journal for each."""
    marks = [bytes([number + ord("A")]) * MARK_BYTES for number in range(n)]
    return [LEVEL_1[:SEED_AT] + mark + LEVEL_1[SEED_AT + MARK_BYTES :] for mark in marks]


def different_12(n: int) -> list[bytes]:
    """Return such states of a TPM 1.2: the data integrity register differs, and the checksum."""
    return [
        with_checksum(
            BUSY_12[:REGISTER_AT] + mark * DIGEST_BYTES + BUSY_12[REGISTER_AT + DIGEST_BYTES :]
        )
        for mark in (bytes([number + ord("A")]) for number in range(n))
    ]


def with_checksum(state: bytes) -> bytes:
    """Return a TPM 1.2's state with the checksum of its bytes."""
    body = state[:-DIGEST_BYTES]
    return body + sha1(body, usedforsecurity=False).digest()


def damaged(state: bytes) -> bytes:
    """Return a state that begins and ends as one, and that libtpms refuses."""
    middle = len(state) // 2
    return state[:middle] + state[middle + 1 :]
