"""The sessions of both sides as transcripts: an event, the state after it, what is done.

Invariant 3: the vTPM is granted only after this side has retired, and served again only after the
other has let go of it.
Invariant 4: a round is acknowledged only after it was staged.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from vtpmd.migration import destination, events, source
from vtpmd.migration.destination import Destination
from vtpmd.migration.source import HEARD_US_MAX, Source
from vtpmd.migration.states import ON_OFFER, TABLE, WITH_BASE, ImpossibleEvent, State
from vtpmd.wire import peer
from vtpmd.wire.state_level import Library

SESSION, UUID, KEY = b"s" * 16, b"u" * 16, b"k" * 32
LINEAGE = b"l" * 16
LIBRARY = Library("0.10.2", {"default-v1": 7, "null": 1, "custom": 2})
HELLO = peer.Hello(peer.VERSION, peer.VERSION, SESSION, UUID, LINEAGE, 2, 7, b"default-v1", 262144)
OWN = destination.Own(None, UUID, None, 2, LIBRARY, 262144, peer.Following.NOT_ASKED_FOR)
ROUND = events.Round(1, 10, 20, 0)

EVENTS: dict[str, Any] = {
    "Hello": HELLO,
    "Welcome": peer.Welcome(2, peer.Following.FOLLOWING),
    "Welcome of another kind": peer.Welcome(2, 9),
    "Refuse": peer.Refuse(peer.Reason.UUID, "it is another VM"),
    "Key": peer.Key(KEY),
    "Record": peer.Record(b"record"),
    "Commit": peer.Commit(*ROUND, 0),
    "CommitLast": peer.Commit(*ROUND, 1),
    "Ack": peer.Ack(1, 10, 20),
    "Ack of another round": peer.Ack(2, 10, 20),
    "Running": peer.Running(SESSION, 0, 0),
    "Reclaim": peer.Reclaim(SESSION),
    "Released": peer.Released(SESSION),
    "Kept": peer.Kept(SESSION),
    "Disarm": peer.Disarm(SESSION),
    "Stopped": peer.Stopped(SESSION),
    "Receiving": peer.Receiving(SESSION, 1),
    "Ping": peer.Ping(SESSION),
    "Pong": peer.Pong(SESSION),
    "Unknown": peer.Unknown(SESSION),
    "Connected": events.Connected(),
    "LaneOpened": events.LaneOpened(),
    "LaneCame": events.LaneCame(5),
    "RoundDue": events.RoundDue(),
    "RoundSent": events.RoundSent(ROUND),
    "NothingChanged": events.NothingChanged(),
    "GuestStopped": events.GuestStopped(),
    "GuestResumed": events.GuestResumed(),
    "QemuLeft": events.QemuLeft(),
    "MigrationEnded": events.MigrationEnded(),
    "Freeze": events.Freeze(),
    "TailMade": events.TailMade(False),
    "TailMade, all sent": events.TailMade(True),
    "Frozen": events.Frozen(),
    "OfferEnded": events.OfferEnded(),
    "OfferEndedEarly": events.OfferEndedEarly(),
    "Revoked": events.Revoked(was_given=False),
    "Revoked, given": events.Revoked(was_given=True),
    "Granted": events.Granted(),
    "CameBack": events.CameBack(),
    "LinkLost": events.LinkLost("a reason"),
    "Disarmed": events.Disarmed("a reason"),
    "Remembered": events.Remembered(),
    "RecordFailed": events.RecordFailed("a reason"),
    "Prepared": events.Prepared(),
    "Staged": events.Staged(),
    "StageFailed": events.StageFailed(peer.Reason.STATE, "a reason"),
    "HeldStarted": events.HeldStarted(),
    "TailRefused": events.TailRefused(peer.Reason.STATE, "a reason"),
    "SetAside": events.SetAside("a reason"),
    "Took": events.Took(),
    "Entitled": events.Entitled(),
    "Started": events.Started(),
    "Adopt": events.Adopt(),
    "InitAnswered": events.InitAnswered(),
    "Admitted": events.Admitted(0, 0),
    "AdmitFailed": events.AdmitFailed(),
    "SettleDue": events.SettleDue(),
    "Settled": events.Settled(),
    "SettleFailed": events.SettleFailed(),
    "Served": events.Served(),
    "Served, when fenced": events.Served(was_fenced=True),
}

TO_ARMED = """
    Connected               GREETING    send Hello
    Welcome                 OPENING     send Key, OPEN_LANE
    LaneOpened              SYNCING     START_ROUND
    RoundSent               SYNCING
    Ack                     ARMED       KEEP_BASE, TELL_ARMED
"""

TO_LAST_ROUND = f"""{TO_ARMED}
    GuestStopped            CAPTURING   WIND_UP, START_ROUND
    RoundSent               LAST_ROUND  MAKE_TAIL, OFFER
    TailMade                LAST_ROUND
"""

TO_OFFERED = f"""{TO_ARMED}
    GuestStopped            CAPTURING   WIND_UP, START_ROUND
    NothingChanged          OFFERED     send Stopped, MAKE_TAIL, OFFER
    TailMade                OFFERED
"""

TO_FROZEN = f"""{TO_OFFERED}
    Frozen                  FROZEN      TELL_FREEZE
"""

TO_GRANTED = f"""{TO_FROZEN}
    Granted                 GRANTED     TELL_GRANTED
"""

TO_RECLAIMING = f"""{TO_GRANTED}
    GuestResumed            RECLAIMING  HOLD_COMMANDS, ASK
