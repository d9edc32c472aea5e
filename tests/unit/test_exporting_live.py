"""What a vtpmd answers to export-states is another program's: nothing of it is trusted."""

import asyncio
import json
import socket
from binascii import b2a_base64
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from vtpmd.cli import export_served
from vtpmd.cli.management_client import ManagementError, ManagementRefusal
from vtpmd.daemon.listener import listen
from vtpmd.daemon.management import Arguments, Handler, ManagementServer
from vtpmd.errors import VtpmdError
from vtpmd.store import exporting_asked, exporting_live
from vtpmd.store.exporting import Taken
from vtpmd.store.exporting_live import Copied, decode, take
from vtpmd.wire.swtpm_format import STATE_BYTES_MAX
from vtpmd.wire.tpm import GENERATION_GIVEN_MAX, StateType, TpmVersion

TIMEOUT_S = 60.0
GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "vtpmd"},
        "capabilities": [],
    }
}
IDENTITY = b"i" * 16
IMAGE = bytes([65]) * 8 + bytes(range(256)) * 4
STATES = {StateType.PERMANENT: IMAGE, StateType.VOLATILE: b"volatile"}


def text(state: bytes) -> str:
    return b2a_base64(state, newline=False).decode()


def answer(**members: Any) -> dict[str, Any]:
    """Return a good answer, but for some members."""
    states = {kind.name.lower(): text(state) for kind, state in STATES.items()}
    return {"identity": IDENTITY.hex(), "generation": 7, "states": states, **members}


def with_state(name: str, content: Any) -> dict[str, Any]:
    return answer(states={**answer()["states"], name: content})


def test_a_good_answer_is_taken() -> None:
    assert decode(answer()) == Copied(IDENTITY, 7, STATES)
    assert decode(answer(identity=None)).identity is None
    assert "volatile" not in repr(decode(answer()))


@pytest.mark.parametrize(
    "hostile",
    [
        None,
        [],
        "states",
        {},
        answer(identity=7),
        answer(identity=["69"] * 32),
        answer(identity="69" * 15),
        answer(identity="6 " * 16),
        answer(identity="69 " * 10 + "69"),
        answer(generation=None),
        answer(generation=True),
        answer(generation=7.0),
        answer(generation=-1),
        answer(generation=GENERATION_GIVEN_MAX + 1),
        answer(states=[]),
        answer(states={}),
        answer(states={"permanent": text(IMAGE)}),
        answer(states={"volatile": text(b"volatile")}),
        with_state("volatile", ""),
        with_state("volatile", 7),
        with_state("volatile", "not base64"),
        with_state("volatile", text(b"volatile") + "\n"),
        with_state("volatile", text(b"v") + text(b"olatile")),
        with_state("volatile", "ä" * 8),
        with_state("volatile", text(bytes(STATE_BYTES_MAX + 1))),
        with_state("other", text(b"other")),
        with_state("PERMANENT", text(b"other")),
    ],
)
def test_what_is_no_answer_is_refused(hostile: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode(hostile)


@pytest.mark.parametrize(
    ("identity", "generation"), [(b"j" * 16, 7), (None, 7), (IDENTITY, 8)], ids=str
)
def test_a_directory_that_is_not_what_runs_is_refused(
    identity: bytes | None, generation: int
) -> None:
    """Another vTPM's, or of an older generation: what was copied is not durable there."""
    stored = Taken(TpmVersion.TPM_2_0, {StateType.PERMANENT: IMAGE}, IDENTITY, 7, is_served=True)
    taken = take(Copied(IDENTITY, 6, STATES), stored, "/srv/tpm")
    assert (taken.generation, taken.states, taken.is_served) == (6, STATES, True)
    with pytest.raises(VtpmdError, match="is not what the vtpmd that was asked runs"):
        take(Copied(identity, generation, STATES), stored, "/srv/tpm")


def test_a_state_of_the_largest_size_is_taken() -> None:
    largest = bytes(STATE_BYTES_MAX)
    assert len(text(largest)) == exporting_live.TEXT_LENGTH_MAX
    assert decode(with_state("volatile", text(largest))).states[StateType.VOLATILE] == largest
    with pytest.raises(ValueError, match="a state is too long"):
        decode(with_state("volatile", text(largest + b"abc")))


@contextmanager
def answering(path: Path, **handlers: Handler) -> Iterator[None]:
    """Serve a real management server, with commands of the test's, while the block runs."""

    async def serve(listening: socket.socket) -> None:
        server = ManagementServer(listening, on_quit=lambda: None)
        for name, handler in handlers.items():
            server.register(name.replace("_", "-"), {}, handler)
        with suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT_S):
                serving = asyncio.create_task(server.serve())
                await asyncio.to_thread(ends.wait, TIMEOUT_S)
                serving.cancel()

    ends = Event()
    with listen(path) as listening:
        thread = Thread(target=lambda: asyncio.run(serve(listening)))
        thread.start()
        try:
            yield
        finally:
            ends.set()
            thread.join()


