"""What people do with two hosts and a guest, what goes wrong meanwhile, and how it must end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from tests.sim.host import Host
from tests.sim.qemu import Qemu
from tests.sim.world import World
from vtpmd.migration.states import WITH_BASE
from vtpmd.store.owner import Whose

Fault = Callable[[World], None]

FAULTS_MAX: Final = 4
# A schedule without a fault has about so many steps; its first hand-over is between these.
STEPS: Final = range(1, 260)
HAND_OVER: Final = range(20, 60)
# What a QEMU has asked for before it died is done by then.
SETTLES_S: Final = 0.1
PAUSES_S: Final = (0.0, 0.001, 0.01, 0.1, 1.0, 4.0)
EXPORTS_S: Final = (0.001, 0.003, 0.01, 0.1)


# What people do.


async def play(world: World) -> None:
    """Move the guest to and fro, and do with it what guests and their operators do."""
    rng = world.rng
    await boot_at(world.a)
    for _ in range(rng.choice((1, 1, 2, 3))):
        await asyncio.sleep(rng.choice((0.05, 0.3)))
        await _something(world)
        await _move(world)


async def _ready(host: Host) -> None:
    for _ in range(100):
        if host.serves_qemu:
            return
        await asyncio.sleep(0.1)


def running_at(world: World) -> Host | None:
    """Return where the guest runs, if it does."""
    found = [host for host in (world.a, world.b) if host.qemu is not None and host.qemu.vcpus]
    return found[0] if found else None


async def _something(world: World) -> None:
    """Reset, take a snapshot, or go back to one."""
    host = running_at(world)
    if host is None:
        await boot_somewhere(world)
        return
    qemu = host.qemu
    what = world.rng.random()
    if qemu.busy:
        return
    if what < 0.1:
        _do(qemu, qemu.reset)
    elif what < 0.25:
        _do(qemu, qemu.savevm)
    elif what < 0.4 and world.vm.snapshot is not None and host.executes:
        _do(qemu, qemu.loadvm)
    await asyncio.sleep(0.1)


def _do(qemu: Qemu, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Have a QEMU do one thing at a time."""
    qemu.busy = True

    async def exclusively() -> None:
        try:
            await work()
        finally:
            qemu.busy = False

    qemu.process.spawn(exclusively())


async def boot_somewhere(world: World) -> bool:
    """Boot the guest at one of the hosts where it may be."""
    for host in world.rng.sample((world.a, world.b), 2):
        if world.vm.may_boot_at(host) and await boot_at(host):
            return True
    return False


async def boot_at(host: Host) -> bool:
    """Boot the guest there; if its TPM does not work, end QEMU again."""
    world = host.world
    await _ready(host)
    if host.qemu is not None:
        await _end(world, host)
        await _ready(host)
    await asyncio.sleep(SETTLES_S)
    if host.qemu is not None or not world.vm.may_boot_at(host):
        return False
    qemu = Qemu(host, world.vm)
    world.log(f"qemu at {host.name}: boots")
    qemu.busy = True  # its main loop does one thing at a time
    works = await qemu.does(qemu.boot())
    qemu.busy = False
    if works:
        return True
    if host.qemu is qemu:
        await _end(world, host)
    return False


async def _end(world: World, host: Host) -> None:
    """End a host's QEMU, in one way or the other."""
    qemu = host.qemu
    if qemu is None:
        return
    if world.rng.random() < 0.5:
        qemu.kill()
        return
    await qemu.does(qemu.quit())
    if qemu.process.alive:
        qemu.kill()


async def _move(world: World) -> None:
    """Arm, migrate, and do with the source's QEMU what people do."""
    source = running_at(world)
    if source is None or source.qemu.busy:
        return
    target = world.b if source is world.a else world.a
    if target.qemu is not None:
        await _end(world, target)
    await _ready(target)
    qemu = source.qemu
    if target.qemu is not None or source.qemu is None:
        return
    incoming = Qemu(target, world.vm, incoming=True)
    incoming.connecting = incoming.process.spawn(incoming._connect())
    qemu.busy = True
    await asyncio.sleep(world.rng.choice((0.01, 0.1)))
    if source.daemon is not None:
        source.daemon.arm(target.name)
    await _armed(source)
    migrated = await qemu.does(qemu.migrate(incoming, return_path=world.rng.random() < 0.7))
    qemu.busy = False
    if migrated:
        await _afterwards(source, qemu)
    elif target.qemu is incoming and incoming.incoming:
        incoming.kill()