"""

SOURCE = {
    "the vTPM moves": """
    Connected               GREETING    send Hello
    Welcome                 OPENING     send Key, OPEN_LANE
    LaneOpened              SYNCING     START_ROUND
    RoundSent               SYNCING
    Ack                     ARMED       KEEP_BASE, TELL_ARMED
    RoundDue                ROUND       START_ROUND
    RoundSent               ROUND
    Ack                     ARMED       KEEP_BASE
    Receiving               ARMED       RECORD_AHEAD
    GuestStopped            CAPTURING   WIND_UP, START_ROUND
    RoundSent               LAST_ROUND  MAKE_TAIL, OFFER
    TailMade                LAST_ROUND
    Ack                     OFFERED     KEEP_BASE
    Frozen                  FROZEN      TELL_FREEZE
    Granted                 GRANTED     TELL_GRANTED
    Running                 MOVED       RECORD_MOVED
    LinkLost                MOVED       CLOSE
    """,
    "nothing has changed when the guest stops": f"""{TO_OFFERED}
    Freeze                  FREEZING    MAKE_TAIL, OFFER
    TailMade, all sent      FROZEN      send Stopped
    Granted                 GRANTED     TELL_GRANTED
    Running                 MOVED       RECORD_MOVED
    """,
    "the guest stops while a round is under way": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    RoundSent               ROUND
    GuestStopped            STOPPING
    Ack                     CAPTURING   KEEP_BASE, WIND_UP, START_ROUND
    RoundSent               LAST_ROUND  MAKE_TAIL, OFFER
    TailMade                LAST_ROUND
    Ack                     OFFERED     KEEP_BASE
    Freeze                  FREEZING    MAKE_TAIL, OFFER
    TailMade                FROZEN
    Ack                     FROZEN
    Frozen                  FROZEN      TELL_FREEZE
    Granted                 GRANTED     TELL_GRANTED
    """,
    "the freeze comes without a word from QEMU's monitor": f"""{TO_ARMED}
    Freeze                  FREEZING    MAKE_TAIL, OFFER
    RoundSent               FREEZING
    TailMade, all sent      FROZEN      send Stopped
    Ack                     FROZEN
    Frozen                  FROZEN      TELL_FREEZE
    Granted                 GRANTED     TELL_GRANTED
    """,
    "the freeze overtakes a round": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    RoundSent               ROUND
    Freeze                  FREEZING    MAKE_TAIL, OFFER
    TailMade                FROZEN
    Ack                     FROZEN
    Frozen                  FROZEN      TELL_FREEZE
    Granted                 GRANTED     TELL_GRANTED
    """,
    "the freeze overtakes the round of a stop": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    RoundSent               ROUND
    GuestStopped            STOPPING
    Freeze                  FREEZING    MAKE_TAIL, OFFER
    TailMade                FROZEN
    """,
    "the freeze overtakes the last round": f"""{TO_LAST_ROUND}
    Freeze                  FREEZING    MAKE_TAIL, OFFER
    TailMade                FROZEN
    """,
    "the destination lets go before it is known that QEMU has the tail": f"""{TO_OFFERED}
    Released                REVOKING    REVOKE
    Granted                 GRANTED     TELL_GRANTED, repeat
    Released                RELEASED    RECORD_RELEASED
    """,
    "a stream comes in before there is a base": """
    Connected               GREETING    send Hello
    Welcome                 OPENING     send Key, OPEN_LANE
    LaneOpened              SYNCING     START_ROUND
    RoundSent               SYNCING
    Receiving               SYNCING
    Ack                     ARMED       KEEP_BASE, TELL_ARMED, RECORD_AHEAD
    """,
    "the destination ends the session": f"""{TO_ARMED}
    Released                ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the destination ends the session in a round": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    Released                ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the destination ends the session while it stops": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    GuestStopped            STOPPING
    Released                ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the destination says that it runs before the engine says that it may": f"""{TO_FROZEN}
    Running                 REVOKING    REVOKE
    Granted                 GRANTED     TELL_GRANTED, repeat
    Running                 MOVED       RECORD_MOVED
    """,
    "it says so before it is known that QEMU has the tail": f"""{TO_OFFERED}
    Running                 REVOKING    REVOKE
    Granted                 GRANTED     TELL_GRANTED, repeat
    """,
    "it says so in the last round": f"""{TO_LAST_ROUND}
    Running                 REVOKING    REVOKE
    Granted                 GRANTED     TELL_GRANTED, repeat
    """,
    "the destination says that it runs, and was granted nothing": f"""{TO_FROZEN}
    Running                 REVOKING    REVOKE
    Revoked                 ENDED       go on, WITHDRAW, CLOSE
    """,
    "nothing has changed": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    NothingChanged          ARMED
    """,
    "QEMU says more than once what is known": f"""{TO_ARMED}
    GuestResumed            ARMED       WITHDRAW
    RoundDue                ROUND       START_ROUND
    RoundDue                ROUND
    RoundSent               ROUND
    GuestResumed            ROUND       WITHDRAW
    GuestStopped            STOPPING
    GuestStopped            STOPPING
    RoundDue                STOPPING
    Ack                     CAPTURING   KEEP_BASE, WIND_UP, START_ROUND
    RoundSent               LAST_ROUND  MAKE_TAIL, OFFER
    TailMade                LAST_ROUND
    GuestStopped            LAST_ROUND
    RoundDue                LAST_ROUND
    Ack                     OFFERED     KEEP_BASE
    GuestStopped            OFFERED
    RoundDue                OFFERED
    Freeze                  FREEZING    MAKE_TAIL, OFFER
    TailMade                FROZEN
    GuestStopped            FROZEN
    RoundDue                FROZEN
    Granted                 GRANTED     TELL_GRANTED
    GuestStopped            GRANTED
    RoundDue                GRANTED
    GuestResumed            RECLAIMING  HOLD_COMMANDS, ASK
    GuestStopped            RECLAIMING
    RoundDue                RECLAIMING
    GuestResumed            RECLAIMING
    QemuLeft                LEFT        ASK
    GuestStopped            LEFT
    RoundDue                LEFT
    GuestResumed            LEFT
    QemuLeft                LEFT        ASK
    Released                RELEASED    RECORD_RELEASED
    Remembered              ENDED       SERVE, go on, CLOSE
    """,
    "QEMU is early": """
    RoundDue                CONNECTING
    GuestStopped            CONNECTING
    GuestResumed            CONNECTING
    Connected               GREETING    send Hello
    RoundDue                GREETING
    GuestStopped            GREETING
    GuestResumed            GREETING
    Welcome                 OPENING     send Key, OPEN_LANE
    RoundDue                OPENING
    GuestStopped            OPENING
    GuestResumed            OPENING
    LaneOpened              SYNCING     START_ROUND
    RoundDue                SYNCING
    GuestStopped            SYNCING
    GuestResumed            SYNCING
    RoundSent               SYNCING
    Ack                     ARMED       KEEP_BASE, TELL_ARMED
    """,
    "the destination says where its QEMU is, and that it is there": """
    Connected               GREETING    send Hello
    Welcome                 OPENING     send Key, OPEN_LANE
    Receiving               OPENING
    MigrationEnded          OPENING
    LaneOpened              SYNCING     START_ROUND
    Receiving               SYNCING
    MigrationEnded          SYNCING
    RoundSent               SYNCING
    Ack                     ARMED       KEEP_BASE, TELL_ARMED
    Pong                    ARMED
    Receiving               ARMED       RECORD_AHEAD
    MigrationEnded          ARMED       WITHDRAW
    RoundDue                ROUND       START_ROUND
    RoundSent               ROUND
    Pong                    ROUND
    Receiving               ROUND       RECORD_AHEAD
    MigrationEnded          ROUND       WITHDRAW
    GuestStopped            STOPPING
    Pong                    STOPPING
    Receiving               STOPPING
    MigrationEnded          STOPPING
    Ack                     CAPTURING   KEEP_BASE, WIND_UP, START_ROUND
    RoundSent               LAST_ROUND  MAKE_TAIL, OFFER
    TailMade                LAST_ROUND
    Pong                    LAST_ROUND
    Receiving               LAST_ROUND
    MigrationEnded          LAST_ROUND
    Ack                     OFFERED     KEEP_BASE
    Pong                    OFFERED
    Receiving               OFFERED
    MigrationEnded          OFFERED
    Freeze                  FREEZING    MAKE_TAIL, OFFER
    TailMade                FROZEN
    Pong                    FROZEN
    Receiving               FROZEN
    Granted                 GRANTED     TELL_GRANTED
    Pong                    GRANTED
    Receiving               GRANTED
    Ack                     GRANTED
    Ack of another round    GRANTED
    Running                 MOVED       RECORD_MOVED
    Pong                    MOVED
    Receiving               MOVED
    Ack                     MOVED
    Ack of another round    MOVED
    GuestResumed            RECLAIMING  HOLD_COMMANDS, ASK
    Pong                    RECLAIMING
    Receiving               RECLAIMING
    Ack                     RECLAIMING
    Ack of another round    RECLAIMING
    QemuLeft                LEFT        ASK
    Pong                    LEFT
    Receiving               LEFT
    Ack                     LEFT
    Ack of another round    LEFT
    Released                RELEASED    RECORD_RELEASED
    Remembered              ENDED       SERVE, go on, CLOSE
    """,
    "the guest runs on while it stops": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    RoundSent               ROUND
    GuestStopped            STOPPING
    GuestResumed            ROUND       WITHDRAW
    """,
    "the destination gives up while it stops": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    RoundSent               ROUND
    GuestStopped            STOPPING
    Refuse                  ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the link is lost while it stops": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    RoundSent               ROUND
    GuestStopped            STOPPING
    LinkLost                ENDED       fall back, WITHDRAW, CLOSE
    """,
    "disarmed while it stops": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    RoundSent               ROUND
    GuestStopped            STOPPING
    Disarmed                ENDED       fall back, send Disarm, WITHDRAW, CLOSE
    """,
    "the guest runs on in the last round": f"""{TO_LAST_ROUND}
    GuestResumed            REVOKING    END_OFFER
    OfferEndedEarly         ROUND       WITHDRAW
    Ack                     ARMED       KEEP_BASE
    """,
    "the destination gives up in the last round": f"""{TO_LAST_ROUND}
    Refuse                  REVOKING    REVOKE
    Revoked                 ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the destination lets go in the last round": f"""{TO_LAST_ROUND}
    Released                REVOKING    REVOKE
    Revoked                 ENDED       go on, WITHDRAW, CLOSE
    """,
    "the link is lost in the last round": f"""{TO_LAST_ROUND}
    LinkLost                REVOKING    REVOKE
    Revoked                 ENDED       fall back, WITHDRAW, CLOSE
    """,
    "disarmed in the last round": f"""{TO_LAST_ROUND}
    Disarmed                REVOKING    REVOKE
    Revoked                 ENDED       fall back, send Disarm, WITHDRAW, CLOSE
    """,
    "QEMU has the tail in the last round": f"""{TO_LAST_ROUND}
    Frozen                  FROZEN      TELL_FREEZE
    Ack                     FROZEN
    """,
    "what is left cannot be captured": f"""{TO_ARMED}
    GuestStopped            CAPTURING   WIND_UP, START_ROUND
    Disarmed                REVOKING    REVOKE
    Revoked                 ENDED       fall back, send Disarm, WITHDRAW, CLOSE
    """,
    "the guest runs on once all is there": f"""{TO_OFFERED}
    GuestResumed            REVOKING    END_OFFER
    OfferEnded              ARMED       WITHDRAW
    """,
    "the destination gives up once all is there": f"""{TO_OFFERED}
    Refuse                  REVOKING    REVOKE
    Revoked                 ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the link is lost once all is there": f"""{TO_OFFERED}
    LinkLost                REVOKING    REVOKE
    Revoked                 ENDED       fall back, WITHDRAW, CLOSE
    """,
    "disarmed once all is there": f"""{TO_OFFERED}
    Disarmed                REVOKING    REVOKE
    Revoked                 ENDED       fall back, send Disarm, WITHDRAW, CLOSE
    """,
    "the lane cannot be opened": """
    Connected               GREETING    send Hello
    Welcome                 OPENING     send Key, OPEN_LANE
    LinkLost                ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the destination gives up before there is a lane": """
    Connected               GREETING    send Hello
    Welcome                 OPENING     send Key, OPEN_LANE
    Refuse                  ENDED       fall back, WITHDRAW, CLOSE
    """,
    "disarmed before there is a lane": """
    Connected               GREETING    send Hello
    Welcome                 OPENING     send Key, OPEN_LANE
    Disarmed                ENDED       fall back, send Disarm, WITHDRAW, CLOSE
    """,
    "nobody is there": """
    LinkLost                ENDED       fall back, WITHDRAW, CLOSE
    """,
    "disarmed before the peer answers": """
    Disarmed                ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the destination refuses the vTPM": """
    Connected               GREETING    send Hello
    Refuse                  ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the link is lost before the welcome": """
    Connected               GREETING    send Hello
    LinkLost                ENDED       fall back, WITHDRAW, CLOSE
    """,
    "disarmed before the welcome": """
    Connected               GREETING    send Hello
    Disarmed                ENDED       fall back, send Disarm, WITHDRAW, CLOSE
    """,
    "it follows its QEMU as nobody does": """
    Connected               GREETING    send Hello
    Welcome of another kind ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the destination refuses the whole images": """
    Connected               GREETING    send Hello
    Welcome                 OPENING     send Key, OPEN_LANE
    LaneOpened              SYNCING     START_ROUND
    RoundSent               SYNCING
    Refuse                  ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the link is lost before a base": """
    Connected               GREETING    send Hello
    Welcome                 OPENING     send Key, OPEN_LANE
    LaneOpened              SYNCING     START_ROUND
    RoundSent               SYNCING
    LinkLost                ENDED       fall back, WITHDRAW, CLOSE
    """,
    "disarmed before a base": """
    Connected               GREETING    send Hello
    Welcome                 OPENING     send Key, OPEN_LANE
    LaneOpened              SYNCING     START_ROUND
    Disarmed                ENDED       fall back, send Disarm, WITHDRAW, CLOSE
    """,
    "an acknowledgement of what was not sent": """
    Connected               GREETING    send Hello
    Welcome                 OPENING     send Key, OPEN_LANE
    LaneOpened              SYNCING     START_ROUND
    RoundSent               SYNCING
    Ack of another round    ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the destination gives up while armed": f"""{TO_ARMED}
    Refuse                  ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the link is lost while armed": f"""{TO_ARMED}
    LinkLost                ENDED       fall back, WITHDRAW, CLOSE
    """,
    "disarmed": f"""{TO_ARMED}
    Disarmed                ENDED       fall back, send Disarm, WITHDRAW, CLOSE
    """,
    "the destination refuses a round": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    RoundSent               ROUND
    Refuse                  ENDED       fall back, WITHDRAW, CLOSE
    """,
    "the link is lost in a round": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    LinkLost                ENDED       fall back, WITHDRAW, CLOSE
    """,
    "disarmed in a round": f"""{TO_ARMED}
    RoundDue                ROUND       START_ROUND
    Disarmed                ENDED       fall back, send Disarm, WITHDRAW, CLOSE
    """,
    "the record cannot say offered": f"""{TO_ARMED}
    Freeze                  FREEZING    MAKE_TAIL, OFFER
    Disarmed                REVOKING    REVOKE
    Revoked                 ENDED       fall back, send Disarm, WITHDRAW, CLOSE
    """,
    "the record cannot say offered, and QEMU has the tail": f"""{TO_LAST_ROUND}
    Disarmed                REVOKING    REVOKE
    Revoked, given          ENDED       go on, send Disarm, WITHDRAW, CLOSE
    """,
    "QEMU has the tail when the guest resumes": f"""{TO_OFFERED}
    GuestResumed            REVOKING    END_OFFER
    Revoked, given          ENDED       go on, send Disarm, WITHDRAW, CLOSE
    """,
    "QEMU asks for the state, and its migration is over": f"""{TO_FROZEN}
    MigrationEnded          FROZEN
    GuestResumed            REVOKING    REVOKE
    Revoked                 ENDED       go on, send Disarm, WITHDRAW, CLOSE
    """,
    "the destination refuses the tail": f"""{TO_FROZEN}
    Refuse                  REVOKING    REVOKE
    Revoked                 ENDED       go on, WITHDRAW, CLOSE
    """,
    "the destination lets go before it has asked": f"""{TO_FROZEN}
    Released                REVOKING    REVOKE
    Revoked                 ENDED       go on, WITHDRAW, CLOSE
    """,
    "the link, or the lane, is lost after the freeze": f"""{TO_FROZEN}
    LinkLost                REVOKING    REVOKE
    Revoked                 ENDED       go on, WITHDRAW, CLOSE
    """,
    "disarmed after the freeze": f"""{TO_FROZEN}
    Disarmed                REVOKING    REVOKE
    Revoked                 ENDED       go on, send Disarm, WITHDRAW, CLOSE
    """,
    "disarmed when it was granted": f"""{TO_FROZEN}
    Disarmed                REVOKING    REVOKE
    Granted                 GRANTED     TELL_GRANTED
    """,
    "QEMU resumes the guest here when it was granted": f"""{TO_FROZEN}
    GuestResumed            REVOKING    REVOKE
    Granted                 GRANTED     TELL_GRANTED, repeat
    GuestResumed            RECLAIMING  HOLD_COMMANDS, ASK
    """,
    "the engine has given the tail, and more, when the guest resumes": f"""{TO_OFFERED}
    GuestResumed            REVOKING    END_OFFER
    Granted                 GRANTED     TELL_GRANTED, repeat
    GuestResumed            RECLAIMING  HOLD_COMMANDS, ASK
    """,
    "reclaimed": f"""{TO_RECLAIMING}
    Running                 RECLAIMING
    LinkLost                RECLAIMING  CLOSE, ASK
    Unknown                 RECLAIMING
    Refuse                  RECLAIMING
    Released                RELEASED    RECORD_RELEASED
    Remembered              ENDED       SERVE, go on, CLOSE
    """,
    "reclaimed too late": f"""{TO_RECLAIMING}
    Kept                    RECLAIMING  RECORD_MOVED, FAIL_COMMANDS
    """,
    "reclaimed in vain at first, then not": f"""{TO_RECLAIMING}
    Kept                    RECLAIMING  RECORD_MOVED, FAIL_COMMANDS
    Released                RELEASED    RECORD_RELEASED
    Remembered              ENDED       SERVE, go on, CLOSE
    """,
    "a QEMU that was handed over runs on later": f"""{TO_GRANTED}
    Running                 MOVED       RECORD_MOVED
    GuestResumed            RECLAIMING  HOLD_COMMANDS, ASK
    Kept                    RECLAIMING  RECORD_MOVED, FAIL_COMMANDS
    """,
    "the destination lets go by itself": f"""{TO_GRANTED}
    Released                RELEASED    RECORD_RELEASED
    Remembered              ENDED       SERVE, go on, CLOSE
    """,
    "the record cannot say released": f"""{TO_RECLAIMING}
    Released                RELEASED    RECORD_RELEASED
    RecordFailed            LEFT        ASK
    Released                RELEASED    RECORD_RELEASED
    Remembered              ENDED       SERVE, go on, CLOSE
    """,
    "the Grant is lost": f"""{TO_GRANTED}
    LinkLost                GRANTED     CLOSE, ASK
    Unknown                 GRANTED
    Refuse                  GRANTED
    Kept                    MOVED       RECORD_MOVED
    Unknown                 MOVED
    Refuse                  MOVED
    Running                 MOVED
    Kept                    MOVED
    Released                RELEASED    RECORD_RELEASED
    Remembered              ENDED       SERVE, go on, CLOSE
    """,
    "QEMU leaves before the destination has said that it has the vTPM": f"""{TO_GRANTED}
    QemuLeft                LEFT        ASK
    LinkLost                LEFT        CLOSE, ASK
    Unknown                 LEFT
    Refuse                  LEFT
    Running                 LEFT        RECORD_MOVED
    Kept                    LEFT        RECORD_MOVED
    Released                RELEASED    RECORD_RELEASED
    Remembered              ENDED       SERVE, go on, CLOSE
    """,
    "QEMU leaves": f"""{TO_GRANTED}
    Running                 MOVED       RECORD_MOVED
    GuestStopped            MOVED
    RoundDue                MOVED
    QemuLeft                LEFT        ASK
    Kept                    LEFT        RECORD_MOVED
    """,
    "another guest boots while the vTPM is asked for": f"""{TO_RECLAIMING}
    QemuLeft                LEFT        ASK
    GuestResumed            LEFT
    """,
    "the vTPM comes back by another session": f"""{TO_GRANTED}
    CameBack                ENDED       CLOSE
    """,
    "the vTPM comes back by another session, later": f"""{TO_GRANTED}
    Running                 MOVED       RECORD_MOVED
    CameBack                ENDED       CLOSE
    """,
    "the vTPM comes back in whole blobs while it is asked for": f"""{TO_RECLAIMING}
    CameBack                ENDED       CLOSE
    """,
    "the vTPM comes back after a restart": f"""{TO_GRANTED}
    QemuLeft                LEFT        ASK
    CameBack                ENDED       CLOSE
    """,
}


TO_HOLDING = """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    Key                     WELCOMED
    LaneCame                RECEIVING   set lane
    Record                  RECEIVING   apply
    Commit                  STAGING     stage
    Staged                  HOLDING     send Ack
