"""States that a real libtpms makes, decoded to the last byte, and held against the TPM itself."""

import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.busy_tpm import CASES, INDEX, PERSISTENT
from tests.harness.live_tpm import LiveTpm
from tests.harness.saved_guest import SavedGuest
from tests.support import tpm2
from tests.support.tpm2 import CommandCode, Property, Reader
from vtpmd.inspect.decoding import Decoded
from vtpmd.inspect.tree import Node
from vtpmd.testing.emulator import VTPMD, EmulatorKind
from vtpmd.wire.tpm import StateType

KINDS = (StateType.PERMANENT, StateType.VOLATILE)


@pytest.fixture
def live() -> Iterator[LiveTpm]:
    with LiveTpm() as live:
        yield live


def is_tiled(root: Node) -> bool:
    """Return whether the leaves have each byte once, in order."""
    at = 0
    for leaf in root.leaves():
        if leaf.offset != at:
            return False
        at += leaf.length
    return at == root.length


def whole(decoded: Decoded) -> Decoded:
    """Return what was decoded, to the last byte."""
    assert not decoded.faults
    assert decoded.decoded_bytes == decoded.total_bytes
    assert is_tiled(decoded.root)
    return decoded


@pytest.mark.parametrize("name", CASES)
def test_every_byte_is_decoded(live: LiveTpm, name: str) -> None:
    CASES[name](live.tpm)
    for kind in KINDS:
        whole(live.decoded(kind))


def test_a_tpm_that_was_not_started_is_decoded() -> None:
    with LiveTpm(is_started=False) as live:
        for kind in KINDS:
            whole(live.decoded(kind))


def test_the_pcrs_are_those_that_the_tpm_reads(live: LiveTpm) -> None:
    CASES["pcrs"](live.tpm)
    pcrs = live.decoded(StateType.VOLATILE).root.find("volatile-state", "pcrs")
    assert pcrs is not None
    for number in range(24):
        assert pcrs.content(str(number), "sha256") == live.tpm.pcr(number)


@pytest.mark.parametrize("case", ["nv of each type", "nv with policy"])
def test_nv_indices_are_those_that_the_tpm_reads(live: LiveTpm, case: str) -> None:
    CASES[case](live.tpm)
    root = live.decoded(StateType.PERMANENT).root
    entries = root.find("persistent-all", "user-nvram", "entries")
    assert entries is not None
    seen = {node.number("handle"): node for node in entries.children if node.name != "end"}
    assert sorted(handle for handle in seen if handle) == _handles(live, INDEX)
    state = live.state(StateType.PERMANENT)
    for handle, node in seen.items():
        public = node.find("index", "public")
        assert handle is not None
        assert public is not None
        marshalled = Reader(live.tpm.execute(tpm2.nv_read_public(handle))).sized()
        assert state[public.offset : public.offset + public.length] == marshalled


def test_nv_contents_are_those_that_the_tpm_reads(live: LiveTpm) -> None:
    CASES["nv of each type"](live.tpm)
    root = live.decoded(StateType.PERMANENT).root
    for number, size in enumerate((32, 8, 32, 8)):
        path = ("persistent-all", "user-nvram", "entries", f"{INDEX + number:#010x}", "data")
        node = root.find(*path)
        assert node is not None
        assert not node.is_secret
        assert node.value == live.tpm.nv_read(INDEX + number, size)


def test_what_needs_an_authorisation_is_a_secret(live: LiveTpm) -> None:
    CASES["nv with policy"](live.tpm)
    root = live.decoded(StateType.PERMANENT).root
    for number in range(2):
        path = ("persistent-all", "user-nvram", "entries", f"{INDEX + number:#010x}", "data")
        node = root.find(*path)
        assert node is not None
        assert node.is_secret


def test_what_a_session_is_bound_to_is_a_secret(live: LiveTpm) -> None:
    """The authorisation is in there, as it is."""
    CASES["bound session"](live.tpm)
    state = live.state(StateType.VOLATILE)
    assert b"bound password" in state
    for leaf in live.decoded(StateType.VOLATILE).root.leaves():
        if not leaf.is_secret:
            assert b"bound password" not in state[leaf.offset : leaf.offset + leaf.length]


@pytest.mark.parametrize(
    "case", ["rsa", "rsa signing", "ecc", "ecc signing", "sealed", "hmac key", "symmetric key"]
)
def test_objects_are_those_that_the_tpm_reads(live: LiveTpm, case: str) -> None:
    CASES[case](live.tpm)
    assert _handles(live, PERSISTENT) == [PERSISTENT]
    state = live.state(StateType.PERMANENT)
    path = ("persistent-all", "user-nvram", "entries", f"{PERSISTENT:#010x}", "slot", "object")
    found = live.decoded(StateType.PERMANENT).root.find(*path)
    assert found is not None
    public, sensitive = found.find("public"), found.find("sensitive", "sensitive")
    assert public is not None
    assert sensitive is not None
    assert sensitive.is_secret
    answer = Reader(live.tpm.execute(tpm2.read_public(PERSISTENT)))
    assert state[public.offset : public.offset + public.length] == answer.sized()
    assert found.content("name") == answer.sized()
    assert found.content("qualified-name") == answer.sized()


def test_lockout_is_what_the_tpm_says(live: LiveTpm) -> None:
    CASES["owned"](live.tpm)
    data = live.decoded(StateType.PERMANENT).root.find("persistent-all", "persistent-data")
    assert data is not None
    for name, which in (
        ("failed-tries", Property.LOCKOUT_COUNTER),
        ("tries-max", Property.MAX_AUTH_FAIL),
        ("recovery-time-s", Property.LOCKOUT_INTERVAL_S),
        ("lockout-recovery-s", Property.LOCKOUT_RECOVERY_S),
    ):
        assert data.number(name) == live.tpm.property(which)


