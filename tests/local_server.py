"""Servers on 127.0.0.1 that answer while a block is open."""

from __future__ import annotations

import socketserver
import threading
from types import TracebackType
from typing import Self


class LocalServer:
    """`url` is where `server` answers, in a thread of its own."""

    def __init__(self, server: socketserver.TCPServer) -> None:
        self._server = server
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self._thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
