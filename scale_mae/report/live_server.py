"""Serves a report over HTTP. The page reloads when the run advances."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from scale_mae.checkpoint.paths import list_checkpoints
from scale_mae.config import UserError
from scale_mae.runs import exit_status, history
from scale_mae.slurm.status import METRICS_FILE


def content_version(run: Path) -> str:
    """Return a string that changes when the content of the report changes."""
    parts = []
    for name in (METRICS_FILE, history.FILE, exit_status.FILE):
        try:
            stat = (run / name).stat()
            parts.append(f"{stat.st_mtime_ns:x}.{stat.st_size:x}")
        except OSError:
            parts.append("0")
    return "-".join([*parts, *(path.name for path in list_checkpoints(run)[-1:])])


class LiveServer(ThreadingHTTPServer):
    """Serves ``/`` (the page) and ``/version`` (the version of its content).

    Args:
        run: Run directory.
        render: Function that returns the page for a version.
        host: Address to listen on.
        port: Port to listen on; 0 selects a free port.

    Raises:
        UserError: The address is not available.
    """

    daemon_threads = True

    def __init__(self, run: Path, render: Callable[[str], str], host: str = "127.0.0.1", port: int = 0) -> None:
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--serve: cannot listen on {host}:{port} ({error})") from None
        self._run, self._render, self._lock = run, render, threading.Lock()
        self._version, self._page = "", b""

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}/"

    def version(self) -> str:
        """Return the current version of the content."""
        return content_version(self._run)

    def handle_error(self, request: object, client_address: object) -> None:
        """Print the error of a request as one line. A client that closes the connection is not an error."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            print(f"scale-mae: --serve: {type(error).__name__}: {error}", file=sys.stderr)

    def page(self) -> bytes:
        """Return the current page. It is rendered once per version."""
        with self._lock:
            version = self.version()
            if version != self._version:
                self._page, self._version = self._render(version).encode(), version
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        """Send the page or its version."""
        path = self.path.partition("?")[0]
        if path not in ("/", "/version"):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            content = self.server.page() if path == "/" else self.server.version().encode()
        except UserError as error:
            print(f"scale-mae: {error}", file=sys.stderr)
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8" if path == "/" else "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Do not log requests."""


def serve(server: LiveServer) -> None:
    """Serve until Ctrl-C."""
    try:
        print(f"Serving the report at {server.url}. Press Ctrl-C to stop.", flush=True)
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
