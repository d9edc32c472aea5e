"""Whatever is wrong with the peer or the link before the freeze, QEMU's stream carries whole blobs.

Invariants of the design that are checked: 6 (a tail only for an authenticated peer that holds a
base) and 3 (the destination takes the whole blobs, nothing half applied is in the way). The guest's
migration does not fail, and people are told why it moved more: in the log, by an event, and in the
answer to query-migration.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest

from tests.harness.handover import (
    Host,
    Pair,
    assert_serves,
    assert_tail,
    assert_whole,
    make_armed_pair,
    make_host,
    make_pair,
    restarted,
    stopped,
)
from tests.harness.lab import Lab
from vtpmd.migration.source import HEARD_US_MAX
from vtpmd.testing.credentials import (
    HOST,
    authority,
    credentials,
    foreign_credentials,
    stranger_credentials,
)
from vtpmd.testing.emulator import EmulatorKind, Peering
from vtpmd.testing.link import Cut, Ending
from vtpmd.testing.program import Program
from vtpmd.testing.waiting import WAIT_TIMEOUT_S, wait_until

UUID = "8f2c0d6e-5a5b-4c1e-9d1a-3f0c7d1f2b11"
OTHER_UUID = "8f2c0d6e-5a5b-4c1e-9d1a-3f0c7d1f2b12"
ROUNDS = 3  # that the link is cut in
EXPIRES_S = (4, 16, 64)  # a certificate, after it is made


def assert_falls_back(source: Host, destination: Host, reason: str) -> None:
    """Check that people are told why, and migrate with whole blobs.

    The event has come and was taken, or comes when QEMU asks for the state.
    """
    facts = source.guest.facts()
    blobs = source.guest.save()
    assert_whole(blobs)
    report = source.manage.migration()
    assert report["outcome"] == "fall-back"
    assert report["reason"] and reason in report["reason"]
    assert report["reason"].isprintable()
    told = [event for event in source.manage.events if event["event"] == "VTPM_FALL_BACK"]
    assert told[-1]["data"]["reason"] == report["reason"]
    logged = [line for line in source.log if report["reason"] in line]
    assert len(logged) >= 1
    destination.guest.load(blobs)
    assert destination.guest.facts() == facts
    assert_serves(destination.guest)


def arm_in_vain(source: Host, address: str) -> None:
    """Begin a session with whoever is there; wait until it has failed."""
    assert source.manage.arm(address)["event"] == "VTPM_FALL_BACK"


@contextmanager
def unused_address() -> Iterator[str]:
    """Give the address of a port that nobody listens on, and nobody else gets meanwhile."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # swtpm does so, too
        bound.bind((HOST, 0))
        yield f"{HOST}:{bound.getsockname()[1]}"


def test_nobody_listens(lab: Lab) -> None:
    pair = make_pair(lab)
    with unused_address() as address:
        arm_in_vain(pair.source, address)
    assert_falls_back(pair.source, pair.destination, "nobody listens")


def test_host_name_is_unknown(lab: Lab) -> None:
    pair = make_pair(lab)
    arm_in_vain(pair.source, "no-such-host.invalid:7000")
    assert_falls_back(pair.source, pair.destination, "no-such-host.invalid:7000")


def test_peer_is_swtpm(lab: Lab) -> None:
    """Its TCP control channel takes TLS's first bytes for a command."""
    pair = make_pair(lab)
    state = lab.new_path("swtpm")
    state.mkdir()
    arguments = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl"]
    with unused_address() as address:
        port = int(address.rpartition(":")[2])
        swtpm = Program("swtpm", [*arguments, f"type=tcp,port={port}"], state)
        try:
            wait_for_port(swtpm, port)
            arm_in_vain(pair.source, address)
        finally:
            swtpm.kill()
    assert_falls_back(pair.source, pair.destination, "did not answer in time; is it a vtpmd?")


def wait_for_port(program: Program, port: int) -> None:
    """Wait until a program listens; RuntimeError when it ends instead."""

    def listens() -> bool:
        program.raise_if_ended()
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) == 0

    wait_until(listens)