"""

TO_STANDBY = f"""{TO_HOLDING}
    Stopped                 STANDBY     START
    HeldStarted             STANDBY
"""

TO_TAKING = f"""{TO_HOLDING}
    Took                    TAKING
"""

TO_STARTED = f"""{TO_TAKING}
    Started                 STARTED
"""

TO_SETTLED = f"""{TO_STARTED}
    InitAnswered            STARTED     ADMIT
    Admitted                ADMITTED    send Running, SETTLE
    Settled                 SETTLED     CLOSE
"""

DESTINATION = {
    "the vTPM comes": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    Key                     WELCOMED
    LaneCame                RECEIVING   set lane
    Record                  RECEIVING   apply
    Record                  RECEIVING   apply
    Commit                  STAGING     stage
    Staged                  HOLDING     send Ack
    Record                  HOLDING     apply
    Commit                  STAGING     stage
    Staged                  HOLDING     send Ack
    Stopped                 STANDBY     START
    HeldStarted             STANDBY
    Took                    TAKING
    Started                 STARTED
    InitAnswered            STARTED     ADMIT
    Admitted                ADMITTED    send Running, SETTLE
    Settled                 SETTLED     CLOSE
    LinkLost                SETTLED     CLOSE
    """,
    "the last round says that it is": f"""{TO_HOLDING}
    Record                  HOLDING     apply
    CommitLast              STAGING     stage
    HeldStarted             STANDBY     send Ack
    Stopped                 STANDBY
    Took                    TAKING
    """,
    "it was not the last round": f"""{TO_HOLDING}
    CommitLast              STAGING     stage
    HeldStarted             STANDBY     send Ack
    Record                  HOLDING     LET_GO, apply
    CommitLast              STAGING     stage
    HeldStarted             STANDBY     send Ack
    """,
    "the last round cannot be started from": f"""{TO_HOLDING}
    CommitLast              STAGING     stage
    StageFailed             DECLINING   send Refuse, decline
    """,
    "the Grant is faster than QEMU": f"""{TO_TAKING}
    Entitled                ENTITLED
    Started                 STARTED
    InitAnswered            STARTED     ADMIT
    Admitted                ADMITTED    send Running, SETTLE
    Settled                 SETTLED     CLOSE
    """,
    "the tail overtakes the last round": f"""{TO_TAKING}
    Record                  TAKING
    Commit                  TAKING
    Stopped                 TAKING
    Started                 STARTED
    """,
    "the Grant overtakes the last round, too": f"""{TO_TAKING}
    Record                  TAKING
    Entitled                ENTITLED
    Record                  ENTITLED
    Commit                  ENTITLED
    Stopped                 ENTITLED
    Started                 STARTED
    Record                  STARTED
    Commit                  STARTED
    Stopped                 STARTED
    InitAnswered            STARTED     ADMIT
    Admitted                ADMITTED    send Running, SETTLE
    Record                  ADMITTED
    Commit                  ADMITTED
    Stopped                 ADMITTED
    Settled                 SETTLED     CLOSE
    Record                  SETTLED
    Commit                  SETTLED
    Stopped                 SETTLED
    """,
    "the tail overtakes a round that begins": f"""{TO_STANDBY}
    Record                  HOLDING     LET_GO, apply
    Took                    TAKING
    """,
    "the tail overtakes a round that ends": f"""{TO_STANDBY}
    Commit                  STAGING     LET_GO, stage
    Took                    TAKING
    """,
    "granted before it could be let be": f"""{TO_TAKING}
    LinkLost                DECLINING   decline
    Entitled                ENTITLED
    """,
    "the source asks for what was granted before it could be let be": f"""{TO_TAKING}
    Reclaim                 DECLINING   decline
    Entitled                ENTITLED    repeat
    Reclaim                 RELEASING   RELEASE
    """,
    "the source asks for what was started before it could be let be": f"""{TO_TAKING}
    Reclaim                 DECLINING   decline
    Started                 STARTED     repeat
    Reclaim                 RELEASING   RELEASE
    """,
    "started before it could be let be": f"""{TO_TAKING}
    Disarm                  DECLINING   decline
    Started                 STARTED
    """,
    "the guest runs on after its TPM was started": f"""{TO_STANDBY}
    Stopped                 STANDBY
    Record                  HOLDING     LET_GO, apply
    Commit                  STAGING     stage
    Staged                  HOLDING     send Ack
    Stopped                 STANDBY     START
    Commit                  STAGING     LET_GO, stage
    Staged                  HOLDING     send Ack
    TailRefused             DECLINING   send Refuse, decline
    """,
    "QEMU boots instead of starting what was granted": f"""{TO_TAKING}
    Entitled                ENTITLED
    Adopt                   STARTED     ADMIT
    Admitted                ADMITTED    send Running, SETTLE
    Settled                 SETTLED     CLOSE
    """,
    "the disk fails at first": f"""{TO_STARTED}
    InitAnswered            STARTED     ADMIT
    AdmitFailed             STARTED
    InitAnswered            STARTED     ADMIT
    Admitted                ADMITTED    send Running, SETTLE
    SettleFailed            ADMITTED
    SettleDue               ADMITTED    SETTLE
    Settled                 SETTLED     CLOSE
    """,
    "the link is lost once granted": f"""{TO_TAKING}
    Entitled                ENTITLED
    LinkLost                ENTITLED    CLOSE
    Started                 STARTED
    LinkLost                STARTED     CLOSE
    InitAnswered            STARTED     ADMIT
    Admitted                ADMITTED    send Running, SETTLE
    LinkLost                ADMITTED    CLOSE
    Settled                 SETTLED     CLOSE
    """,
    "is it there?": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    Ping                    WELCOMED    send Pong
    Key                     WELCOMED
    LaneCame                RECEIVING   set lane
    Ping                    RECEIVING   send Pong
    Commit                  STAGING     stage
    Ping                    STAGING     send Pong
    Staged                  HOLDING     send Ack
    Ping                    HOLDING     send Pong
    Stopped                 STANDBY     START
    Ping                    STANDBY     send Pong
    Took                    TAKING
    Ping                    TAKING      send Pong
    Started                 STARTED
    Ping                    STARTED     send Pong
    InitAnswered            STARTED     ADMIT
    Admitted                ADMITTED    send Running, SETTLE
    Ping                    ADMITTED    send Pong
    Settled                 SETTLED     CLOSE
    Ping                    SETTLED     send Pong
    Reclaim                 RELEASING   RELEASE
    Ping                    RELEASING   send Pong
    Remembered              ENDED       send Released, CLOSE
    """,
    "is it there once granted?": f"""{TO_TAKING}
    Entitled                ENTITLED
    Ping                    ENTITLED    send Pong
    """,
    "is it there at the end?": f"""{TO_HOLDING}
    Disarm                  DECLINING   decline
    Ping                    DECLINING   send Pong
    Remembered              ENDED       send Released, CLOSE
    """,
    "a peer that says nothing": """
    LinkLost                ENDED       CLOSE
    """,
    "the session cannot be written down": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    StageFailed             ENDED       send Refuse, discard, CLOSE
    """,
    "the link is lost before the lane": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    LinkLost                ENDED       discard, CLOSE
    """,
    "the link is lost before a base": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    Key                     WELCOMED
    LaneCame                RECEIVING   set lane
    LinkLost                ENDED       discard, CLOSE
    """,
    "disarmed before the lane": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    Disarm                  ENDED       discard, CLOSE
    """,
    "disarmed before a base": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    Key                     WELCOMED
    LaneCame                RECEIVING   set lane
    Disarm                  ENDED       discard, CLOSE
    """,
    "another source begins before the lane": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    SetAside                ENDED       send Refuse, discard, CLOSE
    """,
    "another source begins before a base": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    Key                     WELCOMED
    LaneCame                RECEIVING   set lane
    SetAside                ENDED       send Refuse, discard, CLOSE
    """,
    "libtpms refuses the round": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    Key                     WELCOMED
    LaneCame                RECEIVING   set lane
    Commit                  STAGING     stage
    StageFailed             DECLINING   send Refuse, decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "the engine fails while it stages": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    Key                     WELCOMED
    LaneCame                RECEIVING   set lane
    Commit                  STAGING     stage
    LinkLost                DECLINING   decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "the engine fails while it stages, and the source gives up": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    Key                     WELCOMED
    LaneCame                RECEIVING   set lane
    Commit                  STAGING     stage
    Disarm                  DECLINING   decline
    """,
    "the engine fails while it stages, and another source begins": """
    Hello                   WELCOMED    PREPARE
    Prepared                WELCOMED    send Welcome
    Key                     WELCOMED
    LaneCame                RECEIVING   set lane
    Commit                  STAGING     stage
    SetAside                DECLINING   send Refuse, decline
    """,
    "the link is lost while holding": f"""{TO_HOLDING}
    LinkLost                DECLINING   decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "the source ends the session while holding": f"""{TO_HOLDING}
    Disarm                  DECLINING   decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "QEMU starts from something else while holding": f"""{TO_HOLDING}
    SetAside                DECLINING   send Refuse, decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "the link is lost with its TPM started": f"""{TO_STANDBY}
    LinkLost                DECLINING   decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "the source ends the session with its TPM started": f"""{TO_STANDBY}
    Disarm                  DECLINING   decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "QEMU starts from something else with its TPM started": f"""{TO_STANDBY}
    SetAside                DECLINING   send Refuse, decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "the link is lost before the Grant": f"""{TO_TAKING}
    LinkLost                DECLINING   decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "the source ends the session before the Grant": f"""{TO_TAKING}
    Disarm                  DECLINING   decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "QEMU starts from something else before the Grant": f"""{TO_TAKING}
    SetAside                DECLINING   send Refuse, decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "that the session is over cannot be written down": f"""{TO_HOLDING}
    Disarm                  DECLINING   decline
    RecordFailed            ENDED       CLOSE
    """,
    "the TPM does not start": f"""{TO_HOLDING}
    Stopped                 STANDBY     START
    StageFailed             DECLINING   send Refuse, decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "the tail cannot be used": f"""{TO_STANDBY}
    TailRefused             DECLINING   send Refuse, decline
    RecordFailed            ENDED       CLOSE
    """,
    "the tail cannot be used, and it is not on standby": f"""{TO_HOLDING}
    TailRefused             DECLINING   send Refuse, decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "the source asks for what it has not granted": f"""{TO_TAKING}
    Reclaim                 DECLINING   decline
    Remembered              ENDED       send Released, CLOSE
    """,
    "given back before QEMU starts it": f"""{TO_TAKING}
    Entitled                ENTITLED
    Reclaim                 RELEASING   RELEASE
    Remembered              ENDED       send Released, CLOSE
    """,
    "given back before it is durable": f"""{TO_STARTED}
    Reclaim                 RELEASING   RELEASE
    Remembered              ENDED       send Released, CLOSE
    """,
    "asked for while it is put into its file": f"""{TO_STARTED}
    InitAnswered            STARTED     ADMIT
    Admitted                ADMITTED    send Running, SETTLE
    Reclaim                 ADMITTED    send Kept
    """,
    "given back, unused": f"""{TO_SETTLED}
    Reclaim                 RELEASING   RELEASE
    Remembered              ENDED       send Released, CLOSE
    """,
    "a command was served": f"""{TO_SETTLED}
    Reclaim                 RELEASING   RELEASE
    Served                  SETTLED     send Kept
    """,
    "offered elsewhere while it was fenced": f"""{TO_SETTLED}
    Reclaim                 RELEASING   RELEASE
    Served, when fenced     SETTLED     SERVE_ON, send Kept
    """,
    "given back once the disk takes it": f"""{TO_SETTLED}
    Reclaim                 RELEASING   RELEASE
    RecordFailed            RELEASING   send Kept
    LinkLost                RELEASING   CLOSE
    Reclaim                 RELEASING   RELEASE
    Remembered              ENDED       send Released, CLOSE
    """,
}


