"""Peers with a good certificate and a name that is allowed, that lie.

Invariants of the design that are checked: 8 (a peer's bytes are checked before they are used), 4
(what libtpms does not take is not acknowledged), 3 and 7. Each lie ends the session with one line
in the log; nothing half applied is in the way of the whole blobs that QEMU brings; the daemon
serves on, with as many descriptors as before.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.fake_peer import LINEAGE, WELCOME, FakeDestination, Stream, connect, hello
from tests.harness.handover import (
    Host,
    assert_serves,
    assert_serves_nothing,
    assert_tail,
    assert_whole,
    make_host,
)
from tests.harness.lab import Lab
from tests.harness.raw_guest import Blobs, Facts
from tests.harness.state_files import lineage
from tests.support import tail
from tests.support.beside import repeating
from tests.support.emulator_client import ControlError
from vtpmd.core import GENERATION_MAX, IMAGE_BYTES_MAX, Image
from vtpmd.core.delta import delta_encode
from vtpmd.core.lane import LANE_FRAME_BYTES, LaneFrame, LaneKind
from vtpmd.testing.credentials import credentials, stranger_credentials
from vtpmd.testing.emulator import Emulator, Peering
from vtpmd.wire import peer, swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import GENERATION_GIVEN_MAX, StateType

WAIT_TIMEOUT_S = 20.0
QUIET = Peering(credentials=credentials(), log_level="info")
# What a host says anyway: whole blobs that are set again restore an older state.
EXPECTED = re.compile("a source has connected|an older state of the vTPM was restored")
KEY = bytes(range(peer.KEY_BYTES))
MESSAGES_AT_ONCE = 3000
COMMANDS_IN_A_FLOOD = 30
NO_DIGEST = bytes(peer.DIGEST_BYTES)


class State(NamedTuple):
    """A guest's TPM as it was, as blobs, as libtpms' images, and as the guest knows it."""

    blobs: Blobs
    permanent: Image
    volatile: Image
    facts: Facts


@pytest.fixture(scope="module")
def state() -> Iterator[State]:
    """Take the state of a TPM that was used, as one of the fake source's vTPM."""
    with Lab() as lab:
        host = make_host(lab)
        host.guest.boot()
        facts, blobs = host.guest.facts(), host.guest.save()
        permanent = swtpm_format.decode_blob(blobs.permanent)
        whole = swtpm_format.encode_blob(permanent, Lineage(LINEAGE, 7))
        yield State(
            blobs._replace(permanent=whole),
            Image(StateType.PERMANENT, 7, permanent),
            Image(StateType.VOLATILE, 9, swtpm_format.decode_blob(blobs.volatile)),
            facts,
        )


def whole(image: Image) -> peer.Record:
    """Return the record of a whole image."""
    return peer.Record(delta_encode(Image(image.type, 0, b""), image))


def changed(image: Image, generation: int) -> Image:
    """Return a later image that libtpms takes as well: the same."""
    return image._replace(generation=generation)


def hold(
    stream: Stream, state: State, session: bytes | None = None, identity: bytes = LINEAGE
) -> peer.Hello:
    """Bring a destination to where it holds a base; return the Hello."""
    greeting = hello(session=session, lineage=identity)
    stream.send(greeting)
    stream.receive(peer.Welcome)
    stream.open_lane(greeting, KEY)
    stream.send(whole(state.permanent), whole(state.volatile))
    stream.send(peer.Commit(1, state.permanent.generation, state.volatile.generation, 0, 0))
    stream.receive(peer.Ack)
    return greeting


def sealed(
    session: bytes,
    *,
    records: tuple[bytes, bytes] = (b"", b""),
    permanent: tuple[int, int] = (7, 7),
    volatile: tuple[int, int] = (9, 9),
    uuid: bytes = bytes(peer.UUID_BYTES),
) -> Blobs:
    """Return a tail that opens with the session's key, and says what it is told to say."""
    header = tail.Header(session, *permanent, *volatile)
    cipher = tail.TailCipher(key=KEY, uuid=uuid, lineage=LINEAGE)
    return Blobs(cipher.seal(tail.Tail(header, 0, *records)), b"", b"")


Lie = Callable[[Stream, State], None]


def frame(number: int, body: bytes = b"", length: int | None = None) -> bytes:
    """Return a frame, which may announce another length than it has."""
    announced = 1 + len(body) if length is None else length
    return announced.to_bytes(4, "big") + bytes([number]) + body


