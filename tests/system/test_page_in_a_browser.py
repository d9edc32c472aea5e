"""The pages of `vtpmd inspect` and `vtpmd diff` in a real browser: Debian's Chromium.

They fetch and run nothing, whatever is in a state; they fit a laptop and a phone, in light and
dark; all on them is reached by the keyboard.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.browser import Browser
from tests.support import states
from tests.unit.test_inspect_html import HOSTILE, MADE, MIX, known_of, numbered, replaced
from vtpmd.inspect.difference import Change
from vtpmd.inspect.history import Commit
from vtpmd.inspect.html.difference import difference_page
from vtpmd.inspect.html.state import state_page
from vtpmd.wire.tpm import EPOCH_GENERATIONS, StateType, TpmVersion

SCREENS = {"laptop": (1366, 768), "phone": (390, 844)}
CONTRAST_MIN = 4.5  # WCAG 2.1, 1.4.3
TAB, ENTER = ("Tab", 9), ("Enter", 13)
PUT_BACK = (
    "A is of restore epoch 0, B of 1: an older state was put back between them, by an import or by "
    "a snapshot that QEMU loaded"
)
TABS_MAX = 180  # more than there are places on the page
# Of each element with a text of its own: the contrast with what is behind it, if it is too little.
CONTRASTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = colour => {
    const [r, g, b] = [...rgba(colour)].slice(0, 3).map(each => {
      const part = each / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = node => {
    const colour = getComputedStyle(node).backgroundColor;
    return rgba(colour)[3] === 255 || !node.parentElement ? colour : behind(node.parentElement);
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    if (![...node.childNodes].some(each => each.nodeType === 3 && each.data.trim())) continue;
    const pair = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    found.push([contrast, node.tagName + "." + node.className + ": " + node.textContent]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as chromium:
        yield chromium


def commits(text: str) -> list[Commit]:
    """Return a history of some length, in which an older state was put back."""
    changes = [[Change(part, text, text)] for part in ("nv", "object", "lockout", "other")]
    epochs = [n // 60 * EPOCH_GENERATIONS for n in range(100)]
    return [Commit(7, None, True, None, 0, 5000, None)] + [
        Commit(8 + n + epoch, n * 60_000, False, 512, 512, 5000, changes[n % len(changes)])
        for n, epoch in enumerate(epochs)
    ]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give pages of all kinds."""
    known, attacked = known_of(MIX), known_of(MIX)
    known["surprises"] = ["the TPM is in failure mode"]
    volatile, saved = states.BUSY_12_VOLATILE, states.BUSY_12_SAVED
    of_12 = {
        StateType.PERMANENT: states.BUSY_12,
        StateType.VOLATILE: volatile,
        StateType.SAVESTATE: saved,
    }
    attacked = replaced(attacked, numbered(HOSTILE))
    changes = [Change("pcr", "7 sha256", f"PCR 7 sha256 extended: {'7' * 64}")]
    contents = {
        "state": state_page(known, commits("NV 0x01000000 written"), MADE, has_secrets=True),
        "1.2": state_page(known_of(of_12, TpmVersion.TPM_1_2), None, MADE),
        "difference": difference_page(known, known, changes, MADE, PUT_BACK),
        "attack": state_page(attacked, commits(HOSTILE), MADE),
    }
    directory = tmp_path_factory.mktemp("pages")
    paths = {name: directory / f"{name}.html" for name in contents}
    for name, path in paths.items():
        path.write_bytes(contents[name])
    return paths


KINDS = ("state", "1.2", "difference", "attack")


def logged(chromium: Browser) -> list[str]:
    """Return what the browser complains of."""
    return [event["entry"]["text"] for event in chromium.seen("Log.entryAdded")]


def asked_for(chromium: Browser) -> list[str]:
    """Return what was fetched, or tried."""
    return [event["request"]["url"] for event in chromium.seen("Network.requestWillBeSent")]


