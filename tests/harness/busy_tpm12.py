"""What can be in a TPM 1.2's state: each case has a TPM do something that leaves its mark there.

As tests/harness/busy_tpm.py for a TPM 2.0.
"""

from collections.abc import Callable
from contextlib import suppress

from tests.support import tpm12
from tests.support.tpm12 import NV_INDEX, Key, Ordinal, Tpm12, Tpm12Error

OWNER, STORAGE, USAGE, COUNTER, INDEX = (letter * 20 for letter in (b"o", b"s", b"k", b"c", b"i"))
OWNER_READ, AUTH_READ = 1 << 17, 1 << 18
CERTIFICATE_INDEX = 0x1000_F000


def nothing(_: Tpm12) -> None:
    """Leave it as TPM_Startup has it."""


def extended(tpm: Tpm12) -> None:
    """Extend PCRs, of which one can be reset."""
    for pcr in (0, 7, 16):
        tpm.extend(pcr, bytes([pcr + 1]) * 20)


def nv_indices(tpm: Tpm12) -> None:
    """Define indices that may be read by anybody, by who knows a secret, and by some PCRs."""
    tpm.nv_define(NV_INDEX, 32)
    tpm.nv_write(NV_INDEX, b"x" * 32)
    tpm.execute(tpm12.nv_define(NV_INDEX + 1, 16, 1 | AUTH_READ, auth=INDEX))
    tpm.nv_write(NV_INDEX + 1, b"by password only")
    tpm.execute(tpm12.nv_define(NV_INDEX + 2, 16, 1 | OWNER_READ))
    tpm.nv_write(NV_INDEX + 2, b"by the owner....")
    read_by = (b"\x81\0\0", b"p" * 20)
    tpm.execute(tpm12.nv_define(NV_INDEX + 3, 8, read_by=read_by))
    tpm.execute(tpm12.nv_define(CERTIFICATE_INDEX, 1000))


def nv_full(tpm: Tpm12) -> None:
    """Define indices until there is no more room."""
    for number in range(100):
        try:
            tpm.nv_define(NV_INDEX + number, 1024)
        except Tpm12Error:
            return
        tpm.nv_write(NV_INDEX + number, bytes([number]) * 1024)


def with_endorsement_key(tpm: Tpm12) -> None:
    """Make the endorsement key."""
    tpm.create_endorsement_key()


def owned(tpm: Tpm12) -> None:
    """Become the owner."""
    tpm.create_endorsement_key()
    tpm.take_ownership(OWNER, STORAGE)


def loaded_key(tpm: Tpm12) -> tuple[int, Key]:
    """Make a key, and load it."""
    owned(tpm)
    key = tpm.create_key(STORAGE, USAGE)
    return tpm.load_key(key, STORAGE), key


def with_key(tpm: Tpm12) -> None:
    """Leave a key loaded."""
    loaded_key(tpm)


def kept_key(tpm: Tpm12) -> None:
    """Leave a key that the owner alone evicts."""
    handle, key = loaded_key(tpm)
    tpm.keep_key(handle, key, OWNER)


def failed_tries(tpm: Tpm12) -> None:
    """Sign with a secret that is wrong."""
    handle, _ = loaded_key(tpm)
    for _ in range(3):
        with suppress(Tpm12Error):
            tpm.sign(handle, bytes(20), b"w" * 20)


def counters(tpm: Tpm12) -> None:
    """Make counters."""
    owned(tpm)
    for label in (b"one.", b"two."):
        tpm.create_counter(OWNER, COUNTER, label)


def audited(tpm: Tpm12) -> None:
    """Have commands audited."""
    owned(tpm)
    tpm.audit(Ordinal.EXTEND, OWNER)
    tpm.extend(3, bytes(20))


def families(tpm: Tpm12) -> None:
    """Make families of delegations."""
    for label in b"ab":
        tpm.create_family(label)


def sessions(tpm: Tpm12) -> None:
    """Leave sessions of each kind open."""
    owned(tpm)
    tpm.oiap()
    tpm.osap(STORAGE)
    tpm.establish_transport(b"t" * 20)


def digest(tpm: Tpm12) -> None:
    """Leave a digest open."""
    tpm.sha1_start(b"message." * 8)


def everything(tpm: Tpm12) -> None:
    """Do all of it that goes together, as a TPM in use has it."""
    nv_indices(tpm)
    families(tpm)
    kept_key(tpm)
    handle = tpm.load_key(tpm.create_key(STORAGE, USAGE), STORAGE)
    for label in (b"one.", b"two."):
        tpm.create_counter(OWNER, COUNTER, label)
    tpm.audit(Ordinal.EXTEND, OWNER)
    extended(tpm)
    with suppress(Tpm12Error):
        tpm.sign(handle, bytes(20), b"w" * 20)
    tpm.oiap()
    tpm.osap(STORAGE)
    tpm.establish_transport(b"t" * 20)
    digest(tpm)


CASES: dict[str, Callable[[Tpm12], None]] = {
    each.__name__.replace("_", " "): each
    for each in (
        *(nothing, extended, nv_indices, nv_full, with_endorsement_key, owned, with_key),
        *(kept_key, failed_tries, counters, audited, families, sessions, digest, everything),
    )
}
