"""`vtpmd import --identity replace`: a new TPM, with what it can have of the one that was exported.

A TPM that has one of each kind of thing in the table of fates is exported and replaced; an engine
serves the new one, and each thing is looked for there. Nothing secret of the old TPM is in the new
directory, nor is its identity, its epoch or a fork in the owner record.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import pack
from typing import Final, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.harness.busy_tpm import handle_of
from tests.harness.command import vtpmd
from tests.harness.dying import Killed, dying
from tests.harness.lab import Lab
from tests.harness.raw_guest import RawGuest, RawGuest12
from tests.harness.replacing import replace
from tests.harness.swtpm_program import Place
from tests.support import sealed_object, tpm2, tpm2_rare
from tests.support.certificate import certificate_of
from tests.support.tpm2 import (
    Handle,
    NvAttribute,
    ReturnCode,
    StartupType,
    Tpm,
    TpmError,
    command,
    password,
    sized,
)
from tests.support.tpm2_rare import ENDORSEMENT
from tests.system.test_linear_file import loop_device
from tests.system.test_state_directory import powered
from tests.system.test_swtpm_clients import (
    EK_CERTIFICATE,
    EK_HANDLE,
    PLATFORM_CERTIFICATE,
    setup,
)
from vtpmd import cli
from vtpmd.inspect.decoding import decode
from vtpmd.inspect.fates import ALWAYS, FATES, KINDS, Fate, Kind
from vtpmd.store.exporting import take
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.wire.tpm import StateType, TpmVersion

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
TPM_2_0 = TpmVersion.TPM_2_0
SECRET = b"the key of a disk"
ORDERLY, CLEAR_AT_STARTUP, PLATFORM_CREATE = 1 << 26, 1 << 27, 1 << 30
PLATFORM_WRITE, WRITE_DEFINE, POLICY_READ = 1, 1 << 13, 1 << 19
NV_WRITE_LOCK, CLEAR_CONTROL, NV_LOCKED = 0x138, 0x127, 0x148
PERSISTENT = Handle.PERSISTENT_FIRST + 7
CAP_HANDLES, CAP_PCRS = 1, 5
SECRET_BYTES_MIN: Final = 16  # what is shorter may be anywhere by chance
SECRETS_MIN: Final = 7  # three seeds, three proofs, and the DRBG's seed


class Index(NamedTuple):
    """An NV index that the old TPM has: how it is defined, and what is done with it then."""

    kind: Kind
    n_bytes: int
    attributes: int = tpm2.NV_ORDINARY
    content: bytes = b""  # as its owner reads it, where it is written
    by_platform: bool = False
    policy: bytes = b""
    auth: bytes = b""
    act: Callable[[Tpm, int], None] | None = None


def extend(tpm: Tpm, index: int) -> None:
    tpm.nv_extend(index, b"measured")


def increment(tpm: Tpm, index: int) -> None:
    for _ in range(3):
        tpm.nv_increment(index)


def lock(tpm: Tpm, index: int) -> None:
    tpm.execute(command(NV_WRITE_LOCK, handles=[index, index], authorizations=[password()]))


def set_bits(tpm: Tpm, index: int) -> None:
    tpm.execute(tpm2_rare.nv_set_bits(index, 0x8421))


ORDINARY = tpm2.NV_ORDINARY
PIN = NvAttribute.OWNER_WRITE | NvAttribute.OWNER_READ | NvAttribute.NO_DICTIONARY_ATTACK
BY_PASSWORD = NvAttribute.AUTH_WRITE | NvAttribute.AUTH_READ | NvAttribute.OWNER_WRITE
BY_OWNER = NvAttribute.OWNER_WRITE | NvAttribute.OWNER_READ
BY_MAKER = ORDINARY | PLATFORM_CREATE | PLATFORM_WRITE
INDICES: Final = {
    0x0150_0001: Index(Kind.ORDINARY, 2048, content=bytes(range(256)) * 8),
    0x0150_0002: Index(Kind.ORDINARY, 8, BY_PASSWORD, b"password", auth=b"index password"),
    0x0150_0003: Index(Kind.ORDINARY, 8, ORDINARY | POLICY_READ, b"policies", policy=b"p" * 32),
    0x0150_0004: Index(Kind.ORDINARY, 6, ORDINARY | WRITE_DEFINE, b"locked", act=lock),
    0x0140_0005: Index(Kind.ORDINARY, 5, BY_MAKER, b"maker", by_platform=True),
    0x0150_0006: Index(Kind.COUNTER, 8, tpm2.NV_COUNTER, act=increment),
    0x0150_0007: Index(Kind.BITS, 8, ORDINARY | 2 << 4, act=set_bits),
    0x0150_0008: Index(Kind.EXTEND, 32, tpm2.NV_CHAIN, act=extend),
    0x0150_0009: Index(Kind.PIN_TRIES, 8, PIN | 8 << 4, pack(">II", 2, 5), auth=b"pin"),
    0x0150_000A: Index(Kind.PIN_USES, 8, PIN | 9 << 4, pack(">II", 1, 4), auth=b"pin"),
    0x0150_000B: Index(Kind.UNWRITTEN, 100),
    0x0150_000C: Index(Kind.ORDERLY_COUNTER, 8, tpm2.NV_COUNTER | ORDERLY, act=increment),
    0x0150_000D: Index(Kind.UNTIL_RESET, 4, ORDINARY | ORDERLY, b"soon"),
    0x0150_000E: Index(Kind.UNTIL_RESET, 4, ORDINARY | CLEAR_AT_STARTUP, b"gone"),
    0x0150_000F: Index(Kind.OWNER_GUARDED, len(SECRET), BY_OWNER, SECRET),
    0x01C0_0002: Index(Kind.ENDORSEMENT_INDEX, 3, BY_MAKER, b"EK.", by_platform=True),
    0x01C0_8000: Index(Kind.PLATFORM_INDEX, 3, BY_MAKER, b"PLT", by_platform=True),
    0x01C9_0011: Index(Kind.DEVICE_INDEX, 3, content=b"DEV"),
}
CERTIFICATE_INDEX: Final = 0x0150_0010
DELETED_COUNTER: Final = 0x0150_0011
# What else of the table the old TPM has, and what is only outside of it.
OTHER_KINDS: Final = {
    *(Kind.PCR_BANKS, Kind.PERSISTENT_OBJECT, Kind.KEY_CERTIFICATE),
    *(Kind.OWNER_AUTHORISATION, Kind.ENDORSEMENT_AUTHORISATION, Kind.LOCKOUT_AUTHORISATION),
    *(Kind.LOCKOUT_PARAMETERS, Kind.FAILED_TRIES, Kind.COMMAND_AUDIT, Kind.CLEAR_CONTROL),
}
# What no guest of vtpmd's can make, or not with each libtpms: tests/unit/test_replacement.py.
NOT_MADE_HERE: Final = {Kind.UNKNOWN_INDEX, Kind.PCR_POLICIES, Kind.PHYSICAL_PRESENCE}


def define(tpm: Tpm, handle: int, index: Index) -> None:
    """Define an NV index, write it, and do with it what is to be done."""
    public = pack(">IHI", handle, tpm2.Algorithm.SHA256, index.attributes) + sized(index.policy)
    made = sized(index.auth) + sized(public + pack(">H", index.n_bytes))
    hierarchy = Handle.PLATFORM if index.by_platform else Handle.OWNER
    code = tpm2.CommandCode.NV_DEFINE_SPACE
    tpm.execute(command(code, handles=[hierarchy], authorizations=[password()], parameters=made))
    for at in range(0, len(index.content), tpm2.NV_CHUNK_BYTES_MAX):
        chunk = index.content[at : at + tpm2.NV_CHUNK_BYTES_MAX]
        write_by_owner(tpm, handle, chunk, at)
    if index.act is not None:
        index.act(tpm, handle)


def write_by_owner(tpm: Tpm, handle: int, content: bytes, at: int = 0) -> None:
    tpm.execute(
        command(
            tpm2.CommandCode.NV_WRITE,
            handles=[Handle.OWNER, handle],
            authorizations=[password()],
            parameters=sized(content) + pack(">H", at),
        )
    )


def read(tpm: Tpm, handle: int) -> bytes:
    """Read an NV index, as its owner if that may read it, else with its authorisation."""
    index = INDICES[handle]
    is_owners = index.attributes & NvAttribute.OWNER_READ
    content = b""
    while len(content) < index.n_bytes:
        chunk = min(index.n_bytes - len(content), tpm2.NV_CHUNK_BYTES_MAX)
        built = command(
            tpm2.CommandCode.NV_READ,
            handles=[Handle.OWNER if is_owners else handle, handle],
            authorizations=[password(b"" if is_owners else index.auth)],
            parameters=pack(">HH", chunk, len(content)),
        )
        content += tpm.execute_with_sessions(built).sized()
    return content


def public(tpm: Tpm, handle: int) -> bytes:
    """Return the public area of an NV index, with all of its attributes, and its name."""
    return tpm.execute(tpm2.nv_read_public(handle))


def endorsement_key(tpm: Tpm) -> bytes:
    """Return what a TPM's endorsement seed makes of a template: the public area, and the name."""
    made = tpm2_rare.create_primary_of(tpm2_rare.ECC_STORAGE, hierarchy=ENDORSEMENT)
    handle = handle_of(tpm, made)
    found = tpm.execute(tpm2.read_public(handle))
    tpm.flush(handle)
    return found


