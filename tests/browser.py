"""A real headless Chromium for tests, driven by its DevTools protocol over a pipe."""

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
    """A page in a browser that reaches nothing but this machine.

    Attributes:
        problems: errors and warnings of the console and uncaught exceptions, of all pages since the last ``open``.
        requests: addresses asked for, likewise, those of ``data:`` left out.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_theirs, self._write = os.pipe()
        self._read, write_theirs = os.pipe()

        # the browser reads commands from 3 and answers on 4
        pipes = f'exec "$@" 3<&{read_theirs} 4>&{write_theirs}'
        resolve = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = ["chromium", *ARGUMENTS, resolve, f"--user-data-dir={self._folder.name}", "about:blank"]
        theirs, quiet = (read_theirs, write_theirs), subprocess.DEVNULL
        self._process = subprocess.Popen(["bash", "-c", pipes, "bash", *browser], pass_fds=theirs, stdout=quiet, stderr=quiet)
        os.close(read_theirs)
        os.close(write_theirs)
        self._number, self._rest, self._session = 0, b"", None
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
        """A command of the protocol; its result."""
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
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], timeout)[0]:
                return None
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has died"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, params: dict) -> None:
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
        """The JSON value of an expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> object:
        """Evaluate until it is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if value := self.evaluate(expression):
                    return value
            except AssertionError as error:
                if "context" not in str(error):  # a page that is just being loaded has none
                    raise
            time.sleep(0.1)
        raise AssertionError(f"{expression} did not come true; {self.problems}")

    def open(self, address: str | Path, width: int = 1200, height: int = 900, *, dark: bool = False) -> None:
        """Show a file or an address, and wait until its charts are drawn."""
        self.look(width, height, dark=dark)
        self.call("Page.navigate", url="about:blank")
        self.problems.clear()
        self.requests.clear()
        self.call("Page.navigate", url=address.resolve().as_uri() if isinstance(address, Path) else address)
        self.wait_for("document.documentElement?.dataset.drawn")

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window (below 600 a phone's) and the colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """What the window shows, or the whole page."""
        content = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(content["data"]))

    def press(self, key: str) -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)