def at_once(*messages: peer.Message) -> Lie:
    """Begin with messages instead of a Hello, or after none."""
    return lambda stream, _: stream.send(*messages)


def after_welcome(*messages: peer.Message, session: bytes | None = None) -> Lie:
    """Say something when the destination has welcomed the source."""

    def lie(stream: Stream, _: State) -> None:
        stream.send(hello(session=session))
        stream.receive(peer.Welcome)
        stream.send(*messages)

    return lie


def while_holding(make: Callable[[State, bytes], list[peer.Message]]) -> Lie:
    """Say something when the destination holds a base."""

    def lie(stream: Stream, state: State) -> None:
        greeting = hold(stream, state)
        stream.send(*make(state, greeting.session))

    return lie


def bytes_while_holding(data: bytes) -> Lie:
    """Send what is no message when the destination holds a base."""

    def lie(stream: Stream, state: State) -> None:
        hold(stream, state)
        stream.send_bytes(data)

    return lie


def on_the_lane(frame: LaneFrame) -> Lie:
    """Say something on the lane when the destination holds a base."""

    def lie(stream: Stream, state: State) -> None:
        hold(stream, state)
        assert stream.lane is not None
        stream.lane.send(frame)

    return lie


def garbage_on_the_lane(stream: Stream, state: State) -> None:
    """Say what was sealed with no key."""
    hold(stream, state)
    assert stream.lane is not None
    stream.lane.socket.sendall(bytes(LANE_FRAME_BYTES))


def records(make: Callable[[State], tuple[bytes, bytes, peer.Commit]]) -> Lie:
    """Send two records and a Commit as the first round."""

    def lie(stream: Stream, state: State) -> None:
        permanent, volatile, commit = make(state)
        greeting = hello()
        stream.send(greeting)
        stream.receive(peer.Welcome)
        stream.open_lane(greeting, KEY)
        stream.send(peer.Record(permanent), peer.Record(volatile), commit)

    return lie


def honest(state: State) -> tuple[bytes, bytes]:
    """Return the records of both whole images."""
    return whole(state.permanent).record, whole(state.volatile).record


def used_up(which: str, generation: int) -> Callable[[State], tuple[bytes, bytes, peer.Commit]]:
    """Make a round that is right but for a generation that leaves no more."""

    def make(state: State) -> tuple[bytes, bytes, peer.Commit]:
        images = [state.permanent, state.volatile]
        at = ("permanent", "volatile").index(which)
        images[at] = images[at]._replace(generation=generation)
        permanent, volatile = (whole(image).record for image in images)
        commit = peer.Commit(1, images[0].generation, images[1].generation, 0, 0)
        return permanent, volatile, commit

    return make


def damaged(image: Image) -> Image:
    """Return an image that libtpms refuses: its last byte, of a section's end, is another."""
    return image._replace(data=image.data[:-1] + bytes([image.data[-1] ^ 0xFF]))


COMMIT = peer.Commit(1, 7, 9, 0, 0)


def second_round(base: Callable[[State], Image], is_last: int) -> Lie:
    """Send a round that continues what the destination does not have."""
    return while_holding(
        lambda s, _: [
            peer.Record(delta_encode(base(s), changed(s.permanent, 10))),
            peer.Commit(2, 10, 9, 0, is_last),
        ]
    )


