"""What a vTPM is told of its QEMU: transcripts, and what holds for any order of events.

A line of a transcript is what QEMU says, what the view says then (``migrating``, ``receiving`` or
``-``), and what its listener is told, in this order. Where a transcript names a version, that QEMU
has said it so (7.2 is Debian 12's, 10.0 Debian 13's, 11.1 that of testing). The installed one says
it again in tests/system/test_qmp.py.
"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.qemu_listener import Told
from vtpmd.daemon.qemu import Following, QemuView
from vtpmd.daemon.qemu_events import (
    Capabilities,
    GuestResumed,
    GuestStopped,
    MigrationState,
    MigrationStatus,
    QemuConnected,
    QemuDisconnected,
    QemuEvent,
    QemuShutdown,
)
from vtpmd.errors import VtpmdError

TRANSCRIPTS = {
    "7.2: a migration": """
        connect running         -
        setup                   -
        active                  migrating   migration_began
        STOP                    migrating   guest_stopped
        completed               -           migration_ended
        disconnect              -           disconnected
    """,
    "10.0 and 11.1: a migration": """
        connect running         -
        setup                   -
        active                  migrating   migration_began
        STOP                    migrating   guest_stopped
        device                  migrating
        completed               -           migration_ended
    """,
    "a word of a later QEMU": """
        connect running         -
        setup                   -
        active                  migrating   migration_began
        switching-fast          migrating
        STOP                    migrating   guest_stopped
        completed               -           migration_ended
    """,
    "a pause before the switchover": """
        connect running         -
        setup                   -
        wait-unplug             migrating   migration_began
        active                  migrating
        STOP                    migrating   guest_stopped
        pre-switchover          migrating
        device                  migrating
        completed               -           migration_ended
    """,
    "7.2: post-copy": """
        connect running         -
        setup                   -
        active                  migrating   migration_began
        postcopy-active         migrating
        STOP                    migrating   guest_stopped
        completed               -           migration_ended
    """,
    "post-copy of a later QEMU, interrupted": """
        connect running         -
        setup                   -
        active                  migrating   migration_began
        STOP                    migrating   guest_stopped
        postcopy-device         migrating
        postcopy-active         migrating
        postcopy-paused         migrating
        postcopy-recover-setup  migrating
        postcopy-recover        migrating
        postcopy-active         migrating
        completed               -           migration_ended
    """,
    "7.2 and 10.0: savevm": """
        connect running         -
        STOP                    -           guest_stopped
        setup                   -
        completed               -
        RESUME                  -           guest_resumed
    """,
    "11.1: savevm": """
        connect running         -
        STOP                    -           guest_stopped
        setup                   -
        completed               -
        RESUME                  -           guest_resumed
    """,
    "loadvm": """
        connect running         -
        STOP                    -           guest_stopped
        RESUME                  -           guest_resumed
    """,
    "7.2: nobody is there": """
        connect running         -
        setup                   -
        failed                  -
    """,
    "11.1: nobody is there": """
        connect running         -
        setup                   -
        failing                 -
        failed                  -
    """,
    "the destination dies": """
        connect running         -
        setup                   -
        active                  migrating   migration_began
        STOP                    migrating   guest_stopped
        device                  migrating
        failing                 -
        failed                  -           migration_ended
        RESUME                  -           guest_resumed
    """,
    "cancelled, and migrated again": """
        connect running         -
        setup                   -
        active                  migrating   migration_began
        cancelling              -
        cancelled               -           migration_ended
        setup                   -
        active                  migrating   migration_began
        completed               -           migration_ended
    """,
    "the guest is stopped already": """
        connect paused          -
        setup                   -
        active                  migrating   migration_began
        completed               -           migration_ended
    """,
    "QEMU is killed while it migrates": """
        connect running         -
        setup                   -
        active                  migrating   migration_began
        STOP                    migrating   guest_stopped
        disconnect              -           migration_ended disconnected
        connect running         -           guest_resumed
    """,
    "the connection is lost while QEMU migrates": """
        connect running         -
        setup                   -
        active                  migrating   migration_began
        disconnect              -           migration_ended disconnected
        connect finish-migrate device  migrating  migration_began guest_stopped
        completed               -           migration_ended
    """,
    "vtpmd comes while QEMU migrates": """
        connect running active  migrating   migration_began
        STOP                    migrating   guest_stopped
        completed               -           migration_ended
    """,
    "what came before the state was known is repeated": """
        connect finish-migrate device  migrating  migration_began
        active                  migrating
        STOP                    migrating
        device                  migrating
        completed               -           migration_ended
    """,
    "7.2: a migration comes in": """
        connect inmigrate       -
        active                  receiving   receiving(True)
        RESUME                  -           guest_resumed receiving(False)
        completed               -
    """,
    "7.2: a migration comes in later, to stay paused": """
        connect inmigrate       -
        setup                   -
        active                  receiving   receiving(True)
        completed               -           receiving(False)
        RESUME                  -           guest_resumed
    """,
    "a destination migrates its guest away": """
        connect inmigrate       -
        setup                   -
        active                  receiving   receiving(True)
        RESUME                  -           guest_resumed receiving(False)
        completed               -
        setup                   -
        active                  migrating   migration_began
        STOP                    migrating   guest_stopped
        completed               -           migration_ended
    """,
    "a destination that never ran migrates its guest away": """
        connect inmigrate       -
        active                  receiving   receiving(True)
        completed               -           receiving(False)
        setup                   -
        active                  migrating   migration_began
        completed               -           migration_ended
    """,
    "vtpmd comes while a migration comes in": """
        connect inmigrate active  receiving  receiving(True)
        RESUME                  -           guest_resumed receiving(False)
        completed               -
        setup                   -
        active                  migrating   migration_began
    """,
    "7.2: post-copy comes in": """
        connect inmigrate       -
        active                  receiving   receiving(True)
        postcopy-active         receiving
        RESUME                  -           guest_resumed receiving(False)
        postcopy-paused         -
        postcopy-active         -
        completed               -
        setup                   -
        active                  migrating   migration_began
    """,
    "vtpmd comes while post-copy brings what is left": """
        connect running postcopy-active  -
        completed               -
        setup                   -
        active                  migrating   migration_began
    """,
    "vtpmd comes back while post-copy brings what is left": """
        connect inmigrate       -
        active                  receiving   receiving(True)
        disconnect              -           receiving(False) disconnected
        connect running postcopy-active  -  guest_resumed
        completed               -
        setup                   -
        active                  migrating   migration_began
    """,
    "what comes in is no migration": """
        connect inmigrate       -
        active                  receiving   receiving(True)
        failed                  -           receiving(False)
        disconnect              -           disconnected
    """,
    "the destination is killed": """
        connect inmigrate       -
        active                  receiving   receiving(True)
        disconnect              -           receiving(False) disconnected
        connect inmigrate       -
        active                  receiving   receiving(True)
    """,
    "without events, a migration that came and went unseen": """
        connect inmigrate none off  -
        setup                   -
        RESUME                  -           guest_resumed
        active                  migrating   migration_began
        setup                   -           migration_ended
        active                  migrating   migration_began
    """,
    "x-colo is switched on when it migrates": """
        connect running         -
        setup                   -
        active                  migrating   migration_began
        capabilities colo       -           colo_seen
        STOP                    -           guest_stopped
        colo                    -
        RESUME                  -           guest_resumed
        failed                  -           migration_ended
        capabilities            -
        setup                   -
        active                  migrating   migration_began
    """,
    "COLO is seen by its state": """
        connect running         -
        active                  migrating   migration_began
        STOP                    migrating   guest_stopped
        colo                    -
    """,
    "x-colo is on": """
        connect running none colo  -        colo_seen
        capabilities colo off   -
        disconnect              -           disconnected
        connect running none colo  -        colo_seen
    """,
}


def state(word: str) -> MigrationState:
    """Return a state, as QEMU's word is taken."""
    return MigrationState(word) if word in list(MigrationState) else MigrationState.OTHER


