"""What can be in a TPM's state: each case has a TPM do something that leaves its mark there.

The cases are for who decodes states: what they leave is all that libtpms marshals.
"""

from collections.abc import Callable
from contextlib import suppress

from tests.support import tpm2, tpm2_rare
from tests.support.tpm2 import Algorithm, Handle, NvAttribute, Reader, StartupType, Tpm, TpmError
from tests.support.tpm2_rare import ENDORSEMENT, SessionType

NV_BITS = tpm2.NV_ORDINARY | 2 << 4
NV_ORDERLY = 1 << 26
NV_POLICY_READ = 1 << 19
PERSISTENT = Handle.PERSISTENT_FIRST
INDEX = Handle.NV_FIRST


def handle_of(tpm: Tpm, command: bytes) -> int:
    """Run a command that makes something, and return its handle."""
    return Reader(tpm.execute(command)).unsigned(4)


def nothing(_: Tpm) -> None:
    """Leave it as Startup has it."""


def nv_of_each_type(tpm: Tpm) -> None:
    """Define and write an index of each type, and one that was never written."""
    tpm.nv_define(INDEX, 32)
    tpm.nv_write(INDEX, b"x" * 32)
    tpm.nv_define(INDEX + 1, 8, tpm2.NV_COUNTER)
    tpm.nv_increment(INDEX + 1)
    tpm.nv_define(INDEX + 2, 32, tpm2.NV_CHAIN)
    tpm.nv_extend(INDEX + 2, b"abc")
    tpm.nv_define(INDEX + 3, 8, NV_BITS)
    tpm.execute(tpm2_rare.nv_set_bits(INDEX + 3, 5))
    tpm.nv_define(INDEX + 4, 2048)


def nv_with_policy(tpm: Tpm) -> None:
    """Define indices with a policy, an authorisation, and names of other algorithms."""
    attributes = NvAttribute.AUTH_WRITE | NV_POLICY_READ | NvAttribute.NO_DICTIONARY_ATTACK
    tpm.execute(tpm2_rare.nv_define_with(INDEX, 16, attributes, policy=bytes(32)))
    tpm.nv_write(INDEX, b"under a policy..")
    by_password = NvAttribute.AUTH_WRITE | NvAttribute.AUTH_READ
    tpm.nv_define(INDEX + 1, 16, by_password, auth=b"index password")
    tpm.nv_write(INDEX + 1, b"by password only", b"index password")
    tpm.execute(tpm2_rare.nv_define_with(INDEX + 2, 4, tpm2.NV_ORDINARY, algorithm=0x000C))


def nv_orderly(tpm: Tpm) -> None:
    """Define orderly indices, which are in memory until a Shutdown."""
    tpm.nv_define(INDEX, 8, tpm2.NV_ORDINARY | NV_ORDERLY)
    tpm.nv_write(INDEX, b"orderly!")
    tpm.nv_define(INDEX + 1, 8, tpm2.NV_COUNTER | NV_ORDERLY)
    tpm.nv_increment(INDEX + 1)


def nv_orderly_removed(tpm: Tpm) -> None:
    """Leave what an orderly index had behind the last one's."""
    nv_orderly(tpm)
    tpm.execute(tpm2.nv_undefine(INDEX))


def nv_full(tpm: Tpm) -> None:
    """Define indices of the largest size until there is no more room."""
    for number in range(100):
        try:
            tpm.nv_define(INDEX + number, 2048)
        except TpmError:
            return
        tpm.nv_write(INDEX + number, bytes([number]) * 2048)


def persistent(template: bytes, *, data: bytes = b"") -> Callable[[Tpm], None]:
    """Return what makes a primary object persistent, and leaves it loaded, too."""

    def act(tpm: Tpm) -> None:
        made = tpm2_rare.create_primary_of(template, auth=b"object", data=data)
        tpm.make_persistent(handle_of(tpm, made), PERSISTENT)

    return act


def public_only(tpm: Tpm) -> None:
    """Load a public area alone."""
    handle_of(tpm, tpm2_rare.load_external_public(tpm2_rare.RSA_PUBLIC))


