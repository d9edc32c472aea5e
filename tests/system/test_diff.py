"""`vtpmd diff`: what a TPM is told to do is what differs between its states before and after."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.busy_tpm import INDEX, PERSISTENT, handle_of
from tests.harness.live_tpm import LiveTpm
from tests.support import tpm2, tpm2_rare
from tests.support.cli_run import QuietRun
from tests.support.documents import DOCS, tables
from tests.support.tpm2 import Handle, Tpm, TpmError
from vtpmd.cli.diff import EXIT_DIFFERENT, EXIT_SAME
from vtpmd.inspect.difference import PARTS, Change, differences
from vtpmd.inspect.overview import Inspected, inspect
from vtpmd.inspect.source import Source
from vtpmd.wire.tpm import StateType

Act = Callable[[Tpm], object]
NV = f"NV {INDEX:#010x}"
PASSWORD = b"a password that nobody sees"


@pytest.fixture
def live() -> Iterator[LiveTpm]:
    with LiveTpm() as live:
        yield live


def seen(live: LiveTpm) -> Inspected:
    """Take its states apart, as they are now."""
    kinds = (StateType.PERMANENT, StateType.VOLATILE)
    return inspect(Source("tpm", "state", {kind: live.state(kind) for kind in kinds}))


def told(live: LiveTpm, *acts: Act) -> list[Change]:
    """Return what differs once the last act is done, but for what each command changes."""
    *before, last = acts
    for act in before:
        act(live.tpm)
    first = seen(live)
    last(live.tpm)
    return [each for each in differences(first, seen(live)) if each.part not in ("other", "clock")]


def define(size: int, attributes: int = tpm2.NV_ORDINARY) -> Act:
    return lambda tpm: tpm.nv_define(INDEX, size, attributes)


def write(data: bytes, offset: int = 0) -> Act:
    return lambda tpm: tpm.execute(tpm2.nv_write(INDEX, data, offset))


def make_persistent(tpm: Tpm) -> None:
    tpm.make_persistent(
        handle_of(tpm, tpm2_rare.create_primary_of(tpm2_rare.RSA_STORAGE)), PERSISTENT
    )


def fail_to_sign(tpm: Tpm) -> None:
    key = handle_of(tpm, tpm2.create_primary(tpm2.ecc_signing_template(), b"right"))
    with pytest.raises(TpmError):
        tpm.ecdsa_sign(key, bytes(32), b"wrong")
    tpm.flush(key)


EXTENDED = "PCR 7 sha256 extended: "
BITS = tpm2.NV_ORDINARY | 2 << 4
CASES: dict[str, tuple[list[Act], list[str]]] = {
    "an index is defined": ([define(32)], [f"{NV} defined: ordinary, 32 bytes"]),
    "it is written first": (
        [define(32), write(b"x" * 32)],
        [f"{NV} written, 32 bytes at 0", f"{NV} attributes: +WRITTEN"],
    ),
    "a part of it is": (
        [define(64), write(b"x" * 64), write(b"y" * 32, 8)],
        [f"{NV} written, 32 bytes at 8"],
    ),
    "a byte of it is": (
        [define(1), write(b"x"), write(b"y")],
        [f"{NV} written, 1 byte at 0"],
    ),
    "it counts": (
        [define(8, tpm2.NV_COUNTER), lambda tpm: tpm.nv_increment(INDEX),
         lambda tpm: tpm.nv_increment(INDEX)],
        [f"{NV} counted: 1 -> 2"],
    ),
    "its bits are set": (
        [define(8, BITS), lambda tpm: tpm.execute(tpm2_rare.nv_set_bits(INDEX, 1)),
         lambda tpm: tpm.execute(tpm2_rare.nv_set_bits(INDEX, 0b1100))],
        [f"{NV} bits set: 2, 3"],
    ),
    "it is extended": (
        [define(32, tpm2.NV_CHAIN), lambda tpm: tpm.nv_extend(INDEX, b"a"),
         lambda tpm: tpm.nv_extend(INDEX, b"b")],
        [f"{NV} extended"],
    ),
    "it is undefined": (
        [define(32), lambda tpm: tpm.execute(tpm2.nv_undefine(INDEX))],
        [f"{NV} undefined"],
    ),
    "a key is made persistent": (
        [make_persistent],
        ["object 0x80000000 loaded: RSA 2048", f"object {PERSISTENT:#010x} added: RSA 2048"],
    ),
    "an authorisation fails": ([fail_to_sign], ["failed-tries: 0 -> 1"]),
    "the owner has a password": (
        [lambda tpm: tpm.execute(tpm2_rare.hierarchy_change_auth(Handle.OWNER, PASSWORD))],
        ["owner authorisation set"],
    ),
    "the endorsement hierarchy goes": (
        [lambda tpm: tpm.execute(tpm2_rare.hierarchy_control(tpm2_rare.ENDORSEMENT, state=False))],
        ["endorsement hierarchy off"],
    ),
    "lockout has other parameters": (
        [lambda tpm: tpm.execute(tpm2.lockout_parameters(7, 1000, 1000))],
        ["tries-max: 3 -> 7"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_the_tpm_was_told_to_do(live: LiveTpm, name: str) -> None:
    acts, texts = CASES[name]
    assert [change.text for change in told(live, *acts)] == texts


def test_a_pcr_that_was_extended_is_told_with_its_value(live: LiveTpm) -> None:
    (change,) = told(live, lambda tpm: tpm.extend(7, b"7" * 32))
    assert (change.part, change.what) == ("pcr", "7 sha256")
    assert change.text == EXTENDED + live.tpm.pcr(7).hex()


def test_a_clear_makes_other_seeds(live: LiveTpm) -> None:
    clear = tpm2.command(
        tpm2.CommandCode.CLEAR, handles=[Handle.PLATFORM], authorizations=[tpm2.password()]
    )
    texts = [change.text for change in told(live, lambda tpm: tpm.execute(clear))]
    assert "owner seed changed: what is made of it is another now" in texts
    assert not any("endorsement seed" in text for text in texts)


def test_a_secret_that_changes_is_named_and_not_shown(live: LiveTpm) -> None:
    live.tpm.execute(tpm2_rare.hierarchy_change_auth(Handle.OWNER, b"the one before"))
    first = seen(live)
    change = tpm2_rare.hierarchy_change_auth(Handle.OWNER, PASSWORD, b"the one before")
    live.tpm.execute(change)
    found = differences(first, seen(live))
    assert "differs, too: permanent/persistent-all/persistent-data/owner-auth" in [
        each.text for each in found
    ]
    said = json.dumps([each._asdict() for each in found])
    for secret in (PASSWORD, b"the one before"):
        assert secret.decode() not in said
        assert secret.hex() not in said


def test_parts_are_those_of_the_document() -> None:
    rows = tables((DOCS / "inspect.md").read_text())["Parts of a difference"]
    assert {row["part"].strip("`") for row in rows} == {*PARTS, "state", "other"}


def test_the_command_compares_files(
    live: LiveTpm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live.tpm.nv_define(INDEX, 16)
    paths = [tmp_path / name for name in ("a", "b")]
    paths[0].write_bytes(live.state(StateType.PERMANENT))
    same = QuietRun(capsys, "diff", paths[0], paths[0])
    assert (same.status, same.lines) == (EXIT_SAME, ["nothing differs"])
    live.tpm.nv_write(INDEX, b"0123456789abcdef")
    paths[1].write_bytes(live.state(StateType.PERMANENT))
    shown = QuietRun(capsys, "diff", *paths)
    assert shown.status == EXIT_DIFFERENT
    assert f"{NV} written, 16 bytes at 0" in shown.lines
    outcome = QuietRun(capsys, "diff", *paths, "--json").outcome
    assert [outcome["a"], outcome["b"]] == list(map(str, paths))
    assert [change["text"] for change in outcome["changes"]] == shown.lines
    assert set(outcome["changes"][0]) == set(Change._fields)
