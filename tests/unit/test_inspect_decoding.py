"""Decoding states: all of a right one, as much as there is of another; no length is trusted."""

import struct
import time

import pytest

from tests.support import states
from tests.support.states import ALL, STATES
from vtpmd.inspect import layouts
from vtpmd.inspect import reader as reading
from vtpmd.inspect.decoding import Decoded, decode, kind_of
from vtpmd.inspect.layouts import HASH_STATES, USER_NVRAM, VOLATILE_STATE
from vtpmd.inspect.reader import Fault, Reader
from vtpmd.inspect.tree import Node, Types
from vtpmd.wire.swtpm_format import STATE_BYTES_MAX
from vtpmd.wire.tpm import StateType, TpmVersion

LONGEST_S = 5.0  # for the largest state that a file holds, on a slow machine


def assert_accounted_for(decoded: Decoded, n_bytes: int) -> None:
    """Each byte is in one leaf, and what is not decoded is told by a fault."""
    at = 0
    for leaf in decoded.root.leaves():
        assert leaf.offset == at
        at += leaf.length
    assert at == decoded.total_bytes == n_bytes
    assert (decoded.decoded_bytes < n_bytes) <= bool(decoded.faults) or has_newer(decoded.root)


def has_newer(root: Node) -> bool:
    """Return whether a part of a later version is there."""
    return any(leaf.name == "newer-part" for leaf in root.leaves())


def block_at(state: bytes, kind: StateType, *path: str) -> Node:
    """Return a block of a state."""
    node = decode(state, kind).root.find(*path)
    assert node is not None
    assert node.type == "block"
    return node


def with_more(state: bytes, block: Node, more: bytes) -> bytes:
    """Return a state with more at the end of a block that has nothing."""
    assert block.length == 3
    head = state[: block.offset] + struct.pack(">BH", 1, len(more))
    return head + more + state[block.offset + 3 :]


@pytest.mark.parametrize("name", ALL)
def test_a_right_state_is_decoded_whole(name: str) -> None:
    state, kind, tpm = ALL[name]
    assert kind_of(state) == (tpm, kind)
    decoded = decode(state, kind, tpm)
    assert decoded.faults == []
    assert decoded.decoded_bytes == len(state)
    assert_accounted_for(decoded, len(state))


@pytest.mark.parametrize("name", ALL)
def test_of_a_truncated_state_all_that_is_there_is_decoded(name: str) -> None:
    state, kind, tpm = ALL[name]
    whole = {(leaf.offset, leaf.length): leaf for leaf in decode(state, kind, tpm).root.leaves()}
    for n_bytes in [*range(0, min(1200, len(state)), 7), *range(1200, len(state), 61)]:
        decoded = decode(state[:n_bytes], kind, tpm)
        assert decoded.faults
        assert decoded.faults[0].offset <= n_bytes
        assert_accounted_for(decoded, n_bytes)
        # Of the others the last 20 bytes are a checksum.
        if (tpm, kind) == (TpmVersion.TPM_2_0, StateType.PERMANENT):
            decoded_leaves = [leaf for leaf in decoded.root.leaves() if leaf.type != Types.UNKNOWN]
            assert all(whole[leaf.offset, leaf.length] == leaf for leaf in decoded_leaves)


def test_a_newer_part_is_shown_and_what_follows_is_decoded() -> None:
    path = ("persistent-all", "persistent-data", "version-3", "version-4", "later-versions")
    block = block_at(states.LEVEL_1, StateType.PERMANENT, *path)
    inner = with_more(states.LEVEL_1, block, b"from the future")
    # What contains the block grows with it.
    for depth in (4, 3):
        outer = block_at(states.LEVEL_1, StateType.PERMANENT, *path[:depth])
        length = outer.length - 3 + len(b"from the future")
        inner = inner[: outer.offset + 1] + struct.pack(">H", length) + inner[outer.offset + 3 :]
    decoded = decode(inner, StateType.PERMANENT)
    assert decoded.faults == []
    newer = decoded.root.find(*path, "newer-part")
    assert newer is not None
    assert (newer.type, newer.value) == (Types.UNKNOWN, b"from the future")
    assert newer.offset == block.offset + 3
    assert decoded.decoded_bytes == len(inner) - len(b"from the future")
    assert decoded.root.find("persistent-all", "user-nvram", "counter-max") is not None


def test_a_section_of_a_later_version_is_named_with_its_place() -> None:
    head = struct.pack(">HI", USER_NVRAM.version, USER_NVRAM.magic)
    at = states.LEVEL_1.index(head)
    later = states.LEVEL_1[:at] + struct.pack(">HIH", 9, USER_NVRAM.magic, 8)
    decoded = decode(later + states.LEVEL_1[at + 8 :], StateType.PERMANENT)
    assert decoded.is_newer
    (fault,) = decoded.faults
    assert fault.offset == at
    assert fault.path == "permanent.persistent-all.user-nvram"
    assert fault.what == (
        "USER_NVRAM is for who knows version 8, a later one than is known here, 2"
    )
    assert_accounted_for(decoded, len(states.LEVEL_1))


