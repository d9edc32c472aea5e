"""The tables of docs/management.md say what the code does."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from vtpmd.daemon import management as server
from vtpmd.daemon import qmp
from vtpmd.daemon.listener import listen
from vtpmd.daemon.qemu import Following
from vtpmd.daemon.qemu_events import MigrationState
from vtpmd.wire import management as wire

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "management.md").read_text()
CONSTANT = re.compile(r"[A-Z]+(_[A-Z]+)+")


def table(title: str) -> list[list[str]]:
    """Return the rows of the first table after a line that ends with a title, without its head."""
    _, _, rest = TEXT.partition(f"{title}\n")
    rows = re.findall(r"^\|(.*)\|$", rest.partition("|\n\n")[0] + "|", re.MULTILINE)
    return [[cell.strip(" `") for cell in row.split("|")] for row in rows[2:]]


def limits(*modules: ModuleType) -> dict[str, str]:
    """Return the numbers that modules name."""
    return {
        name: str(value)
        for module in modules
        for name, value in vars(module).items()
        if CONSTANT.fullmatch(name) and isinstance(value, int | float)
    }


@pytest.mark.parametrize(
    ("title", "modules"), [("### Limits", (wire, server)), ("Of QEMU's monitor:", (qmp,))]
)
def test_limits(title: str, modules: tuple[ModuleType, ...]) -> None:
    imported = {"PATH_BYTES_MAX"}
    in_code = {name: value for name, value in limits(*modules).items() if name not in imported}
    assert {name: value for name, value, _ in table(title)} == in_code


def test_states() -> None:
    assert table("### States") == [
        [state.name, sent.__name__, after.name] for (state, sent), after in wire.TRANSITIONS.items()
    ]


def test_error_classes() -> None:
    assert [row[0] for row in table("### Errors")] == list(wire.ErrorClass)


def test_commands_that_every_daemon_has(tmp_path: Path) -> None:
    written = {name: arguments for name, arguments, _ in table("## Commands")}
    with listen(tmp_path / "m") as listening:
        commands = server.ManagementServer(listening, on_quit=lambda: None)._commands
    assert dict.fromkeys(commands, "").items() <= written.items()
    assert wire.NEGOTIATE in written


def test_how_qemu_is_followed() -> None:
    assert table("### How QEMU is followed") == [
        [each.name.lower().replace("_", "-"), each.value] for each in Following
    ]


def test_phases_of_a_migration() -> None:
    rows = table("in these states of a migration:")
    (_, any_other) = rows.pop()
    written = {word: phase for words, phase in rows for word in re.findall(r"[a-z-]+", words)}
    assert set(written) < set(MigrationState)
    assert {state: written.get(state, any_other) for state in MigrationState} == {
        state: state.phase.name for state in MigrationState
    }


def test_events_of_qemu() -> None:
    data = {"status": "active"}
    events = [(name, field) for name, field, _ in table("and so is a malformed one:")]
    for name, field in events:
        assert qmp._event({"event": name, "data": {field: data.get(field)}}) is not None
        # A field that is named is needed.
        assert (qmp._event({"event": name}) is None) == bool(field)
    assert len(events) == 4
