"""A guest that makes RSA keys moves at once, whatever its TPM computes, and sees no error of it.

Invariants of the design that are checked: 3 (one owner), 5 (the state that moves is the one that
the TPM has). What is done of each operation is tested in C (``tests/c/test_long_command.c``).
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from tests.harness.bare_engine import BareEngine, NoSessions, attached, with_engine
from tests.harness.lab import Lab
from tests.support import tpm2
from tests.support.emulator_client import ControlClient, DataSocket
from tests.support.tpm2 import Handle, ReturnCode
from tests.system.test_stream_guest import (
    FOLLOWING,
    Host,
    arm,
    assert_used_a_tail,
    make_destination,
    make_source,
    migrate,
    migrate_slowly,
)
from vtpmd.core import LinkOperation
from vtpmd.core.link import LinkCapture
from vtpmd.testing import migration
from vtpmd.testing.facts import differences
from vtpmd.testing.waiting import wait_until
from vtpmd.wire.tpm import Result, StateType

ATTEMPTS_MAX: Final = 500
MAKE_KEY: Final = tpm2.create_primary(tpm2.rsa_signing_template(3072))
NO_SUCH_OBJECT: Final = 0x910  # TPM_RC_REFERENCE_H0
UNARMED_KEYS: Final = 8
MOVES: Final = 4
CANCELLED: Final = range(3, 30)
ABANDONED: Final = "in the middle of a TPM command"


async def transact(guest: DataSocket, command: bytes) -> int:
    """Send a command; return the code of its response."""
    response = await asyncio.to_thread(guest.transact, command)
    return tpm2.parse_response(response).return_code


async def make_key(bare: BareEngine, guest: DataSocket, delay_s: float) -> int:
    """Have a key made, and say after a moment that the guest stops; return the response's code."""
    guest.send(MAKE_KEY)
    await asyncio.sleep(delay_s)
    reply = await bare.engine.request(LinkOperation.CAPTURE, 1)
    assert reply.result == Result.SUCCESS
    code = tpm2.parse_response(await asyncio.to_thread(guest.receive)).return_code
    assert bool(reply.argument & LinkCapture.ABANDONED) is (code == ReturnCode.RETRY)
    return code


async def captured(bare: BareEngine) -> tuple[bytes, int]:
    """Capture the state; return the permanent one, and how large the volatile one is."""
    assert (await bare.engine.request(LinkOperation.CAPTURE)).result == Result.SUCCESS
    permanent, volatile = map(bare.store.read, (StateType.PERMANENT, StateType.VOLATILE))
    return permanent.data, len(volatile.data)  # that has the time in it


def with_armed_guest(path: Path, test: Callable[[BareEngine, DataSocket], Awaitable[None]]) -> None:
    """Run a test with an engine that is told when its guest stops, and the guest's data socket."""

    async def run(bare: BareEngine) -> None:
        bare.engine.answer_by(NoSessions(bare.engine))
        with ControlClient(bare.control_path) as control:
            guest = await asyncio.to_thread(control.attach_data)
            await asyncio.to_thread(control.init)
            assert await transact(guest, tpm2.startup()) == ReturnCode.SUCCESS
            assert (await bare.engine.request(LinkOperation.ARM, 1)).result == Result.SUCCESS
            try:
                await test(bare, guest)
            finally:
                guest.close()

    with_engine(path, run)


def test_invariant_5_what_is_captured_is_the_state_before_a_key_that_was_not_made(
    tmp_path: Path,
) -> None:
    """Its response is TPM_RC_RETRY; what is made afterwards is made as ever."""
    public = tpm2.read_public(Handle.TRANSIENT_FIRST)

    async def test(bare: BareEngine, guest: DataSocket) -> None:
        before = await captured(bare)
        for attempt in range(ATTEMPTS_MAX):
            if (code := await make_key(bare, guest, 0.001 * (attempt % 50))) == ReturnCode.RETRY:
                break
            assert code == ReturnCode.SUCCESS
            assert await captured(bare) != before
            await transact(guest, tpm2.flush_context(Handle.TRANSIENT_FIRST))
        assert code == ReturnCode.RETRY
        assert await captured(bare) == before
        while (code := await transact(guest, public)) == ReturnCode.RETRY:
            assert await captured(bare) == before  # what computes has not run out
        assert code == NO_SUCH_OBJECT
        assert await captured(bare) == before
        assert await transact(guest, MAKE_KEY) == ReturnCode.SUCCESS
        assert await transact(guest, public) == ReturnCode.SUCCESS

    with_armed_guest(tmp_path / "state", test)


