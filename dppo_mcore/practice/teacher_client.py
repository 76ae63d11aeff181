"""A chat client for OpenAI-compatible endpoints on the standard library: retries, rate limits, and knowing when to
give up. One client serves many threads.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
REFUSALS = {400, 413, 422, 451}
"""This request can't be answered, others may be. Any other status that isn't tried again (a redirect, a wrong key,
model or path) holds for every sample: the teacher is down at once."""
MOST_BYTES = 64 * 2**20
"""A longer response is no answer."""


class TeacherDownError(RuntimeError):
    """The teacher can't be reached, for this sample or any other; ask again later."""


class TeacherRefusedError(RuntimeError):
    """The teacher will not answer this sample; asking again would not help."""


class TeacherGaveUpError(RuntimeError):
    """This request failed again and again while others succeeded; it may be tried once more on another day."""


class _RetryError(Exception):
    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


@dataclass
class ChatClient:
    """`chat` blocks until an answer or a refusal, or until the teacher has been failing for `patience_s`."""

    url: str
    """Base URL, with or without "/v1" or "/chat/completions"."""
    model: str
    key: str = field(default="", repr=False)
    timeout_s: float = 300.0
    """Longest wait for one answer."""
    patience_s: float = 3600.0
    """Time without any success, over all threads, after which the teacher counts as down."""
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    requests_per_minute: float = 0.0
    """Own rate limit; 0 is none."""
    attempts_per_request: int = 8
    """Tries for one request before it's given up, where others succeeded meanwhile."""
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"teacher_url {self.url!r} is no http(s) address")
        path = parts.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path = (path if path else "/v1") + "/chat/completions"
        self._address = (parts.scheme, parts.hostname, parts.port, path + (f"?{parts.query}" if parts.query else ""))
        self._lock = threading.Lock()
        self._local = threading.local()
        self._last_success = self.clock()
        self._next_slot = 0.0
        self._closed_until = 0.0
        self.down: str = ""
        self.requests = 0
        """HTTP requests made, retries included."""

    def chat(
        self, messages: list[dict[str, Any]], max_tokens: int, temperature: float, seed: int | None = None
    ) -> tuple[str, int]:
        """(text, completion tokens) of one answer."""
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        if seed is not None:
            body["seed"] = seed
        payload = json.dumps(body).encode()
        pause, attempt, began = self.first_pause_s, 0, self.clock()
        while True:
            attempt += 1
            if self.down:
                raise TeacherDownError(self.down)
            self._wait_for_slot()
            try:
                answer = self._once(payload)
            except _RetryError as failure:
                silent = self.clock() - self._last_success
                if silent >= self.patience_s:
                    self.down = f"the teacher at {self.url} failed for {silent:.0f} s, last: {failure}"
                    raise TeacherDownError(self.down) from None
                if attempt >= self.attempts_per_request and self._last_success > began:
                    raise TeacherGaveUpError(f"{attempt} tries failed, last: {failure}") from None
                if failure.after is not None:
                    # The teacher said when: every thread keeps away until then.
                    with self._lock:
                        self._closed_until = max(self._closed_until, self.clock() + min(failure.after, 600.0))
                # Full jitter, so that threads that failed together don't come back together.
                self.sleep(min(pause * random.uniform(0.5, 1.0), max(0.0, self.patience_s - silent)))
                pause = min(2 * pause, self.longest_pause_s)
            else:
                self._last_success = self.clock()
                return answer

    def _wait_for_slot(self) -> None:
        """Keep to the rate limit and to what Retry-After asked for."""
        with self._lock:
            now = self.clock()
            start = max(now, self._next_slot, self._closed_until)
            if self.requests_per_minute > 0:
                self._next_slot = start + 60.0 / self.requests_per_minute
            self.requests += 1
        if start > now:
            self.sleep(start - now)

    def _connection(self) -> http.client.HTTPConnection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            scheme, host, port, _ = self._address
            if scheme == "https":
                connection = http.client.HTTPSConnection(
                    host, port, timeout=self.timeout_s, context=ssl.create_default_context()
                )
            else:
                connection = http.client.HTTPConnection(host, port, timeout=self.timeout_s)
            self._local.connection = connection
        return connection

    def _once(self, payload: bytes) -> tuple[str, int]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        connection = self._connection()
        # A socket's own timeout is per packet: an answer that trickles would never end.
        late: threading.Timer | None = None
        try:
            if connection.sock is None:
                connection.connect()
            late = threading.Timer(self.timeout_s, _hang_up, [connection.sock])
            late.daemon = True
            late.start()
            connection.request("POST", self._address[3], payload, headers)
            response = connection.getresponse()
            content = response.read(MOST_BYTES)
            if len(content) == MOST_BYTES:
                raise http.client.HTTPException(f"a response of {MOST_BYTES} bytes or more")
            if late.finished.is_set():
                raise http.client.HTTPException("cut off")
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self._local.connection = None
            raise _RetryError("no answer in time" if late and late.finished.is_set() else _name(error)) from None
        finally:
            if late is not None:
                late.cancel()
        text = content.decode("utf-8", "replace")
        if response.status in RETRIED or response.status >= 500:
            raise _RetryError(f"HTTP {response.status}: {text[:200]}", _retry_after(response.getheader("Retry-After")))
        if response.status in REFUSALS:
            raise TeacherRefusedError(f"HTTP {response.status}: {text[:500]}")
        if response.status != 200:
            where = response.getheader("Location")
            self.down = f"the teacher at {self.url} answers HTTP {response.status}: {where or text[:200]}"
            raise TeacherDownError(self.down)
        return _parse(text)


def _hang_up(connected: socket.socket) -> None:
    """End a request from another thread: whoever waits for it sees the connection close."""
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _parse(text: str) -> tuple[str, int]:
    """Answer of a 200 response; nonsense is worth another try."""
    try:
        body = json.loads(text)
        message = body["choices"][0]["message"]
        content = message["content"]
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        thought = message.get("reasoning_content")
        if not isinstance(content, str) or not content.strip():
            raise _RetryError("an empty answer")
        if isinstance(thought, str) and thought.strip() and "</think>" not in content:
            content = f"<think>{thought.strip()}</think>\n{content}"
        tokens = (body.get("usage") or {}).get("completion_tokens") or 0
        return content, int(tokens)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _RetryError(f"no chat completion: {text[:200]}") from None


def _retry_after(header: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _name(error: BaseException) -> str:
    if isinstance(error, socket.timeout):
        return "no answer in time"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