async def _armed(source: Host) -> None:
    """Wait until a tail will do; not always."""
    patience = source.world.rng.choice((0, 3, 100, 100, 100))
    for _ in range(patience):
        mobility = source.daemon and source.daemon.mobility
        if mobility and mobility.outgoing and mobility.outgoing.state in WITH_BASE:
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(source.world.rng.choice((0.0, 0.05, 0.3)))


async def _afterwards(source: Host, qemu: Qemu) -> None:
    """A QEMU whose guest has gone stays for a while, quits, is killed, or has it run on."""
    world = source.world
    what = world.rng.random()
    await asyncio.sleep(world.rng.choice(PAUSES_S))
    if not qemu.process.alive:
        return
    if what < 0.35:
        qemu.process.spawn(qemu.quit())
    elif what < 0.5:
        qemu.kill()
    elif what < 0.75 and world.vm.may_run_at(source):
        qemu.process.spawn(qemu.cont())
    await asyncio.sleep(world.rng.choice(PAUSES_S))


async def export_always(world: World) -> None:
    """Have an operator export one vTPM or the other, again and again: nothing comes of that."""
    while not world.healing:
        host = _either(world)
        if host.daemon is not None:
            host.daemon.export()
        await asyncio.sleep(world.rng.choice(EXPORTS_S))


# What goes wrong.


def crash(world: World) -> None:
    _either(world).crash()


def crash_in_write(world: World) -> None:
    world.loses_power.add(_either(world).name)


def disk_fails(world: World) -> None:
    host = _either(world)
    host.disk_fails_until_s = world.scheduler.now_s + world.rng.choice((0.01, 0.5, 3.0))
    world.log(f"{host.name}: DISK FAILS")


def cut(world: World) -> None:
    world.log("CUT")
    world.network.cut(world.rng.choice((0.0, 0.1, 3.0)))


def lane_cut(world: World) -> None:
    world.log("CUT of the lanes")
    world.network.cut_lanes()


def silence(world: World) -> None:
    world.log("SILENCE")
    world.network.silence(world.rng.choice((0.1, 0.9, 2.5, 6.0)))


def dead_flows(world: World) -> None:
    world.log("DEAD FLOWS")
    world.network.kill_flows()


def stop(world: World) -> None:
    """Somebody stops a vtpmd, whatever its QEMU and its sessions are at."""
    host = _either(world)
    if host.daemon is not None:
        host.daemon.stop()


def vtpmd_dies(world: World) -> None:
    """Its engine serves on."""
    _either(world).lose_daemon()


def vtpmd_detaches(world: World) -> None:
    """Somebody upgrades it."""
    host = _either(world)
    if host.daemon is not None:
        host.daemon.stop(ends_vtpm=False)


def vtpmd_hangs(world: World) -> None:
    host = _either(world)
    if host.daemon is not None:
        host.daemon.hang(world.rng.choice((0.3, 3.0, 7.0)))


def qemu_dies(world: World) -> None:
    qemu = _either(world).qemu
    if qemu is not None:
        qemu.kill()


def stream_cut(world: World) -> None:
    world.stream_cut = True


def arm_again(world: World) -> None:
    host = _either(world)
    if host.daemon is not None:
        host.daemon.arm(world.rng.choice(("c", "b" if host is world.a else "a")))


def other_host(world: World) -> None:
    """A third host, with a vTPM of its own, arms a session with one of the two."""
    host = _either(world)

    async def arm() -> None:
        world.c.start()
        await _ready(world.c)
        if world.c.qemu is None:
            qemu = Qemu(world.c, world.other)
            await qemu.does(qemu.boot())
        assert world.c.daemon is not None
        world.c.daemon.arm(host.name)

    world.operator.spawn(arm())


def guest_does_something(world: World) -> None:
    world.operator.spawn(_something(world))


def go_back(world: World) -> None:
    """Somebody has the guest go back to a snapshot, or takes one first."""
    for place in (world.a, world.b):
        qemu = place.qemu
        has_left = place.record.whose is Whose.MOVED and not place.executes
        # By mistake: the guest that stands still there is at the other host.
        if has_left and qemu and not qemu.incoming and not qemu.busy and world.vm.snapshot:
            _do(qemu, qemu.loadvm)
            return
    host = running_at(world)
    if host is not None and not host.qemu.busy and host.executes:
        qemu = host.qemu
        _do(qemu, qemu.savevm if world.vm.snapshot is None else qemu.loadvm)


def cont(world: World) -> None:
    """Somebody has a guest run on that stands still."""
    for host in (world.a, world.b):
        qemu = host.qemu
        stands = qemu and not qemu.vcpus and not qemu.incoming and not qemu.busy
        if stands and world.vm.may_run_at(host):
            _do(qemu, qemu.cont)