def in_other_hierarchies(tpm: Tpm) -> None:
    """Make objects of the endorsement, platform and null hierarchies."""
    for hierarchy in (ENDORSEMENT, Handle.PLATFORM, Handle.NULL):
        template = tpm2.ecc_signing_template()
        handle_of(tpm, tpm2_rare.create_primary_of(template, hierarchy=hierarchy))


def committed(tpm: Tpm) -> None:
    """Commit with an ECDAA key."""
    tpm.execute(tpm2_rare.commit(handle_of(tpm, tpm2_rare.create_primary_of(tpm2_rare.ECDAA_KEY))))


def sequence(algorithm: int) -> Callable[[Tpm], None]:
    """Return what begins a hash sequence and updates it."""

    def act(tpm: Tpm) -> None:
        handle = handle_of(tpm, tpm2_rare.hash_sequence_start(algorithm, b"sequence"))
        tpm.execute(tpm2_rare.sequence_update(handle, b"message" * 50, b"sequence"))

    return act


def hmac_sequence(tpm: Tpm) -> None:
    """Begin an HMAC sequence."""
    key = handle_of(tpm, tpm2_rare.create_primary_of(tpm2_rare.HMAC_KEY))
    handle = handle_of(tpm, tpm2_rare.hmac_start(key, Algorithm.NULL))
    tpm.execute(tpm2_rare.sequence_update(handle, b"message"))


def sessions(tpm: Tpm) -> None:
    """Begin a session of each type, and have a policy."""
    handle_of(tpm, tpm2_rare.start_session(SessionType.HMAC, cipher=True))
    policy = handle_of(tpm, tpm2_rare.start_session(SessionType.POLICY, 0x000C, cipher=False))
    tpm.execute(tpm2_rare.policy_pcr(policy, 7))
    tpm.execute(tpm2_rare.policy_command_code(policy, 0x15E))
    handle_of(tpm, tpm2_rare.start_session(SessionType.TRIAL, cipher=False))


def bound_session(tpm: Tpm) -> None:
    """Begin a session that is bound to an index with an authorisation."""
    tpm.nv_define(INDEX, 16, auth=b"bound password")
    tpm.nv_write(INDEX, bytes(16), b"bound password")
    handle_of(tpm, tpm2_rare.start_session(SessionType.HMAC, cipher=False, bound_to=INDEX))


def saved_sessions(tpm: Tpm) -> None:
    """Save sessions out of the TPM."""
    for _ in range(5):
        handle = handle_of(tpm, tpm2_rare.start_session(SessionType.HMAC, cipher=False))
        tpm.execute(tpm2_rare.context_save(handle))


def audited(tpm: Tpm) -> None:
    """Audit commands, with another algorithm than before."""
    tpm.execute(tpm2_rare.audit_commands(Algorithm.SHA256))
    tpm.execute(tpm2_rare.audit_commands(Algorithm.NULL, 0x17B, 0x182))
    tpm.random(8)


def owned(tpm: Tpm) -> None:
    """Take ownership: authorisations, policies, lockout, the clock."""
    tpm.execute(tpm2_rare.clock_set(10**9))
    tpm.execute(tpm2.lockout_parameters(5, 100, 200))
    tpm.execute(tpm2_rare.set_primary_policy(Handle.OWNER, bytes(32), Algorithm.SHA256))
    tpm.execute(tpm2_rare.set_primary_policy(Handle.PLATFORM, bytes(48), 0x000C))
    for hierarchy in (Handle.OWNER, ENDORSEMENT, Handle.LOCKOUT, Handle.PLATFORM):
        tpm.execute(tpm2_rare.hierarchy_change_auth(hierarchy, b"password of hierarchy"))


def locked_out(tpm: Tpm) -> None:
    """Try a wrong password until the TPM takes none."""
    template = bytearray(tpm2.ecc_signing_template())
    key = handle_of(tpm, tpm2.create_primary(bytes(template), b"right"))
    for _ in range(5):
        try:
            tpm.ecdsa_sign(key, bytes(32), b"wrong")
        except TpmError:
            continue


