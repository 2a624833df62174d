"""A server on 127.0.0.1 that answers as a function says, for what no real server does on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from local_server import LocalServer


@dataclass(frozen=True)
class Asked:
    """A request: its headers in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def access_key(self) -> str | None:
        """Of the signature; None: there is none."""
        _, found, rest = self.headers.get("authorization", "").partition("Credential=")
        return rest.split("/")[0] if found else None


@dataclass(frozen=True)
class Answer:
    """`length`: what the header says of the body, where that is not true; the connection ends behind a shorter one."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None


class ScriptedServer(LocalServer):
    """`asked`: the requests so far. `answer` may be replaced at any time."""

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked = Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                outer.asked.append(asked)
                answer = outer.answer(asked)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)
                self.close_connection = answer.length is not None

            do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that gave up is part of the tests."""

        super().__init__(Server(("127.0.0.1", 0), Handler))


def refusal(status: int, code: str, message: str = "", **headers: str) -> Answer:
    """An error as S3 tells it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Answer(status, body.encode(), headers)


def ranged(asked: Asked, data: bytes) -> Answer:
    """What a server answers whose object is `data`."""
    first, _, last = asked.headers["range"].removeprefix("bytes=").partition("-")
    start, stop = int(first), min(int(last) + 1, len(data))
    if start >= len(data):
        return refusal(416, "InvalidRange")
    return Answer(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})