@pytest.mark.parametrize("kind", KINDS)
def test_it_fetches_and_runs_nothing(kind: str, chromium: Browser, pages: dict[str, Path]) -> None:
    page = pages[kind]
    chromium.open(page, is_dark=False)
    assert asked_for(chromium) == [page.as_uri()]
    assert logged(chromium) == []
    assert chromium.seen("Page.javascriptDialogOpening") == []
    assert chromium.evaluate("document.scripts.length + document.images.length") == 0
    assert chromium.evaluate("document.querySelector('h1').childElementCount") == 0


def test_the_policy_holds_where_something_got_in(
    chromium: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    """What no state can do: the browser refuses it nevertheless."""
    attack = (
        b"<script>document.title = 'it ran'</script><img src='nothing.png'>"
        b"<p id=styled style='color: rgb(1, 2, 3)'>styled</p><style>p { color: red }</style>"
        b"<iframe src='other.html'></iframe><link rel=stylesheet href='other.css'></body>"
    )
    page = tmp_path / "page.html"
    page.write_bytes(pages["state"].read_bytes().replace(b"</body>", attack))
    chromium.open(page, is_dark=False)
    assert chromium.evaluate("document.title") != "it ran"
    colour = "getComputedStyle(document.getElementById('styled')).color"
    assert chromium.evaluate(colour) not in ("rgb(1, 2, 3)", "rgb(255, 0, 0)")
    refused = [line for line in logged(chromium) if "Content Security Policy" in line]
    assert len(refused) >= 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("screen", SCREENS)
def test_it_fits_the_screen(
    screen: str, kind: str, chromium: Browser, pages: dict[str, Path]
) -> None:
    width, height = SCREENS[screen]
    chromium.open(pages[kind], width=width, height=height, is_dark=False)
    assert chromium.evaluate("innerWidth") == width
    assert chromium.evaluate("document.scrollingElement.scrollWidth") == width


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_each_text_can_be_read(
    is_dark: bool, kind: str, chromium: Browser, pages: dict[str, Path]
) -> None:
    chromium.open(pages[kind], is_dark=is_dark)
    background = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(18, 20, 23)") == is_dark
    found = chromium.evaluate(CONTRASTS)
    assert len(found) > 20
    assert [each for each in found if each[0] < CONTRAST_MIN] == []


def focused(chromium: Browser, what: str) -> str:
    """Return what is known of the element that has the focus."""
    return str(chromium.evaluate(f"document.activeElement.{what}"))


def test_the_keyboard_reaches_all_of_it(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["state"], is_dark=False)
    chromium.press(*TAB)
    assert focused(chromium, "className") == "skip"
    assert chromium.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    chromium.press(*ENTER)
    assert focused(chromium, "id") == "main"
    chromium.evaluate("document.activeElement.blur()")
    places = (
        "[...document.querySelectorAll('a.cell, summary, .scroll, .lanes a')]"
        ".filter(each => !each.seen).length"
    )
    assert chromium.evaluate(places) > 100
    for _ in range(TABS_MAX):
        chromium.press(*TAB)
        chromium.evaluate("document.activeElement.seen = true")
        assert chromium.evaluate(
            "document.activeElement === document.body ||"
            " getComputedStyle(document.activeElement).outlineWidth === '3px'"
        )
    assert chromium.evaluate(places) == 0


def test_a_place_on_the_map_leads_to_what_lies_there(
    chromium: Browser, pages: dict[str, Path]
) -> None:
    chromium.open(pages["state"], is_dark=False)
    chromium.evaluate("document.querySelectorAll('a.cell')[1].focus()")
    chromium.press(*ENTER)
    assert chromium.evaluate("location.hash") == "#nv-0x01000001"
    assert chromium.evaluate("document.querySelector('tr:target th').textContent") == "0x01000001"
    chromium.evaluate("document.querySelector('tr:target summary').focus()")
    chromium.press(*ENTER)
    assert chromium.evaluate("document.querySelector('tr:target details').open")
