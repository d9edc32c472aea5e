"""What a state needs of libtpms is read off the state, and held against what libtpms says it has.

Invariant 8: a state is from outside.
"""

import pytest

from tests.support import states
from vtpmd.wire.state_level import (
    LEVEL_MAX,
    UNKNOWN,
    Library,
    Needs,
    active_of,
    library_of,
    needs_of,
)

NULL = Needs(1, "null")
# As TPMLIB_GetInfo() of 0.10 has it, with fewer words.
AVAILABLE = (
    '{"AvailableProfiles":[{"Name":"default-v1","StateFormatLevel":7,"Commands":"0x11f"},'
    '{"Name":"null","StateFormatLevel":1},{"Name":"custom","StateFormatLevel":2}]}'
)
OLD, NEW = library_of("0.9.2", "{}"), library_of("0.10.2", AVAILABLE)


def with_profile(profile: str, version: int = 4, minimum: int = 4) -> bytes:
    """Return a state as later versions write it, without what follows the profile."""
    text = profile.encode() + b"\0"
    head = version.to_bytes(2, "big") + states.LEVEL_1[2:6] + minimum.to_bytes(2, "big")
    return head + len(text).to_bytes(2, "big") + text + states.LEVEL_1[-4:]


def named(name: str, level: object = 7) -> str:
    return f'{{"Name":"{name}","StateFormatLevel":{level}}}'


def test_states_that_libtpms_has_made_say_their_level() -> None:
    assert needs_of(states.LEVEL_1) == NULL
    assert needs_of(states.LEVEL_7) == Needs(7, "default-v1")
    assert needs_of(states.LATER) == Needs(9, "default-v1")


def test_what_is_cut_short_needs_nothing_that_is_known() -> None:
    """It is damaged, whatever libtpms there is."""
    whole = states.LEVEL_7
    assert {needs_of(whole[:n_bytes]) for n_bytes in range(len(whole))} == {UNKNOWN}


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        (with_profile(named("custom:mine")), Needs(7, "custom:mine")),
        (with_profile(named("custom"), version=5), Needs(7, "custom")),
        (with_profile(named("custom"), version=5, minimum=5), Needs(LEVEL_MAX, "")),
        (with_profile(named("x", 99999)), Needs(LEVEL_MAX, "x")),
        (with_profile(named("x", 10**9)), UNKNOWN),
        (with_profile(named("x", -1)), UNKNOWN),
        (with_profile(named("x", "seven")), UNKNOWN),
        (with_profile(named("")), UNKNOWN),
        (with_profile(named("x" * 33)), UNKNOWN),
        (with_profile(named("a\nb")), UNKNOWN),
        (with_profile(named("ä")), UNKNOWN),
        (with_profile("{}"), UNKNOWN),
        (with_profile(named("x"), minimum=5), UNKNOWN),
        (b"", UNKNOWN),
    ],
)
def test_a_profile_is_read_as_libtpms_writes_it(state: bytes, wanted: Needs) -> None:
    assert needs_of(state) == wanted


def test_a_library_says_what_it_has() -> None:
    assert Library("0.9.2", {}) == OLD
    assert Library("0.10.2", {"default-v1": 7, "null": 1, "custom": 2}) == NEW
    assert (OLD.level, NEW.level) == (1, 7)
    assert active_of('{"ActiveProfile":' + named("null", 1) + "}") == NULL
    assert active_of("{}") == UNKNOWN


@pytest.mark.parametrize(
    ("needs", "old", "new"),
    [
        (UNKNOWN, True, True),
        (NULL, True, True),
        (Needs(2, "custom"), False, True),
        (Needs(7, "default-v1"), False, True),
        (Needs(7, "custom:mine"), False, True),
        (Needs(1, "default-v1"), False, True),
        (Needs(8, "default-v2"), False, False),
        (Needs(7, "default-v2"), False, False),
        (Needs(8, "custom"), False, False),
        (Needs(LEVEL_MAX, ""), False, False),
    ],
)
def test_a_library_reads_the_levels_and_profiles_that_it_has(
    needs: Needs, old: bool, new: bool
) -> None:
    assert (OLD.reads(needs), NEW.reads(needs)) == (old, new)
