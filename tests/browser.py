"""A headless Chromium for tests, over the DevTools protocol on two pipes: what a page logs, loads, measures and shows.

`--remote-debugging-pipe` needs no library and opens no port. Messages are JSON, ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-component-update",
)  # fmt: skip
# Chromium reads file descriptor 3 and writes 4.
LAUNCH = """
import os, sys
for held, wanted in zip(map(int, sys.argv[1:3]), (103, 104)):
    os.dup2(held, wanted)
os.dup2(103, 3)
os.dup2(104, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
SEEN = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
OWN = ("file:", "data:", "about:", "blob:")  # what a page that stands alone may ask for


class Browser:
    """One tab; a context manager.

    Attributes:
        errors: what the page logged or threw since it was opened.
        requests: every URL it asked for that is not its own.
    """

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM
        (reads, self._out), (self._in, writes) = os.pipe(), os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(reads), str(writes), CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(reads)
        os.close(writes)
        self._buffer, self._id, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        tab = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # a window nobody looks at has no focus

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        try:
            self.call("Browser.close")
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._out)
            os.close(self._in)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(60)
            if answer.get("id") == self._id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, seconds: float) -> dict[str, Any]:
        """The next message; what events tell is kept."""
        until = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium said nothing for {seconds:g} s.")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError("Chromium has gone.")
            self._buffer += data
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(OWN):
            self.requests.append(params["request"]["url"])
        if method:
            self._events.append(message)
        return message

    def show(
        self, width: int = 1280, height: int = 900, scheme: str = "light", script: bool = True, media: str = ""
    ) -> None:
        """Sets the window, the colour scheme, the medium ("print") and whether scripts run; for pages opened afterwards."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)

    def open(self, page: Path) -> float:
        """Opens a file, waits for its load event, and returns the seconds from the start of navigation to it."""
        self.errors, self.requests, self._events = [], [], []
        start = time.monotonic()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self._events):
            self._next(60)
        return time.monotonic() - start

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def picture(self, out: Path, whole: bool = False, top: int = 0, height: int = 0) -> Path:
        """A PNG of the window, of the whole page, or of a part of it."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        params: dict[str, Any] = {}
        if whole or height:
            clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"], "scale": 1}
            params = {"captureBeyondViewport": True, "clip": clip}
        out.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **params)["data"]))
        return out

    def pdf(self, out: Path) -> Path:
        """The page as it is printed on A4."""
        data = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"]
        out.write_bytes(base64.b64decode(data))
        return out
