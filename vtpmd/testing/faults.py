"""Faults by name: messages to cut the link at, and processes to kill.

The third, a loss of power, is `hosts.LocalHost.lose_power`.
"""

import os
import signal
from contextlib import suppress
from enum import Enum, StrEnum

from vtpmd.core.lane import LaneKind
from vtpmd.testing.host import Host
from vtpmd.testing.link import Kind
from vtpmd.testing.waiting import wait_until
from vtpmd.wire import peer


class Message(StrEnum):
    """What the vtpmd of two hosts say to each other (docs/stream-format.md), in this order."""

    HELLO = "hello"  # the source asks whether the vTPM could run there
    BASE = "base"  # the first record of its state
    ACK = "ack"  # a round is durable at the destination
    TAKE = "take"  # QEMU has brought the tail there; the guest stands still from before
    GRANT = "grant"  # the source serves no more
    RUNNING = "running"  # the guest's TPM runs at the destination


MESSAGES: dict[Message, Kind] = {
    Message.HELLO: peer.Hello,
    Message.BASE: peer.Record,
    Message.ACK: peer.Ack,
    Message.TAKE: LaneKind.TAKE,
    Message.GRANT: LaneKind.GRANT,
    Message.RUNNING: peer.Running,
}


class Victim(Enum):
    """Whom a SIGKILL ends."""

    VTPMD = "vtpmd"  # and its engine
    DAEMON = "daemon"  # vtpmd alone
    ENGINE = "engine"
    QEMU = "qemu"

    def strike(self, host: Host) -> None:
        """Let it happen; the victim is gone then, what ends because of it may take a moment."""
        match self:
            case Victim.VTPMD:
                host.vtpmd.kill()
            case Victim.DAEMON:
                host.vtpmd.program.kill()
            case Victim.ENGINE:
                for engine in host.vtpmd.engines():
                    with suppress(ProcessLookupError):
                        os.kill(engine, signal.SIGKILL)
                wait_until(lambda: not host.vtpmd.engines())  # until vtpmd has seen it
            case Victim.QEMU:
                assert host.guest is not None
                host.guest.program.kill()
