"""The lane as docs/lane-format.md has it, by the `cryptography` package: apart from the C core."""

import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vtpmd.core.lane import LaneFrame, LaneKeying

INFO = {True: b"vtpmd lane 1 from source", False: b"vtpmd lane 1 from destination"}
CONTENT = struct.Struct(">B3sIII32s32s")


def encode(frame: LaneFrame) -> bytes:
    """Return a frame's content."""
    kind, reason, permanent, volatile, apply_us, start_us = frame
    return CONTENT.pack(kind, bytes(3), reason, apply_us, start_us, permanent, volatile)


def seal(keying: LaneKeying, number: int, content: bytes, *, is_source: bool) -> bytes:
    """Return the frame of that number, said by that side."""
    key = HKDF(SHA256(), 32, salt=keying.session, info=INFO[is_source]).derive(keying.key)
    associated = keying.session + keying.uuid + keying.lineage
    return AESGCM(key).encrypt(struct.pack(">IQ", 0, number), content, associated)
