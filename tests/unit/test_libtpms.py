"""A TPM that libtpms makes when it is asked for one: in its sandbox, and in no file."""

import pytest

from vtpmd.errors import VtpmdError
from vtpmd.inspect.decoding import decode
from vtpmd.inspect.tree import Node
from vtpmd.store import libtpms
from vtpmd.wire.tpm import StateType, TpmVersion

SEEDS = ("endorsement-seed", "owner-seed", "platform-seed")
SEED_BYTES = 64
RSA_BYTES = 256


def data_of(state: bytes) -> Node:
    """Return the persistent data of a permanent state, which is decoded whole."""
    decoded = decode(state, StateType.PERMANENT)
    assert not decoded.faults and decoded.decoded_bytes == len(state)
    found = decoded.root.find("persistent-all", "persistent-data")
    assert found is not None
    return found


def test_each_tpm_that_is_made_has_seeds_of_its_own() -> None:
    made = [libtpms.make(TpmVersion.TPM_2_0) for _ in range(2)]
    seeds = [data_of(state).content(name) for state in made for name in SEEDS]
    assert len(set(seeds)) == len(seeds) == 2 * len(SEEDS)
    assert all(len(seed) == SEED_BYTES and any(seed) for seed in seeds)
    for state in made:
        answer = libtpms.ask(TpmVersion.TPM_2_0, states={StateType.PERMANENT: state})
        assert answer.refusal is None


def test_each_tpm_12_that_is_made_has_an_endorsement_key_and_no_owner() -> None:
    """And secrets of its own for DAA; all others come with an owner."""
    made = [libtpms.make(TpmVersion.TPM_1_2) for _ in range(2)]
    secrets = []
    for state in made:
        decoded = decode(state, StateType.PERMANENT, TpmVersion.TPM_1_2)
        assert not decoded.faults and decoded.decoded_bytes == len(state)
        data = decoded.root.find("permanent-all", "permanent-data")
        assert data is not None
        assert data.at("owner-installed") is False
        assert len(data.content("endorsement-key", "public-key")) == RSA_BYTES
        secrets += [data.content("endorsement-key", "private", "private-key")]
        secrets += [data.content(name) for name in ("daa-seed", "daa-proof")]
        answer = libtpms.ask(TpmVersion.TPM_1_2, states={StateType.PERMANENT: state})
        assert answer.refusal is None
    assert len(set(secrets)) == len(secrets) == 6
    assert all(any(secret) for secret in secrets)


@pytest.mark.parametrize("profile", ['{"Name":"bogus"}', "no JSON\n", ""])
def test_a_profile_that_libtpms_does_not_take_is_said_in_a_line(profile: str) -> None:
    with pytest.raises(VtpmdError) as caught:
        libtpms.make(TpmVersion.TPM_2_0, profile)
    assert str(caught.value).startswith("cannot make a TPM of the profile ")
    assert "libtpms refuses it with 0x" in str(caught.value)
    assert "\n" not in str(caught.value)