LIES: dict[str, Lie] = {
    # What is no message.
    "frame-of-length-0": bytes_while_holding(bytes(4)),
    "frame-of-4-gib": bytes_while_holding(b"\xff\xff\xff\xff" + bytes(64)),
    "frame-past-the-limit": bytes_while_holding(frame(5, length=peer.FRAME_BYTES_MAX + 1)),
    "message-of-no-type": bytes_while_holding(frame(0)),
    "message-of-an-unknown-type": bytes_while_holding(frame(99, b"x")),
    "commit-too-short": bytes_while_holding(frame(6, bytes(20))),
    "commit-too-long": bytes_while_holding(frame(6, bytes(22))),
    "refuse-with-too-much-text": bytes_while_holding(frame(3, bytes(3 + peer.TEXT_BYTES_MAX))),
    "half-a-frame": bytes_while_holding(frame(5, bytes(100), length=1000)),
    "random-bytes": bytes_while_holding(bytes(range(255, 0, -1)) * 40),
    # Messages at the wrong moment.
    "key-before-hello": at_once(peer.Key(KEY)),
    "record-before-hello": at_once(peer.Record(b"")),
    "hello-twice": after_welcome(hello()),
    "welcome-from-a-source": after_welcome(peer.Welcome(1, 0)),
    "ack-from-a-source": after_welcome(peer.Ack(1, 7, 9)),
    "released-from-a-source": after_welcome(peer.Released(bytes(16))),
    "kept-from-a-source": after_welcome(peer.Kept(bytes(16))),
    "running-from-a-source": after_welcome(peer.Running(bytes(16), 0, 0)),
    "reclaim-before-a-base": after_welcome(peer.Reclaim(bytes(16))),
    "stopped-before-hello": at_once(peer.Stopped(bytes(16))),
    "stopped-before-a-base": after_welcome(peer.Stopped(bytes(16)), session=bytes(16)),
    "stopped-of-another-session": while_holding(lambda *_: [peer.Stopped(bytes(16))]),
    **{
        f"{said.kind.name}-on-the-lane-before-the-tail": on_the_lane(said)
        for said in (
            LaneFrame(LaneKind.GRANT),
            LaneFrame(LaneKind.TAKE),
            LaneFrame(LaneKind.GO_ON),
            LaneFrame(LaneKind.REFUSE, reason=7),
        )
    },
    "garbage-on-the-lane": garbage_on_the_lane,
    "reclaim-before-the-tail": while_holding(lambda _, session: [peer.Reclaim(session)]),
    "key-after-the-base": while_holding(lambda *_: [peer.Key(KEY)]),
    "hello-after-the-base": while_holding(lambda _, session: [hello(session=session)]),
    # Commits of what is not there.
    "commit-without-images": after_welcome(peer.Key(KEY), peer.Commit(1, 0, 0, 0, 0)),
    "commit-without-a-volatile-image": records(
        lambda s: (honest(s)[0], honest(s)[0], peer.Commit(1, 7, 0, 0, 0))
    ),
    "commit-of-another-permanent-generation": records(
        lambda s: (*honest(s), peer.Commit(1, 8, 9, 0, 0))
    ),
    "commit-of-another-volatile-generation": records(
        lambda s: (*honest(s), peer.Commit(1, 7, 8, 0, 0))
    ),
    "commit-of-the-largest-generations": records(
        lambda s: (*honest(s), peer.Commit(1, (1 << 64) - 1, (1 << 64) - 1, 0, 0))
    ),
    **{
        f"round-of-{which}-generation-{generation:#x}": records(used_up(which, generation))
        for which in ("permanent", "volatile")
        for generation in (GENERATION_GIVEN_MAX + 1, GENERATION_MAX)
    },
    "commit-with-what-no-shutdown-says": records(
        lambda s: (*honest(s), peer.Commit(1, 7, 9, 3, 0))
    ),
    # Records that are none, or not for what the destination has.
    "record-that-is-empty": records(lambda s: (b"", honest(s)[1], COMMIT)),
    "record-that-is-garbage": records(lambda s: (bytes(500), honest(s)[1], COMMIT)),
    "record-of-the-largest-size": records(
        lambda s: (bytes(peer.FRAME_BYTES_MAX - 1), honest(s)[1], COMMIT)
    ),
    "record-that-was-cut": records(lambda s: (honest(s)[0][:-1], honest(s)[1], COMMIT)),
    "record-with-a-bit-flipped": records(
        lambda s: (honest(s)[0][:200] + b"\xff" + honest(s)[0][201:], honest(s)[1], COMMIT)
    ),
    "record-twice": records(lambda s: (honest(s)[0], honest(s)[0], COMMIT)),
    "record-of-savestate": records(
        lambda s: (
            whole(s.permanent._replace(type=StateType.SAVESTATE)).record,
            honest(s)[1],
            COMMIT,
        )
    ),
    "record-for-another-base": second_round(lambda s: changed(s.permanent, 8), 0),
    "last-record-for-another-base": second_round(lambda s: changed(s.permanent, 8), 1),
    "record-for-a-base-of-other-content": second_round(lambda s: damaged(s.permanent), 0),
    "last-record-for-a-base-of-other-content": second_round(lambda s: damaged(s.permanent), 1),
    # Valid records of what libtpms does not take.
    "permanent-state-that-is-none": records(
        lambda s: (
            whole(s.permanent._replace(data=b"no state")).record,
            honest(s)[1],
            COMMIT,
        )
    ),
    "permanent-state-that-is-empty": records(
        lambda s: (whole(s.permanent._replace(data=b"")).record, honest(s)[1], COMMIT)
    ),
    "permanent-state-that-is-damaged": records(
        lambda s: (whole(damaged(s.permanent)).record, honest(s)[1], COMMIT)
    ),
    "volatile-state-that-is-none": records(
        lambda s: (honest(s)[0], whole(s.volatile._replace(data=b"no state")).record, COMMIT)
    ),
    "volatile-state-that-is-the-permanent-one": records(
        lambda s: (honest(s)[0], whole(s.volatile._replace(data=s.permanent.data)).record, COMMIT)
    ),
    "largest-images-that-are-the-last": records(
        lambda s: (
            whole(s.permanent._replace(data=os.urandom(IMAGE_BYTES_MAX))).record,
            whole(s.volatile._replace(data=os.urandom(IMAGE_BYTES_MAX))).record,
            peer.Commit(1, 7, 9, 0, 1),
        )
    ),
    "second-round-that-libtpms-refuses": while_holding(
        lambda s, _: [
            peer.Record(delta_encode(s.permanent, changed(damaged(s.permanent), 8))),
            peer.Commit(2, 8, 9, 0, 0),
        ]
    ),
}

