"""`vtpmd log` on a vTPM that is served: what its guest does is what its journal says, in order."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.busy_tpm import INDEX
from tests.harness.live_tpm import LiveTpm
from tests.support import tpm2
from tests.support.cli_run import QuietRun
from tests.support.file_names import JOURNAL_NAME
from tests.support.tpm2 import Tpm
from vtpmd import moment

NV = f"NV {INDEX:#010x}"


def sign_wrongly(tpm: Tpm) -> None:
    """Fail an authorisation that lockout protects."""
    key = tpm.execute(tpm2.create_primary(tpm2.ecc_signing_template(), b"right"))
    handle = int.from_bytes(key[:4], "big")
    with pytest.raises(tpm2.TpmError):
        tpm.ecdsa_sign(handle, bytes(32), b"wrong")
    tpm.flush(handle)


ACTS: list[tuple[Callable[[Tpm], object], list[str]]] = [
    (lambda tpm: tpm.nv_define(INDEX, 64), [f"{NV} defined: ordinary, 64 bytes"]),
    (
        lambda tpm: tpm.execute(tpm2.nv_write(INDEX, b"x" * 64)),
        [f"{NV} written, 64 bytes at 0", f"{NV} attributes: +WRITTEN"],
    ),
    (lambda tpm: tpm.execute(tpm2.nv_write(INDEX, b"y" * 32, 8)), [f"{NV} written, 32 bytes at 8"]),
]


def logged(capsys: pytest.CaptureFixture[str], path: Path) -> list[list[str]]:
    """Return what each commit has changed."""
    shown = QuietRun(capsys, "log", path, "--json")
    assert shown.status == 0
    assert shown.outcome["in-use"]
    commits = shown.outcome["commits"]
    numbers = [commit["generation"] for commit in commits]
    assert numbers == [*range(numbers[0], numbers[0] + len(numbers))]
    assert commits[0]["checkpoint"]
    return [[change["text"] for change in commit["changes"]] for commit in commits[1:]]


def test_a_guests_commands_are_told_while_it_is_served(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with LiveTpm() as live:
        state, tpm = live.emulator.state, live.tpm
        before = None
        for act, told in ACTS:
            act(tpm)
            commits = logged(capsys, state)
            assert commits[-1] == told
            assert before is None or len(commits) == before + 1
            before = len(commits)
        sign_wrongly(tpm)
        assert any("failed-tries: 0 -> 1" in each for each in logged(capsys, state))


def now() -> str:
    return moment.at_millisecond(int(time.time() * moment.MS_PER_S))


def test_each_commit_has_the_time_at_which_it_was_made(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveTpm() as live:
        live.tpm.nv_define(INDEX, 8)
        began = now()
        live.tpm.nv_write(INDEX, bytes(8))
        between = now()
        live.tpm.nv_write(INDEX, bytes([1]) * 8)
        path = live.emulator.state
        commits = QuietRun(capsys, "log", path, "--json", "--last", "2").outcome["commits"]
        first, second = (commit["time"] for commit in commits)
        assert began <= first <= between <= second <= now()
        last = QuietRun(capsys, "log", path, "--last", "1").lines[1]
        assert last.split()[1] == f"{second.partition('.')[0]}Z"


def test_an_older_generation_is_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a vTPM that is served: what its index held after each commit."""
    with LiveTpm() as live:
        live.tpm.nv_define(INDEX, 8)
        for number in range(4):
            live.tpm.nv_write(INDEX, bytes([number]) * 8)
        state = live.emulator.state
        commits = QuietRun(capsys, "log", state, "--json", "--last", "4").outcome["commits"]
        for number, commit in enumerate(commits):
            at = str(commit["generation"])
            shown = QuietRun(capsys, "inspect", state, "--json", "--at", at).outcome
            (index,) = [
                each for each in shown["nv"]["indices"] if each["handle"] == f"{INDEX:#010x}"
            ]
            assert index["data"] == (bytes([number]) * 8).hex()
            assert QuietRun(capsys, "verify", state, "--at", at).status == 0


def test_its_journal_alone_has_the_same_commits(capsys: pytest.CaptureFixture[str]) -> None:
    """As the engine wrote it, in a file of its whole size."""
    with LiveTpm() as live:
        live.tpm.nv_define(INDEX, 2000)
        live.tpm.nv_write(INDEX, b"x" * 900)
        state = live.emulator.state
        _, *commits = QuietRun(capsys, "log", state, "--json").outcome["commits"]
        shown = QuietRun(capsys, "inspect", state / JOURNAL_NAME, "--json")
    assert (shown.status, shown.outcome["kind"]) == (0, "journal")
    record = shown.outcome["record"]
    assert record["decoded-bytes"] == record["bytes"]
    names = ("generation", "offset", "journal-bytes", "state-bytes")
    assert [[each[name] for name in names] for each in record["says"]["records"]] == [
        [commit[name] for name in names] for commit in commits
    ]