def test_peer_speaks_no_tls(lab: Lab) -> None:
    pair = make_pair(lab)
    with socket.create_server((HOST, 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"220 mail.example ESMTP\r\n")
                connection.recv(1 << 16)

        thread = threading.Thread(target=greet)
        thread.start()
        arm_in_vain(pair.source, f"{HOST}:{server.getsockname()[1]}")
        thread.join()
    assert_falls_back(pair.source, pair.destination, "does not speak our TLS")


def test_peer_says_nothing(lab: Lab) -> None:
    """It takes the connection and no more: QEMU does not wait for it."""
    pair = make_pair(lab)
    with socket.create_server((HOST, 0)) as server:
        address = f"{HOST}:{server.getsockname()[1]}"
        pair.source.manage.command("migrate-arm", to=address)
        connection, _ = server.accept()
        with connection:
            assert_whole(pair.source.guest.save())
            pair.source.manage.wait_for("VTPM_FALL_BACK")
            assert_falls_back(pair.source, pair.destination, "before the destination held a base")


def test_peer_has_another_uuid(lab: Lab) -> None:
    pair = make_pair(
        lab,
        source=Peering(credentials=credentials(), uuid=UUID),
        destination=Peering(credentials=credentials(), uuid=OTHER_UUID),
    )
    assert pair.arm()["event"] == "VTPM_FALL_BACK"
    assert_falls_back(pair.source, pair.destination, "UUIDs differ")


def test_peer_runs_a_tpm_already(lab: Lab) -> None:
    pair = make_pair(lab)
    pair.destination.guest.boot()
    facts = pair.destination.guest.facts()
    assert pair.arm()["event"] == "VTPM_FALL_BACK"
    assert pair.destination.guest.facts() == facts
    assert_falls_back(pair.source, pair.destination, "uses the TPM there already")


def test_peer_trusts_another_authority(lab: Lab) -> None:
    pair = make_pair(lab, destination=Peering(credentials=foreign_credentials()))
    assert pair.arm()["event"] == "VTPM_FALL_BACK"
    assert_falls_back(pair.source, pair.destination, "was not issued by a CA in our ca-cert.pem")


def test_source_is_of_an_authority_that_the_peer_does_not_trust(lab: Lab) -> None:
    """It trusts the peer's, so it is the peer that refuses."""
    mixed = lab.directory / "mixed"
    mixed.mkdir()
    for role in ("server", "client"):
        for kind in ("cert", "key"):
            content = (foreign_credentials() / f"{role}-{kind}.pem").read_bytes()
            path = mixed / f"{role}-{kind}.pem"
            path.touch(0o600)
            path.write_bytes(content)
    both = [directory / "ca-cert.pem" for directory in (credentials(), foreign_credentials())]
    (mixed / "ca-cert.pem").write_bytes(b"".join(path.read_bytes() for path in both))
    pair = make_pair(lab, source=Peering(credentials=mixed, listens=False))
    assert pair.arm()["event"] == "VTPM_FALL_BACK"
    pair.destination.vtpmd.program.wait_for_output("was not issued by a CA")
    assert_falls_back(pair.source, pair.destination, "refuses us: unknown ca")


def pair_whose_peer_expires(lab: Lab) -> tuple[Pair, datetime]:
    """Start a pair, of which one's certificate is good for some seconds more, and until when.

    As vtpmd does not start with an expired one, it lasts longer where that has taken longer.
    """
    for lasts_s in EXPIRES_S[:-1]:
        with suppress(RuntimeError):  # it has ended
            return _pair_until(lab, lasts_s)
    return _pair_until(lab, EXPIRES_S[-1])


def _pair_until(lab: Lab, lasts_s: int) -> tuple[Pair, datetime]:
    not_after = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=lasts_s)
    peering = Peering(credentials=authority().issue_until(not_after))
    return make_pair(lab, destination=peering), not_after


def test_certificate_of_the_peer_has_expired(lab: Lab) -> None:
    pair, not_after = pair_whose_peer_expires(lab)
    assert pair.destination.vtpmd.port
    while datetime.now(UTC) <= not_after:
        time.sleep(0.05)
    assert pair.arm()["event"] == "VTPM_FALL_BACK"
    assert_falls_back(pair.source, pair.destination, "has expired")


def test_certificate_of_the_source_has_expired(lab: Lab) -> None:
    expired = Peering(credentials=authority().issue_expired(), listens=False)
    pair = make_pair(lab, source=expired)
    assert pair.arm()["event"] == "VTPM_FALL_BACK"
    assert_falls_back(pair.source, pair.destination, "has expired")


def test_certificate_of_the_peer_is_for_another_host(lab: Lab) -> None:
    pair = make_pair(lab, destination=Peering(credentials=stranger_credentials()))
    assert pair.arm()["event"] == "VTPM_FALL_BACK"
    assert_falls_back(pair.source, pair.destination, "no alternative name that is the host")


def test_credentials_of_the_source_are_missing(lab: Lab) -> None:
    nowhere = lab.directory / "nowhere"
    pair = make_pair(lab, source=Peering(credentials=nowhere, listens=False))
    assert pair.arm()["event"] == "VTPM_FALL_BACK"
    assert_falls_back(pair.source, pair.destination, str(nowhere))


@pytest.mark.parametrize("side", ["source", "destination"])
def test_name_is_not_allowed(lab: Lab, side: str) -> None:
    """Each side allows whom it knows: neither the one nor the other is enough."""
    allow = Peering(credentials=credentials(), allow=("friend.example",))
    pair = make_pair(
        lab,
        source=allow if side == "source" else None,
        destination=allow if side == "destination" else None,
    )
    assert pair.arm()["event"] == "VTPM_FALL_BACK"
    assert_falls_back(pair.source, pair.destination, f"{HOST} is not allowed here")


