"""`vtpmd import --identity replace` of a TPM 1.2: a new one, with what it can have of the old one.

A TPM that has one of each kind of thing in the table of fates is exported and replaced; an engine
serves the new one, and each thing is looked for there by commands. Nothing secret of the old TPM is
in the new directory.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.harness.command import vtpmd
from tests.harness.lab import Lab
from tests.harness.raw_guest import RawGuest12
from tests.harness.replacing import replace
from tests.harness.swtpm_program import OURS, Place
from tests.support import tpm12
from tests.support.certificate import certificate_of
from tests.support.emulator_client import ControlClient
from tests.support.tpm12 import DIGEST_BYTES, Key, Ordinal, Tpm12, Tpm12Error
from tests.system.test_linear_file import loop_device
from tests.system.test_swtpm_clients import setup
from vtpmd.inspect.decoding import decode
from vtpmd.inspect.fates import FATES, KINDS, Fate, Kind
from vtpmd.store.exporting import take
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.wire.tpm import StateType, TpmVersion

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
VERSION: Final = TpmVersion.TPM_1_2
OWNER, STORAGE, USAGE, COUNTER, INDEX, OPERATOR = (
    letter * DIGEST_BYTES for letter in (b"o", b"s", b"k", b"c", b"i", b"p")
)
SECRET: Final = b"the key of a disk"
OWNER_READ, AUTH_READ, PP_WRITE, OWNER_WRITE = 1 << 17, 1 << 18, 1, 2
WRITE_DEFINE, READ_UNTIL_RESET = 1 << 13, 1 << 31
DATA_REGISTER: Final = 0x1000_0001
CAP_FLAG, CAP_NV_LIST, PERMANENT_FLAGS = 4, 0x0D, 0x108
BAD_INDEX, WRONG_PCR, AREA_LOCKED, BAD_PRESENCE = 0x02, 0x18, 0x3C, 0x2D
AUTH_CONFLICT, NO_OWNER, AUTH_FAIL = 0x3B, 0x12, 0x01
# Flags as TPM_CAP_FLAG_PERMANENT has them, a byte each.
DISABLE, READ_PUBLIC_KEY, HAS_OPERATOR, NV_LOCKED = 0, 3, 13, 15
EXTENDED: Final = b"e" * DIGEST_BYTES
SECRETS_MIN: Final = 9  # of owner, operator, proof, three keys, DAA


class Index(NamedTuple):
    """An NV index that the old TPM has."""

    kind: Kind
    content: bytes
    attributes: int = PP_WRITE
    auth: bytes = bytes(DIGEST_BYTES)
    pcrs: tuple[bytes, bytes] = (bytes(3), bytes(DIGEST_BYTES))  # that read it


def composite(value: bytes) -> bytes:
    """Return the digest of PCR 10 alone, at that value: TPM main part 2, 5.4.1."""
    return tpm12.sha1(struct.pack(">H3sI", 3, PCR_10, DIGEST_BYTES) + value)


PCR_10: Final = bytes([0, 1 << 2, 0])
AFTER: Final = tpm12.sha1(bytes(DIGEST_BYTES) + EXTENDED)
INDICES: Final = {
    0x0001_1101: Index(Kind.ORDINARY, bytes(range(200))),
    0x0001_1102: Index(Kind.ORDINARY, b"by password", PP_WRITE | AUTH_READ, INDEX),
    0x0001_1103: Index(Kind.ORDINARY, b"by PCRs", pcrs=(PCR_10, composite(AFTER))),
    0x0001_1104: Index(Kind.ORDINARY, b"locked", PP_WRITE | WRITE_DEFINE),
    0x0001_1105: Index(Kind.ORDINARY, b"until reset", PP_WRITE | READ_UNTIL_RESET),
    0x0001_1106: Index(Kind.ORDINARY, b"the owner writes", OWNER_WRITE),
    0x1000_F001: Index(Kind.ORDINARY, b"it conforms"),
    0x0001_1107: Index(Kind.OWNER_GUARDED, SECRET, OWNER_READ | PP_WRITE),
    0x1000_F000: Index(Kind.ENDORSEMENT_INDEX, b"EK."),
    0x0000_F000: Index(Kind.ENDORSEMENT_INDEX, b"EK."),
    0x1000_F002: Index(Kind.PLATFORM_INDEX, b"PLT"),
    0x0001_1600: Index(Kind.GPIO_INDEX, b"."),
}
CERTIFICATE_INDEX: Final = 0x0001_1110
REGISTER: Final = b"data of integrity..."
# What no TPM of libtpms' can be told: tests/unit/test_replacement_tpm12.py.
NOT_MADE_HERE: Final = {Kind.MAINTENANCE_KEY}


class Remembered(NamedTuple):
    """What was read of the old TPM."""

    endorsement_key: rsa.RSAPublicKey
    sealed: bytes
    key: Key
    counters: dict[int, tuple[bytes, int]]
    flags: bytes


@contextmanager
def powered(emulator: Emulator) -> Iterator[tuple[ControlClient, Tpm12]]:
    """Connect as QEMU does, and start the TPM."""
    with ControlClient(emulator.control_path) as control:
        data = control.attach_data()
        control.init()
        tpm = Tpm12(data.transact)
        tpm.startup()
        yield control, tpm


def restart(control: ControlClient, tpm: Tpm12) -> None:
    control.init()
    tpm.startup()


def define_all(tpm: Tpm12) -> None:
    """Define the indices, and write them, as a maker does before NV memory is locked."""
    for handle, index in INDICES.items():
        size = len(index.content)
        tpm.execute(
            tpm12.nv_define(handle, size, index.attributes, auth=index.auth, read_by=index.pcrs)
        )
        if index.kind is Kind.GPIO_INDEX:
            continue
        tpm.nv_write(handle, index.content)
    tpm.nv_write(0x0001_1104, b"")  # is locked with that
    tpm.nv_read(0x0001_1105, 0)  # so is that, until a reset
    tpm.nv_write(DATA_REGISTER, REGISTER)
    certificate = certificate_of(tpm.endorsement_key())
    tpm.nv_define(CERTIFICATE_INDEX, len(certificate))
    tpm.nv_write(CERTIFICATE_INDEX, certificate)
    tpm.nv_lock()


def use(emulator: Emulator) -> Remembered:
    """Have a TPM with one of each kind."""
    with powered(emulator) as (control, tpm):
        tpm.enable()
        restart(control, tpm)
        tpm.create_endorsement_key()
        public = tpm.endorsement_key()
        define_all(tpm)
        tpm.create_family(7)
        tpm.execute(tpm12.physical_presence(0x0008))
        tpm.set_operator_auth(OPERATOR)
        tpm.take_ownership(OWNER, STORAGE)
        key = tpm.create_key(STORAGE, USAGE)
        tpm.keep_key(tpm.load_key(key, STORAGE), key, OWNER)
        made = [tpm.create_counter(OWNER, COUNTER, label) for label in (b"one.", b"two.")]
        tpm.audit(Ordinal.EXTEND, OWNER)
        tpm.extend(3, bytes(DIGEST_BYTES))
        return Remembered(
            endorsement_key=public,
            sealed=tpm.seal(SECRET, STORAGE, USAGE),
            key=key,
            counters={handle: tpm.counter(handle) for handle in made},
            flags=flags(tpm),
        )


def flags(tpm: Tpm12) -> bytes:
    """Return the permanent flags, a byte each."""
    return tpm.capability(CAP_FLAG, struct.pack(">I", PERMANENT_FLAGS))[2:]


def of_fate(fate: Fate) -> list[int]:
    """Return the indices that are to be of a fate."""
    return [handle for handle, index in INDICES.items() if FATES[index.kind][0] is fate]


def refused(code: int, act: Callable[..., object], *arguments: object) -> None:
    """Have the TPM refuse something."""
    with pytest.raises(Tpm12Error) as caught:
        act(*arguments)
    assert caught.value.code == code


def secrets_of(state: bytes) -> list[bytes]:
    """Return what must not be in a new TPM: authorisations, proofs and keys."""
    whole = decode(state, StateType.PERMANENT, VERSION).root.find("permanent-all")
    assert whole is not None
    data, keys = (whole.find(name) for name in ("permanent-data", "owner-evict-keys"))
    assert data is not None and keys is not None
    found = [
        leaf.value
        for node in (*data.children, keys)
        for leaf in node.leaves()
        if node.name != "counters" and leaf.is_secret
    ]
    found = [value for value in found if isinstance(value, bytes) and any(value)]
    assert len(found) >= SECRETS_MIN
    return [value for value in found if isinstance(value, bytes)]


@pytest.fixture
def old(lab: Lab) -> tuple[Emulator, Remembered]:
    """Give a vTPM that has one of each kind, and was stopped."""
    emulator = lab.emulator(VTPMD, version=VERSION)
    remembered = use(emulator)
    assert emulator.stop() == 0
    return emulator, remembered


def test_each_kind_of_thing_has_the_fate_that_the_table_says(
    lab: Lab, old: tuple[Emulator, Remembered]
) -> None:
    emulator, remembered = old
    into, said = replace(lab, emulator.state)
    fates = {(each["kind"], each["handle"]): each["fate"] for each in said["contents"]}
    assert {kind for kind, _ in fates} == KINDS[VERSION] - NOT_MADE_HERE
    assert all(fate == FATES[Kind(kind)][0] for (kind, _), fate in fates.items())
    for handle, index in INDICES.items():
        assert (index.kind, f"{handle:#010x}") in fates
    with powered(lab.emulator(VTPMD, into, version=VERSION)) as (_, tpm):
        listed = [each for (each,) in struct.iter_unpack(">I", tpm.capability(CAP_NV_LIST))]
        assert sorted(listed) == sorted(of_fate(Fate.KEPT))
        assert_guarded(tpm)
        assert_flags(tpm, remembered)
        assert_new(tpm, remembered)


def assert_guarded(tpm: Tpm12) -> None:
    """Read what is kept, and try whether what guards it does so."""
    for handle in (0x0001_1101, 0x0001_1104, 0x0001_1105, 0x0001_1106, 0x1000_F001):
        content = INDICES[handle].content
        assert tpm.nv_read(handle, len(content)) == content
    assert tpm.nv_read(DATA_REGISTER, DIGEST_BYTES) == REGISTER
    size = len(INDICES[0x0001_1102].content)
    refused(AUTH_CONFLICT, tpm.nv_read, 0x0001_1102, size)
    size = len(INDICES[0x0001_1103].content)
    refused(WRONG_PCR, tpm.nv_read, 0x0001_1103, size)
    tpm.extend(10, EXTENDED)
    assert tpm.nv_read(0x0001_1103, size) == INDICES[0x0001_1103].content
    refused(BAD_PRESENCE, tpm.nv_write, 0x0001_1101, b"x")
    tpm.execute(tpm12.physical_presence(0x0008))
    tpm.nv_write(0x0001_1101, b"x")
    refused(AREA_LOCKED, tpm.nv_write, 0x0001_1104, b"x")
    refused(AUTH_CONFLICT, tpm.nv_write, 0x0001_1106, b"x")
    refused(AUTH_FAIL, tpm.nv_write_by_owner, 0x0001_1106, b"x", bytes(DIGEST_BYTES))
    refused(NO_OWNER, tpm.nv_read_auth, 0x0001_1102, size, INDEX)
    refused(BAD_INDEX, tpm.nv_define, 0x1000_F000, 3)


def assert_flags(tpm: Tpm12, remembered: Remembered) -> None:
    """Look for the platform's flags, which are kept, and the owner's, which are not."""
    now = flags(tpm)
    assert now[NV_LOCKED] == remembered.flags[NV_LOCKED] == 1
    assert now[DISABLE] == remembered.flags[DISABLE] == 0
    assert (now[READ_PUBLIC_KEY], remembered.flags[READ_PUBLIC_KEY]) == (1, 0)
    assert (now[HAS_OPERATOR], remembered.flags[HAS_OPERATOR]) == (0, 1)


def assert_new(tpm: Tpm12, remembered: Remembered) -> None:
    """Look for what a new TPM has: another key, no owner; then make the same person its owner."""
    theirs, ours = (
        key.public_numbers() for key in (remembered.endorsement_key, tpm.endorsement_key())
    )
    assert ours != theirs
    refused(NO_OWNER, tpm.seal, SECRET, STORAGE, USAGE)
    for handle, before in remembered.counters.items():
        assert tpm.counter(handle) == before
        refused(NO_OWNER, tpm.increment, handle, COUNTER)
    tpm.take_ownership(OWNER, STORAGE)
    guarded = INDICES[0x0001_1102]
    assert tpm.nv_read_auth(0x0001_1102, len(guarded.content), guarded.auth) == guarded.content
    tpm.nv_write_by_owner(0x0001_1106, b"x", OWNER)
    with pytest.raises(Tpm12Error):
        tpm.unseal(remembered.sealed, STORAGE, USAGE)
    with pytest.raises(Tpm12Error):
        tpm.load_key(remembered.key, STORAGE)
    assert tpm.unseal(tpm.seal(SECRET, STORAGE, USAGE), STORAGE, USAGE) == SECRET
    highest = max(value for _, value in remembered.counters.values())
    for handle, (label, value) in remembered.counters.items():
        assert tpm.counter(handle) == (label, value)
    # Of all that are there one alone counts between two starts.
    assert tpm.increment(max(remembered.counters), COUNTER) > highest


def found_in(directory: Path, secrets: list[bytes]) -> list[str]:
    """Return the files of a directory that have a secret."""
    files = [path for path in directory.iterdir() if path.is_file()]
    return [path.name for path in files if any(each in path.read_bytes() for each in secrets)]


def test_nothing_of_the_old_tpm_is_in_the_new_directory(
    lab: Lab, old: tuple[Emulator, Remembered]
) -> None:
    """No secret, and no history: it is another vTPM, whose first generation it is."""
    emulator, _ = old
    before = take(emulator.state, None)
    into, said = replace(lab, emulator.state)
    assert (said["becomes"], said["epoch"], said["tpm"]) == (1, 0, "1.2")
    assert before.identity is not None and said["identity"] != before.identity.hex()
    secrets = [*secrets_of(before.states[StateType.PERMANENT]), SECRET, before.identity]
    assert found_in(into, secrets) == []
    new = lab.emulator(VTPMD, into, version=VERSION)
    with powered(new) as (_, tpm):
        tpm.execute(tpm12.physical_presence(0x0008))
        tpm.nv_write(0x0001_1101, b"changed")
    assert new.stop() == 0
    assert found_in(into, secrets) == []
    assert vtpmd("status", into, "--json").outcome["problems"] == []
    assert "fork" not in vtpmd("owner", into).output


@pytest.mark.parametrize("first", EmulatorKind)
@pytest.mark.parametrize("second", EmulatorKind)
@pytest.mark.parametrize("is_sealed", [False, True], ids=["plain", "encrypted"])
def test_it_is_made_and_served_by_either_program(
    lab: Lab, first: EmulatorKind, second: EmulatorKind, is_sealed: bool
) -> None:
    options = ("--key", f"file={lab.key_file('2a' * 16)},mode=aes-128-cbc") if is_sealed else ()
    emulator = lab.emulator(first, options=options, version=VERSION)
    with closing(RawGuest12(emulator.control_path)) as guest:
        guest.boot()
        before = guest.facts().nv
    emulator.kill()
    into, _ = replace(lab, emulator.state, *options)
    assert (before in (into / "tpm-00.permall").read_bytes()) is not is_sealed
    emulator = lab.emulator(second, into, options=options, version=VERSION)
    with closing(RawGuest12(emulator.control_path)) as guest:
        guest.control.init()
        guest.tpm12.startup()
        assert guest.facts().nv == before


def test_what_swtpm_setup_has_made_is_lost(lab: Lab, tmp_path: Path) -> None:
    """The endorsement key, and the certificates of it."""
    place = Place(OURS, tmp_path / "place", VERSION)
    setup(place, "--create-ek-cert", "--create-platform-cert", "--overwrite", "--lock-nvram")
    before = vtpmd("identity", place.state).output
    into, said = replace(lab, place.state)
    fates = {each["handle"]: (each["kind"], each["fate"]) for each in said["contents"]}
    assert fates["0x1000f000"] == (Kind.ENDORSEMENT_INDEX, Fate.LOST)
    assert fates["0x1000f002"] == (Kind.PLATFORM_INDEX, Fate.LOST)
    assert fates["0x40000006"] == (Kind.ENDORSEMENT_KEY, Fate.LOST)
    after = vtpmd("identity", into).output
    assert before.count("BEGIN CERTIFICATE") == 2 and "BEGIN CERTIFICATE" not in after
    assert "BEGIN PUBLIC KEY" in after and after.splitlines()[1:] != before.splitlines()[1:]


def test_it_is_put_into_a_device(
    lab: Lab, old: tuple[Emulator, Remembered], tmp_path: Path
) -> None:
    emulator, _ = old
    out = lab.new_path("export")
    assert vtpmd("export", emulator.state, "--out", out).status == 0
    before = take(emulator.state, None)
    with loop_device(tmp_path / "disk", 1 << 20) as device:
        ended = vtpmd("import", out, device, "--identity", "replace", "--linear")
        assert ended.status == 0, ended.error
        after = take(device, None)
        assert (after.version, after.generation) == (VERSION, 1)
        assert after.identity not in (None, before.identity)
        content = device.read_bytes()
        keys = [vtpmd("identity", path).output for path in (emulator.state, device)]
    assert not any(each in content for each in secrets_of(before.states[StateType.PERMANENT]))
    assert all("BEGIN PUBLIC KEY" in key for key in keys) and keys[0] != keys[1]
