"""A TPM that libtpms makes when it is asked for one: in its sandbox, and in no file."""

import pytest

from vtpmd.errors import VtpmdError
from vtpmd.inspect.decoding import decode
from vtpmd.inspect.tree import Node
from vtpmd.store import libtpms
from vtpmd.wire.tpm import StateType, TpmVersion

SEEDS = ("endorsement-seed", "owner-seed", "platform-seed")
SEED_BYTES = 64


def data_of(state: bytes) -> Node:
    """Return the persistent data of a permanent state, which is decoded whole."""
    decoded = decode(state, StateType.PERMANENT)
    assert not decoded.faults and decoded.decoded_bytes == len(state)
    found = decoded.root.find("persistent-all", "persistent-data")
    assert found is not None
    return found


def test_each_tpm_that_is_made_has_seeds_of_its_own() -> None:
    made = [libtpms.make() for _ in range(2)]
    seeds = [data_of(state).content(name) for state in made for name in SEEDS]
    assert len(set(seeds)) == len(seeds) == 2 * len(SEEDS)
    assert all(len(seed) == SEED_BYTES and any(seed) for seed in seeds)
    for state in made:
        answer = libtpms.ask(TpmVersion.TPM_2_0, states={StateType.PERMANENT: state})
        assert answer.refusal is None


@pytest.mark.parametrize("profile", ['{"Name":"bogus"}', "no JSON\n", ""])
def test_a_profile_that_libtpms_does_not_take_is_said_in_a_line(profile: str) -> None:
    with pytest.raises(VtpmdError) as caught:
        libtpms.make(profile)
    assert str(caught.value).startswith("cannot make a TPM of the profile ")
    assert "libtpms refuses it with 0x" in str(caught.value)
    assert "\n" not in str(caught.value)