def connected(status: str, migration: str = "none", *capabilities: str) -> QemuConnected:
    return QemuConnected(
        uuid="0",
        running=status == "running",
        status=status,
        migration_status=state(migration),
        capabilities=capabilities_of(*capabilities),
    )


def capabilities_of(*words: str) -> Capabilities:
    return Capabilities(events="off" not in words, colo="colo" in words)


def event(line: str) -> QemuEvent:
    """Parse the left side of a transcript."""
    match line.split():
        case ["connect", *words]:
            return connected(*words)
        case ["disconnect"]:
            return QemuDisconnected()
        case ["capabilities", *words]:
            return capabilities_of(*words)
        case ["STOP"]:
            return GuestStopped()
        case ["RESUME"]:
            return GuestResumed()
        case [word]:
            return MigrationStatus(state(word))
    raise ValueError(line)


def says(view: QemuView) -> str:
    assert not (view.is_migrating and view.is_receiving)
    return "migrating" if view.is_migrating else "receiving" if view.is_receiving else "-"


def split(line: str) -> tuple[str, str, list[str]]:
    """Take a transcript's line apart at what the view says."""
    words = line.split()
    (at,) = (i for i, word in enumerate(words) if word in ("-", "migrating", "receiving"))
    return " ".join(words[:at]), words[at], words[at + 1 :]


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcript(name: str) -> None:
    told = Told()
    view = QemuView(told, asked_for=True)
    for line in filter(None, map(str.strip, TRANSCRIPTS[name].splitlines())):
        said, expected, calls = split(line)
        view.deliver(event(said))
        assert (said, says(view), told.take()) == (said, expected, calls)


