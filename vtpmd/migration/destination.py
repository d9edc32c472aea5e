"""The destination's side of a session: events in, actions out, in order. No I/O, no clock."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from vtpmd.migration.states import ImpossibleEvent, Local, State, advance, check_session
from vtpmd.wire import peer
from vtpmd.wire.peer import Reason

NO_UUID = bytes(peer.UUID_BYTES)


class Own(NamedTuple):
    """What this side can run, to hold against a Hello."""

    running: bool
    uuid: bytes  # all zero: the operator gave none
    tpm_version: int
    libtpms_version: int
    image_bytes_max: int


class Send(NamedTuple):
    """Send a message to the source."""

    message: peer.Message


class Apply(NamedTuple):
    """Apply a record to the images; they are the source's word until the round is staged."""

    record: bytes


class Stage(NamedTuple):
    """Have libtpms validate the images, and make the permanent one durable; then say how it went.

    Refused unless the images have these generations.
    """

    permanent_generation: int
    volatile_generation: int


class Discard(NamedTuple):
    """Forget the images, in the engine too; tell people why. QEMU may still bring whole blobs."""

    reason: str


class Do(Enum):
    """Actions without anything more to say."""

    START = "start the TPM from the last round, held: it executes nothing before it is admitted"
    MAY_RUN = "INIT may go on: the vTPM is ours"
    RELEASE = "unless a guest's command was served: serve none, then say RELEASE"
    CLOSE = "close the connection"


Action = Send | Apply | Stage | Discard | Do
Event = peer.Message | Local


class Destination:
    """One session, from the connection to its end."""

    def __init__(self, own: Own) -> None:
        self.state = State.WELCOMING
        self.session = bytes(peer.SESSION_BYTES)
        self.uuid = own.uuid
        self.key: bytes | None = None
        self._own = own
        self._round = 0
        self._generations = (0, 0)

    def step(self, event: Event, reason: str = "") -> list[Action]:
        """Take an event; ``reason`` is for people, with a lost link and a failed staging.

        Raises ImpossibleEvent, with nothing changed.
        """
        if not isinstance(event, Local | peer.Hello):
            check_session(event, self.session)
        if isinstance(event, peer.Commit) and self.key is None:
            raise ImpossibleEvent("Commit before Key")
        before = self.state
        self.state = advance(before, event if isinstance(event, Local) else type(event))
        if isinstance(event, Local):
            return self._local(event, before, reason)
        return self._message(event, before)

    def take(self, *, digests: tuple[bytes, bytes], durations_us: tuple[int, int, int]) -> Send:
        """Return the message that asks for the vTPM, once the tail has been applied."""
        return Send(peer.Take(self.session, *digests, *durations_us))

    def _local(self, event: Local, before: State, reason: str) -> list[Action]:
        match event:
            case Local.STAGED:
                return [Send(peer.Ack(self._round, *self._generations))]
            case Local.STAGE_FAILED | Local.TAIL_REFUSED:
                refusal = peer.Refuse(Reason.STATE, reason)
                return [Send(refusal), Discard(reason), Do.CLOSE]
            case Local.RELEASE:
                return [Send(peer.Released(self.session)), Do.CLOSE]
            case Local.LINK_LOST if before is not State.OWNING:
                return [Discard(reason), Do.CLOSE]
        return []

    def _message(self, event: peer.Message, before: State) -> list[Action]:
        match event:
            case peer.Hello():
                return self._hello(event)
            case peer.Key():
                self.key = event.key
            case peer.Record() | peer.Commit() | peer.Stopped() if before is State.TAKING:
                return []  # of the round that the freeze overtook: the tail has it
            case peer.Record():
                return [Apply(event.record)]
            case peer.Commit():
                self._round = event.round
                self._generations = (event.permanent_generation, event.volatile_generation)
                return [Stage(*self._generations)]
            case peer.Stopped():
                return [Do.START]
            case peer.Grant():
                return [Do.MAY_RUN]
            case peer.Reclaim() if before is State.TAKING:
                released = Send(peer.Released(self.session))
                return [Discard("the guest runs on at the source"), released, Do.CLOSE]
            case peer.Reclaim():
                return [Do.RELEASE]
            case peer.Disarm():
                return [Discard("the source has ended the session"), Do.CLOSE]
        return []

    def _hello(self, hello: peer.Hello) -> list[Action]:
        self.session = hello.session
        refusal = self._refusal(hello)
        if refusal is not None:
            self.state = State.ENDED
            return [Send(refusal), Do.CLOSE]
        # Either side may have been given none: the tail is bound to the source's.
        self.uuid = hello.uuid
        version = min(hello.version, peer.VERSION)
        return [Send(peer.Welcome(version, self._own.libtpms_version))]

    def _refusal(self, hello: peer.Hello) -> peer.Refuse | None:
        """Return why this side could not run the source's state, or None."""
        own = self._own
        if hello.version_minimum > peer.VERSION or hello.version < peer.VERSION_MINIMUM:
            return peer.Refuse(
                Reason.VERSION,
                f"it speaks versions {hello.version_minimum} to {hello.version}, this vtpmd "
                f"{peer.VERSION_MINIMUM} to {peer.VERSION}: install the same vtpmd on both hosts",
            )
        if hello.tpm_version != own.tpm_version:
            return peer.Refuse(
                Reason.TPM_VERSION,
                f"its TPM is of version {hello.tpm_version}, this one of {own.tpm_version}",
            )
        # libtpms reads its own and older states; patch releases do not change the format.
        if hello.libtpms_version >> 8 > own.libtpms_version >> 8:
            return peer.Refuse(
                Reason.LIBTPMS_VERSION,
                f"its libtpms is {_version(hello.libtpms_version)}, newer than "
                f"{_version(own.libtpms_version)} here: upgrade libtpms on this host",
            )
        if own.running:
            return peer.Refuse(Reason.BUSY, "a guest uses the TPM there already")
        if NO_UUID not in (hello.uuid, own.uuid) and hello.uuid != own.uuid:
            return peer.Refuse(Reason.UUID, "it is another VM: the UUIDs differ")
        if hello.image_bytes_max > own.image_bytes_max:
            return peer.Refuse(
                Reason.LIMIT,
                f"its state may have {hello.image_bytes_max} bytes, here {own.image_bytes_max} fit",
            )
        return None


def _version(number: int) -> str:
    """Write a libtpms version as people do (TPM_LIBRARY_VERSION in tpm_library.h)."""
    return f"{number >> 16 & 0xFF}.{number >> 8 & 0xFF}.{number & 0xFF}"
