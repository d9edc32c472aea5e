"""Decoding against hostile bytes: a result in bounded time, whatever was done to a state.

The oracle: no exception, and each byte in one leaf.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import states
from vtpmd.inspect.decoding import Decoded, decode
from vtpmd.wire.tpm import StateType

STATES = [
    (states.LEVEL_1, StateType.PERMANENT),
    (states.LEVEL_7, StateType.PERMANENT),
    (states.BUSY, StateType.PERMANENT),
    (states.BUSY_VOLATILE, StateType.VOLATILE),
    (states.BUSY_OLD, StateType.PERMANENT),
    (states.BUSY_OLD_VOLATILE, StateType.VOLATILE),
    (states.BUSY_7, StateType.PERMANENT),
    (states.BUSY_7_VOLATILE, StateType.VOLATILE),
]
# What lengths, counts, versions and flags are made of.
PIECES = st.one_of(
    st.sampled_from([b"", b"\0", b"\1", b"\xff", b"\0\0", b"\xff\xff", b"\x7f\xff\xff\xff"]),
    st.binary(max_size=40),
)


def tiles(decoded: Decoded) -> bool:
    """Return whether the leaves have each byte once, in order."""
    at = 0
    for leaf in decoded.root.leaves():
        if leaf.offset != at:
            return False
        at += leaf.length
    return at == decoded.total_bytes


@given(st.data())
@settings(max_examples=400, deadline=2000)
def test_an_altered_state_ends_with_a_result(data: st.DataObject) -> None:
    """Pieces are put in, taken out, or written over."""
    state, kind = data.draw(st.sampled_from(STATES))
    altered = bytearray(state)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(altered)))
        length = data.draw(st.integers(0, 40))
        altered[start : start + length] = data.draw(PIECES)
    assert tiles(decode(bytes(altered), kind))


@given(st.binary(max_size=4000), st.sampled_from([StateType.PERMANENT, StateType.VOLATILE]))
@settings(deadline=2000)
def test_any_bytes_end_with_a_result(content: bytes, kind: StateType) -> None:
    assert tiles(decode(content, kind))
    headed = (state for state, its_kind in STATES if its_kind is kind)
    assert tiles(decode(next(headed)[:8] + content, kind))