def test_a_vtpmd_that_answers_something_else_or_refuses_is_one_line(tmp_path: Path) -> None:
    async def something_else(_: Arguments) -> object:
        return answer(generation="7")

    async def refuse(_: Arguments) -> object:
        raise VtpmdError("the vTPM's TPM does not run here")

    async def stored(_: Arguments) -> object:
        taken = Taken(TpmVersion.TPM_2_0, {StateType.PERMANENT: IMAGE}, IDENTITY, 7, is_served=True)
        return exporting_asked.answer(taken, "/srv/tpm", None)

    manage = tmp_path / "manage"
    with (
        answering(manage, export_states=something_else, export_permanent=stored),
        pytest.raises(ManagementError, match="cannot read: its generation is none; use the same"),
    ):
        export_served.take(manage, None, with_volatile=True)
    with (
        answering(manage, export_states=refuse, export_permanent=stored),
        pytest.raises(ManagementError, match="does not run here"),
    ):
        export_served.take(manage, None, with_volatile=True)


@contextmanager
def saying(path: Path, answer_to: Callable[[object], bytes]) -> Iterator[None]:
    """Be a vtpmd that answers the first command, of an id, with these bytes, and goes."""

    def serve(listening: socket.socket) -> None:
        client, _ = listening.accept()
        with client:
            client.sendall(json.dumps(GREETING).encode() + b"\r\n")
            client.recv(4096)  # less than that, in one piece, as each command is
            client.sendall(b'{"return": {}}\r\n')
            client.sendall(answer_to(json.loads(client.recv(4096))["id"]))

    with listen(path) as listening:
        listening.setblocking(True)
        thread = Thread(target=serve, args=(listening,))
        thread.start()
        yield
        thread.join()


def refusing(path: Path, error: dict[str, object]) -> AbstractContextManager[None]:
    """Be a vtpmd of another version, which answers the first command with an error."""
    return saying(path, lambda id_: json.dumps({"error": error, "id": id_}).encode() + b"\r\n")


@pytest.mark.parametrize(
    ("member", "wanted"),
    [
        *(({"exit-status": status}, status) for status in (4, 5, 9)),
        *(
            ({"exit-status": other}, 1)
            for other in (1, 0, -1, 2, 3, 256, 2**64, 4.0, True, "4", [4])
        ),
        ({"exit-status": None}, 1),
        ({}, 1),  # by an earlier version
        ({"status": 4, "more": {}}, 1),
    ],
)
def test_a_refusal_has_a_status_that_means_the_same_here_or_1(
    tmp_path: Path, member: dict[str, object], wanted: int
) -> None:
    manage = tmp_path / "manage"
    error = {"class": "GenericError", "desc": "there is no vTPM in it yet", **member}
    with refusing(manage, error), pytest.raises(ManagementRefusal, match="no vTPM") as caught:
        export_served.take(manage, None)
    assert (caught.value.exit_status, type(caught.value.exit_status)) == (wanted, int)


def going_away(path: Path, answered: object) -> AbstractContextManager[None]:
    """Be a vtpmd that goes away in the middle of its first answer."""
    return saying(path, lambda _: json.dumps({"return": answered}).encode()[:-9])


def test_a_vtpmd_that_goes_away_is_one_line(tmp_path: Path) -> None:
    """What it has said of its answer is not kept."""
    manage = tmp_path / "manage"
    says = "went away before it answered export-states"
    with going_away(manage, answer()), pytest.raises(ManagementError, match=says):
        export_served.take(manage, None, with_volatile=True)
