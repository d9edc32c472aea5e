"""The page of a state, and of a difference: what is on it, and that nothing in a state gets out.

In a real browser it is looked at by tests/system/test_page_in_a_browser.py.
"""

import os
import stat
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support import states
from tests.support.cli_run import Command, Run
from tests.support.documents import DOCS, tables
from tests.support.file_names import JOURNAL_NAME
from tests.support.page import Page
from tests.unit.test_cli_inspect import LINEAGE, SECRETS, VOLATILE_NAME
from tests.unit.test_cli_log import FIRST, put
from tests.unit.test_cli_records import FILES
from vtpmd.inspect.difference import PARTS, Change
from vtpmd.inspect.history import Commit
from vtpmd.inspect.html import difference, elements, glance, memory, timeline
from vtpmd.inspect.html.state import HAS_SECRETS, state_page
from vtpmd.inspect.html.style import STYLE
from vtpmd.inspect.overview import inspect, overview
from vtpmd.inspect.screen import is_told
from vtpmd.inspect.secrets import Secrets
from vtpmd.inspect.source import Source
from vtpmd.wire import swtpm_format
from vtpmd.wire.tpm import EPOCH_GENERATIONS, StateType, TpmVersion

MADE = "2026-01-01 00:00:00 UTC"
PAGE_BYTES_MAX = 16 << 20  # whatever is in a state
HOSTILE = (
    "</title></style></section></td><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    "<!-- ]]> &lt; &#60; javascript:alert(3) \0\n\r\x1b[31m\u202e\u2066\udcff\ufffe"
)
# What they are is looked up: no state has any others.
WORDS = ("kind", "tpm", "data", "der")
INVISIBLE = set("\0\n\r\x1b\u202e\u2066\udcff\ufffe") - {"\n"}
MIX = {StateType.PERMANENT: states.BUSY, StateType.VOLATILE: states.BUSY_VOLATILE}

Known = dict[str, Any]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return where the page is to be."""
    directory = tmp_path / "out"
    directory.mkdir()
    return directory / "page.html"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Give a directory of a TPM with some of everything."""
    path = tmp_path / "state"
    path.mkdir()
    (path / "tpm2-00.permall").write_bytes(swtpm_format.encode_file(states.BUSY, LINEAGE))
    (path / VOLATILE_NAME).write_bytes(swtpm_format.encode_file(states.BUSY_VOLATILE))
    return path


def known_of(
    content: dict[StateType, bytes], tpm: TpmVersion = TpmVersion.TPM_2_0, path: str = "state"
) -> Known:
    """Return what is known of states."""
    found = inspect(Source(path, "state", content, tpm))
    return overview(found, Secrets(found.parts))


def known_of_each() -> Iterator[tuple[str, Known]]:
    """Yield what is known of a TPM 2.0, and of a TPM 1.2."""
    yield "2.0", known_of(MIX)
    of_12 = {
        StateType.PERMANENT: states.BUSY_12,
        StateType.VOLATILE: states.BUSY_12_VOLATILE,
        StateType.SAVESTATE: states.BUSY_12_SAVED,
    }
    yield "1.2", known_of(of_12, TpmVersion.TPM_1_2)


@pytest.mark.parametrize("name", states.ALL)
def test_each_state_has_a_page_that_keeps_to_the_rules(
    name: str, tmp_path: Path, run: Command, out: Path
) -> None:
    path = tmp_path / "state"
    path.write_bytes(states.ALL[name][0])
    made = run("inspect", path, "--html", out)
    assert made.status == 0
    page = Page(out.read_bytes())
    assert made.output == (f"{out}: a page of {out.stat().st_size} bytes; open it with a browser\n")
    assert "decoded whole" in page.text


@pytest.mark.parametrize("kind", FILES)
def test_a_record_alone_has_a_page_of_what_it_says(
    kind: str, tmp_path: Path, run: Command, out: Path
) -> None:
    path = tmp_path / "record"
    path.write_bytes(FILES[kind])
    says = run("inspect", path, "--json").outcome["record"]["says"]
    assert run("inspect", path, "--html", out).status == 0
    page = Page(out.read_bytes())
    for name, value in says.items():
        assert name.replace("-", " ") in page.text
        if isinstance(value, str):
            assert value in page.text


