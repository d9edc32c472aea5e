"""Debian's Chromium, which opens a page and is asked what it has made of it.

It is spoken to in its DevTools protocol: JSON messages that end with a zero byte, over two pipes.
https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

from vtpmd.closing import Closing

PROGRAM: Final = "chromium-headless-shell"
TIMEOUT_S: Final = 60
READ_BYTES: Final = 1 << 16
# --remote-debugging-pipe reads and writes these.
COMMANDS_FD, ANSWERS_FD = 3, 4


class Browser(Closing):
    """A browser with one page, which nobody sees."""

    def __init__(self, directory: Path) -> None:
        """Start it; ``directory`` is for what it keeps."""
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        options = [
            "--disable-gpu",
            "--disable-background-networking",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={directory}",
            # Its sandbox is not for root.
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]
        moved = f'exec {PROGRAM} "$@" {COMMANDS_FD}<&{commands} {ANSWERS_FD}>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "bash", *options, "about:blank"],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._read = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        self._attach()

    def close(self) -> None:
        """End it."""
        try:
            self._session = None
            self.ask("Browser.close")
            self._process.wait(TIMEOUT_S)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._commands)
            os.close(self._answers)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Do something, and return what it answers; events before that are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path, *, width: int = 1366, height: int = 768, is_dark: bool) -> None:
        """Open a file, as it is seen on such a screen, in such a scheme."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        """Return what an expression of JavaScript is in the page, which itself may run none."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press a key."""
        for kind in ("rawKeyDown", "keyUp"):
            text = {"text": "\r"} if kind == "rawKeyDown" and key == "Enter" else {}
            what = "keyDown" if text else kind
            self.ask(
                "Input.dispatchKeyEvent",
                type=what,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **text,
            )

    def picture(self) -> bytes:
        """Return what is seen, as a PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot")["data"])

    def seen(self, method: str) -> list[dict[str, Any]]:
        """Return the events of a method since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == method]

    def _attach(self) -> None:
        targets = self.ask("Target.getTargets")["targetInfos"]
        (page, *_) = [each["targetId"] for each in targets if each["type"] == "page"]
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    def _next(self) -> dict[str, Any]:
        """Return the next message; the test's own time limit is its limit."""
        while b"\0" not in self._read:
            read = os.read(self._answers, READ_BYTES)
            assert read, "the browser has ended"
            self._read += read
        message, _, self._read = self._read.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found