def make_key(tpm: Tpm) -> bytes:
    """Make a persistent key; return a certificate of it, in DER."""
    key = tpm.create_primary(tpm2.ecc_signing_template())
    tpm.make_persistent(key, PERSISTENT)
    point = tpm.ecc_public(key)
    tpm.flush(key)
    numbers = ec.EllipticCurvePublicNumbers(point.x, point.y, ec.SECP256R1())
    return certificate_of(numbers.public_key())


def fail_a_try(tpm: Tpm) -> None:
    """Give a wrong password where that counts."""
    guarded = ORDINARY & ~NvAttribute.NO_DICTIONARY_ATTACK
    tpm.nv_define(DELETED_COUNTER + 1, 8, guarded, b"right")
    with suppress(TpmError):
        tpm.nv_write(DELETED_COUNTER + 1, bytes(8), b"wrong")
    tpm.execute(tpm2.nv_undefine(DELETED_COUNTER + 1))


def set_all(tpm: Tpm) -> None:
    """Tell the TPM what a new one does not know; authorisations at last."""
    tpm.execute(tpm2.lockout_parameters(5, 100, 200))
    fail_a_try(tpm)
    tpm.execute(tpm2_rare.audit_commands(tpm2.Algorithm.NULL, tpm2.CommandCode.GET_RANDOM))
    platform, is_disabled = [Handle.PLATFORM], b"\1"
    tpm.execute(
        command(
            CLEAR_CONTROL,
            handles=platform,
            authorizations=[password()],
            parameters=is_disabled,
        )
    )
    for hierarchy in (ENDORSEMENT, Handle.LOCKOUT, Handle.OWNER):
        tpm.execute(tpm2_rare.hierarchy_change_auth(hierarchy, b"password of hierarchy"))


