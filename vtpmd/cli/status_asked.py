"""What a vtpmd tells of itself on its management socket (docs/management.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from vtpmd.cli.management_client import ManagementError, connect, line
from vtpmd.store.status import epoch_text

# Answers are another program's: each member may be missing, and of any kind.
Members = Mapping[str, Any]


class Answers(NamedTuple):
    """What was answered, member by member as it came."""

    status: Members
    vtpms: list[Members]
    migration: Members


def ask(path: Path) -> Answers:
    """Ask the vtpmd that manages itself on a socket. Raises ManagementError."""
    return asyncio.run(_ask(path))


async def _ask(path: Path) -> Answers:
    async with connect(path, lambda *_: None) as client:
        status = await client.execute("query-status")
        vtpms = await client.execute("query-vtpms")
        migration = await client.execute("query-migration")
    if not (isinstance(status, dict) and isinstance(migration, dict) and isinstance(vtpms, list)):
        raise ManagementError(
            f"vtpmd on {path} answers with what this vtpmd cannot read; use the same version of "
            "both"
        )
    return Answers(status, _objects(vtpms), migration)


def lines(path: Path, answers: Answers) -> list[str]:
    """Return what was answered, for people."""
    status, migration = answers.status, answers.migration
    told = [f"{path}: {_owner(status)}"]
    for vtpm in answers.vtpms:
        names = [str(vtpm[key]) for key in ("name", "uuid") if vtpm.get(key) is not None]
        guest = f" of guest {', '.join(names)}" if names else ""
        told.append(f"the TPM{guest} is {'on' if vtpm.get('running') else _OFF}")
    told.append(f"QEMU is followed: {status.get('qemu')}")
    told += _lineage(status)
    told += [f"possible fork: {_fork(fork)}" for fork in _objects(status.get("possible-fork"))]
    if "session" in migration:
        told.append(f"last session out: {_session(migration)}")
    return [line(each) for each in told]


def _owner(status: Members) -> str:
    since = f"since {status['since']}" if status.get("since") else "by default"
    match status.get("owner"):
        case "ours":
            return f"the vTPM is this host's, {since}"
        case "offered":
            return f"the vTPM was offered to {status.get('peer')}, {since}"
        case "moved":
            return f"the vTPM is another host's, {status.get('peer')}, {since}"
    return "whose the vTPM is, is not known"


_OFF: Final = "off, or not served here"


def _lineage(status: Members) -> list[str]:
    lineage, restored = status.get("lineage"), status.get("restored")
    told = []
    if isinstance(lineage, dict):
        told.append(f"identity: {lineage.get('identity')}")
        generation = lineage.get("generation")
        told.append(f"generation: {generation}")
        if isinstance(generation, int) and (text := epoch_text(generation)):
            told.append(f"restore epoch: {text}")
    if isinstance(restored, dict):
        told.append(
            f"restored: generation {restored.get('generation')} took the place of "
            f"{restored.get('newest')} at {restored.get('at')}{_epoch(restored)}"
        )
    return told


def _epoch(restored: Members) -> str:
    epoch = restored.get("restore-epoch")
    return "" if epoch is None else f", restore epoch {epoch}"


def _fork(fork: Members) -> str:
    if fork.get("export"):
        return (
            f"imported at {fork.get('at')} from {fork.get('peer')}: what that was exported of may "
            "have been served since, too"
        )
    return (
        f"claimed at {fork.get('at')} without the word of {fork.get('peer') or 'the other host'}, "
        "which may have served it, too"
    )


def _session(migration: Members) -> str:
    text = f"{migration['session']}, {migration.get('state')}"
    for key in ("outcome", "reason"):
        if migration.get(key) is not None:
            text += f", {migration[key]}"
    return text


def _objects(value: object) -> list[Members]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
