"""The endorsement keys of a state; of one that is altered to be none, nothing."""

from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_public_key

from tests.support.states import BUSY
from vtpmd.inspect import contents, identity
from vtpmd.inspect.identity import Key, NothingToEnrol, identity_of
from vtpmd.inspect.overview import Inspected, inspect
from vtpmd.inspect.source import Source
from vtpmd.inspect.tree import Node
from vtpmd.inspect.words.handles import HT_PERSISTENT
from vtpmd.wire.tpm import StateType

PERSISTENT = "0x81000000"  # that BUSY has
# The base point of P-256: SEC 2, 2.4.2.
BASE_POINT = (
    "6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296",
    "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5",
)


@pytest.fixture(autouse=True)
def all_are_endorsement_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "ENDORSEMENT_KEYS", range(0x8100_0000, 0x8200_0000))


def inspected(state: bytes) -> Inspected:
    return inspect(Source("state", "state", {StateType.PERMANENT: state}))


def public_of(found: Inspected) -> Node:
    (entry,) = contents.entries(found.permanent, HT_PERSISTENT)
    public = entry.find("slot", "object", "public")
    assert public is not None
    return public


def test_its_key_has_the_numbers_of_the_state() -> None:
    found = inspected(BUSY)
    (key,) = identity_of(found).keys
    assert (key.handle, key.type) == (PERSISTENT, "RSA 2048")
    public = load_pem_public_key(key.pem.encode())
    assert isinstance(public, rsa.RSAPublicKey)
    modulus = int.from_bytes(public_of(found).content("unique"), "big")
    assert public.public_numbers() == rsa.RSAPublicNumbers(65537, modulus)


@pytest.mark.parametrize("what", ["unique", "exponent"])
def test_numbers_that_make_no_key_are_left_out(what: str) -> None:
    public = public_of(inspected(BUSY))
    node = public.find("unique") if what == "unique" else public.find("parameters", "exponent")
    assert node is not None
    end = node.offset + node.length
    n_bytes = node.length if what == "exponent" else len(public.content("unique"))
    altered = BUSY[: end - n_bytes] + b"\0" * (n_bytes - 1) + b"\2" + BUSY[end:]
    with pytest.raises(NothingToEnrol, match="swtpm_setup"):
        identity_of(inspected(altered))


def leaf(name: str, value: bytes | int | None = None, meaning: str = "") -> Node:
    return Node(name, "", 0, value=value, meaning=meaning)


def ecc_entry(curve: str, x: str, y: str) -> Node:
    """Return an entry of a persistent key."""
    point = [leaf("x", bytes.fromhex(x)), leaf("y", bytes.fromhex(y))]
    public = [
        leaf("type", 0x23, "ECC"),
        Node("parameters", "", 0, children=[leaf("curve", 3, curve)]),
        Node("unique", "", 0, children=point),
    ]
    entity = [Node("public", "", 0, children=public), leaf("name", b"\0\x0b")]
    slot = Node("slot", "", 0, children=[Node("object", "", 0, children=entity)])
    return Node(PERSISTENT, "", 0, children=[slot])


def test_a_point_of_a_curve_is_a_key() -> None:
    key = identity.key_in(ecc_entry("NIST_P256", *BASE_POINT))
    assert isinstance(key, Key)
    assert key.type == "ECC NIST_P256"
    public = load_pem_public_key(key.pem.encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public.public_numbers().x == int(BASE_POINT[0], 16)


@pytest.mark.parametrize(
    ("curve", "x", "y"),
    [("NIST_P256", "01", "02"), ("NIST_P384", *BASE_POINT), ("BN_P256", *BASE_POINT), ("", "", "")],
)
def test_one_that_is_not_on_it_is_none(curve: str, x: str, y: str) -> None:
    assert identity.key_in(ecc_entry(curve, x, y)) is None


EC_KEY, NO_KEY = bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06072a8648ce3d027f")


def test_certificate_of_a_key_that_nobody_knows_is_printed_without_one() -> None:
    """A guest can write it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an EK" * 8)])
    times = datetime(2026, 1, 1, tzinfo=UTC), datetime(2036, 1, 1, tzinfo=UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, *times).sign(key, SHA256())
    der = made.public_bytes(Encoding.DER).replace(EC_KEY, NO_KEY)
    entry = Node("0x01c00002", "", 0, children=[leaf("handle", 0x01C0_0002), leaf("data", der)])
    found = identity._certificate(entry, {})
    assert found is not None
    assert (found.kind, found.key) == ("EK", None)
    assert x509.load_pem_x509_certificate(found.pem.encode()).public_bytes(Encoding.DER) == der