def test_nothing_is_abandoned_for_a_vtpmd_that_has_not_armed_the_engine(tmp_path: Path) -> None:
    """What another one had said ended with its connection."""
    path = tmp_path / "state"

    async def test(bare: BareEngine, guest: DataSocket) -> None:
        await bare.engine.detach()
        directory_fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        bare.engine = await attached(directory_fd, bare.deaths.append)
        os.close(directory_fd)
        bare.engine.answer_by(NoSessions(bare.engine))
        for attempt in range(UNARMED_KEYS):
            assert await make_key(bare, guest, 0.01 * attempt) == ReturnCode.SUCCESS
            await transact(guest, tpm2.flush_context(Handle.TRANSIENT_FIRST))

    with_armed_guest(path, test)


@pytest.mark.parametrize("load", ["rsa-2048", "rsa-3072"])
def test_guest_that_makes_keys_moves_and_sees_no_error(lab: Lab, load: str) -> None:
    """There and back: QEMU stops the guest at any moment of a key."""
    here = make_source(lab)
    before = here.guest.check()
    here.guest.command(f"start {load}")
    vtpmds = [here.vtpmd, lab.peer(FOLLOWING)]
    for move in range(MOVES):
        there = make_destination(lab, vtpmd=vtpmds[(move + 1) % 2])
        arm(here, there)
        migrate(lab, here, there)
        assert_used_a_tail(here)
        here.guest.close()
        here = there
    here.guest.command("stop")
    assert differences(before, here.guest.check(), worked=False) == []


def rounds(source: Host) -> list[object]:
    """Return what the source has sent."""
    sent: list[object] = source.manage.migration()["rounds"]
    return sent


def has_sent_more(source: Host, before: list[object]) -> bool:
    """Tell whether the source has sent a round since."""
    return rounds(source) != before


def test_rounds_go_on_between_qemus_passes(lab: Lab) -> None:
    """What the guest did before a long command is at the destination while that runs."""
    source = make_source(lab)
    destination = make_destination(lab)
    arm(source, destination)
    migrate_slowly(lab, source, destination)
    for _ in range(2):
        before = rounds(source)
        source.guest.command("work 6")
        wait_until(partial(has_sent_more, source, before))
    assert source.guest.qmp("query-migrate")["ram"]["dirty-sync-count"] == 1
    source.guest.qmp("migrate_cancel")
    assert migration.wait_until_ended(source.guest) in migration.GIVEN_UP


def test_guest_goes_on_here_when_its_migration_is_cancelled_in_the_middle_of_a_key(
    lab: Lab,
) -> None:
    """Time and again, at least until a command was abandoned; then it moves."""
    source = make_source(lab)
    destination = make_destination(lab)
    arm(source, destination)
    before = source.guest.check()
    source.guest.command("start rsa-3072")
    for number in range(CANCELLED.stop):
        if number >= CANCELLED.start and ABANDONED in source.vtpmd.program.output:
            break
        migrate_slowly(lab, source, destination)
        source.guest.pause()
        wait_until(lambda: source.manage.migration()["state"] == "offered")
        source.guest.qmp("migrate_cancel")
        assert migration.wait_until_ended(source.guest) in migration.GIVEN_UP
        source.guest.resume()
        destination.guest.close()
        destination = make_destination(lab, vtpmd=destination.vtpmd)
    assert ABANDONED in source.vtpmd.program.output
    migrate(lab, source, destination)
    destination.guest.command("stop")
    assert_used_a_tail(source)
    assert differences(before, destination.guest.check(), worked=False) == []