@pytest.mark.parametrize("version", ["2.0", "1.2"])
def test_it_has_what_json_has(version: str) -> None:
    known = dict(known_of_each())[version]
    page = Page(state_page(known, None, MADE))
    for each in [*known["nv"]["indices"], *known["objects"]]:
        assert each["handle"] in page.text
        assert all(word in page.text for word in each["attributes"])
    for values in known["pcrs"]["values"].values():
        assert all(value in page.text for value in values.values() if is_told(value))
    assert "17 to 22ones" in page.text
    for name in known["hierarchies"] if known["tpm12"] is None else ():
        assert name in page.text
    for each in known["sessions"]:
        assert each["digest"] in page.text
    for state in known["states"].values():
        assert f"{state['bytes']:,}" in page.text
    assert MADE in page.text


def test_the_map_has_each_entry_in_its_place_to_scale() -> None:
    known = known_of(MIX)
    page = Page(state_page(known, None, MADE))
    cells = [each for each in page.having("cell") if "title" in each]
    entries = known["nv"]["entries"]
    assert [str(cell["title"]).partition(":")[0].partition(",")[0] for cell in cells] == [
        entry["what"] for entry in entries
    ]
    assert sum(entry["bytes"] for entry in entries) == known["nv"]["used-bytes"]
    at = 0
    for entry, piece in zip(entries, memory._pieces(known), strict=True):
        assert entry["offset"] == at
        at += entry["bytes"]
        signs = len("".join(memory._cell(piece, memory.SIGN_BYTES).itertext()))
        assert abs(signs - entry["bytes"] / memory.SIGN_BYTES) < 1
    ways = [str(cell["href"]).removeprefix("#") for cell in cells]
    rows = [each["id"] for each in page.named("tr") if "id" in each]
    assert set(ways) <= set(rows)
    assert {each["tabindex"] for each in page.having("scroll")} == {"0"}


def replaced(known: Any, text: Callable[[], str]) -> Any:
    """Return what is known with each text in it another one."""
    if isinstance(known, str):
        return text()
    if isinstance(known, list):
        return [replaced(each, text) for each in known]
    if isinstance(known, dict):
        return {
            name: value if name in WORDS else replaced(value, text) for name, value in known.items()
        }
    return known


def numbered(text: str) -> Callable[[], str]:
    """Return what makes texts, each another one: handles are."""
    numbers = count()
    return lambda: f"{text}{next(numbers)}"


@pytest.mark.parametrize("version", ["2.0", "1.2"])
def test_no_text_of_a_state_becomes_an_element(version: str) -> None:
    """Whatever is in a state: the page has the elements that it has for plain words, no others."""
    known = dict(known_of_each())[version]
    known["surprises"] = ["one"]
    fault = {"offset": 1, "part": "part", "what": "what", "newer": False}
    known["states"]["permanent"]["faults"] = [fault]
    commits = [Commit(7, 1, False, 512, 512, 1, [Change("nv", HOSTILE, HOSTILE)])]
    attacked, plain = (
        Page(state_page(replaced(known, numbered(text)), commits, MADE))
        for text in (HOSTILE, "x" * len(HOSTILE))
    )
    assert attacked.structure == plain.structure
    assert "<script>alert(1)</script>" in attacked.text
    assert set(attacked.text) & INVISIBLE == set()


@pytest.mark.parametrize("part", [*PARTS, "state", "other"])
def test_no_text_of_a_difference_becomes_an_element(part: str) -> None:
    known = known_of(MIX)
    attacked, plain = (
        Page(
            difference.difference_page(
                replaced(known, numbered(text)), known, [Change(part, text, text)], MADE
            )
        )
        for text in (HOSTILE, "x")
    )
    assert attacked.structure == plain.structure
    assert set(attacked.text) & INVISIBLE == set()


def test_no_name_of_a_directory_becomes_an_element(
    state: Path, tmp_path: Path, run: Command, out: Path
) -> None:
    """Also one that is no text."""
    renamed = tmp_path / os.fsdecode(b"<img src=x onerror=alert(1)>\"'&\xff\x1b\n")
    state.rename(renamed)
    assert run("inspect", renamed, "--html", out).status == 0
    page = Page(out.read_bytes())
    assert "<img src=x onerror=alert(1)>\"'&" + elements.NOT_PRINTABLE * 3 in page.text


