"""A real headless Chromium, spoken to as the W3C WebDriver protocol says: a few requests, for which no library is needed."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def missing() -> str:
    """Why there is no browser here; empty where there is one."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)} here (Debian: apt-get install chromium chromium-driver)" if absent else ""


class Browser:
    """One window."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.session = ""

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A WebDriver command and its value."""
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(
            f"{self.root}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def command(self, method: str, path: str, **body: Any) -> Any:
        """A command of this session."""
        return self.call(method, f"/session/{self.session}{path}", body)

    def open(self, page: Path) -> None:
        """Load a file."""
        self.command("POST", "/url", url=page.resolve().as_uri())

    def js(self, script: str, *arguments: Any) -> Any:
        """The value of `return …` in the page."""
        return self.command("POST", "/execute/sync", script=script, args=list(arguments))

    def wait(self, script: str, seconds: float = 20) -> Any:
        """The value of a script once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.js(script)):
            assert time.monotonic() < end, f"still not true: {script}"
            time.sleep(0.1)
        return value

    def element(self, selector: str) -> str:
        """The id of an element."""
        return next(iter(self.command("POST", "/element", using="css selector", value=selector).values()))

    def click(self, selector: str) -> None:
        """A real click into the middle of an element."""
        self.command("POST", f"/element/{self.element(selector)}/click")

    def keys(self, selector: str, text: str) -> None:
        """Real keys, sent to an element."""
        self.command("POST", f"/element/{self.element(selector)}/value", text=text)

    def click_at(self, x: float, y: float) -> None:
        """A real click at a place of the window."""
        point = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
        steps = [point, {"type": "pause", "duration": 300}, {"type": "pointerDown", "button": 0}]
        steps += [{"type": "pointerUp", "button": 0}]
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        self.command("POST", "/actions", actions=[pointer])

    def size(self, width: int, height: int) -> None:
        """Of the page."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)

    def dark(self, on: bool) -> None:
        """What the page is told about the user's taste."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def devtools(self, method: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self.command("POST", "/goog/cdp/execute", cmd=method, params=parameters)

    def picture(self, file: Path) -> None:
        """What is seen, as a PNG."""
        file.write_bytes(base64.b64decode(self.command("GET", "/screenshot")))

    def said(self) -> list[str]:
        """What the console holds: errors, and whatever the security policy refused."""
        return [entry["message"] for entry in self.command("POST", "/se/log", type="browser")]

    def requested(self) -> list[str]:
        """Addresses of everything that the page asked for, as Chromium's network layer saw it."""
        found = []
        for entry in self.command("POST", "/se/log", type="performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A window with a new profile in `folder`; it and its driver end with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    window = Browser(port)
    try:
        end = time.monotonic() + 20
        while True:
            try:
                if window.call("GET", "/status")["ready"]:
                    break
            except OSError:
                assert time.monotonic() < end, "chromedriver does not answer"
                time.sleep(0.1)
        options = {"args": [*FLAGS, f"--user-data-dir={folder}", "about:blank"], "binary": shutil.which("chromium")}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        window.session = window.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield window
        finally:
            window.command("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(20)
