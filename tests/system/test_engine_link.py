"""The engine, asked over its link as vtpmd asks it: what is about whose the vTPM is.

Invariant 3: a TPM that is held or retired executes and writes nothing. Invariant 12: what the guest
said of power travels. What each operation does to the TPM is tested in C (``tests/c/test_tpm.c``).
"""

import asyncio
import fcntl
import os
import signal
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.bare_engine import (
    SEALS,
    SERVING,
    BareEngine,
    Late,
    NoSessions,
    attached,
    descriptors_for,
    sealed,
    with_engine,
)
from tests.support.emulator_client import (
    INIT_DELETE_VOLATILE,
    Blob,
    ControlClient,
    ControlError,
    DataSocket,
    receive_exactly,
)
from tests.support.image_digest import whole_digest
from tests.support.tail import Header, Tail, TailCipher
from tests.support.tpm2 import (
    ReturnCode,
    StartupType,
    nv_define,
    pcr_extend,
    shutdown,
    startup,
)
from vtpmd import core
from vtpmd.core import Image, LinkDescriptor, LinkOperation, Store
from vtpmd.core.delta import delta_apply, delta_encode
from vtpmd.core.handover import Handover
from vtpmd.core.lane import LANE_FRAME_BYTES, Lane, LaneFrame, LaneKeying, LaneKind
from vtpmd.core.link import (
    LinkCapture,
    LinkCapturing,
    LinkCondition,
    LinkCustody,
    LinkShutdown,
    LinkStage,
    link_held,
    link_said,
    pack_link_lineage,
    pack_link_records,
    unpack_link_digests,
)
from vtpmd.daemon import engine_process
from vtpmd.daemon.engine import Engine, EngineDetached, EngineDied, Reply
from vtpmd.wire.tpm import Result, StateType

INDEX = 0x01500030
KINDS = (StateType.PERMANENT, StateType.VOLATILE)
KEYING = LaneKeying(b"a session's name", bytes(32), bytes(16), bytes(16), is_greeted=True)
NV_DEFINED = 0x14C  # TPM_RC_NV_DEFINED


class Vtpm:
    """An engine, and the guest's end of its data socket."""

    def __init__(
        self, engine: Engine, store: Store, control: ControlClient, guest: DataSocket
    ) -> None:
        self.engine = engine
        self.store = store
        self.control = control
        self._guest = guest

    async def ask(self, operation: LinkOperation, argument: int = 0, payload: bytes = b"") -> Reply:
        """Ask the engine for something that it does."""
        reply = await self.engine.request(operation, argument, payload)
        assert reply.result == Result.SUCCESS, operation
        return reply

    async def refused(
        self, operation: LinkOperation, argument: int = 0, payload: bytes = b""
    ) -> int:
        """Ask the engine for something that it refuses; return its result."""
        reply = await self.engine.request(operation, argument, payload)
        assert reply.result != Result.SUCCESS, operation
        return reply.result

    async def command(self, command: bytes) -> int:
        """Send a guest's command; return the response code."""
        response = await asyncio.to_thread(self._guest.transact, command)
        return int.from_bytes(response[6:10], "big")


def with_guest(path: Path, test: Callable[[Vtpm], Awaitable[None]]) -> None:
    """Run a test with an engine on a state directory that has a guest."""

    async def run(bare: BareEngine) -> None:
        bare.engine.answer_by(NoSessions(bare.engine))
        with ControlClient(bare.control_path) as control:
            guest = await asyncio.to_thread(control.attach_data)
            try:
                await test(Vtpm(bare.engine, bare.store, control, guest))
            finally:
                guest.close()

    with_engine(path, run)


async def sleeping(vtpm: Vtpm) -> tuple[bytes, bytes]:
    """Return the state of a guest that sleeps, with its TPM off."""
    await vtpm.ask(LinkOperation.INIT)
    assert await vtpm.command(startup(StartupType.CLEAR)) == 0
    assert await vtpm.command(shutdown(StartupType.STATE)) == 0
    reply = await vtpm.ask(LinkOperation.CAPTURE)
    assert reply.argument & LinkCapture.CHANGED
    assert link_said(reply.argument) is LinkShutdown.STATE
    permanent, volatile = [
        vtpm.store.read(kind).data for kind in (StateType.PERMANENT, StateType.VOLATILE)
    ]
    await vtpm.ask(LinkOperation.STOP)
    return permanent, volatile


