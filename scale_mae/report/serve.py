"""A report that follows its run: rendered again when the run has moved on, given to browsers on this machine."""

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


def version_of(run: Path) -> str:
    """Text that changes when what a report shows has changed."""
    found = []
    for name in (METRICS_FILE, history.FILE, exit_status.FILE):
        try:
            facts = (run / name).stat()
            found.append(f"{facts.st_mtime_ns:x}.{facts.st_size:x}")
        except OSError:
            found.append("0")
    return "-".join([*found, *(path.name for path in list_checkpoints(run)[-1:])])


class Server(ThreadingHTTPServer):
    """Serves ``/`` (the page) and ``/version`` (of what it shows).

    Args:
        run: the run directory.
        render: makes the page of a version.
        host: address to listen on.
        port: 0: any free one.

    Raises:
        UserError: the address cannot be had.
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
        """Where a browser finds it."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}/"

    def version(self) -> str:
        """Of what there is to show now."""
        return version_of(self._run)

    def handle_error(self, request: object, client_address: object) -> None:
        """A line on what went wrong with a request; a client that went away is no error."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            print(f"scale-mae: --serve: {type(error).__name__}: {error}", file=sys.stderr)

    def page(self) -> bytes:
        """The page as of now; rendered once a version, however many ask."""
        with self._lock:
            version = self.version()
            if version != self._version:
                self._page, self._version = self._render(version).encode(), version
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """The page, or its version."""
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
        """Requests are not told."""


def serve(server: Server) -> None:
    """Until Ctrl-C."""
    try:
        print(f"{server.url} follows the run; Ctrl-C ends it", flush=True)
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