def parse(line: str) -> tuple[str, str, list[str]]:
    """Split a line of a transcript: its columns are apart by two blanks or more, or it is full."""
    found = re.fullmatch(r"\s*(.{1,24}?)\s+([A-Z_]+)(?:\s{2,}(\S.*?))?\s*", line)
    assert found, line
    event, state, actions = found.groups()
    return event, state, actions.split(", ") if actions else []


_SPELLINGS: dict[type, str] = {
    source.FallBack: "fall back",
    source.GoOn: "go on",
    destination.SetLane: "set lane",
    destination.Apply: "apply",
    destination.Stage: "stage",
    destination.Decline: "decline",
    destination.Discard: "discard",
    source.Repeat: "repeat",
    destination.Repeat: "repeat",
}


def spell(action: source.Action | destination.Action) -> str:
    """Write an action as the transcripts do."""
    if isinstance(action, source.Send | destination.Send):
        return f"send {type(action.message).__name__}"
    if isinstance(action, source.Do | destination.Do):
        return action.name
    return _SPELLINGS[type(action)]


def play(machine: Source | Destination, transcript: str) -> set[tuple[State, object]]:
    """Play a transcript; return the rows of the table that it has walked."""
    walked: set[tuple[State, object]] = set()
    for line in filter(str.strip, transcript.splitlines()):
        name, state, actions = parse(line)
        event = EVENTS[name]
        walked.add((machine.state, type(event)))
        assert [spell(each) for each in machine.step(event)] == actions, line
        assert machine.state is State[state], line
    return walked


