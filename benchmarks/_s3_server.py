"""A server on 127.0.0.1 that speaks as much S3 as `object_store.py` needs, and is fast: `_s3_server.py FOLDER`.

The servers that tests talk to would be what is measured: moto takes 50 ms for a small range of a large object, Swift
answers a few hundred requests a second. This one moves bytes by sendfile(2) and splice(2), and checks no signature. It
prints its port, and ends when its standard input ends. ``GET /counts`` tells what came by since the last time:
requests and bytes by method, and the ranges that were read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import sys
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_PIECE = 1 << 20
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.lock = threading.Lock()
        self.seen: list[tuple[str, str, int, int]] = []

    def count(self, method: str, name: str, start: int, stop: int) -> None:
        with self.lock:
            self.seen.append((method, name, start, stop))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _path(self) -> tuple[str, Path]:
        """Name of the object in its bucket, and the file that keeps it: one folder holds all, by their full names."""
        name = unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]
        return name, self.server.folder / name.replace("/", "%")

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0"')
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name, path = self._path()
        if self.path == "/counts":
            with self.server.lock:
                seen, self.server.seen = self.server.seen, []
            return self._answer(200, json.dumps(seen).encode())
        if not name:
            return self._list()
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        try:
            status = os.fstat(fd)
            start, stop = 0, status.st_size
            if found := _RANGE.fullmatch(self.headers.get("Range", "")):
                start = int(found[1])
                stop = min(int(found[2]) + 1, stop) if found[2] else stop
            if start >= stop > 0:
                return self._answer(416, b"<Error><Code>InvalidRange</Code></Error>")
            self.server.count(self.command, name, start, stop)
            self.send_response_only(206 if found else 200)
            self.send_header("Content-Length", str(stop - start))
            if found:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{status.st_size}")
            self.send_header("Last-Modified", formatdate(status.st_mtime, usegmt=True))
            self.send_header("ETag", '"0"')
            self.end_headers()
            at = start
            while self.command == "GET" and at < stop:
                at += os.sendfile(self.connection.fileno(), fd, at, stop - at)
        finally:
            os.close(fd)
        return None

    do_HEAD = do_GET

    def _list(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        prefix = query.get("prefix", [""])[0]
        self.server.count("LIST", prefix, 0, 0)
        rows = []
        for entry in os.scandir(self.server.folder):
            name = entry.name.replace("%", "/")
            if name.startswith(prefix) and not entry.name.startswith("."):
                status = entry.stat()
                rows.append((name, status.st_size))
        items = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2020-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;0&quot;</ETag><Size>{size}</Size></Contents>"
            for name, size in sorted(rows)
        )
        text = f'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>'
        self._answer(200, text.encode())

    def do_PUT(self) -> None:
        name, path = self._path()
        if not name:
            return self._answer(200)
        left = int(self.headers["Content-Length"])
        self.server.count("PUT", name, 0, left)
        temporary = path.with_name(f".{threading.get_ident()}")
        with temporary.open("wb", buffering=0) as file:
            # What came with the headers; the rest goes from the socket to the file without passing through here.
            left -= file.write(self.rfile.peek()[:left])
            self.rfile.read(file.tell())
            left -= _moved(self.connection.fileno(), file.fileno(), left)
        if left:
            temporary.unlink()
            self.close_connection = True
            return None
        temporary.rename(path)
        return self._answer(200)

    def do_DELETE(self) -> None:
        name, path = self._path()
        self.server.count("DELETE", name, 0, 0)
        path.unlink(missing_ok=True)
        self._answer(204)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = re.findall(r"<Key>(.*?)</Key>", body)
        for name in names:
            self.server.count("DELETE", name, 0, 0)
            (self.server.folder / name.replace("/", "%")).unlink(missing_ok=True)
        gone = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
        self._answer(200, f'<?xml version="1.0"?><DeleteResult>{gone}</DeleteResult>'.encode())


def _moved(source: int, target: int, size: int) -> int:
    """Move bytes from a socket to a file; how many there were."""
    out, into = os.pipe()
    done = 0
    try:
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, _PIECE)
        while done < size:
            held = os.splice(source, into, min(_PIECE, size - done))
            if not held:
                break
            done += held
            while held:
                held -= os.splice(out, target, held)
    finally:
        os.close(out)
        os.close(into)
    return done


def main(folder: Path) -> None:
    server = Server(folder)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
