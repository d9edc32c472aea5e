"""What a vtpmd that attaches to an engine finds, and does first: one table for each side.

Whatever vtpmd was there before may have died between any two steps, and the engine has gone on
alone since. What is durable (the owner record, and a file of a state on its way in) and what the
engine knows (custody, and how far a hand-over is) say together which step that was; nothing else
does. Nothing that the engine asks is answered before this is done.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import TYPE_CHECKING, Final

from vtpmd.config import RunConfig
from vtpmd.core import LinkOperation
from vtpmd.core.handover import Handover
from vtpmd.core.link import LinkCondition, LinkCustody
from vtpmd.daemon.engine import Engine
from vtpmd.daemon.mobility import Mobility
from vtpmd.migration.states import State
from vtpmd.store.moving import MovingFiles, is_open
from vtpmd.store.owner import Outcome, Record, Whose

if TYPE_CHECKING:
    from vtpmd.store.incoming import Resumed

log = logging.getLogger(__name__)


class File(Enum):
    """What the file of a state on its way in is."""

    NONE = "there is none"
    OVER = "of a session whose end the record has"
    OPEN = "of a session that is not granted, as far as the disk knows"
    GRANTED = "of a session that is granted"


class Come(Enum):
    """What is done about a state on its way in."""

    NOTHING = "nothing is on its way in"
    LET_GO = "the engine lets go of what it was started with ahead of time"
    REMOVE = "the file is removed"
    DECLINE = "the session ended without a Grant: that is written down, and its file removed"
    ADOPT = "it was granted: that is made durable, commands are executed, the state is settled"
    ADOPT_OFF = "as ADOPT, and it is powered off: no QEMU has been told that it is on"
    SETTLE = "commands are executed already: its state gets its own file"
    GIVE_BACK = "the source has asked for it, and no command was served: what was begun is ended"


class Own(Enum):
    """What is done about whose the vTPM is."""

    NOTHING = "it is this host's, and served"
    UNRETIRE = "it is this host's: the engine serves again"
    WITHDRAW = "it was offered, and never granted: it is this host's"
    ARRIVE = "QEMU has brought it, and it has started: it is this host's"
    ASK = "the host that may have it is asked"
    RECLAIM = "it is asked to let go: the guest runs here"
    STOP = "it was given back, and is powered off"
    STAY = "it is another host's"


_A, _G, _F, _R, _S, _P = LinkCustody
_HERE: Final = (_A, _G)
_AWAY: Final = (_F, _R)

# What is not in the table is NOTHING.
COME: Final[dict[tuple[File, bool, LinkCustody], Come]] = {
    **{(file, True, each): Come.LET_GO for file in (File.NONE, File.OVER) for each in (_S, _P)},
    **{(File.OVER, on, custody): Come.REMOVE for on in (False, True) for custody in (_A, _G, _F)},
    (File.OVER, True, _R): Come.REMOVE,
    **{(File.OPEN, on, custody): Come.DECLINE for on in (False, True) for custody in _HERE},
    (File.OPEN, False, _F): Come.DECLINE,
    (File.OPEN, True, _S): Come.DECLINE,
    # EXPECT is said after the Grant alone.
    (File.OPEN, True, _P): Come.ADOPT,
    # On and fenced with a file there is none but what was on ahead of time.
    **{(File.OPEN, True, custody): Come.GIVE_BACK for custody in _AWAY},
    (File.GRANTED, True, _S): Come.ADOPT_OFF,
    (File.GRANTED, True, _P): Come.ADOPT,
    **{(File.GRANTED, on, custody): Come.SETTLE for on in (False, True) for custody in _HERE},
    **{(File.GRANTED, True, custody): Come.GIVE_BACK for custody in _AWAY},
    (File.GRANTED, False, _F): Come.GIVE_BACK,
}

# By the record, whether the vTPM was sent or given back, whether it is on, and its custody; once
# nothing is on its way in.
OWN: Final[dict[tuple[Whose, bool, bool, LinkCustody], Own]] = {
    **{(Whose.OURS, False, on, _F): Own.UNRETIRE for on in (False, True)},
    (Whose.OURS, False, True, _R): Own.UNRETIRE,
    # The engine retires before the Grant.
    **{(Whose.OFFERED, True, on, each): Own.WITHDRAW for on in (False, True) for each in _HERE},
    **{(Whose.OFFERED, True, on, _F): Own.ASK for on in (False, True)},
    (Whose.OFFERED, True, True, _R): Own.RECLAIM,
    # A retired engine starts only what QEMU has brought.
    **{
        (Whose.MOVED, sent, on, each): Own.ARRIVE
        for sent in (False, True)
        for on in (False, True)
        for each in _HERE
    },
    **{(Whose.MOVED, True, on, _F): Own.ASK for on in (False, True)},
    (Whose.MOVED, True, True, _R): Own.RECLAIM,
    (Whose.MOVED, False, False, _F): Own.STAY,
    **{(Whose.MOVED, False, True, each): Own.STOP for each in _AWAY},
}


def come(file: File, condition: LinkCondition, custody: LinkCustody) -> Come:
    """Return what is done about a state on its way in."""
    return COME.get((file, LinkCondition.ON in condition, custody), Come.NOTHING)


def own(record: Record, condition: LinkCondition, custody: LinkCustody) -> Own:
    """Return what is done about whose the vTPM is."""
    key = (record.whose, was_sent(record), LinkCondition.ON in condition, custody)
    return OWN.get(key, Own.NOTHING)


def was_sent(record: Record) -> bool:
    """Return whether the vTPM is offered, or has moved, in a session of this host's."""
    line = record.find(record.session)
    return line is not None and line.outcome is Outcome.SENT


