"""Decoding against hostile bytes: a result in bounded time, whatever was done to a state.

The oracle: no exception, each byte in one leaf, and each way to show it has something to show. What
a state is in may be refused, in one line.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.page import Page
from tests.support.states import ALL
from vtpmd.errors import VtpmdError
from vtpmd.inspect import identity
from vtpmd.inspect.containers import open_with_history
from vtpmd.inspect.decoding import Decoded, decode
from vtpmd.inspect.difference import differences
from vtpmd.inspect.html.state import state_page
from vtpmd.inspect.identity import NothingToEnrol, identity_of
from vtpmd.inspect.overview import Inspected, inspect, overview
from vtpmd.inspect.report_json import node_json
from vtpmd.inspect.screen import screen
from vtpmd.inspect.secrets import Secrets
from vtpmd.inspect.source import Source
from vtpmd.inspect.tree_text import fault_lines, tree_lines
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import StateType, TpmVersion

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


def altered(data: st.DataObject, content: bytes) -> bytes:
    """Return content with pieces put in, taken out, or written over."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(changed)))
        length = data.draw(st.integers(0, 40))
        changed[start : start + length] = data.draw(PIECES)
    return bytes(changed)


def show(source: Source) -> Inspected:
    """Show a source in every way."""
    found = inspect(source)
    assert all(map(tiles, found.states.values()))
    secrets = Secrets(found.states.values())
    known = overview(found, secrets)
    Page(state_page(known, None, ""))
    lines = screen(known)
    for decoded in found.states.values():
        lines += [*tree_lines(decoded.root, secrets), *fault_lines(decoded)]
        json.dumps(node_json(decoded.root, secrets))
    assert json.loads(json.dumps(known)).keys() == known.keys()
    assert all(line.isascii() and line.isprintable() for line in lines)
    for parts in (known["nv"]["indices"], known["objects"], known["sessions"]):
        assert len({frozenset(part) for part in parts}) <= 1  # keys are stable
    with suppress(NothingToEnrol):
        identity_of(found)
    assert differences(found, found) == []
    return found


@pytest.fixture(autouse=True, scope="module")
def all_are_enrolled() -> Iterator[None]:
    """Take any key for an endorsement key, and any index for one with a certificate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "ENDORSEMENT_KEYS", range(0x8100_0000, 0x8200_0000))
        patch.setattr(identity, "CERTIFICATES", {"EK": range(0x0100_0000, 0x0200_0000)})
        patch.setattr(identity, "CERTIFICATES_12", {"EK": range(0x2000_0000)})
        yield


@given(data=st.data())
@settings(max_examples=400, deadline=4000)
def test_an_altered_state_is_shown(data: st.DataObject) -> None:
    state, kind, tpm = ALL[data.draw(st.sampled_from(list(ALL)))]
    found = show(Source("state", "state", {kind: altered(data, state)}, tpm))
    whole = inspect(Source("state", "state", {kind: state}, tpm))
    for change in (*differences(whole, found), *differences(found, whole)):
        assert change.text.isascii() and change.text.isprintable()


@pytest.mark.parametrize("hostile", [b"default-\xff1", rb"def\u001b1"])
def test_a_text_of_a_state_is_one_for_terminals(hostile: bytes) -> None:
    """A name that is altered is shown as one in a difference, too."""
    state, kind, tpm = ALL["level 7"]
    name = b"default-v1"
    assert state.count(name) == 1
    found = show(Source("state", "state", {kind: state.replace(name, hostile)}, tpm))
    whole = inspect(Source("state", "state", {kind: state}, tpm))
    changes = differences(whole, found)
    assert changes
    for change in changes:
        assert change.text.isascii() and change.text.isprintable()


@given(data=st.data())
@settings(max_examples=200, deadline=4000)
def test_an_altered_file_is_shown_or_refused_in_a_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    state, _, _ = ALL[data.draw(st.sampled_from(list(ALL)))]
    wrap = data.draw(st.sampled_from([swtpm_format.encode_file, swtpm_format.encode_blob]))
    path: Path = tmp_path_factory.getbasetemp() / "altered"
    path.write_bytes(altered(data, wrap(state)[:4000]))
    try:
        source = open_with_history(path, None)[0]
    except VtpmdError as error:
        assert len(str(error).splitlines()) == 1
    else:
        show(source)


@given(st.binary(max_size=4000), st.sampled_from(list(ALL.values())))
@settings(deadline=2000)
def test_any_bytes_end_with_a_result(
    content: bytes, known: tuple[bytes, StateType, TpmVersion]
) -> None:
    state, kind, tpm = known
    assert tiles(decode(content, kind, tpm))
    assert tiles(decode(state[:8] + content, kind, tpm))
