"""What the guest's workload found, and how the host compares it."""

from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

Facts = dict[str, str]

# Each check uses the session, makes a signature and reads a clock: these differ, the rest may not.
CHANGED_BY_A_CHECK = frozenset({"signature", "session_uses", "clock_ms"})
# The load changes these, too; the guest compares them with its own model.
CHANGED_BY_WORK = frozenset({"pcr_chain", "extends", "nv", "counter"})
NUMBER_BYTES = 32  # of a P-256 coordinate, or of one number of an ECDSA signature


def verify_signature(facts: Facts, nonce: str) -> None:
    """Verify the signature over the nonce by the key that the guest showed.

    Raises cryptography's InvalidSignature, or KeyError when the facts have no signature.
    """
    point = b"\x04" + bytes.fromhex(facts["signing_key"])
    key = EllipticCurvePublicKey.from_encoded_point(SECP256R1(), point)
    numbers = bytes.fromhex(facts["signature"])
    signature = encode_dss_signature(
        int.from_bytes(numbers[:NUMBER_BYTES], "big"), int.from_bytes(numbers[NUMBER_BYTES:], "big")
    )
    key.verify(signature, nonce.encode(), ECDSA(SHA256()))


def differences(before: Facts, after: Facts, *, worked: bool) -> list[str]:
    """Return one line for each fact of two checks that differs and should not.

    With `worked` the guest used its TPM between the checks. The clock must not go back, a session
    must not forget its uses.
    """
    changing = CHANGED_BY_A_CHECK | (CHANGED_BY_WORK if worked else frozenset())
    found = [
        f"{name}: {before.get(name)} before, {after.get(name)} after"
        for name in sorted((before.keys() | after.keys()) - changing)
        if before.get(name) != after.get(name)
    ]
    growing = ["clock_ms", "session_uses", *(["extends", "counter"] if worked else [])]
    found += [
        f"{name}: went back from {before[name]} to {after[name]}"
        for name in growing
        if int(after[name]) < int(before[name])
    ]
    return found
