"""A proxy on 127.0.0.1 before a server that speaks S3: counts what goes through, and fails as it is told to."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

from local_server import LocalServer

READS = ("list", "head", "range", "whole")
WRITES = ("put", "delete")

_ERRORS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "missing": (404, "NoSuchKey", "The specified key does not exist."),
    "deny": (403, "AccessDenied", "Access Denied"),
}
SIGNED = f"AWS4-HMAC-SHA256 Credential=any/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature={0:064}"
"""Enough for a server that checks no signature."""
WAYS = (*_ERRORS, "cut", "lose", "stall", "stale", "spoil")


@dataclass(frozen=True)
class Fault:
    """One way to fail, and which requests do.

    `way`: ``slow_down`` (503), ``error`` (500), ``missing`` (404), ``deny`` (403); ``cut``: the connection is reset in
    the middle of the body that is sent, or else of the answer's, or before the answer; ``lose``: the server does what
    it is asked to, and the connection is reset without an answer; ``stall``: nothing comes for `seconds` where ``cut``
    would reset the connection; ``stale``: a listing is answered as it was
    the last time before; ``spoil``: one bit of
    the body is wrong, of what is sent as of what is answered.

    Of the requests of these `kinds` (none given: any) for objects whose name matches `name`, those from the `first` on
    fail, `times` of them, each with probability `share`. The kinds: ``list``; reads of an object ``whole``, of a
    ``range``, of a range at its beginning (``head``); ``stat``; ``put``; ``delete``; ``parts`` of a larger upload.
    """

    way: str
    kinds: tuple[str, ...] = ()
    name: str = "*"
    first: int = 1
    times: float = float("inf")
    share: float = 1.0
    seconds: float = 10.0

    def __post_init__(self) -> None:
        assert self.way in WAYS, f"no such fault: {self.way}"

    def concerns(self, kind: str, name: str) -> bool:
        return (not self.kinds or kind in self.kinds) and fnmatchcase(name, self.name)


@dataclass
class Request:
    """One request that came by: bytes of its body and of the answer's (0 where it got none), and the `way` in which it
    was made to fail."""

    kind: str
    name: str
    start: int
    signed: bool
    way: str
    sent: int = 0
    received: int = 0
    status: int = 0


class FaultProxy(LocalServer):
    """A proxy before the server at `upstream` (``http://host:port``); with `public` its buckets are such that everybody
    may read, and nobody has credentials for: whoever signs is refused, and whoever would write."""

    def __init__(self, upstream: str, *, seed: int = 0, public: bool = False) -> None:
        self.upstream = urlsplit(upstream)
        self.public = public
        self.requests: list[Request] = []
        self.listings: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}
        self.over = threading.Event()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._faults: list[list[object]] = []
        server = _Server(("127.0.0.1", 0), _Handler)
        server.proxy = self
        super().__init__(server)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.over.set()
        super().__exit__(kind, error, at)

    def fail(self, *faults: Fault) -> None:
        """From now on these faults and no others; counting begins anew."""
        with self._lock:
            self._faults = [[fault, 0, 0] for fault in faults]

    @contextlib.contextmanager
    def failing(self, *faults: Fault) -> Iterator[list[Request]]:
        """These faults inside the block, which gets the requests of the block; it must have met one of them."""
        at = len(self.requests)
        seen: list[Request] = []
        self.fail(*faults)
        try:
            yield seen
        finally:
            self.fail()
            seen += self.requests[at:]
        assert any(request.way for request in seen), "no request met the fault"

    def count(self, *kinds: str) -> int:
        """How many requests of these kinds (none given: any) came by."""
        return sum(not kinds or request.kind in kinds for request in self.requests)

    def received(self, *kinds: str) -> int:
        """Bytes of the answers to requests of these kinds (none given: any)."""
        return sum(request.received for request in self.requests if not kinds or request.kind in kinds)

    def fault_for(self, kind: str, name: str) -> Fault | None:
        with self._lock:
            for state in self._faults:
                fault, met, failed = state
                assert isinstance(fault, Fault) and isinstance(met, int) and isinstance(failed, int)
                if fault.concerns(kind, name):
                    state[1] = met + 1
                    if met + 1 >= fault.first and failed < fault.times and self._random.random() < fault.share:
                        state[2] = failed + 1
                        return fault
        return None


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128
    proxy: FaultProxy

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        # Without an orderly end: what has a lingering time of 0 is reset.
        assert isinstance(request, socket.socket)
        request.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what faults are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        proxy = self.server.proxy
        kind, name, start = self._what()
        fault = proxy.fault_for(kind, name)
        way = fault.way if fault else ""
        size = int(self.headers.get("Content-Length") or 0)
        request = Request(kind, name, start, "Authorization" in self.headers, way)
        proxy.requests.append(request)
        body = self.rfile.read(size // 2)
        if fault and way == "cut" and size:
            return self._reset()
        if fault and way == "stall" and size:
            proxy.over.wait(fault.seconds)
        body += self.rfile.read(size - size // 2)
        if len(body) < size:
            return self._reset()
        if way == "spoil" and body:
            body = _spoilt(body)
        request.sent = size
        refused = proxy.public and (request.signed or kind in (*WRITES, "parts"))
        if refused or way in _ERRORS:
            status, headers, answer = _refusal("deny" if refused else way)
        elif way == "stale" and self.path in proxy.listings:
            status, headers, answer = proxy.listings[self.path]
        else:
            status, headers, answer = self._forward(body)
            if kind == "list" and way != "stale":
                proxy.listings[self.path] = status, headers, answer
        request.status = status
        if way == "lose" or (way == "cut" and not answer):
            return self._reset()
        if fault and way == "stall" and not size and not answer:
            proxy.over.wait(fault.seconds)
        request.received = len(answer)
        if way == "spoil" and answer and status < 300:
            answer = _spoilt(answer)
        self.send_response_only(status)
        for key, value in headers:
            self.send_header(key, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if way not in ("cut", "stall"):
            self.wfile.write(answer)
            return None
        half = len(answer) // 2
        self.wfile.write(answer[:half])
        if way == "cut":
            return self._reset()
        if fault and not size and answer:
            proxy.over.wait(fault.seconds)
        self.wfile.write(answer[half:])
        return None

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _what(self) -> tuple[str, str, int]:
        """Kind of this request, the object's name in its bucket, and where a range begins."""
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        name = unquote(url.path.lstrip("/").partition("/")[2])
        if self.command == "GET":
            if not name:
                return "list", query.get("prefix", [""])[0], 0
            first = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
            kind = "whole" if "Range" not in self.headers else "head" if first == "0" else "range"
            return kind, name, int(first or 0)
        if "uploads" in query or "uploadId" in query:
            return "parts", name, 0
        if self.command == "POST" and "delete" in query:
            return "delete", name, 0
        return {"PUT": "put", "DELETE": "delete", "HEAD": "stat"}.get(self.command, "other"), name, 0

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = self.server.proxy.upstream
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
        try:
            # With the host that was signed, which is this one.
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
            if self.server.proxy.public:
                headers["Authorization"] = SIGNED
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            data = answer.read()
            length = "content-length" if self.command != "HEAD" else ""
            gone = ("connection", "transfer-encoding", "keep-alive", length)
            return answer.status, [(k, v) for k, v in answer.getheaders() if k.lower() not in gone], data
        finally:
            connection.close()

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _spoilt(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def _refusal(way: str) -> tuple[int, list[tuple[str, str]], bytes]:
    status, code, message = _ERRORS[way]
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return status, [("Content-Type", "application/xml")], text.encode()