# Lies that the destination cannot tell from a source that is slow, until the source hangs up.
WAITING = {"half-a-frame"}


def speak(lab: Lab, host: Host, directory: Path | None = None) -> Stream:
    """Connect to a host as a source does, by default as one that is allowed."""
    stream = connect(host.vtpmd.port, directory or credentials())
    lab.close_at_end(stream)
    return stream


def descriptors(emulator: Emulator) -> int:
    """Count a process's open descriptors."""
    return len(list(Path(f"/proc/{emulator.program.pid}/fd").iterdir()))


def wait_for_descriptors(emulator: Emulator, wanted: int) -> None:
    """Wait until a process has closed what it opened for a connection."""
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while (found := descriptors(emulator)) != wanted:
        assert time.monotonic() < deadline, f"{found} descriptors are open, {wanted} were"
        time.sleep(0.005)


def assert_takes_whole_blobs(host: Host, state: State) -> None:
    """Bring a TPM in QEMU's own stream, use it, and stop it."""
    host.guest.load(state.blobs)
    assert host.guest.facts() == state.facts
    assert_serves(host.guest)
    host.guest.control.stop()


@pytest.mark.parametrize("names", [list(LIES)[0::2], list(LIES)[1::2]], ids=["even", "odd"])
def test_each_lie_of_a_source_ends_its_session_and_nothing_else(
    lab: Lab, state: State, names: list[str]
) -> None:
    """One destination hears them all, one after the other."""
    host = make_host(lab, QUIET)
    assert host.vtpmd.port  # it has said that it waits for vTPMs
    before = descriptors(host.vtpmd)
    for name in names:
        logged = len(host.log)
        stream = speak(lab, host)
        LIES[name](stream, state)
        if name not in WAITING:
            said = stream.wait_for_end()
            harmless = peer.Refuse | peer.Released
            assert all(isinstance(message, harmless) for message in said), name
        stream.close()
        wait_for_descriptors(host.vtpmd, before)
        lines = [line for line in host.log[logged:] if not EXPECTED.search(line)]
        assert len(lines) == 1, (name, lines)
        assert_serves_nothing(host.guest)
        assert_takes_whole_blobs(host, state)
    assert host.vtpmd.program.exit_code is None


def test_lies_do_not_touch_a_tpm_that_runs(lab: Lab) -> None:
    """A guest is served; a peer that could make a session tries."""
    host = make_host(lab, QUIET)
    host.guest.boot()
    facts = host.guest.facts()
    before = descriptors(host.vtpmd)
    for message in (hello(), peer.Reclaim(bytes(16)), peer.Disarm(bytes(16)), peer.Key(KEY)):
        stream = speak(lab, host)
        stream.send(message)
        stream.wait_for_end()
        stream.close()
    wait_for_descriptors(host.vtpmd, before)
    assert host.guest.facts() == facts
    assert_serves(host.guest)


def test_reclaim_of_a_session_that_never_was_takes_nothing_away(lab: Lab) -> None:
    """The vTPM is this host's, its guest is off; a peer that is allowed asks to have it back."""
    host = make_host(lab, QUIET)
    host.guest.boot()
    nv = host.guest.facts().nv
    host.guest.control.stop()
    stream = speak(lab, host)
    stream.send(peer.Reclaim(bytes(16)))
    stream.wait_for_end()
    stream.close()

    host.guest.control.init()
    host.guest.tpm.startup()
    assert host.guest.facts().nv == nv