def new_source() -> Source:
    return Source(hello=HELLO, key=KEY)


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
    """From the peer it ends the session; nothing has changed by then. What is over ignores all."""
    theirs = Destination(OWN)
    theirs.key = KEY
    for machine in (new_source(), theirs):
        machine.state = state
        machine.session = SESSION
        before = dict(vars(machine))
        for event in EVENTS.values():
            if (state, type(event)) in TABLE:
                continue
            if state is State.ENDED:
                assert machine.step(event) == []
                continue
            with pytest.raises(ImpossibleEvent, match=state.name):
                machine.step(event)
            assert vars(machine) == before
            assert not isinstance(event, events.LocalEvent) or not machine.can_take(type(event))


@pytest.mark.parametrize("name", ["Reclaim", "Disarm", "Stopped", "Ping"])
def test_invariant_3_messages_of_another_session_change_nothing_here(name: str) -> None:
    """Whoever has a certificate cannot grant, reclaim or end a session that is not theirs."""
    machine = Destination(OWN)
    play(machine, TO_TAKING)
    with pytest.raises(ImpossibleEvent, match="another session"):
        machine.step(EVENTS[name]._replace(session=b"x" * 16))
    assert machine.state is State.TAKING


@pytest.mark.parametrize("name", ["Released", "Kept", "Running", "Unknown"])
def test_invariant_3_answers_of_another_session_change_nothing_here(name: str) -> None:
    """Nor can they give this side the vTPM back."""
    machine = new_source()
    play(machine, TO_RECLAIMING)
    with pytest.raises(ImpossibleEvent, match="another session"):
        machine.step(EVENTS[name]._replace(session=b"x" * 16))
    assert machine.state is State.RECLAIMING


