"""The page of a sweep that may be running: on this machine alone, and never long out of date."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from knet_core import KNetError
from knet_platform.errors import UsageError
from knet_platform.report.page import Live, html
from knet_platform.report.table import Report

HOST = "127.0.0.1"
LEAST_SECONDS = 5.0
"""Between two looks at the store."""
_SHARE = 0.1
"""Of one core that looking may take: the sweep may be training on the same machine."""


class LivePage:
    """Looks at the store when somebody asks and the last look is old.

    Args:
        build: Looks; its errors of the expected kind pass through.
    """

    def __init__(self, build: Callable[[], Report]) -> None:
        self._build = build
        self._lock = threading.Lock()
        self._report: Report | None = None
        self._page = b""
        self._due = 0.0

    def current(self) -> tuple[str, bytes]:
        """Return the page and the version that it bears: when what it shows last changed.

        Raises:
            KNetError: The store or the sweep file cannot be read.
        """
        with self._lock:
            start = time.monotonic()
            if self._report is None or start >= self._due:
                found = self._build()
                known = self._report
                if known is None or replace(found, created=known.created) != known:
                    live = Live(version=found.created, seconds=LEAST_SECONDS)
                    self._report, self._page = found, html(found, live).encode()
                end = time.monotonic()
                self._due = end + max(LEAST_SECONDS, (end - start) / _SHARE)
            assert self._report is not None, "built above"
            return self._report.created, self._page


def page_server(page: LivePage, port: int) -> ThreadingHTTPServer:
    """Return a server of `/` and `/version` on the loopback device; port 0 is any free one.

    Raises:
        UsageError: Nothing can listen there.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site's name may be made to lead here; it must not read the page.
            if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            path = urlsplit(self.path).path
            if path not in ("/", "/version"):
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                version, text = page.current()
            except KNetError as error:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", str(error).encode())
                return
            if path == "/version":
                self._answer(HTTPStatus.OK, "text/plain", version.encode())
            else:
                self._answer(HTTPStatus.OK, "text/html", text)

        def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Keep quiet: the terminal is for the sweep."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--port {port}: cannot listen on {HOST}:{port} ({error}); expected a free port, "
            f"or 0 for any"
        ) from None