def test_the_policy_lets_nothing_be_fetched_run_or_sent() -> None:
    page = Page(state_page(known_of(MIX), None, MADE))
    policy = dict(each.strip().partition(" ")[::2] for each in page.policy.split(";"))
    assert policy.pop("style-src").startswith("'sha256-")
    assert policy == dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")


def full(known: Known, n: int) -> Known:
    """Return what is known with as many of each thing as no state has, of any size."""
    nv = known["nv"]
    index = nv["indices"][0] | {"data": "3c" * 2048, "attributes": ["OWNERWRITE"] * 32}
    known["surprises"] = ["<" * 10_000] * n
    known["objects"] = [each | {"handle": f"{i:#x}"} for i in range(n) for each in known["objects"]]
    known["sessions"] *= n
    known["audit"]["commands"] = ["Clear"] * 500
    nv["bytes"], nv["used-bytes"] = 2**64 - 1, n * 2**32
    nv["indices"] = [index | {"handle": f"{number:#x}"} for number in range(n)]
    nv["entries"] = [
        {"what": f"{number:#x}", "offset": number << 32, "bytes": 2**32 - 1} for number in range(n)
    ]
    return known


@pytest.mark.parametrize("version", ["2.0", "1.2"])
def test_a_page_is_bounded_whatever_is_in_a_state(version: str) -> None:
    n = elements.ROWS_MAX + 100
    changes = [Change("nv", "x" * 100, "<" * 200)] * n
    commits = [Commit(i, None, False, 1, 1, 1, changes) for i in range(timeline.COMMITS_MAX)]
    content = state_page(full(dict(known_of_each())[version], n), commits, MADE)
    assert len(content) < PAGE_BYTES_MAX
    page = Page(content)
    n_tables = len(page.named("table"))
    assert len(page.named("tr")) <= n_tables * (elements.ROWS_MAX + 1)
    cells = [each for each in page.having("cell") if "title" in each]
    assert len(cells) == elements.ROWS_MAX
    assert f"and {n - elements.ROWS_MAX:,} more: --json" in page.text
    signs = page.text.count(elements.NO_BREAK)
    assert signs <= memory.MAP_SIGNS_MAX + 2 * elements.ROWS_MAX + 2 * memory.FREE_SIGNS
    assert f"and {n - timeline.CHANGES_MAX:,} more" in page.text
    assert f"and {n - glance.SURPRISES_MAX:,} more" in page.text


def test_the_stylesheet_has_what_the_code_names() -> None:
    assert f"calc(100% / {timeline.ROW_COMMITS})" in STYLE
    kinds = {*PARTS, *memory.WORDS, "state", "other", timeline.NOTHING}
    kinds |= {timeline.UNTOLD, timeline.RESTORED}
    assert [kind for kind in kinds if f".{kind} " not in STYLE and f".{kind}, " not in STYLE] == []


def test_the_document_has_each_limit() -> None:
    rows = tables((DOCS / "inspect.md").read_text())["Limits of a page"]
    limits = {
        name: value
        for module in (elements, glance, memory, timeline)
        for name, value in vars(module).items()
        if name.endswith("_MAX")
    }
    assert {row["limit"].strip("`"): int(row["value"]) for row in rows} == limits


def test_the_map_of_a_tpm_12_has_no_part_twice() -> None:
    known = dict(known_of_each())["1.2"]
    end = 0
    for entry in known["nv"]["entries"]:
        assert entry["offset"] >= end
        end = entry["offset"] + entry["bytes"]
    assert end <= known["nv"]["used-bytes"]


def test_a_long_text_is_cut() -> None:
    assert len(elements.shown("x" * 10_000)) == elements.TEXT_LENGTH_MAX


def page_of(run: Command, out: Path, *arguments: str | Path) -> tuple[Run, bytes]:
    """Make a page; return the run and what is on it."""
    made = run(*arguments, "--html", out)
    content = out.read_bytes()
    out.unlink()
    return made, content


