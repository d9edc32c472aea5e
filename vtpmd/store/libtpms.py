"""What libtpms says of itself, of profiles and of states: the engine is asked, which has it.

It is a process of its own for each question, that takes states apart in the engine's sandbox
(``csrc/engine/inquiry.h``).
"""

from __future__ import annotations

from vtpmd.core import LinkOperation
from vtpmd.core.program import LinkInquiry, inquire
from vtpmd.core.program import make as make_new
from vtpmd.errors import VtpmdError
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple
from vtpmd.store.directory import StateDirectoryError, names_of
from vtpmd.wire import state_level
from vtpmd.wire.state_level import Library
from vtpmd.wire.tpm import StateType, TpmVersion

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpmd.core.program import Inquired

States = dict[StateType, bytes]

# Of TPMLIB_GetInfo() (libtpms' tpm_library.h).
INFO_FEATURES = 4
INFO_ALGORITHMS = 8
INFO_COMMANDS = 16
INFO_ACTIVE_PROFILE = 32
INFO_AVAILABLE_PROFILES = 64

# What libtpms takes, each looked at with the ones before it.
TAKEN = {
    TpmVersion.TPM_1_2: (StateType.PERMANENT, StateType.VOLATILE, StateType.SAVESTATE),
    TpmVersion.TPM_2_0: (StateType.PERMANENT, StateType.VOLATILE),
}

EXIT_TOO_OLD = 8
WORDS_MAX = 200  # of libtpms or a profile, that a person is shown


class LibtpmsTooOld(StateDirectoryError):
    """A state is right, as far as can be told, and this host's libtpms is too old for it."""

    exit_status = EXIT_TOO_OLD


class Refusal(NamedTuple):
    """What libtpms does not take."""

    state: StateType | None  # None: the profile
    result: int  # a TPM_RESULT
    words: str  # libtpms' last ones, for people; often none

    def __str__(self) -> str:
        said = f"; libtpms says: {self.words}" if self.words else ""
        return f"libtpms refuses it with {self.result:#x}{said}"


class Answer(NamedTuple):
    """What libtpms said."""

    version: str
    info: str  # JSON
    refusal: Refusal | None  # then there is no info


def ask(
    tpm: TpmVersion,
    flags: int = 0,
    *,
    profile: str | None = None,
    states: States | None = None,
) -> Answer:
    """Ask with these flags of TPMLIB_GetInfo(), of the TPM that the states make if there are any.

    A state that libtpms never takes of such a TPM is not asked about. Raises VtpmdError if there is
    no answer, as where libtpms has no TPM of that version.
    """
    messages = _of_profile(profile)
    for kind in TAKEN[tpm]:
        if states and kind in states:
            messages.append((LinkOperation.LOAD_STATE, kind, states[kind]))
    version, answer, refusal = _answer(lambda: inquire(tpm, flags, messages))
    return Answer(version, answer.decode(errors="replace").rstrip("\n"), refusal)


def make(tpm: TpmVersion, profile: str | None = None) -> bytes:
    """Return the permanent state of a new TPM: a TPM 2.0 of a profile, or of the one that all have.

    A TPM 1.2 has an endorsement key, and no owner. The state is in no file, and in the memory of no
    process but this. Raises VtpmdError where libtpms does not take the profile.
    """
    _, state, refusal = _answer(lambda: make_new(tpm, _of_profile(profile)))
    if refusal is not None:
        words = _printable(profile or "")
        raise VtpmdError(f"cannot make a TPM of the profile {words}: {refusal}; update libtpms")
    return state


def _of_profile(profile: str | None) -> list[tuple[LinkOperation, int, bytes]]:
    return [] if profile is None else [(LinkOperation.SET_PROFILE, 0, profile.encode() + b"\0")]


def _answer(ask_it: Callable[[], Inquired]) -> tuple[str, bytes, Refusal | None]:
    """Return libtpms' version, and what it answers; nothing with a refusal. Raises VtpmdError."""
    try:
        status, output, errors = ask_it()
    except OSError as error:
        raise VtpmdError(f"cannot ask libtpms: {error.strerror}; install vtpmd again") from error
    line, _, answer = output.partition(b"\n")
    version = line.decode(errors="replace")
    if status == LinkInquiry.ANSWERED:
        return version, answer, None
    if status == LinkInquiry.REFUSED:
        operation, argument, result = map(int, answer.split())
        is_state = operation == LinkOperation.LOAD_STATE
        state = StateType(argument) if is_state else None
        return version, b"", Refusal(state, result, _last_words(errors))
    raise VtpmdError("cannot ask libtpms: it does not answer; install vtpmd again")


def library() -> Library:
    """Return what this host's libtpms has. Raises VtpmdError."""
    answer = ask(TpmVersion.TPM_2_0, INFO_AVAILABLE_PROFILES)
    return state_level.library_of(answer.version, answer.info)


def check_level(path: str, tpm: TpmVersion, states: States) -> None:
    """Raise LibtpmsTooOld where the permanent state at a path needs a later libtpms than this.

    Others are right, or damaged: that is found out when they are started. A TPM 1.2 is of no level.
    """
    permanent = states.get(StateType.PERMANENT)
    if permanent is None or tpm is not TpmVersion.TPM_2_0:
        return
    needs = state_level.needs_of(permanent)
    if needs.level <= state_level.NULL_LEVEL:
        return  # which every libtpms reads: it is not asked, as that takes its time
    has = library()
    if has.reads(needs):
        return
    refusal = ask(tpm, states={StateType.PERMANENT: permanent}).refusal
    if refusal is not None:
        raise LibtpmsTooOld(
            f"cannot use the state in {path}: it needs a later libtpms, which is no damage: it has "
            f"{needs}, and this host {has}; update libtpms here, or use it on a host that has a "
            f"later one; {refusal}"
        )


def check(path: str, tpm: TpmVersion, states: States) -> None:
    """As ``check_level``; and raise RecoveryRefused for a state that libtpms refuses otherwise."""
    from vtpmd.store.recovery import RecoveryRefused

    check_level(path, tpm, states)
    refusal = ask(tpm, states=states).refusal
    if refusal is not None and refusal.state is not None:
        raise RecoveryRefused(
            f"cannot use state directory {path}: {names_of(tpm).state(refusal.state)} is damaged: "
            f"{refusal}; restore it from a backup, or see `vtpmd recover {path}`"
        )


def _last_words(errors: str) -> str:
    return _printable(errors.strip().rpartition("\n")[2].strip())


def _printable(line: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in line)[:WORDS_MAX]