CONNECTIONS = st.builds(
    QemuConnected,
    uuid=st.just("0"),
    running=st.booleans(),
    status=st.sampled_from(["running", "paused", "inmigrate", "finish-migrate"]),
    migration_status=st.sampled_from(MigrationState),
    capabilities=st.builds(Capabilities, events=st.booleans(), colo=st.booleans()),
)
EVENTS = st.one_of(
    st.builds(MigrationStatus, st.sampled_from(MigrationState)),
    st.builds(Capabilities, events=st.booleans(), colo=st.booleans()),
    st.sampled_from([GuestStopped(), GuestResumed(), QemuShutdown()]),
)


def alternate(calls: list[str], first: str, second: str) -> bool:
    """Whether the two came in turns, and the second of each pair has come."""
    pair = [call for call in calls if call in (first, second)]
    return pair == [first, second] * (len(pair) // 2)


@given(st.lists(st.tuples(CONNECTIONS, st.lists(EVENTS, max_size=12)), max_size=3))
def test_any_order_of_events(qemus: list[tuple[QemuConnected, list[QemuEvent]]]) -> None:
    """What begins is told once, and its end, at the latest when QEMU is gone."""
    told = Told()
    view = QemuView(told, asked_for=True)
    for connection, events in qemus:
        for each in [connection, *events]:
            view.deliver(each)
            began = told.calls.count("migration_began") > told.calls.count("migration_ended")
            assert began or not view.is_migrating
            receives = told.calls.count("receiving(True)") > told.calls.count("receiving(False)")
            assert receives == view.is_receiving
            says(view)
        view.deliver(QemuDisconnected())
        assert told.calls[-1] == "disconnected"
        assert says(view) == "-"
        assert alternate(told.calls, "migration_began", "migration_ended")
        assert alternate(told.calls, "receiving(True)", "receiving(False)")


def test_how_qemu_is_followed() -> None:
    assert QemuView(Told(), asked_for=False).following is Following.NOT_ASKED_FOR
    view = QemuView(Told(), asked_for=True)
    words = [view.word]
    for line in (
        "connect running none off",
        "capabilities",
        "capabilities off",
        "disconnect",
        "connect running",
    ):
        view.deliver(event(line))
        words.append(view.word)
    assert words == [
        "not-reachable",
        "without-events",
        "following",
        "without-events",
        "not-reachable",
        "following",
    ]


class Monitor:
    """A QEMU with these capabilities."""

    def __init__(self, *words: str) -> None:
        self.capabilities = capabilities_of(*words)
        self.looked = 0

    async def look(self) -> Capabilities:
        self.looked += 1
        return self.capabilities


def test_arming_is_refused_with_colo_alone() -> None:
    view = QemuView(Told(), asked_for=True)
    asyncio.run(view.check_can_arm())
    monitor = Monitor("colo")
    view.attach(monitor)
    asyncio.run(view.check_can_arm())  # there is no QEMU to ask
    assert monitor.looked == 0
    view.deliver(event("connect running"))
    with pytest.raises(VtpmdError, match=r"x-colo is on, .*; switch it off, or migrate without"):
        asyncio.run(view.check_can_arm())
    monitor.capabilities = capabilities_of("off")
    asyncio.run(view.check_can_arm())
    assert monitor.looked == 2
