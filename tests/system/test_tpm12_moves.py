"""A TPM 1.2 moves by rounds and a tail, as a TPM 2.0 does (test_stream_handover.py).

Invariants 3 (at most one side serves), 4 (what was acknowledged is durable), 5 (the state is the
same, bit for bit), 12 (a guest that sleeps wakes up) and 13 (only its own state).
"""

from hashlib import sha256

import pytest

from tests.harness.handover import Host, Pair, assert_tail, killed, make_host, stopped
from tests.harness.lab import Lab
from tests.harness.raw_guest import RawGuest12
from tests.support.emulator_client import ControlError
from tests.support.image_digest import whole_digest
from tests.support.tpm12 import StartupType, get_random
from vtpmd.store.directory import names_of
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Emulator, EmulatorKind, Peering
from vtpmd.testing.waiting import wait_until
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import TpmVersion

NAMES = names_of(TpmVersion.TPM_1_2)
NOTHING = (0x009, 0x800)  # TPM_FAIL, TPM_RETRY


def make_host_12(lab: Lab, peering: Peering | None = None) -> Host:
    vtpmd = lab.peer(peering, version=TpmVersion.TPM_1_2)
    return Host(vtpmd, lab.management(vtpmd), lab.raw_guest(vtpmd, RawGuest12))


def guest_of(host: Host) -> RawGuest12:
    assert isinstance(host.guest, RawGuest12)
    return host.guest


def make_armed_pair(lab: Lab) -> Pair:
    first, second = make_host_12(lab), make_host_12(lab)
    first.guest.boot()
    pair = Pair(first, second, lab.link(second.vtpmd))
    assert pair.arm()["event"] == "VTPM_ARMED"
    first.guest.work()
    return pair


def booted(lab: Lab, emulator: Emulator) -> RawGuest12:
    """Boot a guest from the state that an emulator has."""
    guest = RawGuest12(emulator.control_path)
    lab.close_at_end(guest)
    guest.control.init()
    guest.tpm12.startup()
    return guest


def assert_serves_nothing(host: Host) -> None:
    response = host.guest.data.transact(get_random(8))
    assert response[:6] == bytes.fromhex("00c4 0000000a")
    assert int.from_bytes(response[6:], "big") in NOTHING


def test_rounds_and_tail_move_it_bit_by_bit(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    for _ in range(3):
        pair.source.manage.wait_for("VTPM_ROUND")
        pair.source.guest.work()
    facts = pair.source.guest.facts()
    blobs = pair.source.guest.save()
    assert_tail(blobs)
    pair.destination.guest.load(blobs)
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    report = pair.source.manage.migration()
    assert report["outcome"] == "handed-over"
    wait_until(lambda: not (pair.destination.vtpmd.state / NAMES.incoming).exists())
    file = (pair.destination.vtpmd.state / NAMES.permanent).read_bytes()
    digest = whole_digest(swtpm_format.decode_file(file))
    assert digest.hex() == report["digests"]["permanent"]
    assert pair.destination.guest.facts() == facts
    pair.destination.guest.work()
    assert_serves_nothing(pair.source)
    facts = pair.destination.guest.facts()
    pair.destination.guest.control.shutdown()
    state = stopped(pair.destination).vtpmd.state
    swtpm = lab.emulator(EmulatorKind.SWTPM, state, version=TpmVersion.TPM_1_2)
    assert booted(lab, swtpm).facts().nv == facts.nv


def test_invariant_4_it_is_durable_once_it_was_granted(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    facts = pair.source.guest.facts()
    pair.destination.guest.load(pair.source.guest.save())
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    state = killed(pair.destination).vtpmd.state
    assert booted(lab, lab.emulator(EmulatorKind.VTPMD, state)).facts().nv == facts.nv


def test_invariant_12_a_guest_that_sleeps_wakes_up_at_the_destination(lab: Lab) -> None:
    """The saved state is no part of what moves: it is made of the rest."""
    pair = make_armed_pair(lab)
    facts = pair.source.guest.facts()
    guest_of(pair.source).tpm12.save_state()
    saved = (pair.source.vtpmd.state / NAMES.savestate).read_bytes()
    pair.destination.guest.load(pair.source.guest.save())
    pair.source.manage.wait_for("VTPM_HANDED_OVER")
    path = pair.destination.vtpmd.state / NAMES.savestate
    wait_until(path.exists)
    assert sha256(path.read_bytes()).digest() == sha256(saved).digest()
    guest = guest_of(pair.destination)
    guest.control.stop()
    guest.control.init()
    guest.tpm12.startup(StartupType.STATE)
    assert guest.facts() == facts
    assert not path.exists()


def test_invariant_3_the_guest_goes_on_where_it_was(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    facts = pair.source.guest.facts()
    assert_tail(pair.source.guest.save())
    pair.source.guest.resume()
    assert pair.source.guest.facts() == facts
    pair.source.guest.work()
    assert pair.source.guest.facts() != facts
    assert_serves_nothing(pair.destination)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_invariant_13_one_is_never_taken_for_the_other(lab: Lab, *, is_reversed: bool) -> None:
    peering = Peering(credentials=credentials())
    older, newer = make_host_12(lab, peering), make_host(lab, peering)
    source, destination = (newer, older) if is_reversed else (older, newer)
    source.guest.boot()
    facts = source.guest.facts()
    event = source.manage.arm(destination.vtpmd.address)
    assert event["event"] == "VTPM_FALL_BACK"
    words = [version.facts.word for version in TpmVersion]
    first, second = reversed(words) if is_reversed else words
    refusal = f"the source has a TPM {first}, the destination a TPM {second}: "
    assert refusal in event["data"]["reason"]
    with pytest.raises(ControlError):
        destination.guest.load(source.guest.save())
    source.guest.resume()
    assert source.guest.facts() == facts