@pytest.mark.parametrize("said", [["LaneCame"], ["Commit"], ["Record"], ["Key", "Commit"]])
def test_key_and_lane_come_before_a_round(said: list[str]) -> None:
    """There would be a base, and no way to open the tail, or to ask for the vTPM."""
    machine = Destination(OWN)
    machine.step(HELLO)
    *before, last = said
    for each in before:
        machine.step(EVENTS[each])
    with pytest.raises(ImpossibleEvent):
        machine.step(EVENTS[last])
    assert machine.state is State.WELCOMED


def test_a_session_has_one_lane() -> None:
    """Another one would have the same keys, with the same numbers."""
    machine = Destination(OWN)
    for each in ("Hello", "Key", "LaneCame"):
        machine.step(EVENTS[each])
    with pytest.raises(ImpossibleEvent):
        machine.step(EVENTS["LaneCame"])


def test_invariant_12_a_round_says_what_the_guest_said_of_power() -> None:
    """As the engine knows it, and nothing else."""
    machine = Destination(OWN)
    machine.step(HELLO)
    machine.step(EVENTS["Key"])
    machine.step(EVENTS["LaneCame"])
    with pytest.raises(ImpossibleEvent, match="TPM2_Shutdown"):
        machine.step(EVENTS["Commit"]._replace(power=3))
    (stage,) = machine.step(EVENTS["Commit"]._replace(power=2))
    assert stage == destination.Stage(10, 20, 2, 0)


