"""The sessions of both sides as transcripts: an event, the state after it, what is done.

Invariant 3: the vTPM is granted only after this side has retired, and served again only after the
other has let go of it.
Invariant 4: a round is acknowledged only after it was staged.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from vtpmd.migration import destination, source
from vtpmd.migration.destination import Destination
from vtpmd.migration.source import Round, Source
from vtpmd.migration.states import TABLE, ImpossibleEvent, Local, State, advance
from vtpmd.wire import peer

SESSION, UUID, KEY = b"s" * 16, b"u" * 16, b"k" * 32
DIGESTS = (b"p" * 32, b"v" * 32)
HELLO = peer.Hello(1, 1, SESSION, UUID, 2, 0x000902, 262144)
OWN = destination.Own(False, UUID, 2, 0x000902, 262144)

MESSAGES: dict[str, peer.Message] = {
    "Hello": HELLO,
    "Welcome": peer.Welcome(1, 0x000902),
    "Refuse": peer.Refuse(peer.Reason.UUID, "it is another VM"),
    "Key": peer.Key(KEY),
    "Record": peer.Record(b"record"),
    "Commit": peer.Commit(1, 10, 20),
    "Ack": peer.Ack(1, 10, 20),
    "Ack of another round": peer.Ack(2, 10, 20),
    "Take": peer.Take(SESSION, *DIGESTS, 0, 0, 0),
    "Take of another state": peer.Take(SESSION, DIGESTS[0], b"x" * 32, 0, 0, 0),
    "Grant": peer.Grant(SESSION),
    "Running": peer.Running(SESSION, 0, 0),
    "Reclaim": peer.Reclaim(SESSION),
    "Released": peer.Released(SESSION),
    "Kept": peer.Kept(SESSION),
    "Disarm": peer.Disarm(SESSION),
    "Stopped": peer.Stopped(SESSION),
}

TO_ARMED = """
    CONNECTED               GREETING    send Hello
    Welcome                 SYNCING     send Key, START_ROUND
    Ack                     ARMED       KEEP_BASE
"""
TO_FROZEN = f"""{TO_ARMED}
    FREEZE                  FROZEN
"""
TO_GRANTED = f"""{TO_FROZEN}
    Take                    RETIRING    RETIRE
    RETIRED                 GRANTED     send Grant, HANDED_OVER