def test_no_secret_is_on_a_page_unless_it_is_asked_for(
    state: Path, run: Command, out: Path
) -> None:
    closed, opened = (
        page_of(run, out, "inspect", state, *more) for more in ((), ("--show-secrets",))
    )
    for secret in SECRETS:
        assert secret.hex().encode() not in closed[1]
        assert secret not in closed[1]
    seed = known_of(MIX)["hierarchies"]["owner"]["seed"]
    assert (
        f"secret, {seed['bytes']} bytes, fingerprint {seed['fingerprint']}" in Page(closed[1]).text
    )
    assert (closed[0].error, HAS_SECRETS in Page(closed[1]).text) == ("", False)
    assert SECRETS[1].hex().encode() in opened[1]
    assert "who reads them can be this TPM" in opened[0].error
    assert HAS_SECRETS in Page(opened[1]).text


def test_a_directory_has_its_history(tmp_path: Path, run: Command, out: Path) -> None:
    put(tmp_path)
    log = run("log", tmp_path, "--json").outcome["commits"]
    _, content = page_of(run, out, "inspect", tmp_path)
    page = Page(content)
    rows = [each["id"] for each in page.named("tr") if str(each.get("id")).startswith("commit-")]
    assert len(rows) == len(log)
    signs = [each for each in page.named("a") if str(each.get("title")).startswith("generation ")]
    assert [each["title"] for each in signs] == [
        f"generation {commit['generation']}: hierarchy" for commit in log[1:]
    ]
    for change in log[-1]["changes"]:
        assert page.text.count(change["text"]) == len(log) - 1
    shown, content = page_of(run, out, "inspect", tmp_path, "--at", "6")
    assert shown.status == 0
    assert "this page6" in Page(content).text


def test_a_history_has_its_times(tmp_path: Path, run: Command, out: Path) -> None:
    put(tmp_path, times=[1_795_959_040_125, 1_795_959_041_000, 1_795_959_039_999])
    page = Page(page_of(run, out, "inspect", tmp_path)[1])
    times = ["2026-11-29T13:30:40Z", "2026-11-29T13:30:41Z", "2026-11-29T13:30:39Z"]
    signs = [each for each in page.named("a") if str(each.get("title")).startswith("generation ")]
    assert [str(each["title"]).partition(", ")[2] for each in signs] == [
        f"{time}: hierarchy" for time in times
    ]
    for time in times:
        assert page.text.count(time) == 1


def test_a_history_tells_of_a_restore_epoch_where_it_begins(
    tmp_path: Path, run: Command, out: Path
) -> None:
    """In words, as the log does, and with a sign of its own in the lanes: of that commit alone."""
    put(tmp_path, restored=2)
    (line,) = [line for line in run("log", tmp_path).lines if line.startswith("restore epoch 1: ")]
    page = Page(page_of(run, out, "inspect", tmp_path)[1])
    assert page.text.count(line) == 1
    assert page.text.index(line) > page.text.index(str(EPOCH_GENERATIONS + FIRST + 2))
    signs = [each for each in page.named("a") if str(each.get("title")).startswith("generation ")]
    assert [str(each["title"]).rpartition(": ")[2] for each in signs] == [
        *("hierarchy", "restored, hierarchy", "hierarchy")
    ]
    assert len([each for each in page.having("restored") if each["class"] == "kind restored"]) == 1