def test_source_that_is_not_allowed_is_told_so_and_no_more(lab: Lab) -> None:
    host = make_host(lab, QUIET)
    stream = speak(lab, host, stranger_credentials())
    refusal = stream.receive(peer.Refuse)
    assert refusal.reason == peer.Reason.NOT_ALLOWED
    assert stream.wait_for_end() == []
    stream.close()


def test_many_peers_that_say_nothing_keep_nobody_out(lab: Lab, state: State) -> None:
    """More of them than are served at once; as they hang up, the next one is served."""
    host = make_host(lab, QUIET)
    before = descriptors(host.vtpmd)
    silent = [speak(lab, host) for _ in range(8)]
    for stream in silent:
        stream.close()
    stream = speak(lab, host)
    hold(stream, state)
    stream.close()
    wait_for_descriptors(host.vtpmd, before)


TAIL_LIES: dict[str, Callable[[State, bytes], Blobs]] = {
    "for-another-vtpm": lambda _, session: sealed(session, uuid=b"another vtpm's id"[:16]),
    "of-another-session": lambda *_: sealed(bytes(16)),
    "from-an-older-generation": lambda _, session: sealed(session, permanent=(6, 7)),
    "from-a-later-generation": lambda _, session: sealed(session, volatile=(10, 10)),
    "to-a-generation-that-it-does-not-make": lambda _, session: sealed(session, permanent=(7, 8)),
    "back-to-an-older-generation": lambda _, session: sealed(session, volatile=(9, 8)),
    "with-garbage-for-a-record": lambda _, session: sealed(
        session, records=(b"garbage", b""), permanent=(7, 8)
    ),
    "with-a-record-of-the-other-type": lambda s, session: sealed(
        session,
        records=(delta_encode(s.volatile, changed(s.volatile, 10)), b""),
        permanent=(7, 10),
    ),
    "with-a-record-that-goes-elsewhere": lambda s, session: sealed(
        session,
        records=(delta_encode(s.permanent, changed(s.permanent, 9)), b""),
        permanent=(7, 8),
    ),
    "with-a-state-that-libtpms-refuses": lambda s, session: sealed(
        session,
        records=(delta_encode(s.permanent, changed(damaged(s.permanent), 8)), b""),
        permanent=(7, 8),
    ),
}


def test_each_lie_in_a_tail_is_refused(lab: Lab, state: State) -> None:
    """The source has the session's key, so the seal is good: what is inside is not."""
    host = make_host(lab, QUIET)
    before = descriptors(host.vtpmd)
    for name, lie in TAIL_LIES.items():
        stream = speak(lab, host)
        greeting = hold(stream, state)
        logged = len(host.log)
        with pytest.raises(ControlError):
            host.guest.load(lie(state, greeting.session))
        assert any("tail" in line or "refuses" in line for line in host.log[logged:]), name
        assert not any("Traceback" in line for line in host.log[logged:]), name
        assert_serves_nothing(host.guest)
        stream.close()
        wait_for_descriptors(host.vtpmd, before)
        assert_takes_whole_blobs(host, state)


def test_tail_before_the_key_is_refused(lab: Lab, state: State) -> None:
    """The source never gave a key; no key is not a key of zeros."""
    host = make_host(lab, QUIET)
    stream = speak(lab, host)
    greeting = hello()
    stream.send(greeting)
    stream.receive(peer.Welcome)
    stream.send(whole(state.permanent), whole(state.volatile), COMMIT)
    with pytest.raises(ControlError):
        host.guest.load(sealed(greeting.session))
    assert not any("AssertionError" in line for line in host.log)
    stream.close()
    assert_takes_whole_blobs(host, state)