def test_failed_tries_are_counted(live: LiveTpm) -> None:
    CASES["locked out"](live.tpm)
    data = live.decoded(StateType.PERMANENT).root.find("persistent-all", "persistent-data")
    assert data is not None
    assert data.number("failed-tries") == live.tpm.property(Property.LOCKOUT_COUNTER)
    assert data.number("failed-tries")


def test_the_clock_and_the_counts_are_the_tpms(live: LiveTpm) -> None:
    CASES["owned"](live.tpm)
    before = live.tpm.clock()
    root = live.decoded(StateType.VOLATILE).root.find("volatile-state")
    after = live.tpm.clock()
    assert root is not None
    clock = root.number("orderly-data", "clock-ms")
    assert clock is not None
    assert before.clock_ms <= clock <= after.clock_ms
    assert root.at("orderly-data", "clock-safe") == after.safe
    assert root.number("state-reset", "restart-count") == after.restart_count
    data = live.decoded(StateType.PERMANENT).root.find("persistent-all", "persistent-data")
    assert data is not None
    assert data.number("reset-count") == after.reset_count


def test_sessions_have_the_attributes_that_they_were_given(live: LiveTpm) -> None:
    CASES["sessions"](live.tpm)
    slots = live.decoded(StateType.VOLATILE).root.find("volatile-state", "sessions", "slots")
    assert slots is not None
    hmac, policy, trial = (slots.find(str(number), "session") for number in range(3))
    assert hmac is not None
    assert policy is not None
    assert trial is not None
    assert hmac.words("attributes") == ""
    assert policy.words("attributes") == "isPolicy"
    assert policy.words("command") == "Unseal"
    assert policy.words("hash-algorithm") == "SHA384"
    assert trial.words("attributes") == "isPolicy isTrialPolicy"
    assert hmac.words("symmetric", "algorithm") == "AES"


def test_a_served_vtpm_is_inspected_and_serves_on(live: LiveTpm) -> None:
    CASES["nv of each type"](live.tpm)
    command: list[str | Path] = [VTPMD, "inspect", "--json", live.emulator.state]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    known = json.loads(shown.stdout)
    assert known["in-use"]
    assert known["journal-commits"]
    handles = [index["handle"] for index in known["nv"]["indices"]]
    assert handles == [f"{INDEX + number:#010x}" for number in range(5)]
    assert known["surprises"] == []
    live.tpm.nv_increment(INDEX + 1)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    index = json.loads(again.stdout)["nv"]["indices"][1]
    assert int(index["data"], 16) == live.tpm.nv_counter(INDEX + 1)


def test_a_full_memory_is_a_surprise(live: LiveTpm) -> None:
    CASES["nv full"](live.tpm)
    command: list[str | Path] = [VTPMD, "inspect", "--json", live.emulator.state]
    known = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    (surprise,) = known["surprises"]
    nv = known["nv"]
    assert surprise == f"NV memory is nearly full: {nv['used-bytes']} of {nv['bytes']} bytes"


def verified(path: Path) -> dict[str, str]:
    """Have a directory that is served verified, which must be fine; return what was found."""
    command: list[str | Path] = [VTPMD, "verify", "--json", path]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    outcome = json.loads(shown.stdout)
    assert outcome["verdict"] == "fine"
    return {check["name"]: check["finding"] for check in outcome["checks"]}


def test_a_served_vtpm_is_verified(live: LiveTpm) -> None:
    CASES["everything"](live.tpm)
    found = verified(live.emulator.state)
    assert found == dict.fromkeys(("container", "permanent state", "libtpms"), "passed")


def test_a_directory_of_swtpms_is_decoded_whole() -> None:
    with LiveTpm(EmulatorKind.SWTPM) as live:
        CASES["everything"](live.tpm)
        for kind in KINDS:
            whole(live.decoded(kind))
        live.control.store_volatile()
        found = verified(live.emulator.state)
    assert found == dict.fromkeys(
        ("container", "permanent state", "volatile state", "libtpms"), "passed"
    )


def test_a_saved_guests_vtpm_is_found_in_its_stream(saved_guest: SavedGuest) -> None:
    command: list[str | Path] = [VTPMD, "inspect", "--json", saved_guest.path]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    known = json.loads(shown.stdout)
    assert known["kind"] == "migration-stream"
    assert set(known["states"]) == {"permanent", "volatile"}
    for state in known["states"].values():
        assert state["decoded-bytes"] == state["bytes"]
    values = known["pcrs"]["values"]["sha256"]
    for name in ("pcr_seal", "pcr_chain"):
        assert saved_guest.facts[name] in values.values()


def test_audited_commands_are_named(live: LiveTpm) -> None:
    CASES["audit"](live.tpm)
    data = live.decoded(StateType.PERMANENT).root.find("persistent-all", "persistent-data")
    assert data is not None
    words = data.words("audit-commands").split()
    assert {"GetRandom", "PCR_Extend", "SetCommandCodeAuditStatus"} == set(words)
    assert data.words("audit-algorithm") == "SHA256"
    answer = Reader(live.tpm.execute(tpm2.get_capability(4, 0x11F, 200)))  # TPM_CAP_AUDIT_COMMANDS
    answer.take(1 + 4)
    assert answer.unsigned(4) == len(words)


def _handles(live: LiveTpm, first: int) -> list[int]:
    """Return the handles of one range that the TPM has."""
    built = tpm2.command(CommandCode.GET_CAPABILITY, parameters=struct.pack(">III", 1, first, 1000))
    reader = Reader(live.tpm.execute(built))
    reader.take(1 + 4)
    return [reader.unsigned(4) for _ in range(reader.unsigned(4))]