def whole(states: tuple[bytes, bytes]) -> bytes:
    """Return the payload of STAGE that brings two states of generation 1."""
    records = [
        delta_encode(Image(kind, 0, b""), Image(kind, 1, state))
        for kind, state in zip(KINDS, states, strict=True)
    ]
    return pack_link_records(*records)


async def start_held(vtpm: Vtpm, said: LinkShutdown) -> None:
    """Start a sleeping guest's TPM, held, from its own state."""
    await vtpm.ask(LinkOperation.STAGE, 0, whole(await sleeping(vtpm)))
    await vtpm.ask(LinkOperation.STAGE, link_held(said), pack_link_records(b"", b""))


def test_states_are_brought_and_started_from_in_one_request(tmp_path: Path) -> None:
    """What is no such request is refused, and nothing has started by then."""

    async def test(vtpm: Vtpm) -> None:
        states = await sleeping(vtpm)
        held = link_held(LinkShutdown.STATE)
        both = whole(states)
        too_long = (len(both) - 3).to_bytes(4, sys.byteorder) + both[4:]
        wrong = both[:-1] + bytes([both[-1] ^ 1])
        for argument, payload in (
            (held, b""),
            (held, both[:3]),
            (held, too_long),
            (held, wrong),
            (held, bytes(4)),
            (held | 3 << 8, both),
            (1 << 8, both),
            (LinkStage.HELD << 1, both),
        ):
            assert await vtpm.refused(LinkOperation.STAGE, argument, payload) == (
                Result.BAD_PARAMETER
            )
        assert not (await vtpm.engine.condition())[0] & LinkCondition.ON
        await vtpm.ask(LinkOperation.STAGE, held, both)
        assert await vtpm.engine.condition() == (LinkCondition.ON, LinkCustody.STANDBY)

    with_guest(tmp_path / "state", test)


def test_what_was_brought_is_gone_once_no_more_is_to_come(tmp_path: Path) -> None:
    """As when its TPM was let go of, but then the next record continues it."""

    async def test(vtpm: Vtpm) -> None:
        no_more, held = pack_link_records(b"", b""), link_held(LinkShutdown.NONE)
        await start_held(vtpm, LinkShutdown.NONE)
        await vtpm.ask(LinkOperation.FORGET_STATE, 1)
        assert not (await vtpm.engine.condition())[0] & LinkCondition.ON
        await vtpm.ask(LinkOperation.STAGE, held, no_more)
        await vtpm.ask(LinkOperation.FORGET_STATE)
        assert await vtpm.refused(LinkOperation.STAGE, held, no_more) == Result.BAD_PARAMETER

    with_guest(tmp_path / "state", test)


def test_held_start_takes_up_that_the_guest_sleeps(tmp_path: Path) -> None:
    """The next capture says so again, and nothing else."""

    async def test(vtpm: Vtpm) -> None:
        await start_held(vtpm, LinkShutdown.STATE)
        lineage = pack_link_lineage(bytes(16), 1)
        await vtpm.ask(LinkOperation.ADMIT, payload=lineage)
        reply = await vtpm.ask(LinkOperation.CAPTURE)
        assert link_said(reply.argument) is LinkShutdown.STATE
        reply = await vtpm.ask(LinkOperation.CAPTURE)
        assert reply.argument == LinkShutdown.STATE << 8

    with_guest(tmp_path / "state", test)


def test_invariant_3_vtpm_of_another_host_does_not_start_until_it_is_ours(tmp_path: Path) -> None:
    """What vtpmd does at a start when the owner record says so. Nothing is written meanwhile."""
    state = tmp_path / "state"

    async def test(vtpm: Vtpm) -> None:
        await vtpm.ask(LinkOperation.RETIRE)
        assert await vtpm.refused(LinkOperation.INIT) == Result.FAIL
        assert await vtpm.command(startup(StartupType.CLEAR)) == ReturnCode.FAILURE
        assert {file.name for file in state.iterdir()} == {".lock", "control", "vtpmd.link"}
        await vtpm.ask(LinkOperation.UNRETIRE)
        await vtpm.ask(LinkOperation.INIT)
        assert await vtpm.command(startup(StartupType.CLEAR)) == 0

    with_guest(state, test)