# What a source may say on the lane when it was asked; the canary is the first.
ANSWERS: dict[str, bytes | LaneFrame | None] = {
    "a-grant": LaneFrame(LaneKind.GRANT),
    "that-the-guest-goes-on": LaneFrame(LaneKind.GO_ON),
    "a-refusal": LaneFrame(LaneKind.REFUSE, reason=7),
    "a-take": LaneFrame(LaneKind.TAKE),
    "what-was-sealed-with-no-key": bytes(LANE_FRAME_BYTES),
    "the-end": None,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_invariant_3_only_a_grant_starts_the_tpm(lab: Lab, state: State, name: str) -> None:
    host = make_host(lab, QUIET)
    stream = speak(lab, host)
    session = hold(stream, state).session
    assert stream.lane is not None
    host.guest.give(sealed(session))
    assert stream.lane.receive().kind is LaneKind.TAKE
    answer = ANSWERS[name]
    if isinstance(answer, LaneFrame):
        stream.lane.send(answer)
    elif answer is not None:
        stream.lane.socket.sendall(answer)
    else:
        stream.lane.close()
    if answer == LaneFrame(LaneKind.GRANT):
        host.guest.start()
        assert host.guest.facts() == state.facts
        return
    with pytest.raises(ControlError):
        host.guest.start()
    assert_serves_nothing(host.guest)


def changed_permanent(state: State) -> bytes:
    """Return the record of a permanent state that follows the one of hold()."""
    return delta_encode(state.permanent, changed(state.permanent, 8))


def another_round(stream: Stream, state: State, session: bytes) -> Blobs:
    """The guest runs on, and is stopped again."""
    stream.send(peer.Record(changed_permanent(state)), peer.Commit(2, 8, 9, 0, 0))
    stream.receive(peer.Ack)
    stream.send(peer.Stopped(session))
    return sealed(session, permanent=(8, 8))


AFTER_STOPPED: dict[str, Callable[[Stream, State, bytes], Blobs]] = {
    "what-was-announced": lambda _stream, _state, session: sealed(session),
    "another-round": another_round,
    "a-tail-with-more": lambda _, state, session: sealed(
        session, records=(changed_permanent(state), b""), permanent=(7, 8)
    ),
    "whole-blobs": lambda _stream, state, _session: state.blobs,
}


@pytest.mark.parametrize("then", AFTER_STOPPED)
def test_tpm_that_was_started_ahead_of_the_tail(lab: Lab, state: State, then: str) -> None:
    """The source has said that its guest stands still, and what comes next is that, or not."""
    host = make_host(lab, QUIET)
    stream = speak(lab, host)
    session = hold(stream, state).session
    stream.send(peer.Stopped(session))
    blobs = AFTER_STOPPED[then](stream, state, session)
    assert_serves_nothing(host.guest)
    host.guest.give(blobs)
    if blobs is not state.blobs:
        assert stream.lane is not None
        assert stream.lane.receive().kind is LaneKind.TAKE
        stream.lane.send(LaneFrame(LaneKind.GRANT))
    host.guest.start()
    assert host.guest.facts() == state.facts
    assert_serves(host.guest)
    stream.close()


def test_invariant_3_source_that_leaves_after_stopped_starts_nothing(
    lab: Lab, state: State
) -> None:
    """The TPM that was started ahead is let go of, and the host's own one is as it was."""
    host = make_host(lab, QUIET)
    host.guest.boot()
    own = host.guest.facts().nv
    host.guest.control.stop()
    stream = speak(lab, host)
    of_host = lineage(host.vtpmd.state).identity
    stream.send(peer.Stopped(hold(stream, state, identity=of_host).session))
    assert_serves_nothing(host.guest)
    stream.close()
    host.vtpmd.program.wait_for_output("is set aside: the")  # stream, or lane
    assert_serves_nothing(host.guest)
    host.guest.control.init()
    host.guest.tpm.startup()
    assert host.guest.facts().nv == own
    assert_serves(host.guest)


# What a destination may say to a source; each of them is a lie at its moment.

DESTINATION_LIES_IN_ANSWER_TO_HELLO: dict[str, bytes] = {
    "garbage": bytes(range(255, 0, -1)) * 40,
    "frame-of-4-gib": b"\xff\xff\xff\xff" + bytes(64),
    "hello": peer.encode(hello()),
    "ack-before-welcome": peer.encode(peer.Ack(0, 0, 0)),
    "released": peer.encode(peer.Released(bytes(16))),
    "refusal-with-a-line-break": peer.encode(peer.Refuse(7, "one\nvtpmd: two\x1b[2J")),
}


@pytest.fixture
def fake(lab: Lab) -> FakeDestination:
    """Give a test a destination that says what the test says."""
    destination = FakeDestination(credentials())
    lab.close_at_end(destination)
    return destination


def assert_gives_whole_blobs(source: Host) -> None:
    """Check that a session has ended in a fall-back that is told in one line."""
    source.manage.wait_for("VTPM_FALL_BACK")
    assert_whole(source.guest.save())
    assert_serves(source.guest)
    report = source.manage.migration()
    assert report["outcome"] == "fall-back"
    assert report["reason"].isprintable()
    assert not any("Traceback" in line for line in source.log)


def test_each_lie_in_answer_to_hello_leads_to_whole_blobs(lab: Lab, fake: FakeDestination) -> None:
    source = make_host(lab, QUIET)
    source.guest.boot()
    before = descriptors(source.vtpmd)
    for lie in DESTINATION_LIES_IN_ANSWER_TO_HELLO.values():
        source.manage.command("migrate-arm", to=fake.address)
        stream = fake.accept()
        stream.receive(peer.Hello)
        stream.send_bytes(lie)
        assert_gives_whole_blobs(source)
        stream.close()
        wait_for_descriptors(source.vtpmd, before)


ACKNOWLEDGEMENTS: dict[str, Callable[[peer.Commit], peer.Message]] = {
    "of-another-round": lambda commit: peer.Ack(commit.round + 1, *commit[1:3]),
    "of-another-permanent-generation": lambda commit: peer.Ack(
        commit.round, commit.permanent_generation + 1, commit.volatile_generation
    ),
    "of-another-volatile-generation": lambda commit: peer.Ack(
        commit.round, commit.permanent_generation, commit.volatile_generation - 1
    ),
    "that-is-a-refusal": lambda _: peer.Refuse(peer.Reason.STORAGE, "the disk is full"),
}


def test_each_false_acknowledgement_leads_to_whole_blobs(lab: Lab, fake: FakeDestination) -> None:
    """What a source believes of the base must be what it has sent."""
    source = make_host(lab, QUIET)
    source.guest.boot()
    for lie in ACKNOWLEDGEMENTS.values():
        source.manage.command("migrate-arm", to=fake.address)
        stream = fake.accept()
        greeting = stream.receive(peer.Hello)
        stream.send(WELCOME)
        fake.accept_lane(stream, greeting)
        stream.send(lie(stream.receive_round()))
        assert_gives_whole_blobs(source)
        stream.close()


def freeze(source: Host, fake: FakeDestination) -> tuple[Stream, bytes, Blobs]:
    """Arm a session with a destination that acknowledges, and have QEMU take the tail."""
    source.manage.command("migrate-arm", to=fake.address)
    stream, session = fake.hold_base()
    source.manage.wait_for("VTPM_ARMED")
    blobs = source.guest.save()
    assert stream.receive(peer.Stopped).session == session
    return stream, session, blobs


def digests(source: Host) -> tuple[bytes, bytes]:
    """Return the digests of both images at the freeze, as the source says them."""
    said = source.manage.migration()["digests"]
    return bytes.fromhex(said["permanent"]), bytes.fromhex(said["volatile"])


Both = tuple[bytes, bytes]
TAKES: dict[str, Callable[[bytes, Both], LaneFrame | peer.Message]] = {
    "with-another-permanent-digest": lambda _, both: take(NO_DIGEST, both[1]),
    "with-another-volatile-digest": lambda _, both: take(both[0], NO_DIGEST),
    "with-the-digests-exchanged": lambda _, both: take(both[1], both[0]),
    "that-is-a-grant": lambda *_: LaneFrame(LaneKind.GRANT),
    "that-is-a-refusal-on-the-lane": lambda *_: LaneFrame(LaneKind.REFUSE, reason=7),
    "that-is-a-refusal": lambda *_: peer.Refuse(peer.Reason.STATE, "it does not fit"),
    "that-is-a-running": lambda session, _: peer.Running(session, 0, 0),
    "that-is-a-released": lambda session, _: peer.Released(session),
}


def take(permanent: bytes, volatile: bytes) -> LaneFrame:
    """Return what a destination says that has started from what has these digests."""
    return LaneFrame(LaneKind.TAKE, 0, permanent, volatile)


def test_each_false_take_leaves_the_tpm_with_the_source(lab: Lab, fake: FakeDestination) -> None:
    """Who does not have the very state that was frozen does not get the vTPM."""
    source = make_host(lab, QUIET)
    source.guest.boot()
    for lie in TAKES.values():
        facts = source.guest.facts()
        stream, session, blobs = freeze(source, fake)
        assert_tail(blobs)
        said = lie(session, digests(source))
        if isinstance(said, LaneFrame):
            fake.lanes[-1].send(said)
        else:
            stream.send(said)
        source.manage.wait_for("VTPM_GO_ON")
        with suppress(ConnectionError):
            assert fake.lanes[-1].receive().kind is LaneKind.GO_ON
        assert fake.lanes[-1].has_ended()
        source.guest.resume()
        assert source.guest.facts() == facts
        assert_serves(source.guest)
        stream.close()


def granted(source: Host, fake: FakeDestination) -> tuple[Stream, bytes]:
    """Freeze, and be granted the vTPM; return the stream and the session."""
    stream, session, blobs = freeze(source, fake)
    assert_tail(blobs)
    fake.lanes[-1].send(take(*digests(source)))
    assert fake.lanes[-1].receive().kind is LaneKind.GRANT
    return stream, session


def test_true_take_is_granted_once_and_durably(lab: Lab, fake: FakeDestination) -> None:
    """The canary of the test above. The record is on disk before the grant is sent."""
    source = make_host(lab, QUIET)
    source.guest.boot()
    stream, _ = granted(source, fake)
    source.vtpmd.kill()
    again = make_host_on(lab, source.vtpmd.state)
    with pytest.raises(ControlError):
        again.guest.control.init()
    assert_serves_nothing(again.guest)
    stream.close()


def make_host_on(lab: Lab, directory: Path) -> Host:
    """Start a vtpmd on a state directory that there is."""
    vtpmd = lab.peer(QUIET, directory)
    return Host(vtpmd, lab.management(vtpmd), lab.raw_guest(vtpmd))


@pytest.mark.parametrize("answer", [peer.Kept, peer.Released], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("own_session", [True, False], ids=["its-own", "another"])
def test_only_a_release_of_the_session_gives_the_tpm_back(
    lab: Lab,
    fake: FakeDestination,
    answer: type[peer.Kept | peer.Released],
    own_session: bool,
) -> None:
    """The source has granted, and its guest resumes."""
    source = make_host(lab, QUIET)
    source.guest.boot()
    facts = source.guest.facts()
    _, session = granted(source, fake)
    source.guest.resume()
    asking = fake.accept()
    assert asking.receive(peer.Reclaim).session == session
    asking.send(answer(session if own_session else bytes(16)))
    assert asking.wait_for_end() == []
    fake.close()
    if answer is peer.Released and own_session:
        assert source.guest.facts() == facts
    else:
        assert_serves_nothing(source.guest)


def test_secrets_are_in_no_log(lab: Lab, fake: FakeDestination) -> None:
    """Invariant 7: the session's key and the state are in no line, also at level debug."""
    source = make_host(lab)
    source.guest.boot()
    source.manage.command("migrate-arm", to=fake.address)
    stream = fake.accept()
    greeting = stream.receive(peer.Hello)
    stream.send(WELCOME)
    key = fake.accept_lane(stream, greeting).key
    record = stream.receive(peer.Record).record
    stream.send_bytes(b"\xff\xff\xff\xff")
    source.manage.wait_for("VTPM_FALL_BACK")
    output = source.vtpmd.program.output
    assert key.hex() not in output and repr(key) not in output
    assert record[-64:].hex() not in output
    stream.close()


@contextmanager
def flood(stream: Stream, message: peer.Message) -> Iterator[None]:
    """Say the same all the time while the block runs, and throw away what comes."""
    many = peer.encode(message) * MESSAGES_AT_ONCE

    def talk() -> None:
        stream.send_bytes(many)
        stream.discard()

    with repeating(talk):
        yield
    stream.close()


def assert_answers_all_the_time(host: Host) -> None:
    """Both of its sockets are served, again and again."""
    for _ in range(COMMANDS_IN_A_FLOOD):
        host.manage.command("query-version")
        host.guest.control.get_capability()


@pytest.mark.parametrize("kind", [peer.Pong, peer.Receiving])
def test_destination_that_never_stops_talking_holds_up_nobody(
    lab: Lab, fake: FakeDestination, kind: type[peer.Message]
) -> None:
    """What comes faster than it is taken leaves QEMU and people their turns."""
    host = make_host(lab, QUIET)
    host.guest.boot()
    host.manage.command("migrate-arm", to=fake.address)
    stream, session = fake.hold_base()
    host.manage.wait_for("VTPM_ARMED")
    with flood(stream, peer.Pong(session) if kind is peer.Pong else peer.Receiving(session, 1)):
        assert_answers_all_the_time(host)
        assert_serves(host.guest)


def test_source_that_never_stops_talking_holds_up_nobody(lab: Lab, state: State) -> None:
    host = make_host(lab, QUIET)
    stream = speak(lab, host)
    greeting = hold(stream, state)
    with flood(stream, peer.Ping(greeting.session)):
        assert_answers_all_the_time(host)
