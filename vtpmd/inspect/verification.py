"""Whether a state is right: what it is in, its structure, its checksums, and libtpms' own word."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from vtpmd.inspect.decoding import Decoded
from vtpmd.inspect.overview import inspect
from vtpmd.inspect.source import Source
from vtpmd.store.libtpms import LibtpmsTooOld, ask, check_level
from vtpmd.wire.tpm import StateType


class Finding(StrEnum):
    """What a check has found."""

    PASSED = "passed"
    FAILED = "failed"
    NEWER = "newer"  # nothing is wrong, but a later libtpms has written it
    SKIPPED = "skipped"  # it could not be made


class Check(NamedTuple):
    """A check that was made, or why it was not."""

    name: str
    finding: Finding
    what: str  # in words


class Verdict(StrEnum):
    """What all checks say together."""

    FINE = "fine"
    DAMAGED = "damaged"
    NEWER = "newer"


def verify(source: Source) -> list[Check]:
    """Check a source. Raises VtpmdError where libtpms cannot be asked."""
    checks = [_container(source)]
    found = inspect(source)
    checks += [_structure(decoded) for decoded in found.parts]
    return [*checks, _by_libtpms(source, found.states)]


def verdict(checks: list[Check]) -> Verdict:
    """Return what checks say together; libtpms' is the last. What it takes is not newer than it."""
    findings = {check.finding for check in checks}
    if Finding.FAILED in findings:
        return Verdict.DAMAGED
    is_newer = Finding.NEWER in findings and checks[-1].finding is not Finding.PASSED
    return Verdict.NEWER if is_newer else Verdict.FINE


def _container(source: Source) -> Check:
    """Say what is known of headers, checksums, and the journal's chain."""
    if source.problems:
        return Check("container", Finding.FAILED, "; ".join(source.problems))
    commits = source.journal_commits
    journal = "" if commits is None else f", and {_follow(commits)}"
    return Check("container", Finding.PASSED, f"it is whole{journal}")


def _follow(commits: int) -> str:
    if commits == 1:
        return "the one commit of its journal follows it"
    return f"{commits} commits of its journal follow each other"


def _structure(decoded: Decoded) -> Check:
    name = decoded.words
    known = f"{decoded.decoded_bytes} of {decoded.total_bytes} bytes decoded"
    if not decoded.faults:
        return Check(name, Finding.PASSED, known)
    fault = decoded.faults[0]
    finding = Finding.NEWER if decoded.is_newer else Finding.FAILED
    return Check(name, finding, f"{known}; byte {fault.offset}, in {fault.path}: {fault.what}")


def _by_libtpms(source: Source, states: dict[StateType, Decoded]) -> Check:
    """Ask this host's libtpms; it looks at each state with the permanent one alone."""
    if StateType.PERMANENT not in source.states:
        return Check("libtpms", Finding.SKIPPED, "it takes no state without the permanent one")
    try:
        check_level(source.path, source.tpm, source.states)
    except LibtpmsTooOld as error:
        return Check("libtpms", Finding.NEWER, str(error))
    answer = ask(source.tpm, states=source.states)
    if answer.refusal is None:
        return Check("libtpms", Finding.PASSED, f"libtpms {answer.version} takes it")
    refused = states.get(answer.refusal.state) if answer.refusal.state is not None else None
    is_newer = refused is not None and refused.is_newer
    finding = Finding.NEWER if is_newer else Finding.FAILED
    return Check("libtpms", finding, f"libtpms {answer.version}: {answer.refusal}")