def test_command_waits_while_a_vtpm_is_asked_back(tmp_path: Path) -> None:
    """It is told to come again when that takes long, and fails when it is not asked for."""

    async def test(vtpm: Vtpm) -> None:
        assert await vtpm.refused(LinkOperation.AWAIT, 1) == Result.BAD_ORDINAL
        await start_held(vtpm, LinkShutdown.NONE)
        await vtpm.ask(LinkOperation.RETIRE)
        await vtpm.ask(LinkOperation.AWAIT, 1)
        assert await vtpm.command(startup(StartupType.CLEAR)) == ReturnCode.RETRY
        await vtpm.ask(LinkOperation.AWAIT, 0)
        assert await vtpm.command(startup(StartupType.CLEAR)) == ReturnCode.FAILURE
        await vtpm.ask(LinkOperation.UNRETIRE)
        assert await vtpm.command(startup(StartupType.CLEAR)) not in (
            ReturnCode.RETRY,
            ReturnCode.FAILURE,
        )

    with_guest(tmp_path / "state", test)


def tail_of(before: tuple[int, int], after: tuple[int, int], *records: bytes) -> bytes:
    """Return a tail of the session, of a guest that has said nothing."""
    cipher = TailCipher(key=KEYING.key, uuid=KEYING.uuid, lineage=KEYING.lineage)
    header = Header.between(KEYING.session, before, after)
    return cipher.seal(Tail(header, LinkShutdown.NONE, *(records or (b"", b""))))


def test_tail_is_taken_of_what_has_come_only(tmp_path: Path) -> None:
    """It may continue what was there before the last round; nothing else, and nothing else's."""

    async def refused(vtpm: Vtpm, tail: bytes) -> None:
        with pytest.raises(ControlError):
            await asyncio.to_thread(vtpm.control.set_state_blob, Blob.PERMANENT, tail)
        await asyncio.to_thread(vtpm.control.stop)  # what comes next is another stream's

    async def test(vtpm: Vtpm) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await vtpm.engine.set_lane(theirs.fileno(), KEYING, is_source=False)
            states = await sleeping(vtpm)
            again, later = (
                [
                    delta_encode(Image(kind, 1, state), Image(kind, to, state))
                    for kind, state in zip(KINDS, states, strict=True)
                ]
                for to in (2, 3)
            )
            await refused(vtpm, tail_of((1, 1), (1, 1)))
            await vtpm.ask(LinkOperation.STAGE, 0, whole(states))
            altered = bytearray(tail_of((1, 1), (2, 2), *again))
            altered[-20] ^= 1
            await refused(vtpm, bytes(altered))
            await refused(vtpm, tail_of((1, 1), (2, 3), *again))
            await refused(vtpm, tail_of((2, 2), (2, 2)))
            await refused(vtpm, tail_of((0, 0), (0, 0)))
            await vtpm.ask(LinkOperation.STAGE, 0, pack_link_records(*again))
            await refused(vtpm, tail_of((1, 1), (2, 1), again[0], b""))
            tail = tail_of((1, 1), (3, 3), *later)
            await asyncio.to_thread(vtpm.control.set_state_blob, Blob.PERMANENT, tail)
            frame = Lane(KEYING, is_source=True).open(
                await asyncio.to_thread(receive_exactly, ours, LANE_FRAME_BYTES)
            )
            assert (frame.kind, *frame[2:4]) == (LaneKind.TAKE, *map(whole_digest, states))
            assert (await vtpm.engine.staged()).generation == 3

    with_guest(tmp_path / "state", test)


def test_invariant_2_what_a_tail_was_taken_for_changes_no_more(tmp_path: Path) -> None:
    """A round that comes later is refused, and says why; so is to let go of it."""

    async def test(vtpm: Vtpm) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await vtpm.engine.set_lane(theirs.fileno(), KEYING, is_source=False)
            await vtpm.ask(LinkOperation.STAGE, 0, whole(await sleeping(vtpm)))
            tail = tail_of((1, 1), (1, 1))
            await asyncio.to_thread(vtpm.control.set_state_blob, Blob.PERMANENT, tail)
            await asyncio.to_thread(vtpm.control.get_capability)  # it has started by then
            nothing, held = pack_link_records(b"", b""), link_held(LinkShutdown.NONE)
            for operation, argument, payload in (
                (LinkOperation.STAGE, held, nothing),
                (LinkOperation.STAGE, 0, nothing),
                (LinkOperation.FORGET_STATE, 1, b""),
                (LinkOperation.FORGET_STATE, 0, b""),
            ):
                reply = await vtpm.engine.request(operation, argument, payload)
                assert reply.result == Result.BAD_ORDINAL
                if operation is LinkOperation.STAGE:
                    assert Handover(reply.argument) is Handover.TAKING
            assert await vtpm.engine.condition() == (LinkCondition.ON, LinkCustody.STANDBY)

    with_guest(tmp_path / "state", test)


