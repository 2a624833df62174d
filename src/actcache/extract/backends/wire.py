"""nnsight's client for one request, quiet, and with a connection that notices when the other side is gone."""

from __future__ import annotations

import functools
import json
import math
import socket
import time
from typing import Any

from actcache.config import remote_patience
from actcache.errors import EngineUnavailableError

_CONNECT_SECONDS = 10
# A server that is gone without a word is noticed after about two minutes.
_KEPT_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


def wire(model_key: str, *, host: str, api_key: str, env: dict[str, Any]) -> Any:
    """What carries one block to `host` and its answer back, as nnsight's "backend" of a trace."""
    return _wire()(model_key, host=host, api_key=api_key, env=env)


@functools.cache
def _wire() -> Any:
    from nnsight.intervention.backends.display import StatusDisplay
    from nnsight.intervention.backends.remote import RemoteBackend
    from nnsight.schema.response import Status

    def _message(connection: Any, host: str) -> Any:
        """The next thing that the server says; signs of life between the machines are none.

        A job may wait its turn for long, of which the server tells.
        """
        import websocket

        patience = remote_patience()
        until = time.monotonic() + patience.value
        while True:
            left = until - time.monotonic()
            connection.settimeout(None if math.isinf(left) else max(left, 1e-3))
            try:
                kind, data = connection.recv_data(control_frame=True)
            except websocket.WebSocketTimeoutException:
                left = 0
            if left <= 0:
                raise EngineUnavailableError(
                    f"{host} has accepted a batch and said nothing of it for {patience.value:g} s. What was finished "
                    "is stored, and the same call goes on from there. To wait longer set ACTCACHE_REMOTE_TIMEOUT to "
                    "more seconds."
                )
            if kind == websocket.ABNF.OPCODE_CLOSE:
                raise websocket.WebSocketConnectionClosedException("the server has closed the connection")
            if kind in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
                return data.decode() if kind == websocket.ABNF.OPCODE_TEXT else data

    class Wire(RemoteBackend):  # type: ignore[misc, unused-ignore]
        def __init__(self, model_key: str, **options: Any) -> None:
            super().__init__(model_key, **options)
            self.display = StatusDisplay(enabled=False)

        def request(self, request: Any, tracer: Any) -> Any:
            import websocket

            blob = self._serialize(tracer)
            options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
            # Not every system has each of them.
            options += [
                (socket.IPPROTO_TCP, getattr(socket, name), value)
                for name, value in _KEPT_ALIVE.items()
                if hasattr(socket, name)
            ]
            connection = websocket.create_connection(
                f"{self.ws_host}/subscribe",
                header={"ndif-api-key": self.api_key} if self.api_key else None,
                timeout=_CONNECT_SECONDS,
                sockopt=options,
            )
            try:
                request.session_id = json.loads(connection.recv())["session_id"]
                self.send(request, blob)
                while True:
                    response = self.parse(_message(connection, self.ws_host))
                    result = self.handle(response)
                    if response.status == Status.COMPLETED:
                        return result
            finally:
                connection.close()

    return Wire