def test_last_round_is_said_by_one_or_nothing() -> None:
    """Another number is none of this version's."""
    machine = Destination(OWN)
    for name in ("Hello", "Key", "LaneCame"):
        machine.step(EVENTS[name])
    with pytest.raises(ImpossibleEvent, match="last round"):
        machine.step(EVENTS["Commit"]._replace(is_last=2))
    (stage,) = machine.step(EVENTS["CommitLast"])
    assert stage == destination.Stage(10, 20, 0, 1)


def lines() -> list[tuple[str, str, list[str]]]:
    """Return all lines of all transcripts."""
    transcripts = [*SOURCE.values(), *DESTINATION.values()]
    return [parse(line) for each in transcripts for line in each.splitlines() if line.strip()]


def test_invariant_3_the_engine_serves_again_once_released_is_durable_only() -> None:
    """No other event has it serve again than Remembered."""
    assert {event for event, _, actions in lines() if "SERVE" in actions} == {"Remembered"}


def test_invariant_3_what_was_offered_is_withdrawn_once_the_engine_has_agreed() -> None:
    """It may have granted the vTPM, and not been heard yet."""
    for state in (*ON_OFFER, State.FROZEN):
        ends = [then for (before, _), then in TABLE.items() if before is state]
        assert State.ENDED not in ends
        assert State.ARMED not in ends