def test_a_fault_in_a_block_costs_that_block_alone() -> None:
    """The PCRs of a volatile state are in a block; the sessions behind them in another."""
    state = bytearray(states.BUSY_VOLATILE)
    pcrs = block_at(bytes(state), StateType.VOLATILE, "volatile-state", "pcrs")
    state[pcrs.offset + 5 + 2] ^= 0xFF  # the magic number of the first
    decoded = decode(bytes(state), StateType.VOLATILE)
    assert [fault.path for fault in decoded.faults] == [
        "volatile.volatile-state.pcrs.0",
        "volatile",
    ]
    assert decoded.faults[1].what == "its checksum is not that of its bytes"
    slots = decoded.root.find("volatile-state", "sessions", "slots")
    assert slots is not None
    assert slots.find("0", "session", "key") is not None
    assert_accounted_for(decoded, len(state))


def test_another_end_is_told() -> None:
    state = states.LEVEL_1[:-1] + b"\0"
    (fault,) = decode(state, StateType.PERMANENT).faults
    assert fault.offset == len(state) - 4
    assert fault.what == "the state does not end with its magic number"


def test_bytes_behind_a_state_are_told() -> None:
    decoded = decode(states.LEVEL_1 + b"more", StateType.PERMANENT)
    (fault,) = decoded.faults
    assert (fault.offset, fault.what) == (len(states.LEVEL_1), "4 bytes follow its end")
    assert decoded.decoded_bytes == len(states.LEVEL_1)


@pytest.mark.parametrize("name", ALL)
def test_each_flipped_byte_ends_with_a_result(name: str) -> None:
    state, kind, tpm = ALL[name]
    for at in range(0, len(state), 1 + len(state) // 150):
        altered = state[:at] + bytes([state[at] ^ 0xFF]) + state[at + 1 :]
        assert_accounted_for(decode(altered, kind, tpm), len(state))


@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"\1", b"\x00\x00\x00\x0d\x01"])
@pytest.mark.parametrize("keep", [0, 8, 0.5, 0.9])
def test_the_largest_state_takes_a_bounded_time(filling: bytes, keep: float) -> None:
    """Whatever follows what is right, for as long as a state can be."""
    for state, kind, tpm in ALL.values():
        head = state[: int(keep if keep > 1 else keep * len(state))]
        hostile = (head + filling * STATE_BYTES_MAX)[:STATE_BYTES_MAX]
        begun = time.monotonic()
        assert_accounted_for(decode(hostile, kind, tpm), STATE_BYTES_MAX)
        assert time.monotonic() - begun < LONGEST_S


def test_faults_are_kept_up_to_a_limit() -> None:
    block = struct.pack(">BH", 1, 1) + b"\0"
    n_blocks = 2 * reading.FAULTS_MAX
    reader = Reader(block * n_blocks, "blocks")

    def read_all() -> None:
        for _ in range(n_blocks):
            with reader.block("block"):
                raise reader.fault("nothing is right")

    with pytest.raises(Fault) as met:
        read_all()
    reader.finish(met.value)
    assert len(reader.faults) == reading.FAULTS_MAX
    assert_accounted_for(Decoded(StateType.PERMANENT, reader.root, reader.faults), 4 * n_blocks)


def test_parts_in_parts_have_a_limit() -> None:
    reader = Reader(b"", "deep")

    def descend() -> None:
        with reader.part("part", "part"):
            descend()

    with pytest.raises(Fault, match=f"more than {reading.DEPTH_MAX} parts deep"):
        descend()


def test_a_block_that_is_not_there_has_no_length() -> None:
    reader = Reader(struct.pack(">BH", 0, 2) + b"xx", "block")
    with pytest.raises(Fault, match="length is 2, and at most 0"), reader.block("block"):
        pass


def test_no_value_is_in_what_a_node_shows_of_itself() -> None:
    for node in decode(states.BUSY, StateType.PERMANENT).root.walk():
        assert repr(node) == f"Node({node.name}, {node.type}, {node.offset}+{node.length})"


def test_secrets_are_marked() -> None:
    """The passwords that the busy TPM was given are in no node that may be shown."""
    words = (b"password of hierarchy", b"object", b"under a policy..", b"message", b"pcr")
    for state, kind in (STATES["busy"], STATES["busy, volatile"]):
        root = decode(state, kind).root
        for leaf in root.leaves():
            raw = state[leaf.offset : leaf.offset + leaf.length]
            if not leaf.is_secret:
                assert not any(word in raw for word in words), leaf
    assert words[0] in states.BUSY


def test_the_magic_numbers_are_each_ones_own() -> None:
    sections = [each for each in vars(layouts).values() if isinstance(each, reading.Section)]
    sections += [section for section, _, _ in HASH_STATES.values()]
    assert len({section.magic for section in sections}) == len(sections)
    assert VOLATILE_STATE in sections