async def settle(mobility: Mobility, engine: Engine, files: MovingFiles, config: RunConfig) -> None:
    """Settle what another vtpmd has left. Raises VtpmdError: then nothing may be answered."""
    # From here on nothing is granted of what that vtpmd had prepared.
    handed_over = Handover((await engine.request(LinkOperation.WITHDRAW)).argument)
    condition, custody = await engine.condition()
    mobility.runs = LinkCondition.RUNNING in condition
    file = _file(files)
    if file is File.OPEN and handed_over is Handover.ENTITLED:
        file = File.GRANTED  # as the engine knows
    way = come(file, condition, custody)
    if way is not Come.NOTHING:
        log.warning("of the vtpmd that was here before: %s", way.value)
        await _COME[way](mobility, engine, files)
    if way in (Come.ADOPT, Come.ADOPT_OFF, Come.SETTLE, Come.GIVE_BACK):
        return  # whose it is, the session says
    condition, custody = await engine.condition()
    record = files.owner.read()
    how = own(record, condition, custody)
    if how is not Own.NOTHING:
        log.info("whose the vTPM is: %s", how.value)
    await _OWN[how](mobility, engine, files, config)


def _file(files: MovingFiles) -> File:
    found = files.found()
    if found is None:
        return File.NONE
    if not is_open(found, files.owner.read()):
        return File.OVER
    return File.GRANTED if found.granted else File.OPEN


# What is done about a state on its way in.


async def _let_go(_: Mobility, engine: Engine, files: MovingFiles) -> None:
    await engine.request(LinkOperation.FORGET_STATE)
    files.incoming.remove()


async def _remove(_: Mobility, engine: Engine, files: MovingFiles) -> None:
    del engine
    files.incoming.remove()


async def _decline(mobility: Mobility, engine: Engine, files: MovingFiles) -> None:
    del engine
    session = mobility.found_incoming(State.HOLDING, files.incoming.resume())
    await session.set_aside("its vtpmd was started again")


