"""An HTTP proxy before a store that answers some requests itself, as a store under load does."""

import http.client
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


Headers = dict[str, str]


class FaultyProxy:
    """Passes requests on to an endpoint and answers `share` of them with 503 SlowDown; counts both.

    `change` makes the headers that are passed on of method, path, headers and body.
    """

    def __init__(
        self,
        endpoint: str,
        share: float,
        seed: int = 0,
        change: Callable[[str, str, Headers, bytes], Headers] = lambda method, path, headers, body: headers,
    ) -> None:
        self.share = share
        self._change = change
        self.counts: Counter[str] = Counter()
        self._target = urlsplit(endpoint)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator["FaultyProxy"]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _refuses(self) -> bool:
        with self._lock:
            refused = self._random.random() < self.share
            self.counts["refused" if refused else "passed"] += 1
            return refused

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                if self.headers.get("Expect", "").lower() == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy._refuses():
                    self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
                    return
                connection = http.client.HTTPConnection(proxy._target.hostname or "", proxy._target.port, timeout=60)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                headers = proxy._change(self.command, self.path, headers, body)
                connection.request(self.command, self.path, body or None, headers)
                answer = connection.getresponse()
                self._answer(answer.status, dict(answer.getheaders()), answer.read())
                connection.close()

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" and status < 300 else len(body)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def log_message(self, *_: object) -> None:
                """Quiet."""

        return Handler
