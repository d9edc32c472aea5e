"""The management socket's commands about vTPMs and their migrations (docs/management.md)."""

from __future__ import annotations

import socket
from binascii import b2a_base64
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vtpmd.config import RunConfig, parse_address
from vtpmd.daemon.engine import EngineDied
from vtpmd.daemon.management import Argument, ManagementServer
from vtpmd.daemon.mobility import Mobility
from vtpmd.errors import VtpmdError
from vtpmd.wire.tpm import StateType

if TYPE_CHECKING:
    from vtpmd.daemon.outgoing import Outgoing

Arguments = Mapping[str, object]


async def serve_management(
    listening: socket.socket,
    mobility: Mobility,
    config: RunConfig,
    directory: str,
    on_quit: Callable[[], None],
) -> None:
    """Serve the management socket of the vTPM in a state directory until cancelled."""
    server = ManagementServer(listening, on_quit)
    mobility.tell = server.broadcast
    commands = _Commands(mobility, config, directory)
    server.register("query-status", {}, commands.query_status)
    server.register("query-vtpms", {}, commands.query_vtpms)
    server.register("export-states", {}, commands.export_states)
    server.register("export-permanent", {}, commands.export_permanent)
    server.register("migrate-arm", {"to": Argument(str)}, commands.migrate_arm)
    server.register("migrate-disarm", {}, commands.migrate_disarm)
    server.register("query-migration", {}, commands.query_migration)
    await server.serve()


class _Commands:
    """One method a command; each returns what JSON can say."""

    def __init__(self, mobility: Mobility, config: RunConfig, directory: str) -> None:
        self._mobility = mobility
        self._config = config
        self._directory = directory

    async def query_status(self, _: Arguments) -> object:
        record, restored = self._mobility.owner_record(), self._mobility.lineages.restored
        return {
            "running": self._mobility.is_served,
            "vtpms": 1,
            "qemu": self._mobility.qemu.word,
            "owner": record.whose.value,
            "peer": record.peer or None,
            "since": record.since or None,
            "possible-fork": [fork._asdict() for fork in record.forks],
            "lineage": await self._lineage(),
            "restored": None if restored is None else restored.json(),
        }

    async def _lineage(self) -> object:
        try:
            own = await self._mobility.lineages.own()
        except EngineDied:
            return None
        return {"identity": own.identity.hex(), "generation": own.generation}

    async def export_states(self, _: Arguments) -> object:
        copy = await self._mobility.copy_states()
        states = {
            StateType.PERMANENT: copy.permanent,
            StateType.VOLATILE: copy.volatile,
            StateType.SAVESTATE: copy.savestate,
        }
        return {
            "identity": copy.identity.hex() if any(copy.identity) else None,
            "generation": copy.generation,
            "states": {
                kind.name.lower(): b2a_base64(state, newline=False).decode()
                for kind, state in states.items()
                if state
            },
        }

    async def export_permanent(self, _: Arguments) -> object:
        return await self._mobility.export_permanent(self._directory)

    async def query_vtpms(self, _: Arguments) -> object:
        outgoing, incoming = self._mobility.outgoing, self._mobility.incoming
        return [
            {
                "name": self._config.name,
                "uuid": self._config.uuid,
                "directory": self._directory,
                "running": self._mobility.is_served,
                "owner": self._mobility.owner_record().whose.value,
                "outgoing": None if outgoing is None else outgoing.state.name.lower(),
                "incoming": None if incoming is None else incoming.state.name.lower(),
            }
        ]

    async def migrate_arm(self, arguments: Arguments) -> object:
        from vtpmd.daemon.outgoing import Peer

        credentials = self._config.credentials()
        if credentials is None:
            raise VtpmdError("vtpmd has no credentials for peers; start it with --tls-creds DIR")
        address = parse_address(str(arguments["to"]))
        to = Peer(*address, credentials, self._config.allowed)
        session = await self._mobility.arm(to)
        return {"session": session.session.hex(), "qemu": self._mobility.qemu.word}

    async def migrate_disarm(self, _: Arguments) -> object:
        if self._mobility.outgoing is not None:
            await self._mobility.outgoing.disarm("disarmed on request")
        return {}

    async def query_migration(self, _: Arguments) -> object:
        outgoing = self._mobility.outgoing
        return {"state": "none"} if outgoing is None else report(outgoing)


def report(outgoing: Outgoing) -> dict[str, object]:
    """Return what happened in a session so far, as query-migration answers it."""
    return {
        "state": outgoing.state.name.lower(),
        "outcome": outgoing.outcome,
        "reason": outgoing.reason,
        "refusal": None if outgoing.refusal is None else outgoing.refusal.word,
        "qemu": None if outgoing.armed_following is None else outgoing.armed_following.word,
        "peer-qemu": None if outgoing.peer_following is None else outgoing.peer_following.word,
        "session": outgoing.session.hex(),
        "rounds": [
            {
                "round": each.number,
                "bytes": each.record_bytes,
                "permanent-generation": each.permanent_generation,
                "volatile-generation": each.volatile_generation,
                "acknowledged-us": each.acknowledged_us,
            }
            for each in outgoing.rounds
        ],
        "rounds-sent": outgoing.rounds[-1].number if outgoing.rounds else 0,
        "round-bytes": outgoing.round_bytes,
        "tail-bytes": outgoing.tail_bytes,
        "phases-us": dict(outgoing.phases_us),
        "digests": dict(outgoing.digests),
    }