async def _completed(engine: Engine, files: MovingFiles) -> Resumed:
    """Go on with the file of a vTPM that was granted, maybe before the file took its last state."""
    resumed = files.incoming.resume()
    if not resumed.granted:
        files.incoming.complete(await engine.staged())
        resumed = files.incoming.resume()
    return resumed


async def _adopt(mobility: Mobility, engine: Engine, files: MovingFiles) -> None:
    resumed = await _completed(engine, files)
    await mobility.found_incoming(State.ENTITLED, resumed).go_on()


async def _adopt_off(mobility: Mobility, engine: Engine, files: MovingFiles) -> None:
    session = mobility.found_incoming(State.ENTITLED, await _completed(engine, files))
    if await session.adopt():
        await engine.request(LinkOperation.STOP)


async def _settle(mobility: Mobility, engine: Engine, files: MovingFiles) -> None:
    del engine
    await mobility.found_incoming(State.ADMITTED, files.incoming.resume()).go_on()


async def _give_back(mobility: Mobility, engine: Engine, files: MovingFiles) -> None:
    del engine
    await mobility.found_incoming(State.RELEASING, files.incoming.resume()).go_on()


_COME: Final[dict[Come, Callable[[Mobility, Engine, MovingFiles], Awaitable[None]]]] = {
    Come.LET_GO: _let_go,
    Come.REMOVE: _remove,
    Come.DECLINE: _decline,
    Come.ADOPT: _adopt,
    Come.ADOPT_OFF: _adopt_off,
    Come.SETTLE: _settle,
    Come.GIVE_BACK: _give_back,
}


# What is done about whose the vTPM is.


async def _nothing(_: Mobility, engine: Engine, files: MovingFiles, config: RunConfig) -> None:
    del engine, files, config


async def _unretire(_: Mobility, engine: Engine, files: MovingFiles, config: RunConfig) -> None:
    del files, config
    await engine.request(LinkOperation.UNRETIRE, 1)  # the record says so


async def _withdraw(_: Mobility, engine: Engine, files: MovingFiles, config: RunConfig) -> None:
    del engine, config
    files.owner.withdraw(bytes.fromhex(files.owner.read().session))


async def _arrive(_: Mobility, engine: Engine, files: MovingFiles, config: RunConfig) -> None:
    del engine, config
    files.owner.arrive()


async def _ask(mobility: Mobility, engine: Engine, files: MovingFiles, config: RunConfig) -> None:
    condition, _ = await engine.condition()
    state = State.LEFT
    if LinkCondition.STARTED in condition:  # its QEMU is still there, and may be told to run on
        is_offered = files.owner.read().whose is Whose.OFFERED
        state = State.GRANTED if is_offered else State.MOVED
    await mobility.ask(state, config.credentials(), config.allowed)


async def _reclaim(
    mobility: Mobility, engine: Engine, files: MovingFiles, config: RunConfig
) -> None:
    del files
    if not await mobility.ask(State.RECLAIMING, config.credentials(), config.allowed):
        await engine.request(LinkOperation.AWAIT, 0)  # nobody will answer


async def _stop(_: Mobility, engine: Engine, files: MovingFiles, config: RunConfig) -> None:
    await engine.request(LinkOperation.STOP)
    await _stay(_, engine, files, config)


async def _stay(_: Mobility, engine: Engine, files: MovingFiles, config: RunConfig) -> None:
    del engine, config
    record = files.owner.read()
    log.warning("the vTPM was given back to %s: it is not served here", record.peer)


_OWN: Final[dict[Own, Callable[[Mobility, Engine, MovingFiles, RunConfig], Awaitable[None]]]] = {
    Own.NOTHING: _nothing,
    Own.UNRETIRE: _unretire,
    Own.WITHDRAW: _withdraw,
    Own.ARRIVE: _arrive,
    Own.ASK: _ask,
    Own.RECLAIM: _reclaim,
    Own.STOP: _stop,
    Own.STAY: _stay,
}