def test_where_an_epoch_began_is_not_told_of_what_a_page_has_no_room_for(
    tmp_path: Path, run: Command, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of that epoch, but was put back before."""
    monkeypatch.setattr(timeline, "COMMITS_MAX", 1)
    put(tmp_path, restored=2)
    page = Page(page_of(run, out, "inspect", tmp_path)[1])
    assert page.text.count("restore epoch 1: ") == 1
    assert page.having("restored") == []


def test_a_page_of_a_long_history_has_the_last_of_it(
    tmp_path: Path, run: Command, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "COMMITS_MAX", 2)
    put(tmp_path)
    page = Page(page_of(run, out, "inspect", tmp_path)[1])
    rows = [each for each in page.named("tr") if str(each.get("id")).startswith("commit-")]
    assert len(rows) == 2
    assert "The last 2 generations" in page.text


def test_a_file_alone_has_no_history(state: Path, run: Command, out: Path) -> None:
    page = Page(page_of(run, out, "inspect", state / VOLATILE_NAME)[1])
    assert "history" not in [each.get("id") for each in page.named("section")]


def test_what_is_damaged_is_on_the_page(tmp_path: Path, run: Command, out: Path) -> None:
    journal = put(tmp_path)
    journal[600] ^= 1
    (tmp_path / JOURNAL_NAME).write_bytes(journal)
    made, content = page_of(run, out, "inspect", tmp_path)
    assert made.status == 5
    assert "tpm2-00.journal is damaged" in Page(content).text
    path = tmp_path / "cut"
    path.write_bytes(states.LEVEL_1[:700])
    made, content = page_of(run, out, "inspect", path)
    assert made.status == 5
    fault = "platform-seed has 66 bytes, and 38 are left"
    assert Page(content).text.count(fault) == 2  # as a surprise, and in its place


def test_a_difference_has_each_line_of_the_text(tmp_path: Path, run: Command, out: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path, content in zip(paths, (states.LEVEL_1, states.BUSY), strict=True):
        path.write_bytes(content)
    told = run("diff", *paths)
    made, content = page_of(run, out, "diff", *paths)
    assert (told.status, made.status) == (11, 11)
    page = Page(content)
    assert all(line in page.text for line in told.lines)
    assert len(page.named("tr")) == len(told.lines) + 3 + _parts(run, paths)
    same, content = page_of(run, out, "diff", paths[0], paths[0])
    assert same.status == 0
    assert "Nothing differs." in Page(content).text


def test_a_difference_tells_that_an_older_state_was_put_back(
    tmp_path: Path, run: Command, out: Path
) -> None:
    """Also where nothing differs; not of two vTPMs, or within an epoch."""
    generations = {"a": 7, "b": EPOCH_GENERATIONS + 7, "c": EPOCH_GENERATIONS + 9, "other": 7}
    for name, generation in generations.items():
        identity = b"another vTPM's i" if name == "other" else LINEAGE.identity
        lineage = LINEAGE._replace(identity=identity, generation=generation)
        (tmp_path / name).write_bytes(swtpm_format.encode_file(states.BUSY, lineage))
    for first, second in [("a", "b"), ("b", "a"), ("b", "c"), ("other", "b")]:
        paths = tmp_path / first, tmp_path / second
        told = [line for line in run("diff", *paths).lines if "restore epoch" in line]
        assert len(told) == ((first, second) in [("a", "b"), ("b", "a")])
        epochs = [int(generations[name] > EPOCH_GENERATIONS) for name in (first, second)]
        assert run("diff", *paths, "--json").outcome["restore-epochs"] == epochs
        page = Page(page_of(run, out, "diff", *paths)[1])
        assert [page.text.count(line) for line in told] == [1] * len(told)
        assert ("restore epoch" in page.text) == bool(told)


def _parts(run: Command, paths: list[Path]) -> int:
    """Return how many parts differ: each has a table, whose head is a row."""
    return len({each["part"] for each in run("diff", *paths, "--json").outcome["changes"]})


def test_each_part_of_a_difference_has_a_title() -> None:
    assert set(difference.TITLES) == {*PARTS, "state", "other"}


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_a_file_is_made_anew_and_never_replaced(
    command: str, state: Path, run: Command, out: Path
) -> None:
    arguments = [state] if command == "inspect" else [state, state]
    assert run(command, *arguments, "--html", out).status == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    made = out.read_bytes()
    again = run(command, *arguments, "--html", out)
    assert (again.status, again.output) == (2, "")
    assert again.error == f"vtpmd: {out} is there already: give another name, or remove it\n"
    assert out.read_bytes() == made
    # It is said before anything else is done, as reading a key that is removed then.
    missing = [each.with_name("missing") for each in arguments]
    assert run(command, *missing, "--html", out).error == again.error
    link = out.with_name("link")
    link.symlink_to(out.with_name("nothing"))
    assert run(command, *arguments, "--html", link).status == 2
    assert sorted(each.name for each in out.parent.iterdir()) == ["link", out.name]


@pytest.mark.parametrize("more", ["--section=user-nvram", "--json", "--tree"])
def test_a_page_is_one_way_to_show(
    more: str, state: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = Run(capsys, "inspect", state, "--html", out, more).status
    except SystemExit as met:
        status = int(met.code or 0)
    assert (status, out.exists()) == (2, False)
