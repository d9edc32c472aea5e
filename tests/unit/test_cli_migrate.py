"""`vtpmd migrate` without QEMU: its command line, its client, its progress and its report.

What it does to real guests is in tests/system/test_migrate_cli.py.
"""

import asyncio
import itertools
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vtpmd import cli
from vtpmd.cli import moving_report
from vtpmd.cli.management_client import ManagementError, Round, Session, connect
from vtpmd.cli.migrate import EXIT_STATUS
from vtpmd.cli.moving import Progress, Rate
from vtpmd.cli.moving_display import guest_text, stage, vtpm_text
from vtpmd.cli.moving_verdict import Ending, Report, Seen, verdict
from vtpmd.daemon.listener import listen
from vtpmd.daemon.management import Arguments, ManagementServer
from vtpmd.daemon.qemu_events import MigrationState
from vtpmd.daemon.qmp import Migration

TIMEOUT_S = 60.0
OPTIONS = {"--manage": "/m", "--to": "host:1", "--qmp": "/q", "--uri": "tcp:host:2"}
DIGEST = "0123456789abcdef" * 4
ANSWER: dict[str, Any] = {
    "state": "granted",
    "outcome": "handed-over",
    "reason": None,
    "refusal": None,
    "qemu": "following",
    "peer-qemu": "not-reachable",
    "session": "00" * 16,
    "rounds": [
        {
            "round": 1,
            "bytes": 12000,
            "permanent-generation": 3,
            "volatile-generation": 4,
            "acknowledged-us": 1500,
        },
        {
            "round": 2,
            "bytes": 500,
            "permanent-generation": 3,
            "volatile-generation": 5,
            "acknowledged-us": None,
        },
    ],
    "tail-bytes": 96,
    "phases-us": {"source: capture": 166, "destination: start the TPM": 251},
    "digests": {"permanent": DIGEST, "volatile": DIGEST},
}
SESSION = Session(
    session="00" * 16,
    state="granted",
    outcome="handed-over",
    qemu="following",
    peer_qemu="not-reachable",
    rounds=(Round(1, 12000, 3, 4, 1500), Round(2, 500, 3, 5, None)),
    tail_bytes=96,
    phases_us=ANSWER["phases-us"],
    digests=ANSWER["digests"],
)
COMPLETED = Migration(
    status=MigrationState.COMPLETED,
    passes=3,
    ram_transferred_bytes=81_000_000,
    ram_remaining_bytes=0,
    total_ms=360,
    downtime_ms=29,
)
TAIL = Report(ending=Ending.TAIL, guest=COMPLETED, vtpm=SESSION)


def command_line(**changes: str | None) -> list[str]:
    """Return the command's words; an option that is changed to None is left out."""
    options = OPTIONS | {f"--{name}": value for name, value in changes.items()}
    return ["migrate", *(word for pair in options.items() if pair[1] for word in pair if word)]


@pytest.mark.parametrize(
    "arguments",
    [
        *(command_line(**{name[2:]: None}) for name in OPTIONS),
        command_line(to="host"),
        command_line(to="host:65536"),
        command_line(to="::1:4433"),
        [*command_line(), "extra"],
    ],
)
def test_wrong_command_lines_are_refused_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: vtpmd" in capsys.readouterr().err


def test_help_has_an_example_and_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["migrate", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "example:\n  vtpmd migrate --manage /" in text
    lines = text.partition("exit status:\n")[2].splitlines()
    numbers = (line.split()[0] for line in lines if not line.startswith("   "))
    assert {int(number) for number in numbers} == {2, *EXIT_STATUS.values()}
    assert EXIT_STATUS.keys() == {ending.value for ending in Ending}


def test_a_failure_before_anything_is_one_line_and_one_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    assert cli.main([*command_line(manage=missing), "--json"]) == 1
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"vtpmd: the guest has not moved: cannot manage vtpmd on {missing}: ")
    report = json.loads(said.out)
    assert (report["ending"], report["guest"], report["vtpm"]) == ("failed", None, None)


def ignore(name: str, data: Mapping[str, object]) -> None:
    """Take an event that does not matter."""