class Remembered(NamedTuple):
    """What was read of the old TPM."""

    public: dict[int, bytes]
    content: dict[int, bytes]
    endorsement_key: bytes
    banks: bytes
    sealed: sealed_object.Sealed
    deleted_counter: int


def banks(tpm: Tpm) -> bytes:
    """Return which PCRs are on."""
    return tpm.execute(tpm2.get_capability(CAP_PCRS, 0, 100))


def use(emulator: Emulator) -> Remembered:
    """Have a TPM with one of each kind."""
    with powered(emulator) as (control, tpm):
        tpm.startup()
        tpm.execute(tpm2.pcr_allocate(range(8)))
        control.init()
        tpm.startup()
        for handle, index in INDICES.items():
            define(tpm, handle, index)
        certificate = make_key(tpm)
        tpm.nv_define(CERTIFICATE_INDEX, len(certificate))
        tpm.nv_write(CERTIFICATE_INDEX, certificate)
        tpm.nv_define(DELETED_COUNTER, 8, tpm2.NV_COUNTER)
        increment(tpm, DELETED_COUNTER)
        deleted_counter = tpm.nv_counter(DELETED_COUNTER)
        tpm.execute(tpm2.nv_undefine(DELETED_COUNTER))
        remembered = Remembered(
            public={handle: public(tpm, handle) for handle in INDICES},
            content={handle: read(tpm, handle) for handle in written()},
            endorsement_key=endorsement_key(tpm),
            banks=banks(tpm),
            sealed=sealed_object.seal(tpm, SECRET),
            deleted_counter=deleted_counter,
        )
        set_all(tpm)
    return remembered


def written() -> list[int]:
    """Return the indices that have a content."""
    return [handle for handle, index in INDICES.items() if index.kind is not Kind.UNWRITTEN]


def of_fate(*fates: Fate) -> list[int]:
    """Return the indices that are to be of a fate."""
    return [handle for handle, index in INDICES.items() if FATES[index.kind][0] in fates]


def secrets_of(state: bytes) -> list[bytes]:
    """Return what must not be in a new TPM: seeds, proofs, authorisations, objects, the DRBG's."""
    whole = decode(state, StateType.PERMANENT).root.find("persistent-all")
    assert whole is not None
    found = []
    for part in ("persistent-data", "orderly-data", "user-nvram"):
        node = whole.find(part)
        assert node is not None
        of_indices = [each for each in node.walk() if each.type == "NV_INDEX"]
        kept = {leaf.offset for each in of_indices for leaf in each.walk()}
        for leaf in node.walk():
            is_one = leaf.is_secret and leaf.name != "data" and leaf.offset not in kept
            value = leaf.value if is_one and isinstance(leaf.value, bytes) else b""
            if len(value) >= SECRET_BYTES_MIN and any(value):
                found.append(value)
    assert len(found) >= SECRETS_MIN
    return found


