"""Whether a chain of backups is right: each of its states is restored and looked at."""

from __future__ import annotations

from pathlib import Path

from vtpmd.core.image import Image
from vtpmd.counted import counted
from vtpmd.inspect.source import Source
from vtpmd.inspect.verification import Check, Finding, verify
from vtpmd.store import chain as chains
from vtpmd.store.chain import Chain, ChainDamaged, ChainFile
from vtpmd.store.export_seal import Seal
from vtpmd.wire.tpm import StateType


def verify_chain(path: Path, seal: Seal) -> tuple[Chain, list[Check]]:
    """Check a chain as a whole, and then each backup in it.

    Raises StateKeyError, or another VtpmdError where it cannot be read or libtpms be asked.
    """
    return chains.again(path, lambda: _verify_once(path, seal))


def _verify_once(path: Path, seal: Seal) -> tuple[Chain, list[Check]]:
    chain = chains.read(path)
    checks = [_whole(chain)]
    image: Image | None = None
    for file in chain.points():
        try:
            image = chains.image_of(chain, file, image, seal)
        except ChainDamaged as error:
            image = None
            checks.append(Check(chains.shown(file.name), Finding.FAILED, str(error)))
        else:
            checks.append(_state(chain, file, image))
    return chain, checks


def _whole(chain: Chain) -> Check:
    """Say whether each link continues the one before, as far as their headers tell."""
    if chain.problems:
        return Check("chain", Finding.FAILED, "; ".join(map(str, chain.problems)))
    points, leftovers = chain.points(), chain.leftovers()
    if not points:
        return Check("chain", Finding.FAILED, f"{chain.path} has no backup in it")
    left = f"; the next backup removes {counted(len(leftovers), 'older file')}" if leftovers else ""
    follow = f"{len(points)} links follow each other" if len(points) > 1 else "it has one link"
    return Check("chain", Finding.PASSED, f"{follow}{left}")


def _state(chain: Chain, file: ChainFile, image: Image) -> Check:
    """Check a state's structure, and ask libtpms; say the first thing that is wrong, if any."""
    header, name = file.header, chains.shown(file.name)
    source = Source(
        path=chain.place(file),
        kind="export",
        states={StateType.PERMANENT: image.data},
        tpm=header.version,
        is_encrypted=header.sealing is not None,
    )
    *others, asked = verify(source)
    for check in (*others, asked):
        if check.finding is Finding.FAILED:
            return check._replace(name=name)
    is_newer = any(check.finding is Finding.NEWER for check in others)
    if is_newer and asked.finding is not Finding.PASSED:
        return asked._replace(name=name)
    size = counted(len(image.data), "byte")
    what = f"generation {header.generation}, a state of {size}; {asked.what}"
    return Check(name, asked.finding, what)
