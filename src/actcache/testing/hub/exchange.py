"""One request and its answer: bodies in pieces, counted; and what can be made to go wrong with them."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from actcache.testing.hub.repositories import CHUNK, RefusedError

if TYPE_CHECKING:
    from actcache.testing.hub.server import LoopbackHub

# The largest body that is taken into memory: a commit with small files in it.
_LARGEST_MESSAGE = 2**28


@dataclass
class Request:
    """A request the Hub was sent.

    `origin` is ``"hub"`` or ``"storage"`` (where the large files are); `received` and `sent` are bytes of the bodies of
    request and answer, and `status` is None as long as nothing was answered.
    """

    method: str
    path: str
    token: str | None
    origin: str = "hub"
    received: int = 0
    sent: int = 0
    status: int | None = None


@dataclass
class Fault:
    """What goes wrong with requests.

    Strikes those whose method and path match (`path` is searched for, a regular expression), after `skip` of them went
    well, `times` times (None: from then on always).

    Attributes:
        status: the answer instead of the one asked for, with `retry_after` (seconds) as its header.
        cut_upload: the connection breaks when so many bytes of the request's body have arrived.
        cut_answer: the connection breaks when so many bytes of the answer's body were sent.
        lose_answer: what was asked is done, and the connection breaks before a word of it.
        delay: seconds before anything is done.
        rate: bytes per second of both bodies.
        then: called when it strikes: before anything else, and of a lost answer when what was asked is done.
    """

    method: str = ""
    path: str = ""
    status: int | None = None
    retry_after: float | None = None
    cut_upload: int | None = None
    cut_answer: int | None = None
    lose_answer: bool = False
    delay: float = 0.0
    rate: float | None = None
    times: int | None = 1
    skip: int = 0
    then: Callable[[], None] | None = None
    seen: int = 0
    struck: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def strikes(self, request: Request) -> bool:
        """Whether this request is one of its."""
        if (self.method and request.method != self.method) or not re.search(self.path, request.path):
            return False
        with self._lock:
            self.seen += 1
            if self.seen <= self.skip or (self.times is not None and self.struck >= self.times):
                return False
            self.struck += 1
        return True


class Refusal(Exception):
    """An answer other than the one asked for: status, and the code by which the client tells its reason."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


class _Broken(Exception):
    """The connection is to break now."""


