"""A fuzz target in Python holds for its corpus, and its oracle notices a codec that is wrong."""

import struct
from pathlib import Path

import pytest

from tests.fuzz import fuzz_control
from vtpmd.wire import control

CORPUS = Path(__file__).resolve().parents[1] / "fuzz" / "corpus" / "control"
INPUTS = sorted(CORPUS.iterdir())


def test_corpus_has_every_command() -> None:
    numbers = {int.from_bytes(path.read_bytes()[1:5], "big") for path in INPUTS}
    assert set(control.Command) <= numbers


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.name)
def test_control(path: Path) -> None:
    fuzz_control.test_one_input(path.read_bytes())


@pytest.mark.parametrize(
    ("command", "layout"),
    [
        ("INIT", control._Layout(struct.Struct(">I"), control.Init, excess_ignored=True)),
        ("HASH_DATA", control._Layout(struct.Struct(">I"), control.HashData, 1 << 20)),
        ("SET_LOCALITY", control._Layout(struct.Struct(">4s"), control.SetLocality)),
        ("STOP", control._Layout(struct.Struct(">"), lambda: control.Init(0))),
    ],
)
def test_oracle_notices_a_wrong_layout(
    monkeypatch: pytest.MonkeyPatch, command: str, layout: control._Layout
) -> None:
    monkeypatch.setitem(control._LAYOUTS, control.Command[command], layout)
    failures = 0
    for path in INPUTS:
        try:
            fuzz_control.test_one_input(path.read_bytes())
        except (AssertionError, struct.error):
            failures += 1
    assert failures > 0