"""

SOURCE = {
    "the vTPM moves": f"""{TO_ARMED}
    ROUND_DUE               ROUND       START_ROUND
    Ack                     ARMED       KEEP_BASE
    ROUND_DUE               ROUND       START_ROUND
    NOTHING_CHANGED         ARMED
    FREEZE                  FROZEN
    Take                    RETIRING    RETIRE
    RETIRED                 GRANTED     send Grant, HANDED_OVER
    Running                 GRANTED
    LINK_LOST               GRANTED
    """,
    "the freeze overtakes a round": f"""{TO_ARMED}
    ROUND_DUE               ROUND       START_ROUND
    FREEZE                  FROZEN
    Ack                     FROZEN
    Take                    RETIRING    RETIRE
    """,
    "the guest is stopped before QEMU asks": f"""{TO_ARMED}
    GUEST_STOPPED           ARMED       send Stopped
    FREEZE                  FROZEN
    Take                    RETIRING    RETIRE
    """,
    "the guest is stopped while a round is under way": f"""{TO_ARMED}
    ROUND_DUE               ROUND       START_ROUND
    GUEST_STOPPED           ROUND       send Stopped
    Ack                     ARMED       KEEP_BASE
    FREEZE                  FROZEN
    Take                    RETIRING    RETIRE
    """,
    "the guest runs on after a stop": f"""{TO_ARMED}
    GUEST_STOPPED           ARMED       send Stopped
    ROUND_DUE               ROUND       START_ROUND
    Ack                     ARMED       KEEP_BASE
    """,
    "nobody is there": """
    LINK_LOST               ENDED       fall back, CLOSE
    """,
    "disarmed before the peer answers": """
    DISARM                  ENDED       fall back, send Disarm, CLOSE
    """,
    "the destination refuses the vTPM": """
    CONNECTED               GREETING    send Hello
    Refuse                  ENDED       fall back, CLOSE
    """,
    "the link is lost before the welcome": """
    CONNECTED               GREETING    send Hello
    LINK_LOST               ENDED       fall back, CLOSE
    """,
    "disarmed before the welcome": """
    CONNECTED               GREETING    send Hello
    DISARM                  ENDED       fall back, send Disarm, CLOSE
    """,
    "the destination refuses the whole images": """
    CONNECTED               GREETING    send Hello
    Welcome                 SYNCING     send Key, START_ROUND
    Refuse                  ENDED       fall back, CLOSE
    """,
    "the link is lost before a base": """
    CONNECTED               GREETING    send Hello
    Welcome                 SYNCING     send Key, START_ROUND
    LINK_LOST               ENDED       fall back, CLOSE
    """,
    "QEMU asks before there is a base": """
    CONNECTED               GREETING    send Hello
    Welcome                 SYNCING     send Key, START_ROUND
    DISARM                  ENDED       fall back, send Disarm, CLOSE
    """,
    "an acknowledgement of what was not sent": """
    CONNECTED               GREETING    send Hello
    Welcome                 SYNCING     send Key, START_ROUND
    Ack of another round    ENDED       fall back, CLOSE
    """,
    "the destination gives up while armed": f"""{TO_ARMED}
    Refuse                  ENDED       fall back, CLOSE
    """,
    "the link is lost while armed": f"""{TO_ARMED}
    LINK_LOST               ENDED       fall back, CLOSE
    """,
    "disarmed": f"""{TO_ARMED}
    DISARM                  ENDED       fall back, send Disarm, CLOSE
    """,
    "the destination refuses a round": f"""{TO_ARMED}
    ROUND_DUE               ROUND       START_ROUND
    Refuse                  ENDED       fall back, CLOSE
    """,
    "the link is lost in a round": f"""{TO_ARMED}
    ROUND_DUE               ROUND       START_ROUND
    LINK_LOST               ENDED       fall back, CLOSE
    """,
    "disarmed in a round": f"""{TO_ARMED}
    ROUND_DUE               ROUND       START_ROUND
    DISARM                  ENDED       fall back, send Disarm, CLOSE
    """,
    "the destination refuses the tail": f"""{TO_FROZEN}
    Refuse                  ENDED       go on, CLOSE
    """,
    "the link is lost after the freeze": f"""{TO_FROZEN}
    LINK_LOST               ENDED       go on, CLOSE
    """,
    "disarmed after the freeze": f"""{TO_FROZEN}
    DISARM                  ENDED       go on, send Disarm, CLOSE
    """,
    "QEMU resumes the guest here": f"""{TO_FROZEN}
    GUEST_RESUMED           ENDED       go on, send Disarm, CLOSE
    """,
    "the guest has resumed before the destination asks": f"""{TO_FROZEN}
    Take                    RETIRING    RETIRE
    RETIRE_FAILED           ENDED       go on, send Disarm, CLOSE
    """,
    "the destination has made another state of the tail": f"""{TO_FROZEN}
    Take of another state   ENDED       go on, send Disarm, CLOSE
    """,
    "reclaimed": f"""{TO_GRANTED}
    GUEST_RESUMED           RECLAIMING  send Reclaim
    Running                 RECLAIMING
    Released                ENDED       UNRETIRE, go on, CLOSE
    """,
    "reclaimed too late": f"""{TO_GRANTED}
    GUEST_RESUMED           RECLAIMING  send Reclaim
    Kept                    GRANTED     KEPT
    """,
    "no answer to the reclaim": f"""{TO_GRANTED}
    GUEST_RESUMED           RECLAIMING  send Reclaim
    LINK_LOST               GRANTED
    GUEST_RESUMED           RECLAIMING  send Reclaim
    """,
}

TO_HOLDING = """
    Hello                   RECEIVING   send Welcome
    Key                     RECEIVING
    Record                  RECEIVING   apply
    Record                  RECEIVING   apply
    Commit                  STAGING     stage 10 20
    STAGED                  HOLDING     send Ack
"""
TO_TAKING = f"""{TO_HOLDING}
    TAIL_APPLIED            TAKING
"""
TO_OWNING = f"""{TO_TAKING}
    Grant                   OWNING      MAY_RUN