class Exchange(BaseHTTPRequestHandler, ABC):
    """Answers with what `route` does; `route` reads the body with `body` or `message`."""

    protocol_version = "HTTP/1.1"
    # One write per answer's head, and no waiting for more of it.
    wbufsize = -1
    disable_nagle_algorithm = True
    hub: LoopbackHub
    origin = "hub"

    @abstractmethod
    def route(self) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        authorization = self.headers.get("Authorization")
        self.token = authorization.removeprefix("Bearer ") if authorization else None
        self.request_log = Request(self.command, self.path, self.token, self.origin)
        self.hub.requests.append(self.request_log)
        self.fault = next((fault for fault in self.hub.faults if fault.strikes(self.request_log)), None)
        self._unread = int(self.headers.get("Content-Length") or 0)
        self._chunked = "chunked" in (self.headers.get("Transfer-Encoding") or "")
        if (self.headers.get("Expect") or "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        try:
            try:
                self._strike()
                self.route()
            except Refusal as refusal:
                self._refuse(refusal)
            except RefusedError as error:
                self._refuse(Refusal(400, "BadRequest", str(error)))
            # The next request of this connection begins after this one's body.
            for _ in self.body():
                pass
        except (_Broken, ConnectionError):
            self._break()

    def _strike(self) -> None:
        fault = self.fault
        if fault is None:
            return
        if fault.then is not None and not fault.lose_answer:
            fault.then()
        time.sleep(fault.delay)
        if fault.status is not None:
            for _ in self.body():
                pass
            wait = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
            raise Refusal(fault.status, "Injected", "an injected fault", wait)

    def _break(self) -> None:
        self.close_connection = True
        # A reset, so that the other side sees a broken connection and not the end of an answer.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.wfile = _Nowhere()  # type: ignore[assignment]
        self.connection.close()

    @property
    def parts(self) -> list[str]:
        """The path's parts, unquoted. A quoted slash stays inside its part: branches may have slashes."""
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.path).query).items()}

    def asked_for(self, name: str) -> bool:
        """Whether the query says yes to this, as one client or another writes it."""
        return self.query.get(name, "").lower() in ("true", "1")

    def body(self) -> Iterator[bytes]:
        """The request's body, piece by piece."""
        for piece in self._pieces():
            self.request_log.received += len(piece)
            fault = self.fault
            if fault is not None:
                if fault.cut_upload is not None and self.request_log.received >= fault.cut_upload:
                    raise _Broken
                if fault.rate is not None:
                    time.sleep(len(piece) / fault.rate)
            yield piece

    def _pieces(self) -> Iterator[bytes]:
        if self._chunked:
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            self._chunked = False
            return
        # Small pieces when a cut is wanted, or it would come too late.
        size = 2**16 if self.fault is not None else CHUNK
        while self._unread:
            piece = self.rfile.read(min(size, self._unread))
            if not piece:
                raise _Broken
            self._unread -= len(piece)
            yield piece

    def message(self) -> bytes:
        """The request's body, whole."""
        pieces, total = [], 0
        for piece in self.body():
            total += len(piece)
            if total > _LARGEST_MESSAGE:
                raise Refusal(413, "TooLarge", "the body is too large")
            pieces.append(piece)
        return b"".join(pieces)

    def json_message(self) -> dict[str, Any]:
        try:
            value = json.loads(self.message() or b"{}")
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Refusal(400, "BadRequest", "the body is no JSON object")
        return value

    def answer_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.answer_bytes(status, [body], len(body), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, refusal: Refusal) -> None:
        headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal), **refusal.headers}
        self.answer_json({"error": str(refusal)}, refusal.status, headers)

    def answer_file(self, path: Path, headers: Mapping[str, str]) -> None:
        """The file at `path`, or the range of it that is asked for."""
        size = path.stat().st_size
        start, end = 0, size
        status = 200
        wanted = self.headers.get("Range")
        if wanted is not None:
            found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted.strip())
            if found is None or found.group(0) == "bytes=-":
                raise Refusal(416, "Range", f"not one range of bytes: {wanted}", {"Content-Range": f"bytes */{size}"})
            if not found[1]:
                start = max(0, size - int(found[2]))
            else:
                start, end = int(found[1]), min(int(found[2] or size) + 1, size)
            if start >= end:
                raise Refusal(416, "Range", f"no such range: {wanted}", {"Content-Range": f"bytes */{size}"})
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        self.answer_bytes(status, _pieces_of(path, start, end), end - start, headers)

    def answer_bytes(self, status: int, body: Any, size: int, headers: Mapping[str, str]) -> None:
        fault = self.fault
        if fault is not None and fault.lose_answer:
            if fault.then is not None:
                fault.then()
            raise _Broken
        self.request_log.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command == "HEAD":
            return
        for piece in body:
            if fault is not None and fault.cut_answer is not None:
                piece = piece[: max(0, fault.cut_answer - self.request_log.sent)]
            if fault is not None and fault.rate is not None:
                self.wfile.flush()
                time.sleep(len(piece) / fault.rate)
            self.wfile.write(piece)
            self.request_log.sent += len(piece)
            if fault is not None and fault.cut_answer is not None and self.request_log.sent >= fault.cut_answer:
                self.wfile.flush()
                raise _Broken

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `LoopbackHub.requests`."""


class _Nowhere:
    """What is left of the stream of a connection that broke: the base class flushes and closes it."""

    closed = True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _pieces_of(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(CHUNK, end - start))
            if not piece:
                return
            start += len(piece)
            yield piece
