"""The report of a running run, served on loopback and made anew when the run has written something."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dppo_mcore.report.blocks import Limits
from dppo_mcore.report.frames import Seen
from dppo_mcore.report.page import build
from dppo_mcore.report.read import ReportError, state_token

REBUILD_SECONDS = 5.0
"""A page is not made anew more often."""
SHARE_OF_TIME = 0.1
"""Of one core, for making pages."""
LOOPBACK = {"127.0.0.1", "localhost"}


class LiveReport:
    """The newest page and the state of the run it shows."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self._lock = threading.Lock()
        self._page = b""
        self._token = ""
        self._rest_until = float("-inf")
        self._seen: Seen = {}

    def token(self) -> str:
        """What the page should show: changes at most every `REBUILD_SECONDS`, more rarely for a large run."""
        if time.monotonic() < self._rest_until:
            return self._token
        return state_token(self.folder)

    def page(self) -> bytes:
        """The page, made anew if the run went on."""
        with self._lock:
            token = self.token()
            if token != self._token:
                began = time.monotonic()
                self._page = build(self.folder, self.limits, token, self._seen).encode("utf-8")
                now = time.monotonic()
                self._token, self._rest_until = token, now + max(REBUILD_SECONDS, (now - began) / SHARE_OF_TIME)
            return self._page


def make_server(folder: Path, port: int, limits: Limits) -> ThreadingHTTPServer:
    """A server on 127.0.0.1: `/` is the page, `/version` the state that the page polls, `/made` waits until there is
    a page of it."""
    report = LiveReport(folder, limits)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            # A name that someone made point at 127.0.0.1 must not read a run through the browser.
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in LOOPBACK:
                self.send_error(403)
            elif self.path == "/version":
                self._answer(report.token().encode(), "text/plain; charset=utf-8")
            elif self.path in ("/", "/made"):
                self._make(self.path == "/")
            else:
                self.send_error(404)

        def _make(self, whole: bool) -> None:
            try:
                page = report.page()
            except ReportError as error:
                self.send_error(503, explain=str(error))
            else:
                self._answer(page if whole else b"", "text/html; charset=utf-8")

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            with suppress(ConnectionError):  # the reader may have gone on to another page
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """The terminal stays quiet."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)