def test_what_was_granted_is_so_until_it_is_admitted(tmp_path: Path) -> None:
    """Also once vtpmd has heard that the guest runs here, and has the engine serve on."""

    async def test(vtpm: Vtpm) -> None:
        source = Lane(KEYING, is_source=True)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await vtpm.engine.set_lane(theirs.fileno(), KEYING, is_source=False)
            await start_held(vtpm, LinkShutdown.NONE)
            tail = tail_of((1, 1), (1, 1))
            await asyncio.to_thread(vtpm.control.set_state_blob, Blob.PERMANENT, tail)
            take = await asyncio.to_thread(receive_exactly, ours, LANE_FRAME_BYTES)
            assert source.open(take).kind is LaneKind.TAKE
            ours.sendall(source.seal(LaneFrame(LaneKind.GRANT)))
            await asyncio.to_thread(vtpm.control.init, INIT_DELETE_VOLATILE)
            await vtpm.ask(LinkOperation.UNRETIRE)
            reply = await vtpm.engine.request(LinkOperation.WITHDRAW)
            assert (reply.result, Handover(reply.argument)) == (
                Result.BAD_ORDINAL,
                Handover.STARTED,
            )

    with_guest(tmp_path / "state", test)


def test_state_is_given_once_a_tail_is_offered_whatever_is_answered_later(tmp_path: Path) -> None:
    """vtpmd may be at its disk by then, and QEMU's guest stands still."""

    async def test(vtpm: Vtpm) -> None:
        late = Late(vtpm.engine)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await vtpm.engine.set_lane(theirs.fileno(), KEYING, is_source=True)
            await vtpm.ask(LinkOperation.INIT)
            assert await vtpm.command(startup(StartupType.CLEAR)) == 0
            await vtpm.ask(LinkOperation.CAPTURE)
            base = [vtpm.store.read(kind) for kind in KINDS]
            generations = base[0].generation, base[1].generation
            await vtpm.ask(LinkOperation.KEEP_BASE, 0, struct.pack("=QQ", *generations))
            vtpm.engine.answer_by(late)
            giving = asyncio.create_task(
                asyncio.to_thread(vtpm.control.get_state_blob, Blob.PERMANENT)
            )
            await late.asked.wait()
            assert await vtpm.command(pcr_extend(1, bytes(32))) == 0
            assert not giving.done()
            reply = await vtpm.ask(LinkOperation.CAPTURE, LinkCapturing.OFFERS)
            assert reply.argument & LinkCapture.OFFERED
            tail = TailCipher(key=KEYING.key, uuid=KEYING.uuid, lineage=KEYING.lineage).open(
                await giving, KEYING.session
            )
            late.ending.set()
            await vtpm.ask(LinkOperation.RECORDED)
            final = [vtpm.store.read(kind) for kind in KINDS]
            assert tail.permanent == b""
            assert delta_apply(base[1], tail.volatile).data == final[1].data
            assert unpack_link_digests(reply.payload) == tuple(
                whole_digest(image.data) for image in final
            )

    with_guest(tmp_path / "state", test)


def test_engine_that_is_killed_while_it_stops_has_died(tmp_path: Path) -> None:
    """Nothing says that it stopped in order."""

    async def test(bare: BareEngine) -> None:
        os.kill(bare.engine.pid, signal.SIGSTOP)
        stopping = asyncio.create_task(bare.engine.stop())
        await asyncio.sleep(0)  # it is told to end
        os.kill(bare.engine.pid, signal.SIGKILL)
        await stopping
        (line,) = bare.deaths
        assert "was killed by SIGKILL before it had stopped in order" in line
        assert bare.engine.death == line
        bare.deaths.clear()

    with_engine(tmp_path, test)


def started(stack: ExitStack, path: Path, record: bytes, seals: int = SEALS) -> tuple[int, int]:
    """Start an engine from a boot record; return its number, and the directory's descriptor."""
    fd = sealed(record, seals)
    stack.callback(os.close, fd)
    descriptors, _ = descriptors_for(stack, path, lambda _: fd)
    return engine_process.spawn(descriptors), descriptors[LinkDescriptor.DIRECTORY]