@pytest.fixture
def old(lab: Lab) -> tuple[Emulator, Remembered]:
    """Give a vTPM that has one of each kind, and was stopped."""
    emulator = lab.emulator(VTPMD)
    remembered = use(emulator)
    assert emulator.stop() == 0
    return emulator, remembered


def test_each_kind_of_thing_has_the_fate_that_the_table_says(
    lab: Lab, old: tuple[Emulator, Remembered]
) -> None:
    emulator, remembered = old
    into, said = replace(lab, emulator.state)
    fates = {(each["kind"], each["handle"]): each["fate"] for each in said["contents"]}
    kinds = {index.kind for index in INDICES.values()} | OTHER_KINDS | set(ALWAYS[TPM_2_0])
    assert {kind for kind, _ in fates} == kinds == KINDS[TPM_2_0] - NOT_MADE_HERE
    assert all(fate == FATES[Kind(kind)][0] for (kind, _), fate in fates.items())
    for handle, index in INDICES.items():
        assert (index.kind, f"{handle:#010x}") in fates

    with powered(lab.emulator(VTPMD, into)) as (_, tpm):
        tpm.startup()
        for handle in of_fate(Fate.LOST):
            assert not tpm.nv_is_defined(handle), INDICES[handle]
        assert not tpm.nv_is_defined(CERTIFICATE_INDEX)
        for handle in of_fate(Fate.KEPT):
            assert public(tpm, handle) == remembered.public[handle], INDICES[handle]
            if handle in remembered.content:
                assert read(tpm, handle) == remembered.content[handle], INDICES[handle]
        for handle in of_fate(Fate.EMPTIED):
            with pytest.raises(TpmError) as caught:
                read(tpm, handle)
            assert caught.value.return_code == ReturnCode.NV_UNINITIALIZED
        with pytest.raises(TpmError) as caught:
            tpm.nv_write(0x0150_0004, b"again")
        assert caught.value.return_code == NV_LOCKED
        assert banks(tpm) == remembered.banks
        assert_new(tpm, remembered)


def assert_new(tpm: Tpm, remembered: Remembered) -> None:
    """Look for what a new TPM has: other keys, no objects, empty authorisations."""
    assert endorsement_key(tpm) != remembered.endorsement_key
    with pytest.raises(TpmError):
        sealed_object.unseal(tpm, remembered.sealed)
    nothing = pack(">BII", 0, CAP_HANDLES, 0)
    assert tpm.execute(tpm2.get_capability(CAP_HANDLES, 0x8100_0000, 10)) == nothing
    assert tpm.property(tpm2.Property.PERMANENT) & 0x107 == 0  # no authorisation, ClearControl
    assert tpm.property(tpm2.Property.LOCKOUT_COUNTER) == 0
    tpm.nv_define(DELETED_COUNTER, 8, tpm2.NV_COUNTER)
    tpm.nv_increment(DELETED_COUNTER)
    assert tpm.nv_counter(DELETED_COUNTER) > remembered.deleted_counter


def test_nothing_of_the_old_tpm_is_in_the_new_directory(
    lab: Lab, old: tuple[Emulator, Remembered]
) -> None:
    """No secret, and no history: it is another vTPM, whose first generation it is."""
    emulator, _ = old
    before = take(emulator.state, None)
    assert before.identity is not None and before.generation > 1
    into, said = replace(lab, emulator.state)
    assert (said["becomes"], said["epoch"]) == (1, 0)
    assert said["identity"] != before.identity.hex()
    after = take(into, None)
    assert after.identity is not None and after.identity.hex() == said["identity"]
    secrets = secrets_of(before.states[StateType.PERMANENT])
    secrets += [before.identity, before.identity.hex().encode()]
    new = lab.emulator(VTPMD, into)
    with powered(new) as (_, tpm):
        tpm.startup()
        write_by_owner(tpm, 0x0150_0001, b"changed")
    assert new.stop() == 0
    for path in into.iterdir():
        content = path.read_bytes()
        assert not any(secret in content for secret in secrets), path
    made = secrets_of(take(into, None).states[StateType.PERMANENT])
    assert len(set(made)) == len(made) and not set(made) & set(secrets)
    assert json.loads(vtpmd("status", into, "--json").output)["problems"] == []
    assert "fork" not in vtpmd("owner", into).output