def pcrs(tpm: Tpm) -> None:
    """Extend PCRs, and give those that can have them a policy and an authorisation."""
    for pcr in (0, 7, 23):
        tpm.extend(pcr, bytes([pcr]) * 32)
    with suppress(TpmError):  # from libtpms 0.10 on no PCR can have either
        tpm.execute(tpm2_rare.pcr_set_auth(20, b"pcr"))
        tpm.execute(tpm2_rare.pcr_set_policy(20, bytes(32), Algorithm.SHA256))


def pcrs_allocated(tpm: Tpm) -> None:
    """Choose other PCRs for the time after the next reset."""
    tpm.execute(tpm2.pcr_allocate(range(8)))


def hierarchies_off(tpm: Tpm) -> None:
    """Turn hierarchies off."""
    tpm.execute(tpm2_rare.hierarchy_control(ENDORSEMENT, state=False))
    tpm.execute(tpm2_rare.hierarchy_control(Handle.OWNER, state=False))


def shut_down(kind: StartupType) -> Callable[[Tpm], None]:
    """Return what leaves it as a Shutdown does."""

    def act(tpm: Tpm) -> None:
        nv_orderly(tpm)
        pcrs(tpm)
        saved_sessions(tpm)
        tpm.shutdown(kind)

    return act


def cleared(tpm: Tpm) -> None:
    """Own the TPM, and clear it."""
    nv_of_each_type(tpm)
    tpm.execute(
        tpm2.command(tpm2.CommandCode.CLEAR, handles=[Handle.PLATFORM],
                     authorizations=[tpm2.password()])
    )  # fmt: skip


def everything(tpm: Tpm) -> None:
    """Leave some of everything that goes together."""
    nv_of_each_type(tpm)
    nv_with_policy_after(tpm)
    persistent(tpm2_rare.RSA_STORAGE)(tpm)
    sessions(tpm)
    audited(tpm)
    pcrs(tpm)
    hmac_sequence(tpm)
    owned(tpm)


def nv_with_policy_after(tpm: Tpm) -> None:
    """Define an index with a policy behind those of ``nv_of_each_type``."""
    attributes = NvAttribute.AUTH_WRITE | NV_POLICY_READ | NvAttribute.NO_DICTIONARY_ATTACK
    tpm.execute(tpm2_rare.nv_define_with(INDEX + 9, 16, attributes, policy=bytes(32)))
    tpm.nv_write(INDEX + 9, b"under a policy..")


CASES: dict[str, Callable[[Tpm], None]] = {
    "nothing": nothing,
    "nv of each type": nv_of_each_type,
    "nv with policy": nv_with_policy,
    "nv orderly": nv_orderly,
    "nv orderly removed": nv_orderly_removed,
    "nv full": nv_full,
    "rsa": persistent(tpm2_rare.RSA_STORAGE),
    "rsa signing": persistent(tpm2.rsa_signing_template()),
    "ecc": persistent(tpm2_rare.ECC_STORAGE),
    "ecc signing": persistent(tpm2.ecc_signing_template()),
    "sealed": persistent(tpm2_rare.SEALED, data=b"sealed data"),
    "hmac key": persistent(tpm2_rare.HMAC_KEY),
    "symmetric key": persistent(tpm2_rare.SYMMETRIC_KEY),
    "public only": public_only,
    "other hierarchies": in_other_hierarchies,
    "commit": committed,
    "sha1 sequence": sequence(0x0004),
    "sha256 sequence": sequence(0x000B),
    "sha384 sequence": sequence(0x000C),
    "sha512 sequence": sequence(0x000D),
    "event sequence": sequence(0x0010),
    "hmac sequence": hmac_sequence,
    "sessions": sessions,
    "bound session": bound_session,
    "saved sessions": saved_sessions,
    "audit": audited,
    "owned": owned,
    "locked out": locked_out,
    "pcrs": pcrs,
    "pcrs allocated": pcrs_allocated,
    "hierarchies off": hierarchies_off,
    "shutdown clear": shut_down(StartupType.CLEAR),
    "shutdown state": shut_down(StartupType.STATE),
    "cleared": cleared,
    "everything": everything,
}