"""

DESTINATION = {
    "the vTPM comes": f"""{TO_HOLDING}
    Record                  HOLDING     apply
    Commit                  STAGING     stage 10 20
    STAGED                  HOLDING     send Ack
    TAIL_APPLIED            TAKING
    Grant                   OWNING      MAY_RUN
    LINK_LOST               OWNING
    """,
    "the TPM is started before the tail comes": f"""{TO_HOLDING}
    Stopped                 HOLDING     START
    TAIL_APPLIED            TAKING
    Grant                   OWNING      MAY_RUN
    """,
    "the guest runs on after its TPM was started": f"""{TO_HOLDING}
    Stopped                 HOLDING     START
    Record                  HOLDING     apply
    Commit                  STAGING     stage 10 20
    STAGED                  HOLDING     send Ack
    TAIL_APPLIED            TAKING
    Grant                   OWNING      MAY_RUN
    """,
    "the tail overtakes the news that the guest has stopped": f"""{TO_TAKING}
    Stopped                 TAKING
    Grant                   OWNING      MAY_RUN
    """,
    "a peer that says nothing": """
    LINK_LOST               ENDED       discard, CLOSE
    """,
    "the link is lost before a base": """
    Hello                   RECEIVING   send Welcome
    LINK_LOST               ENDED       discard, CLOSE
    """,
    "disarmed before a base": """
    Hello                   RECEIVING   send Welcome
    Disarm                  ENDED       discard, CLOSE
    """,
    "libtpms refuses the round": """
    Hello                   RECEIVING   send Welcome
    Key                     RECEIVING
    Commit                  STAGING     stage 10 20
    STAGE_FAILED            ENDED       send Refuse, discard, CLOSE
    """,
    "the link is lost while holding": f"""{TO_HOLDING}
    LINK_LOST               ENDED       discard, CLOSE
    """,
    "disarmed while holding": f"""{TO_HOLDING}
    Disarm                  ENDED       discard, CLOSE
    """,
    "the tail cannot be used": f"""{TO_HOLDING}
    TAIL_REFUSED            ENDED       send Refuse, discard, CLOSE
    """,
    "the guest resumes at the source": f"""{TO_TAKING}
    Disarm                  ENDED       discard, CLOSE
    """,
    "the source reclaims what it has not granted": f"""{TO_TAKING}
    Reclaim                 ENDED       discard, send Released, CLOSE
    """,
    "the link is lost before the grant": f"""{TO_TAKING}
    LINK_LOST               ENDED       discard, CLOSE
    """,
    "the freeze overtakes a round": f"""{TO_TAKING}
    Record                  TAKING
    Commit                  TAKING
    Grant                   OWNING      MAY_RUN
    """,
    "given back": f"""{TO_OWNING}
    Reclaim                 OWNING      RELEASE
    RELEASE                 ENDED       send Released, CLOSE
    """,
}


def parse(line: str) -> tuple[str, str, list[str]]:
    """Split a line of a transcript: its columns are apart by two blanks or more, or it is full."""
    found = re.fullmatch(r"\s*(.{1,24}?)\s+([A-Z]+)(?:\s{2,}(\S.*?))?\s*", line)
    assert found, line
    event, state, actions = found.groups()
    return event, state, actions.split(", ") if actions else []


def spell(action: source.Action | destination.Action) -> str:
    """Write an action as the transcripts do."""
    match action:
        case source.Send(message=message) | destination.Send(message=message):
            return f"send {type(message).__name__}"
        case source.FallBack():
            return "fall back"
        case source.GoOn():
            return "go on"
        case destination.Apply():
            return "apply"
        case destination.Stage():
            return f"stage {action.permanent_generation} {action.volatile_generation}"
        case destination.Discard():
            return "discard"
    return action.name


def play(machine: Source | Destination, transcript: str) -> set[tuple[State, object]]:
    """Play a transcript; return the rows of the table that it has walked."""
    walked: set[tuple[State, object]] = set()
    for line in filter(str.strip, transcript.splitlines()):
        name, state, actions = parse(line)
        event = Local[name] if name in Local.__members__ else MESSAGES[name]
        walked.add((machine.state, event if isinstance(event, Local) else type(event)))
        assert [spell(each) for each in machine.step(event, "a reason")] == actions, line
        assert machine.state is State[state], line
    return walked


def new_source() -> Source:
    machine = Source(hello=HELLO, key=KEY)
    machine.round, machine.final_digests = Round(1, 10, 20), DIGESTS
    return machine


@pytest.mark.parametrize("name", SOURCE)
def test_source(name: str) -> None:
    play(new_source(), SOURCE[name])


@pytest.mark.parametrize("name", DESTINATION)
def test_destination(name: str) -> None:
    play(Destination(OWN), DESTINATION[name])


def test_transcripts_walk_the_whole_table() -> None:
    """No transition is there that no transcript shows."""
    walked: set[tuple[State, object]] = set()
    for transcript in SOURCE.values():
        walked |= play(new_source(), transcript)
    for transcript in DESTINATION.values():
        walked |= play(Destination(OWN), transcript)
    assert set(TABLE) - walked == set()


@pytest.mark.parametrize("state", State)
def test_what_is_not_in_the_table_is_refused(state: State) -> None:
    """From the peer it ends the session; nothing has changed by then."""
    events = [*Local, *(type(message) for message in MESSAGES.values())]
    impossible = [event for event in events if (state, event) not in TABLE]
    assert impossible
    for event in impossible:
        with pytest.raises(ImpossibleEvent, match=state.name):
            advance(state, event)


@pytest.mark.parametrize("name", ["Grant", "Reclaim", "Disarm"])
def test_invariant_3_messages_of_another_session_change_nothing_here(name: str) -> None:
    """Whoever has a certificate cannot grant, reclaim or end a session that is not theirs."""
    machine = Destination(OWN)
    play(machine, TO_TAKING)
    message = MESSAGES[name]
    assert not isinstance(message, peer.Welcome | peer.Refuse | peer.Key | peer.Record)
    with pytest.raises(ImpossibleEvent, match="another session"):
        machine.step(type(message)(b"x" * 16))  # type: ignore[call-arg, arg-type]
    assert machine.state is State.TAKING


@pytest.mark.parametrize("kind", [peer.Released, peer.Kept])
def test_invariant_3_answers_of_another_session_change_nothing_here(
    kind: type[peer.Released] | type[peer.Kept],
) -> None:
    """Nor can they give this side the vTPM back."""
    machine = new_source()
    play(machine, TO_GRANTED)
    machine.step(Local.GUEST_RESUMED)
    with pytest.raises(ImpossibleEvent, match="another session"):
        machine.step(kind(b"x" * 16))
    assert machine.state is State.RECLAIMING
    with pytest.raises(ImpossibleEvent, match="another session"):
        new_source().step(peer.Take(b"x" * 16, *DIGESTS, 0, 0, 0))


def test_a_round_before_the_key_is_refused() -> None:
    """There would be a base, and no way to open the tail."""
    machine = Destination(OWN)
    machine.step(HELLO)
    with pytest.raises(ImpossibleEvent, match="before Key"):
        machine.step(MESSAGES["Commit"])


def test_invariant_3_a_grant_comes_after_the_retirement_only() -> None:
    """No other action of the source sends one."""
    for transcript in SOURCE.values():
        machine, before = new_source(), ""
        for line in filter(str.strip, transcript.splitlines()):
            event, _, actions = parse(line)
            if "send Grant" in actions:
                assert (event, before) == ("RETIRED", "Take")
            before = event
            machine.step(Local[event] if event in Local.__members__ else MESSAGES[event], "")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"version": 9, "version_minimum": 9}, peer.Reason.VERSION),
        ({"version": 0, "version_minimum": 0}, peer.Reason.VERSION),
        ({"tpm_version": 1}, peer.Reason.TPM_VERSION),
        ({"libtpms_version": 0x000A00}, peer.Reason.LIBTPMS_VERSION),
        ({"uuid": b"x" * 16}, peer.Reason.UUID),
        ({"image_bytes_max": 262145}, peer.Reason.LIMIT),
    ],
)
def test_unfit_destination_refuses_before_anything_moves(
    changed: dict[str, Any], reason: peer.Reason
) -> None:
    """It says which of the source's properties it cannot match."""
    machine = Destination(OWN)
    actions = machine.step(HELLO._replace(**changed))
    assert machine.state is State.ENDED
    assert isinstance(actions[0], destination.Send)
    assert isinstance(actions[0].message, peer.Refuse)
    assert actions[0].message.reason == reason
    assert actions[1:] == [destination.Do.CLOSE]


def test_destination_in_use_refuses() -> None:
    """A guest's TPM is not replaced under it."""
    (send, _) = Destination(OWN._replace(running=True)).step(HELLO)
    assert isinstance(send, destination.Send)
    assert isinstance(send.message, peer.Refuse)
    assert send.message.reason == peer.Reason.BUSY


@pytest.mark.parametrize(
    "fine", [{"uuid": bytes(16)}, {"libtpms_version": 0x000905}, {"libtpms_version": 0x000801}]
)
def test_fit_destination_welcomes(fine: dict[str, Any]) -> None:
    """A VM without a UUID, another patch release of libtpms, an older libtpms."""
    machine = Destination(OWN)
    machine.step(HELLO._replace(**fine))
    assert machine.state is State.RECEIVING


def test_invariant_4_a_round_is_acknowledged_after_it_was_staged_only() -> None:
    """Validated by libtpms, and durable: nothing else makes an Ack."""
    acknowledged = 0
    for transcript in DESTINATION.values():
        for line in filter(str.strip, transcript.splitlines()):
            event, _, actions = parse(line)
            if "send Ack" in actions:
                assert event == "STAGED"
                acknowledged += 1
    assert acknowledged