def test_an_orderly_counter_never_goes_back(lab: Lab) -> None:
    """Of a TPM that was not shut down, as one that is exported while it is served."""
    emulator, handle = lab.emulator(VTPMD), 0x0150_000C
    with powered(emulator) as (control, tpm):
        tpm.startup()
        define(tpm, handle, INDICES[handle])
        tpm.shutdown(StartupType.CLEAR)
        control.init()
        tpm.startup()
        increment(tpm, handle)
        value = tpm.nv_counter(handle)
        into, _ = replace(lab, emulator.state)
    with powered(lab.emulator(VTPMD, into)) as (_, tpm):
        tpm.startup()
        tpm.nv_increment(handle)
        assert tpm.nv_counter(handle) > value


@pytest.mark.parametrize("version", TpmVersion, ids=lambda version: version.facts.word)
def test_a_loss_of_power_at_any_step_leaves_the_old_vtpm_or_a_new_one(
    lab: Lab, version: TpmVersion
) -> None:
    """On a real disk, which forgets what was not synced: with the one's identity and epoch, or not.

    The old one is a copy, of a restore epoch, and may be a fork.
    """
    emulator, out = lab.emulator(VTPMD, version=version), lab.new_path("export")
    lab.raw_guest(emulator, RawGuest if version is TPM_2_0 else RawGuest12).boot()
    assert vtpmd("export", emulator.state, "--out", out).status == 0
    disk = lab.new_power_disk()
    directory = disk.path / "state"
    words = ["import", str(out), str(directory), "--force", "--identity"]
    assert cli.main([*words, "copy"]) == 0
    with dying(None) as steps:
        assert cli.main([*words, "replace"]) == 0
    have_happened = []
    for at in range(steps.done):
        assert cli.main([*words, "copy"]) == 0
        old = take(directory, None)
        with pytest.raises(Killed), dying(at):
            cli.main([*words, "replace"])
        disk.lose_power()
        disk.repair()
        assert vtpmd("fold", directory).status == 0
        found = take(directory, None)
        is_new = found.identity != old.identity
        have_happened.append(is_new)
        assert found.record is not None and found.version is version
        assert (found.generation, bool(found.record.forks)) == (
            (1, False) if is_new else (old.generation, True)
        )
    assert have_happened == sorted(have_happened) and set(have_happened) == {True, False}


@pytest.mark.parametrize("kind", EmulatorKind)
def test_it_is_encrypted_and_served_by_either_program(lab: Lab, kind: EmulatorKind) -> None:
    options = ("--key", f"file={lab.key_file('2a' * 16)},mode=aes-128-cbc")
    first = lab.emulator(SWTPM, options=options)
    guest = lab.raw_guest(first)
    guest.boot()
    before = guest.facts().nv
    guest.close()
    first.kill()
    into, _ = replace(lab, first.state, *options)
    assert before not in (into / "tpm2-00.permall").read_bytes()
    again = lab.raw_guest(lab.emulator(kind, into, options=options))
    again.control.init()
    again.tpm.startup()
    assert again.facts().nv == before


def test_what_swtpm_setup_has_made_is_lost(lab: Lab, ours: Place) -> None:
    """Endorsement keys, and certificates of them: a new TPM has others, or none yet."""
    setup(ours, "--create-ek-cert", "--create-platform-cert", "--overwrite")
    _, said = replace(lab, ours.state)
    fates = {(each["kind"], each["handle"]): each["fate"] for each in said["contents"]}
    made = {
        (Kind.ENDORSEMENT_INDEX, f"{EK_CERTIFICATE:#010x}"),
        (Kind.PLATFORM_INDEX, f"{PLATFORM_CERTIFICATE:#010x}"),
        (Kind.PERSISTENT_OBJECT, f"{EK_HANDLE:#010x}"),
    }
    assert made <= fates.keys()
    assert {fate for (_, handle), fate in fates.items() if handle is not None} == {Fate.LOST}


def test_it_is_put_into_a_device(lab: Lab, tmp_path: Path) -> None:
    emulator, out = lab.emulator(VTPMD), lab.new_path("export")
    lab.raw_guest(emulator).boot()
    before = take(emulator.state, None)
    assert vtpmd("export", emulator.state, "--out", out).status == 0
    with loop_device(tmp_path / "disk", 1 << 20) as device:
        ended = vtpmd("import", out, device, "--identity", "replace", "--linear")
        assert ended.status == 0, ended.error
        after = take(device, None)
        assert after.generation == 1
        assert after.identity not in (None, before.identity)
        content = device.read_bytes()
    assert not any(each in content for each in secrets_of(before.states[StateType.PERMANENT]))