def test_invariant_3_released_is_said_once_that_is_durable_only() -> None:
    """So a restart says the same."""
    assert {event for event, _, does in lines() if "send Released" in does} == {"Remembered"}


def test_invariant_4_a_round_is_acknowledged_after_it_was_staged_only() -> None:
    """Validated by libtpms, and durable: nothing else makes an Ack."""
    acknowledging = {(event, after) for event, after, does in lines() if "send Ack" in does}
    assert acknowledging == {("Staged", "HOLDING"), ("HeldStarted", "STANDBY")}
    machine = Destination(OWN)
    machine.state = State.STANDBY
    assert machine.step(events.HeldStarted()) == []


def test_invariant_6_a_tail_needs_a_base_and_a_destination_that_is_there_and_receives() -> None:
    """Else QEMU gets whole blobs, and people are told why."""
    machine = new_source()
    machine.peer_following = peer.Following.NOT_ASKED_FOR
    for state in State:
        machine.state = state
        assert (machine.why_no_tail(0) is None) == (state in (*WITH_BASE, State.CAPTURING))
    machine.state = State.ARMED
    assert "not been heard of for 1.0 s" in str(machine.why_no_tail(HEARD_US_MAX + 1))
    machine.peer_following = peer.Following.FOLLOWING
    assert "has not said that a stream comes in" in str(machine.why_no_tail(0))
    machine.step(EVENTS["Receiving"])
    assert machine.why_no_tail(HEARD_US_MAX) is None
    machine.step(EVENTS["MigrationEnded"])
    assert machine.why_no_tail(0) is not None


def test_a_session_that_was_found_asks_at_once() -> None:
    """After a restart: its state is the one of a QEMU that has left."""
    found = Source.found(SESSION, State.LEFT)
    assert (found.state, found.session, found.is_fenced) == (State.LEFT, SESSION, True)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"version": 9, "version_minimum": 9}, peer.Reason.VERSION),
        ({"version": 0, "version_minimum": 0}, peer.Reason.VERSION),
        ({"tpm_version": 1}, peer.Reason.TPM_VERSION),
        ({"format_level": 8}, peer.Reason.LIBTPMS_VERSION),
        ({"profile": b"default-v2"}, peer.Reason.LIBTPMS_VERSION),
        ({"profile": b"null\n"}, peer.Reason.LIBTPMS_VERSION),
        ({"uuid": b"x" * 16}, peer.Reason.UUID),
        ({"lineage": b"m" * 16}, peer.Reason.LINEAGE),
        ({"image_bytes_max": 262145}, peer.Reason.LIMIT),
    ],
)
def test_unfit_destination_refuses_before_anything_moves(
    changed: dict[str, Any], reason: peer.Reason
) -> None:
    """It says which of the source's properties it cannot match."""
    machine = Destination(OWN._replace(lineage=LINEAGE))
    actions = machine.step(HELLO._replace(**changed))
    assert machine.state is State.ENDED
    assert isinstance(actions[0], destination.Send)
    assert isinstance(actions[0].message, peer.Refuse)
    assert actions[0].message.reason == reason
    assert actions[1:] == [destination.Do.CLOSE]


def test_destination_in_use_refuses() -> None:
    """A guest's TPM is not replaced under it; the text is the daemon's."""
    send, _ = Destination(OWN._replace(busy="a guest uses the TPM there already")).step(HELLO)
    assert isinstance(send, destination.Send)
    assert send.message == peer.Refuse(peer.Reason.BUSY, "a guest uses the TPM there already")


@pytest.mark.parametrize(
    "fine",
    [
        {"uuid": bytes(16)},
        {"lineage": b"m" * 16},
        {"format_level": 1, "profile": b"null" + bytes(28)},
        {"format_level": 0, "profile": bytes(32)},
        {"format_level": 2, "profile": b"custom:mine"},
    ],
)
def test_fit_destination_welcomes(fine: dict[str, Any]) -> None:
    """A VM without a UUID, no state in the directory, a state that this libtpms reads."""
    machine = Destination(OWN)
    machine.step(HELLO._replace(**fine))
    assert machine.state is State.WELCOMED