def ask(tmp_path: Path, answer: object) -> Session:
    """Ask a real management server, whose query-migration answers so."""

    async def query_migration(_: Arguments) -> object:
        return answer

    async def test() -> Session:
        path = tmp_path / "manage"
        with listen(path) as listening:
            server = ManagementServer(listening, on_quit=lambda: None)
            server.register("query-migration", {}, query_migration)
            async with asyncio.timeout(TIMEOUT_S):
                task = asyncio.create_task(server.serve())
                try:
                    async with connect(path, ignore) as client:
                        return await client.query_migration()
                finally:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

    return asyncio.run(test())


def test_session_is_what_vtpmd_answers(tmp_path: Path) -> None:
    assert ask(tmp_path, ANSWER) == SESSION
    assert ask(tmp_path, {"state": "none"}).state == "none"


@pytest.mark.parametrize(
    "changes",
    [
        {"state": 1},
        {"rounds": {}},
        {"rounds": [1]},
        {"rounds": [{}]},
        {"rounds": [ANSWER["rounds"][0] | {"bytes": -1}]},
        {"rounds": [ANSWER["rounds"][0] | {"bytes": True}]},
        {"tail-bytes": "96"},
        {"phases-us": [1]},
        {"phases-us": {"source: capture": 0.5}},
        {"digests": {"permanent": None}},
        {"reason": ["x"]},
        {"refusal": 8},
        {"qemu": True},
        {"peer-qemu": {}},
    ],
)
def test_malformed_answers_are_errors(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ManagementError, match="use the same version of both"):
        ask(tmp_path, ANSWER | changes)


@pytest.mark.parametrize("name", [name for name in ANSWER if name != "session"])
def test_incomplete_answers_are_errors(tmp_path: Path, name: str) -> None:
    answer = {key: value for key, value in ANSWER.items() if key != name}
    with pytest.raises(ManagementError, match="use the same version of both"):
        ask(tmp_path, answer)


def test_control_characters_of_the_other_side_reach_no_terminal(tmp_path: Path) -> None:
    assert ask(tmp_path, ANSWER | {"reason": "a\x1b[2Jb\nc"}).reason == "a?[2Jb c"


@contextmanager
def greeting(path: Path, said: bytes) -> Iterator[None]:
    """Serve one client: say this and no more, until it hangs up."""

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(TIMEOUT_S)
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass  # to hang up with something unread would be a reset

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(TIMEOUT_S)
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b'{"error": {"class": "GenericError", "desc": "no"}}\r\n',
        b'{"QMP": {"version": {"qemu": {}, "package": ""}, "capabilities": []}}\r\n'
        b'{"return": {}}\r\n',
    ],
)
def test_other_servers_are_not_taken_for_vtpmd(tmp_path: Path, said: bytes) -> None:
    async def test() -> None:
        async with asyncio.timeout(TIMEOUT_S), connect(tmp_path / "s", ignore):
            pytest.fail("connected")

    with greeting(tmp_path / "s", said), pytest.raises(ManagementError, match="no vtpmd greets"):
        asyncio.run(test())


def test_json_has_everything() -> None:
    report = json.loads(json.dumps(moving_report.as_json(TAIL)))
    assert report["ending"] == "tail"
    assert report["guest"]["downtime-ms"] == 29
    for name in set(ANSWER) - {"digests"}:
        assert report["vtpm"][name] == ANSWER[name]
    assert report["vtpm"]["digests"]["permanent"] == {"at-freeze": DIGEST, "after-load": DIGEST}


