"""A page as a parser has it, held against what every page of ours is to keep to."""

import base64
import hashlib
from html.parser import HTMLParser
from typing import Final

VOID: Final = {"meta", "br", "img", "link", "input", "hr"}
# What these name is fetched, run or sent.
FETCHING: Final = {"src", "srcset", "action", "data", "poster", "background", "manifest", "style"}
REFERRING: Final = ("href", "aria-labelledby")

Attributes = dict[str, str | None]


class Page(HTMLParser):
    """What is in a page. Whatever breaks a rule is an AssertionError."""

    def __init__(self, content: bytes) -> None:
        """Take it apart."""
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, Attributes]] = []
        self.texts: list[str] = []
        self.doctype = ""
        self._open: list[str] = []
        text = content.decode()
        self.feed(text)
        self.close()
        assert self._open == []
        assert self.doctype == "DOCTYPE html"
        self._check_references()

    @property
    def structure(self) -> list[tuple[str, list[str]]]:
        """Which elements there are, in their order, with which attributes."""
        return [(name, list(attributes)) for name, attributes in self.elements]

    @property
    def text(self) -> str:
        """All that is to be read."""
        return "".join(self.texts)

    def having(self, class_: str) -> list[Attributes]:
        """Return the attributes of the elements of a class."""
        return [each for _, each in self.elements if class_ in (each.get("class") or "").split()]

    def named(self, *names: str) -> list[Attributes]:
        """Return the attributes of the elements of these names."""
        return [each for name, each in self.elements if name in names]

    def handle_decl(self, decl: str) -> None:
        assert not self.elements
        self.doctype = decl

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute twice: {tag}"
        assert not FETCHING & set(names), f"it fetches: {tag} {names}"
        assert not any(name.startswith("on") for name in names), f"it runs: {tag} {names}"
        assert tag not in ("script", "link", "iframe", "img", "object", "base", "form"), tag
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self._check_style(data)
        else:
            self.texts.append(data)

    def _check_style(self, style: str) -> None:
        """It is the page's own, which its policy names, and fetches nothing."""
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert f"style-src 'sha256-{digest}'" in self.policy
        assert "url(" not in style
        assert "@import" not in style

    @property
    def policy(self) -> str:
        """What the page says may be fetched and run."""
        (policy,) = [
            each["content"] or ""
            for each in self.named("meta")
            if each.get("http-equiv") == "Content-Security-Policy"
        ]
        return policy

    def _check_references(self) -> None:
        """Each is to one element of this page."""
        ids = [each["id"] for _, each in self.elements if "id" in each]
        assert len(set(ids)) == len(ids)
        for _, attributes in self.elements:
            href = attributes.get("href")
            assert href is None or href.startswith("#")
            for name in REFERRING:
                place = attributes.get(name)
                assert place is None or place.removeprefix("#") in ids