def restart(world: World) -> None:
    """Somebody boots the guest, as they believe that it runs nowhere."""

    async def restart() -> None:
        if running_at(world) is None:
            await boot_somewhere(world)

    world.operator.spawn(restart())


def _either(world: World) -> Host:
    return world.rng.choice((world.a, world.b))


FAULTS: Final[tuple[Fault, ...]] = (
    crash,
    crash,
    crash_in_write,
    crash_in_write,
    disk_fails,
    disk_fails,
    cut,
    cut,
    lane_cut,
    lane_cut,
    silence,
    dead_flows,
    stop,
    vtpmd_dies,
    vtpmd_dies,
    vtpmd_dies,
    vtpmd_detaches,
    vtpmd_hangs,
    vtpmd_hangs,
    qemu_dies,
    stream_cut,
    stream_cut,
    arm_again,
    other_host,
    guest_does_something,
    go_back,
    cont,
    restart,
)


def draw_faults(world: World, faults: Sequence[Fault], steps: range) -> None:
    """Draw what goes wrong, and at which steps: most of it near to each other."""
    rng = world.rng
    n_faults = rng.randrange(FAULTS_MAX + 1)
    near = rng.choice(steps)
    for _ in range(n_faults):
        far = rng.random() < 0.3
        step = rng.choice(steps) if far else near + rng.randrange(min(30, len(steps)))
        while step in world.faults:
            step += 1
        world.faults[step] = rng.choice(faults)


# The end.


def run(
    world: World,
    faults: Sequence[Fault] = FAULTS,
    steps: range = STEPS,
    *,
    with_exports: bool = False,
) -> None:
    """Play a schedule, then have everything heal. Raises Violation."""
    draw_faults(world, faults, steps)
    if with_exports:
        world.operator.spawn(export_always(world))
    for host in (world.a, world.b):
        host.start()
    played = world.operator.spawn(play(world))
    world.run_until(played.done, 60.0)
    if played.done():
        played.result()
    world.run_until(lambda: False, world.rng.choice((0.0, 0.1, 3.0)))
    heal(world)


def heal(world: World) -> None:
    """From now on nothing fails. The guest must run at one host, and nowhere else."""
    world.log("HEALING")
    world.healing, world.slowness = True, 30.0
    world.faults.clear()
    world.loses_power.clear()
    world.network.heal()
    world.stream_cut = False
    for host in (world.a, world.b):
        host.disk_fails_until_s = 0.0
        host.start()
    world.run_until(lambda: False, 8.0)
    healed = world.operator.spawn(_heal(world))
    world.run_until(healed.done, 400.0)
    runs = healed.done() and healed.result()
    if not runs and not _needs_another_directory(world):
        world.violated("STUCK: the guest can run nowhere")
    world.check()


def _needs_another_directory(world: World) -> bool:
    """A guest that never had a vTPM gets none where a peer has sent, and not granted, one."""
    return world.vm.lineage is None and any(
        host.knows_sessions and not host.has_state for host in world.vm.places
    )


async def _heal(world: World) -> bool:
    for attempt in range(6):
        if await _serves(world):
            break
        if attempt == 5:
            return False
        await _try(world)
        await asyncio.sleep(10.0)
    # Wherever else it may be believed to be, it must not start.
    place = running_at(world)
    for host in (world.a, world.b):
        if host is not place and world.vm.may_boot_at(host):
            await boot_at(host)
    if not await _serves(world):
        return False
    serving = running_at(world)
    mobility = serving and serving.daemon and serving.daemon.mobility
    if mobility and mobility.outgoing and mobility.outgoing.is_fenced:
        world.violated("STUCK: the guest runs, but its vTPM can neither move nor be saved")
    return True


async def _serves(world: World) -> bool:
    host = running_at(world)
    if host is None:
        return False
    for _ in range(5):
        if host.qemu is not None and await host.qemu.does(host.qemu.command()):
            return True
        await asyncio.sleep(0.5)
    return False


async def _try(world: World) -> None:
    """Have a guest that stands still run, if there is one; else boot it."""
    for host in (world.a, world.b):
        qemu = host.qemu
        stands = qemu is not None and not qemu.vcpus and not qemu.incoming and qemu.has_tpm
        if stands and world.vm.may_run_at(host):
            await qemu.does(qemu.cont())
            await asyncio.sleep(10.0)
            if await _serves(world):
                return
    for host in (world.a, world.b):
        if host.qemu is not None:
            await _end(world, host)
    await asyncio.sleep(5.0)
    await boot_somewhere(world)