def test_destination_was_restarted_in_between(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    destination = restarted(lab, stopped(pair.destination))
    pair.source.manage.wait_for("VTPM_FALL_BACK")
    assert_falls_back(pair.source, destination, "its vtpmd stops")


def test_destination_was_killed_and_started_again_in_between(lab: Lab) -> None:
    """What it had made durable of the rounds is not in the way of whole blobs."""
    pair = make_armed_pair(lab)
    pair.destination.vtpmd.kill()
    pair.source.manage.wait_for("VTPM_FALL_BACK")
    assert_falls_back(pair.source, restarted(lab, pair.destination), "destination")


def test_source_was_disarmed(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    pair.source.manage.command("migrate-disarm")
    pair.source.manage.wait_for("VTPM_FALL_BACK")
    assert_falls_back(pair.source, pair.destination, "disarmed on request")


def test_nobody_armed_a_session(lab: Lab) -> None:
    pair = make_pair(lab)
    facts, blobs = pair.source.guest.facts(), pair.source.guest.save()
    assert_whole(blobs)
    pair.destination.guest.load(blobs)
    assert pair.destination.guest.facts() == facts
    assert pair.source.manage.migration() == {"state": "none"}


def test_second_session_succeeds_after_a_fall_back(lab: Lab) -> None:
    pair = make_armed_pair(lab)
    pair.source.manage.command("migrate-disarm")
    pair.source.manage.wait_for("VTPM_FALL_BACK")
    assert pair.arm()["event"] == "VTPM_ARMED"
    facts, blobs = pair.source.guest.facts(), pair.source.guest.save()
    assert_tail(blobs)
    pair.destination.guest.load(blobs)
    assert pair.destination.guest.facts() == facts


def arm_and_work(pair: Pair) -> bool:
    """Begin a session and let it have rounds; return False when it has ended before."""
    if pair.arm()["event"] == "VTPM_FALL_BACK":
        return False
    for _ in range(ROUNDS):
        pair.source.guest.work()
        if pair.source.manage.wait_for("VTPM_ROUND", "VTPM_FALL_BACK")["event"] != "VTPM_ROUND":
            return False
        if not pair.source.manage.wait_for_acknowledgement():
            pair.source.manage.wait_for("VTPM_FALL_BACK")
            return False
    return True


@pytest.mark.parametrize("ending", [Ending.RESET, Ending.HALFWAY])
def test_link_is_cut_at_each_record_before_the_freeze(lab: Lab, ending: Ending) -> None:
    """Cut at the first record of TLS, then at the second, until rounds have passed uncut."""
    pair = make_pair(lab)
    for records in count():
        pair.link.cut_at(Cut(after=records, ending=ending))
        if arm_and_work(pair):
            if pair.link.spare():
                break
            pair.source.manage.wait_for("VTPM_FALL_BACK")  # a Ping, or its Pong, came to the cut
        assert pair.link.was_cut.is_set()
        assert_falls_back(pair.source, pair.destination, "")
        pair.destination.guest.control.stop()
    assert records > 8  # two for the handshake, Hello, Welcome, Key, and three for each round
    assert_tail(pair.source.guest.save())


def test_invariant_6_link_is_silent_from_the_first_round_on(lab: Lab) -> None:
    """The destination holds a base, and the source is not told that nothing gets through."""
    pair = make_pair(lab)
    assert pair.arm()["event"] == "VTPM_ARMED"
    pair.link.cut_at(Cut(ending=Ending.SILENCE))
    pair.source.guest.work()
    assert pair.link.was_cut.wait(WAIT_TIMEOUT_S)
    time.sleep(HEARD_US_MAX / 1e6)  # for so long a tail may still be given
    assert_whole(pair.source.guest.save())
    reason = pair.source.manage.wait_for("VTPM_FALL_BACK")["data"]["reason"]
    assert "the destination has not been heard of for" in reason


def test_swtpm_goes_on_from_either_directory_after_a_fall_back(lab: Lab) -> None:
    """Invariant 9: what a session has left there does not matter to swtpm."""
    pair = make_armed_pair(lab)
    pair.source.manage.command("migrate-disarm")
    pair.source.manage.wait_for("VTPM_FALL_BACK")
    assert_falls_back(pair.source, pair.destination, "disarmed on request")
    for host in (pair.source, pair.destination):
        nv = host.guest.facts().nv
        swtpm = lab.raw_guest(lab.emulator(EmulatorKind.SWTPM, stopped(host).vtpmd.state))
        swtpm.control.init()
        swtpm.tpm.startup()
        assert swtpm.facts().nv == nv


def test_peer_without_a_session_is_told_to_go(lab: Lab) -> None:
    """A vtpmd that has no credentials for peers says so when it is armed."""
    host = make_host(lab)
    with pytest.raises(Exception, match="is no address"):
        host.manage.command("migrate-arm", to="nonsense")
