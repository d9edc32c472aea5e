"""`vtpmd verify`: each way in which a state is not right, told apart by its exit status.

libtpms is asked by the real engine.
"""

from pathlib import Path
from struct import pack

import pytest

from tests.support import states
from tests.support.cli_run import Command, Run
from tests.support.documents import DOCS, tables
from tests.support.file_names import JOURNAL_NAME, PERMANENT_NAME
from tests.support.journal import write_journal
from vtpmd.inspect.layouts import USER_NVRAM
from vtpmd.inspect.screen import RECORDS
from vtpmd.inspect.verification import Check, Finding, Verdict, verdict
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage

VOLATILE_NAME = "tpm2-00.volatilestate"
IDENTITY = b"i" * 16
KEY, IV = b"k" * 32, b"v" * 32
NEWER = states.LEVEL_1.replace(
    pack(">HIH", 2, USER_NVRAM.magic, 1), pack(">HIH", 9, USER_NVRAM.magic, 8)
)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command; each time what it was given is as it was."""

    def run(path: Path, *options: str) -> Run:
        files = [path] if path.is_file() else sorted(path.iterdir())
        before = [file.read_bytes() for file in files]
        result = Run(capsys, "verify", path, *options)
        files = [path] if path.is_file() else sorted(path.iterdir())
        assert [file.read_bytes() for file in files] == before
        return result

    return run


def directory(path: Path, permanent: bytes, volatile: bytes | None = None) -> Path:
    """Make a state directory."""
    (path / PERMANENT_NAME).write_bytes(swtpm_format.encode_file(permanent))
    if volatile is not None:
        (path / VOLATILE_NAME).write_bytes(swtpm_format.encode_file(volatile))
    return path


def findings(run: Run) -> dict[str, str]:
    """Return what each check has found, of --json."""
    return {check["name"]: check["finding"] for check in run.outcome["checks"]}


def test_a_right_directory(tmp_path: Path, run: Command) -> None:
    found = run(directory(tmp_path, states.BUSY, states.BUSY_VOLATILE), "--json")
    assert (found.status, found.outcome["verdict"]) == (0, "fine")
    assert findings(found) == dict.fromkeys(
        ("container", "permanent state", "volatile state", "libtpms"), "passed"
    )


def test_a_right_directory_of_a_tpm_12(tmp_path: Path, run: Command) -> None:
    for state, name in ((states.BUSY_12, "permall"), (states.BUSY_12_VOLATILE, "volatilestate")):
        (tmp_path / f"tpm-00.{name}").write_bytes(swtpm_format.encode_file(state))
    found = run(tmp_path, "--json")
    assert (found.status, found.outcome["tpm"]) == (0, "1.2")
    assert findings(found) == dict.fromkeys(
        ("container", "permanent state", "volatile state", "libtpms"), "passed"
    )
    altered = bytearray(states.BUSY_12)
    altered[100] ^= 1
    (tmp_path / "tpm-00.permall").write_bytes(swtpm_format.encode_file(bytes(altered)))
    found = run(tmp_path, "--json")
    assert found.status == 5
    assert findings(found)["permanent state"] == findings(found)["libtpms"] == "failed"


def test_a_volatile_state_alone_is_decoded_and_libtpms_not_asked(
    tmp_path: Path, run: Command
) -> None:
    path = tmp_path / "state"
    path.write_bytes(states.BUSY_VOLATILE)
    found = run(path, "--json")
    assert (found.status, findings(found)["libtpms"]) == (0, "skipped")


def test_a_damaged_state(tmp_path: Path, run: Command) -> None:
    found = run(directory(tmp_path, states.damaged(states.LEVEL_1)), "--json")
    assert (found.status, found.outcome["verdict"]) == (5, "damaged")
    assert findings(found)["permanent state"] == findings(found)["libtpms"] == "failed"


def test_what_only_libtpms_finds_wrong(tmp_path: Path, run: Command) -> None:
    """The volatile state of another TPM, which is right in itself."""
    found = run(directory(tmp_path, states.LEVEL_1, states.BUSY_VOLATILE), "--json")
    assert found.status == 5
    failed = [name for name, finding in findings(found).items() if finding == "failed"]
    assert failed == ["libtpms"]


def test_an_altered_value_is_found_by_the_checksum(tmp_path: Path, run: Command) -> None:
    at = len(states.BUSY_VOLATILE) - 40
    altered = bytearray(states.BUSY_VOLATILE)
    altered[at] ^= 1
    found = run(directory(tmp_path, states.BUSY, bytes(altered)))
    assert found.status == 5
    assert "its checksum is not that of its bytes" in found.output


@pytest.mark.parametrize("at", [600, 1100])
def test_a_damaged_journal(at: int, tmp_path: Path, run: Command) -> None:
    images = states.different(3)
    continued = Lineage(IDENTITY, 1, continued=True)
    (tmp_path / PERMANENT_NAME).write_bytes(swtpm_format.encode_file(images[0], continued))
    journal = write_journal(images, identity=IDENTITY)
    (tmp_path / JOURNAL_NAME).write_bytes(journal)
    right = run(tmp_path, "--json")
    assert right.status == 0
    assert right.outcome["checks"][0]["what"] == (
        "it is whole, and 2 commits of its journal follow each other"
    )
    journal[at] ^= 1
    (tmp_path / JOURNAL_NAME).write_bytes(journal)
    found = run(tmp_path, "--json")
    assert (found.status, findings(found)["container"]) == (5, "failed")


def test_a_missing_journal(tmp_path: Path, run: Command) -> None:
    continued = Lineage(IDENTITY, 1, continued=True)
    (tmp_path / PERMANENT_NAME).write_bytes(swtpm_format.encode_file(states.LEVEL_1, continued))
    assert run(tmp_path).status == 5
    assert run(tmp_path / PERMANENT_NAME).status == 5


@pytest.mark.parametrize("state", [states.LATER, NEWER])
def test_a_state_of_a_later_libtpms(state: bytes, tmp_path: Path, run: Command) -> None:
    found = run(directory(tmp_path, state), "--json")
    assert (found.status, found.outcome["verdict"]) == (8, "newer")
    assert findings(found)["libtpms"] == "newer"


def test_an_encrypted_state(tmp_path: Path, run: Command) -> None:
    path = tmp_path / "state"
    path.write_bytes(swtpm_format.encode_file(states.LEVEL_1, key=KEY, iv=IV))
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_bytes(KEY.hex().encode())
    wrong.write_bytes((b"x" * 32).hex().encode())
    for key in (right, wrong):
        key.chmod(0o600)
    option = "mode=aes-256-cbc"
    assert run(path).status == 4
    assert run(path, "--key", f"file={wrong},{option}").status == 4
    assert run(path, "--key", f"file={right},{option}").status == 0


def test_what_is_none_of_ours(tmp_path: Path, run: Command) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"QEVM" + bytes(500))
    assert run(path).status == 9
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(empty).status == 9


def test_the_document_has_each_check(tmp_path: Path, run: Command) -> None:
    rows = tables((DOCS / "inspect.md").read_text())["The checks"]
    documented = {name.strip(" `") for row in rows for name in row["check"].split(",")}
    found = run(directory(tmp_path, states.BUSY, states.BUSY_VOLATILE), "--json")
    assert documented == {
        *findings(found),
        "savestate state",
        *(name.replace("-", " ") for name in RECORDS),
    }
    assert set(found.outcome) == {"path", "kind", "tpm", "verdict", "checks"}


@pytest.mark.parametrize(
    ("others", "last", "expected"),
    [
        (Finding.PASSED, Finding.PASSED, Verdict.FINE),
        (Finding.PASSED, Finding.SKIPPED, Verdict.FINE),
        (Finding.NEWER, Finding.PASSED, Verdict.FINE),
        (Finding.NEWER, Finding.NEWER, Verdict.NEWER),
        (Finding.NEWER, Finding.SKIPPED, Verdict.NEWER),
        (Finding.FAILED, Finding.NEWER, Verdict.DAMAGED),
        (Finding.FAILED, Finding.PASSED, Verdict.DAMAGED),
        (Finding.PASSED, Finding.FAILED, Verdict.DAMAGED),
    ],
)
def test_the_verdict(others: Finding, last: Finding, expected: Verdict) -> None:
    assert verdict([Check("others", others, ""), Check("libtpms", last, "")]) is expected