@pytest.mark.parametrize("uri", ["exec:cat > /tmp/state", "fd:7", "file:/tmp/state"])
def test_uri_that_carries_no_word_back_is_refused(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is asked: QEMU would wait for ever, with its guest stopped."""
    assert cli.main(command_line(uri=uri, manage=str(tmp_path / "missing"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    transport = uri.partition(":")[0]
    assert line.startswith(f"vtpmd: the guest has not moved: {transport}: carries no word back")
    assert line.endswith("give a --uri with tcp: or unix:")


def test_digests_after_load_are_known_only_after_the_destination_has_said_them() -> None:
    failed = Session(outcome="go-on", phases_us={}, digests={"permanent": DIGEST})
    report: Any = moving_report.as_json(Report(ending=Ending.FAILED, vtpm=failed))
    assert report["vtpm"]["digests"]["permanent"] == {"at-freeze": DIGEST, "after-load": None}


def test_text_has_a_line_for_each_number() -> None:
    assert moving_report.text(TAIL).splitlines() == [
        "The guest has moved, and its vTPM beside it: both run at the destination.",
        "",
        "  vTPM, base                           12,000 bytes  "
        "generations 3 and 4, acknowledged in 1.5 ms",
        "  vTPM, round 2                           500 bytes  generations 3 and 5",
        "  vTPM, beside QEMU's stream           12,500 bytes",
        "  vTPM, in QEMU's stream                   96 bytes  the sealed tail",
        "  guest memory, in QEMU's stream   81,000,000 bytes  in 3 passes",
        "  QEMU's total time                          360 ms",
        "  QEMU's downtime                             29 ms",
        "  source: capture                          0.166 ms",
        "  destination: start the TPM               0.251 ms",
        "  digest, permanent state         01234567…89abcdef  at the freeze and after load",
        "  digest, volatile state          01234567…89abcdef  at the freeze and after load",
    ]


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 14, 1000])
def test_text_accounts_for_every_round(count: int) -> None:
    """However many there are, the lines are few, and their bytes add up."""
    rounds = tuple(Round(number, number, 1, 1, 1) for number in range(1, count + 1))
    session = Session(rounds=rounds, phases_us={}, digests={})
    lines = moving_report.text(Report(ending=Ending.TAIL, vtpm=session)).splitlines()[2:]
    numbers = {
        name.split("  ")[0]: int(name.split()[-2].replace(",", ""))
        for name in (line.strip().partition(" byte")[0] + " bytes" for line in lines)
    }
    total = numbers.pop("vTPM, beside QEMU's stream", sum(numbers.values()))
    assert total == sum(numbers.values()) == sum(range(count + 1))
    assert len(numbers) <= 13
    if count > 12:
        more = "1 round" if count == 13 else f"{count - 12} rounds"
        assert f"vTPM, {more} more" in numbers


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (Report(ending=Ending.WHOLE_BLOBS, reason="why"), "the guest has moved, with its .*: why"),
        (Report(ending=Ending.FAILED, reason="why"), "the guest has not moved: why"),
        (
            Report(ending=Ending.FAILED, guest=COMPLETED, run_state="paused", reason="why"),
            "the guest has not moved, the guest is paused at the source: why",
        ),
        (Report(ending=Ending.INTERRUPTED), "interrupted before QEMU began to migrate"),
        (
            Report(ending=Ending.INTERRUPTED, guest=COMPLETED, run_state="running", reason="why"),
            "interrupted, the guest is running at the source: why",
        ),
        (
            Report(ending=Ending.INTERRUPTED, guest=COMPLETED, reason="why"),
            "interrupted, QEMU's migration has ended at the source: why",
        ),
        (
            Report(ending=Ending.UNKNOWN, reason="why"),
            "it is not known where the guest and its vTPM are: why",
        ),
    ],
)
def test_heading_says_what_became_of_the_guest(report: Report, said: str) -> None:
    assert re.fullmatch(said, moving_report.heading(report))


OUTCOMES = (None, "granted", "handed-over", "go-on", "fall-back")


def everything_seen() -> Iterator[Seen]:
    """Yield each combination of what can be seen, and some that cannot."""
    sessions: list[Session | None] = [None]
    sessions += [
        Session(outcome=outcome, tail_bytes=tail_bytes, phases_us={}, digests={})
        for outcome in OUTCOMES
        for tail_bytes in (None, 96)
    ]
    guests = [None, *(Migration(status=status) for status in MigrationState)]
    for guest, vtpm, qemu, vtpmd, blobs, refused, interrupted in itertools.product(
        guests,
        sessions,
        (None, "QEMU is lost"),
        (None, "vtpmd is lost"),
        (None, "whole"),
        (None, "refused"),
        (False, True),
    ):
        yield Seen(
            guest=guest,
            vtpm=vtpm,
            qemu_lost=qemu,
            vtpmd_lost=vtpmd,
            whole_blobs=blobs,
            refused=refused,
            interrupted=interrupted,
        )


def test_nothing_is_called_moved_that_was_not_seen_at_the_destination() -> None:
    """And nothing is said to have stayed that may be there."""
    endings = set()
    for seen in everything_seen():
        report = verdict(seen)
        endings.add(report.ending)
        outcome = None if seen.vtpm is None else seen.vtpm.outcome
        is_loaded = seen.guest is not None and seen.guest.status is MigrationState.COMPLETED
        match report.ending:
            case Ending.TAIL:
                assert (is_loaded, outcome, seen.whole_blobs) == (True, "handed-over", None)
                assert seen.qemu_lost is None
            case Ending.WHOLE_BLOBS:
                assert is_loaded and seen.qemu_lost is None
                assert seen.vtpm is None or seen.whole_blobs or seen.vtpm.tail_bytes is None
            case Ending.FAILED | Ending.INTERRUPTED:
                assert seen.qemu_lost is None
                assert (report.ending is Ending.INTERRUPTED) <= seen.interrupted
                if seen.guest is not None:
                    assert outcome not in ("granted", "handed-over")
                if is_loaded:
                    assert outcome == "go-on"
            case Ending.UNKNOWN:
                assert report.reason
    assert endings == set(Ending)


@pytest.mark.parametrize(
    ("outcome", "status", "ending", "said"),
    [
        ("handed-over", "completed", Ending.TAIL, None),
        ("granted", "completed", Ending.UNKNOWN, "was granted, but nothing was heard .* --ask"),
        ("go-on", "completed", Ending.FAILED, "has not taken the vTPM .* QEMU's cont"),
        (None, "completed", Ending.UNKNOWN, "does not say what became"),
        ("handed-over", "failed", Ending.UNKNOWN, "has not given the vTPM back"),
        ("granted", "cancelled", Ending.UNKNOWN, "was cancelled; .* not given the vTPM back"),
        ("go-on", "failed", Ending.FAILED, "the vTPM goes on here"),
        (None, "failed", Ending.UNKNOWN, "does not say that the vTPM goes on here"),
    ],
)
def test_verdict_on_a_tail(
    outcome: str | None, status: str, ending: Ending, said: str | None
) -> None:
    vtpm = Session(outcome=outcome, tail_bytes=96, phases_us={}, digests={})
    report = verdict(Seen(guest=Migration(status=MigrationState(status)), vtpm=vtpm))
    assert report.ending is ending
    assert report.reason is None if said is None else re.search(said, report.reason or "")


def test_progress_says_rounds_bytes_and_rates() -> None:
    active = Migration(
        status=MigrationState.ACTIVE,
        passes=2,
        ram_transferred_bytes=3 << 20,
        ram_remaining_bytes=1 << 20,
        dirty_pages_per_s=1234,
    )
    progress = Progress(guest=active, ram_rate_bytes=2 << 20)
    assert vtpm_text(progress) == "asking the destination"
    assert guest_text(progress) == (
        "active, pass 2, 3.0 MiB moved, 2.0 MiB/s, 1.0 MiB dirty, 1,234 pages/s dirtied"
    )
    armed = progress._replace(rounds=2, round_bytes=500, vtpm_bytes=12_500, vtpm_rate_bytes=5_000)
    assert vtpm_text(armed) == "round 2, 500 bytes, 12,500 in all, 5,000 bytes/s"
    assert vtpm_text(armed._replace(tail_bytes=96)).endswith(", tail 96 bytes")
    assert vtpm_text(armed._replace(whole_blobs=True)) == "all of it in QEMU's stream"
    assert guest_text(Progress()) == "not begun"


def test_a_stage_is_new_when_something_has_happened() -> None:
    """And not when a number has grown: then there is a line only now and then."""
    active = Migration(status=MigrationState.ACTIVE, passes=1)
    steps = [
        Progress(),
        Progress(rounds=1),
        Progress(rounds=1, guest=active),
        Progress(rounds=1, guest=Migration(status=MigrationState.ACTIVE, passes=2)),
        Progress(rounds=1, guest=COMPLETED),
        Progress(rounds=1, guest=COMPLETED, tail_bytes=96),
        Progress(rounds=1, guest=COMPLETED, whole_blobs=True),
    ]
    assert len({stage(step) for step in steps}) == len(steps)
    assert stage(steps[2]) == stage(steps[2]._replace(rounds=9, ram_rate_bytes=9, vtpm_bytes=9))


def test_rate_is_that_of_the_last_second() -> None:
    rate = Rate()
    assert rate.of(1000, 10.0) == 0
    assert rate.of(1500, 10.5) == 1000
    assert rate.of(2000, 11.0) == 1000
    assert [rate.of(2000, 11.0 + step / 2) for step in (1, 2, 3)] == [500, 0, 0]
