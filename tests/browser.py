"""A headless Chromium for tests, controlled by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path

ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """A page in a browser that can only connect to this machine.

    Attributes:
        problems: Console errors, console warnings and uncaught exceptions since the last ``open``.
        requests: Requested addresses since the last ``open``, without ``data:`` addresses.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        browser_read, self._write = os.pipe()
        self._read, browser_write = os.pipe()

        # the browser reads commands from file descriptor 3 and answers on 4
        pipes = f'exec "$@" 3<&{browser_read} 4>&{browser_write}'
        resolve = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = ["chromium", *ARGUMENTS, resolve, f"--user-data-dir={self._folder.name}", "about:blank"]
        pipe_ends, null = (browser_read, browser_write), subprocess.DEVNULL
        self._process = subprocess.Popen(["bash", "-c", pipes, "bash", *browser], pass_fds=pipe_ends, stdout=null, stderr=null)
        os.close(browser_read)
        os.close(browser_write)
        self._number, self._buffer, self._session = 0, b"", None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._session = None
        self.call("Browser.close")
        self._process.wait(20)
        self._folder.cleanup()

    def call(self, method: str, **parameters: object) -> dict:
        """Send a command of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(60)
            assert answer, f"{method}: no answer"
            if answer.get("id") == self._number:
                assert "result" in answer, f"{method}: {answer}"
                return answer["result"]

    def _next(self, timeout: float) -> dict | None:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], timeout)[0]:
                return None
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has died"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._record(message.get("method"), message.get("params", {}))
        return message

    def _record(self, method: str | None, params: dict) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)

    def evaluate(self, expression: str) -> object:
        """Evaluate an expression and return its JSON value. Waits for a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> object:
        """Evaluate an expression until it is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if value := self.evaluate(expression):
                    return value
            except AssertionError as error:
                if "context" not in str(error):  # a page that is loading has no execution context
                    raise
            time.sleep(0.1)
        raise AssertionError(f"{expression} did not become true; {self.problems}")

    def open(self, address: str | Path, width: int = 1200, height: int = 900, *, dark: bool = False) -> None:
        """Open a file or an address and wait until its charts are drawn."""
        self.set_window(width, height, dark=dark)
        self.call("Page.navigate", url="about:blank")
        self.problems.clear()
        self.requests.clear()
        self.call("Page.navigate", url=address.resolve().as_uri() if isinstance(address, Path) else address)
        self.wait_for("document.documentElement?.dataset.drawn")

    def set_window(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window and the color scheme. A width below 600 emulates a phone."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save a picture of the window, or of the whole page."""
        content = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(content["data"]))

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)
