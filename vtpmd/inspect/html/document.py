"""The page around its parts: its head, the policy that it is under, and the way to each part.

The policy lets nothing be fetched, run or sent, and takes no style but the page's own, by its
digest: neither what is in a state nor who opens the page can make it do more than be read.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Final
from xml.etree.ElementTree import Element

from vtpmd.inspect.html.elements import MAP, element, written
from vtpmd.inspect.html.style import STYLE

DOCTYPE: Final = "<!DOCTYPE html>\n"
STYLE_DIGEST: Final = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{STYLE_DIGEST}'; base-uri 'none'; form-action 'none'"
)
MAIN: Final = "main"
BROKEN: Final = ("head", "body", "main", "div", "section", "table", "tbody", "dl", "ul", "ol")


def document(
    title: str, lead: str, parts: Sequence[Element], made: str, warnings: Sequence[str] = ()
) -> bytes:
    """Return a page: its title, a line on what it is of, its parts; and when it was made."""
    header = element(
        "header",
        element("p", "vtpmd", class_="brand"),
        element("h1", title),
        element("p", lead, class_="lead"),
        *(element("p", warning, class_="alert") for warning in warnings),
    )
    body = element(
        "body",
        element("a", "Skip to the content", class_="skip", href=f"#{MAIN}"),
        header,
        element(
            "div",
            _ways(parts),
            element("main", *parts, id=MAIN, tabindex=-1),
            class_="columns",
        ),
        element("footer", element("p", f"made at {made}")),
    )
    page = element("html", _head(title), body, lang="en")
    _break_lines(page)
    return (DOCTYPE + written(page) + "\n").encode()


def _head(title: str) -> Element:
    style = Element("style")
    style.text = STYLE  # the one text that is no text: nothing of a state is in it
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} - vtpmd"),
        style,
    )


def _ways(parts: Sequence[Element]) -> Element:
    """Return references to the parts."""
    items = [
        element("li", element("a", "".join(each[0].itertext()), href=f"#{each.get('id')}"))
        for each in parts
    ]
    return element("nav", element("ul", *items), aria_label="parts of this page")


def _break_lines(page: Element) -> None:
    """Put line ends where they are not seen: a page is read by people who look at its source."""
    for each in page.iter():
        if each.tag in BROKEN and each.get("class") != MAP:
            each.text = (each.text or "") + "\n"
            for child in each:
                child.tail = (child.tail or "") + "\n"
