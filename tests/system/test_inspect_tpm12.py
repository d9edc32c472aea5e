"""A TPM 1.2's states, as libtpms makes them: decoded to the last byte, and held against the TPM."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from tests.harness.busy_tpm12 import AUTH_READ, CASES, CERTIFICATE_INDEX, OWNER, STORAGE
from tests.harness.live_tpm12 import LiveTpm12
from tests.support import tpm12
from tests.support.cli_run import QuietRun
from tests.support.tpm12 import NV_INDEX, Tpm12
from tests.system.test_inspect_live import is_tiled
from vtpmd.inspect.difference import differences
from vtpmd.inspect.identity import identity_of
from vtpmd.inspect.overview import Inspected, overview
from vtpmd.inspect.secrets import Secrets
from vtpmd.wire.tpm import StateType

# Of TPM_GetCapability.
CAP_FLAG, CAP_PROPERTY, CAP_KEY_HANDLE, CAP_NV_LIST, CAP_NV_INDEX = 4, 5, 7, 0x0D, 0x11
PERMANENT, VOLATILE = 0x108, 0x109
PROP_OWNER, PROP_MAX_COUNTERS, PROP_FAMILY_ROWS = 0x111, 0x10F, 0x114
SAVED = (StateType.PERMANENT, StateType.VOLATILE, StateType.SAVESTATE)


@pytest.fixture
def live() -> Iterator[LiveTpm12]:
    with LiveTpm12() as live:
        yield live


def known(live: LiveTpm12) -> dict[str, Any]:
    """Return what its states say."""
    found = live.seen()
    return overview(found, Secrets(found.states.values()))


def assert_whole(found: Inspected) -> None:
    for decoded in found.states.values():
        assert not decoded.faults
        assert decoded.decoded_bytes == decoded.total_bytes
        assert is_tiled(decoded.root)


def long(value: int) -> bytes:
    return struct.pack(">I", value)


@pytest.mark.parametrize("name", CASES)
def test_every_byte_is_decoded(live: LiveTpm12, name: str) -> None:
    CASES[name](live.tpm)
    assert_whole(live.seen())
    live.tpm.save_state()
    found = live.seen()
    assert tuple(found.states) == SAVED
    assert_whole(found)


def test_a_tpm_that_was_not_started_is_decoded() -> None:
    with LiveTpm12(is_started=False) as live:
        assert_whole(live.seen())
        own = known(live)["tpm12"]
        assert (own["waits-for-startup"], own["owner"]) == (True, False)


def test_a_digest_of_the_hash_interface_is_decoded(live: LiveTpm12) -> None:
    """As a DRTM leaves it, in the middle."""
    live.control.hash_start()
    live.control.hash_data(b"measured")
    found = live.seen()
    assert_whole(found)
    assert found.volatile.at("volatile-all", "hash-interface", "present") is True


def test_the_pcrs_are_those_that_the_tpm_reads(live: LiveTpm12) -> None:
    CASES["extended"](live.tpm)
    values = known(live)["pcrs"]["values"]["sha1"]
    assert values == {str(number): live.tpm.pcr(number).hex() for number in range(24)}
    live.tpm.save_state()
    saved = live.seen().states[StateType.SAVESTATE].root.find("saved", "stclear-data", "pcrs")
    assert saved is not None
    assert {node.name: saved.content(node.name).hex() for node in saved.children} == {
        str(number): values[str(number)] for number in range(16)
    }


def test_nv_indices_are_those_that_the_tpm_lists(live: LiveTpm12) -> None:
    CASES["nv indices"](live.tpm)
    raw = live.tpm.capability(CAP_NV_LIST)
    handles = [f"{handle:#010x}" for (handle,) in struct.iter_unpack(">I", raw)]
    nv = known(live)["nv"]
    assert sorted(each["handle"] for each in nv["indices"]) == sorted(handles)
    for each in nv["indices"]:
        public = live.tpm.capability(CAP_NV_INDEX, bytes.fromhex(each["handle"][2:]))
        # TPM_NV_DATA_PUBLIC: tag, index, two TPM_PCR_INFO_SHORT of 26 bytes, then these.
        attributes, read_locked, write_locked, defined, size = struct.unpack(
            ">2xI???I", public[6 + 2 * 26 :]
        )
        assert (each["bytes"], attributes & AUTH_READ) == (
            size,
            AUTH_READ * ("AUTHREAD" in each["attributes"]),
        )
        locks = {"READLOCKED": read_locked, "WRITELOCKED": write_locked, "WRITEDEFINED": defined}
        assert {word for word, is_so in locks.items() if is_so} == (
            locks.keys() & set(each["attributes"])
        )
        digest = public[6 + 6 : 6 + 26]
        assert each["policy"] == (digest.hex() if any(digest) else None)


def test_nv_contents_are_those_that_the_tpm_reads(live: LiveTpm12) -> None:
    CASES["nv indices"](live.tpm)
    indices = {each["handle"]: each for each in known(live)["nv"]["indices"]}
    for handle, size in ((NV_INDEX, 32), (CERTIFICATE_INDEX, 1000)):
        read = live.tpm.nv_read(handle, size)
        assert indices[f"{handle:#010x}"]["data"] == read.hex()
    for number in (1, 2):
        assert set(indices[f"{NV_INDEX + number:#010x}"]["data"]) == {"secret"}


def test_the_flags_are_those_that_the_tpm_tells(live: LiveTpm12) -> None:
    for name in ("nothing", "owned"):
        CASES[name](live.tpm)
        own = known(live)["tpm12"]
        told = live.tpm.capability(CAP_FLAG, long(PERMANENT))[2:]
        assert own["flags"] is not None
        assert list(map(bool, told)) == list(own["flags"].values())
        told = live.tpm.capability(CAP_FLAG, long(VOLATILE))[2:]
        assert list(map(bool, told)) == list(own["flags-until-reset"].values())
        owner = live.tpm.capability(CAP_PROPERTY, long(PROP_OWNER))
        assert own["owner"] is bool(owner[0])


def test_the_endorsement_key_is_that_which_the_tpm_reads(live: LiveTpm12) -> None:
    CASES["with endorsement key"](live.tpm)
    (key,) = identity_of(live.seen()).keys
    public = load_pem_public_key(key.pem.encode())
    theirs = live.tpm.endorsement_key()
    assert public.public_numbers() == theirs.public_numbers()  # type: ignore[union-attr]
    assert (key.handle, key.type) == ("0x40000006", "RSA 2048")


@pytest.mark.parametrize("name", ["with key", "kept key"])
def test_keys_have_the_handles_that_the_tpm_lists(live: LiveTpm12, name: str) -> None:
    CASES[name](live.tpm)
    raw = live.tpm.capability(CAP_KEY_HANDLE)
    handles = [handle for (handle,) in struct.iter_unpack(">I", raw[2:])]
    objects = known(live)["objects"]
    found = [int(each["handle"], 16) for each in objects]
    assert sorted(found) == sorted([0x4000_0000, 0x4000_0006, *handles])
    last = objects[-1]
    assert (last["type"], last["key-bits"], last["auth-set"]) == ("RSA", 2048, True)
    assert ("OWNER_EVICT" in last["attributes"]) is (name == "kept key")
    assert last["attributes"][0] == "SIGNING"


def test_a_loaded_key_has_the_public_part_that_was_wrapped(live: LiveTpm12) -> None:
    CASES["owned"](live.tpm)
    key = live.tpm.create_key(STORAGE, b"k" * 20)
    live.tpm.load_key(key, STORAGE)
    keys = live.seen().volatile.find("volatile-all", "loaded-keys", "keys")
    assert keys is not None
    (entry,) = keys.children
    modulus = int.from_bytes(entry.content("key", "public-key"), "big")
    assert modulus == key.public().public_numbers().n


def test_counters_are_those_that_the_tpm_reads(live: LiveTpm12) -> None:
    CASES["counters"](live.tpm)
    counters = known(live)["tpm12"]["counters"]
    assert len(counters) == 2
    for each in counters:
        label, value = live.tpm.counter(each["handle"])
        assert (each["label"], each["value"], each["auth-set"]) == (label.hex(), value, True)


def test_the_tables_are_as_long_as_the_tpm_says(live: LiveTpm12) -> None:
    data = live.seen().permanent.find("permanent-all", "permanent-data")
    assert data is not None
    for name, property_ in (("counters", PROP_MAX_COUNTERS), ("families", PROP_FAMILY_ROWS)):
        told = int.from_bytes(live.tpm.capability(CAP_PROPERTY, long(property_)), "big")
        table = data.find(name)
        assert table is not None
        assert len(table.children) == told


def test_audited_commands_have_their_names(live: LiveTpm12) -> None:
    before = set(known(live)["audit"]["commands"])
    CASES["audited"](live.tpm)
    assert set(known(live)["audit"]["commands"]) - before == {"Extend"}


def test_failed_tries_are_counted(live: LiveTpm12) -> None:
    CASES["failed tries"](live.tpm)
    lockout = known(live)["lockout"]
    assert (lockout["failed-tries"], lockout["locked-out"]) == (3, False)


def test_sessions_are_those_that_were_left_open(live: LiveTpm12) -> None:
    CASES["sessions"](live.tpm)
    assert [each["type"] for each in known(live)["sessions"]] == ["oiap", "osap", "transport"]


Act = Callable[[Tpm12], object]
CHANGES: list[tuple[str, Act, Act, set[str]]] = [
    (
        "an index is written",
        lambda tpm: tpm.nv_define(NV_INDEX, 64),
        lambda tpm: tpm.execute(tpm12.nv_write(NV_INDEX, b"y" * 32, 8)),
        {f"NV {NV_INDEX:#010x} written, 32 bytes at 8"},
    ),
    (
        "a PCR is extended",
        CASES["nothing"],
        lambda tpm: tpm.extend(7, bytes(20)),
        {"PCR 7 sha1 extended: "},
    ),
    (
        "it gets an owner",
        CASES["with endorsement key"],
        lambda tpm: tpm.take_ownership(OWNER, STORAGE),
        {"it has an owner", "object 0x40000000 added: RSA 2048"},
    ),
    (
        "a counter is made",
        CASES["owned"],
        lambda tpm: tpm.create_counter(OWNER, b"c" * 20, b"one."),
        {"counter 0 made: "},
    ),
    (
        "a family is made",
        CASES["nothing"],
        lambda tpm: tpm.create_family(1),
        {"families: 0 -> 1"},
    ),
]


@pytest.mark.parametrize(("before", "act", "told"), [case[1:] for case in CHANGES])
def test_what_it_is_told_to_do_is_what_differs(
    live: LiveTpm12, before: Act, act: Act, told: set[str]
) -> None:
    before(live.tpm)
    first = live.seen()
    act(live.tpm)
    texts = [change.text for change in differences(first, live.seen()) if change.part != "other"]
    assert all(any(text.startswith(words) for text in texts) for words in told)
    assert differences(first, first) == []


def test_commands_look_into_a_directory_in_use(
    live: LiveTpm12, capsys: pytest.CaptureFixture[str]
) -> None:
    CASES["nv indices"](live.tpm)
    CASES["owned"](live.tpm)
    path: Path = live.emulator.state
    shown = QuietRun(capsys, "inspect", path, "--json")
    assert (shown.status, shown.outcome["tpm"], shown.outcome["in-use"]) == (0, "1.2", True)
    assert QuietRun(capsys, "verify", path).status == 0
    assert QuietRun(capsys, "identity", path).output.startswith("# EK 0x40000006, RSA 2048")
    logged = QuietRun(capsys, "log", path, "--json").outcome["commits"]
    texts = [change["text"] for commit in logged[1:] for change in commit["changes"]]
    for words in (f"NV {NV_INDEX:#010x} written, 32 bytes at 0", "it has an owner"):
        assert words in texts