def status_of(pid: int) -> int:
    """Return the status that an engine ends with."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def message(operation: int, payload: bytes = b"", payload_bytes: int | None = None) -> bytes:
    """Return a message of a boot record; its header may lie about the length."""
    n_bytes = len(payload) if payload_bytes is None else payload_bytes
    return core.pack_link_header(core.LinkHeader(operation, payload_bytes=n_bytes)) + payload


SERVE_MESSAGE = message(LinkOperation.SERVE_CONTROL, SERVING)
KEY_MESSAGE = message(LinkOperation.SET_KEY, bytes(32))
WRONG_RECORDS = {
    "not sealed": (KEY_MESSAGE, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW),
    "cut": (KEY_MESSAGE[:-1], SEALS),
    "cut in a header": (KEY_MESSAGE + KEY_MESSAGE[:5], SEALS),
    "no request": (message(99), SEALS),
    "a request that is refused": (message(LinkOperation.SET_KEY, bytes(5)), SEALS),
    "no words about the control channel": (KEY_MESSAGE, SEALS),
    "a name without an end": (message(LinkOperation.SERVE_CONTROL, b"x" * len(SERVING)), SEALS),
    "an anchor that is not there": (message(LinkOperation.SET_ANCHOR, bytes(88)), SEALS),
    "longer than a message may be": (
        message(LinkOperation.SET_KEY, payload_bytes=core.LINK_PAYLOAD_BYTES_MAX + 1),
        SEALS,
    ),
}


def test_engine_starts_from_a_sealed_boot_record(tmp_path: Path) -> None:
    """And removes its sockets when it ends."""

    async def stop(directory_fd: int) -> None:
        await (await attached(directory_fd, pytest.fail)).stop()

    with ExitStack() as stack:
        _, directory_fd = started(stack, tmp_path, SERVE_MESSAGE + KEY_MESSAGE)
        asyncio.run(stop(directory_fd))
        assert [each.name for each in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("wrong", WRONG_RECORDS.values(), ids=WRONG_RECORDS)
def test_engine_does_not_start_from_a_boot_record_that_is_wrong(
    tmp_path: Path, wrong: tuple[bytes, int], capfd: pytest.CaptureFixture[str]
) -> None:
    """It says so in one line, and nothing is written."""
    with ExitStack() as stack:
        pid, _ = started(stack, tmp_path, *wrong)
        assert status_of(pid) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("vtpmd-engine: cannot start from the boot record: ")
    assert {each.name for each in tmp_path.iterdir()} - {"vtpmd.link"} == {".lock"}


def test_invariant_3_what_a_session_gave_is_not_started_from_once_its_vtpmd_is_gone(
    tmp_path: Path,
) -> None:
    """It was not granted: the TPM starts from its own state."""

    async def give(bare: BareEngine, control: ControlClient) -> None:
        bare.engine.answer_by(NoSessions(bare.engine))
        guest = await asyncio.to_thread(control.attach_data)
        vtpm = Vtpm(bare.engine, bare.store, control, guest)
        await vtpm.ask(LinkOperation.INIT)
        assert await vtpm.command(startup(StartupType.CLEAR)) == 0
        await vtpm.ask(LinkOperation.CAPTURE)
        permanent, volatile = [vtpm.store.read(kind).data for kind in KINDS]
        assert await vtpm.command(nv_define(INDEX, 8)) == 0
        await vtpm.ask(LinkOperation.STOP)
        await vtpm.ask(LinkOperation.STAGE, 0, whole((permanent, volatile)))
        bare.lose_vtpmd()
        await asyncio.to_thread(control.init)
        assert await vtpm.command(startup(StartupType.CLEAR)) == 0
        assert await vtpm.command(nv_define(INDEX, 8)) == NV_DEFINED
        guest.close()

    async def test(bare: BareEngine) -> None:
        with ControlClient(bare.control_path) as control:
            await give(bare, control)

    with_engine(tmp_path / "state", test)


def test_engine_that_was_killed_is_not_said_to_serve_on(tmp_path: Path) -> None:
    """Its link is closed before it is known to have ended, and who asks then has to wait for that.

    What a session does with a vTPM that may still be served, and with one that is not, differs.
    """

    async def test(bare: BareEngine) -> None:
        engine = bare.engine
        engine._lose(ConnectionError("closed"))
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied) as caught:
            await engine.request(LinkOperation.WITHDRAW)
        assert not isinstance(caught.value, EngineDetached)
        assert bare.deaths
        bare.deaths.clear()

    with_engine(tmp_path, test)
