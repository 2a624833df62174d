"""A real browser for tests, by the WebDriver protocol (https://www.w3.org/TR/webdriver2/) of Debian's chromedriver."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MISSING = next((name for name in ("chromium", "chromedriver") if shutil.which(name) is None), None)
"""The program that is not there."""


class Browser:
    """One window. Pages are files of this machine."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self._url}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path, *, width: int, dark: bool = False) -> None:
        """Show a page in a window `width` pixels wide."""
        self._devtools(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._devtools("Emulation.setEmulatedMedia", {"features": scheme})
        self.ask("POST", "/url", {"url": page.absolute().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, key: str) -> None:
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})

    def messages(self) -> list[str]:
        """What the console has said since it was last asked."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]

    def _devtools(self, command: str, parameters: dict[str, Any]) -> None:
        self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser whose profile lies in `folder`; it ends with the block."""
    driver = subprocess.Popen(
        [shutil.which("chromedriver") or "", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        said = next(found for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        options = {
            "binary": shutil.which("chromium"),
            "args": [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--user-data-dir={folder}",
            ],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        top = Browser(f"http://127.0.0.1:{said[1]}")
        made = top.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        window = Browser(f"http://127.0.0.1:{said[1]}/session/{made['sessionId']}")
        try:
            yield window
        finally:
            window.ask("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(30)
        if driver.stdout is not None:
            driver.stdout.close()
