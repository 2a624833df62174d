"""A server that speaks NDIF's protocol, in a process of its own that does not have actcache.

    python tests/ndif_server.py KEY FAILURES

`KEY` is the only API key that is let in. `FAILURES` is a file: each request takes its first line away, which says what
goes wrong with it (503, 429, 404, drop, error, memory, garbage, nothing, slow, silent; anything else is served). It
prints its port, and then a line for each request that was served.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import queue
import struct
import sys
import threading
import time
import warnings
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class NotHere:
    """Nothing of the client's own packages can be imported."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] == "actcache":
            raise ModuleNotFoundError(f"no module named {name!r} on the server")


sys.meta_path.insert(0, NotHere())  # type: ignore[arg-type]

import torch  # noqa: E402
import zstandard  # noqa: E402
from nnsight import NNsight  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import ResponseModel, Status  # noqa: E402
from nnsight.tracing.tracer import dec, inc  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

KEY, FAILURES = sys.argv[1], Path(sys.argv[2])
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
sessions: dict[str, queue.Queue[Any]] = {}
models: dict[str, Any] = {}
one_at_a_time = threading.Lock()


def wrapped(key: str) -> Any:
    """The model of a key, as nnsight wraps it; `LookupError` for one that is not served."""
    if key not in models:
        kind, _, told = key.partition(":")
        data = json.loads(told)
        if kind != "nnsight.modeling.transformers.TransformersModel" or data["task"] != "text-generation":
            raise LookupError(f"no deployment for {key}")
        if not Path(data["repo_id"]).is_dir():
            raise LookupError(f"no model {data['repo_id']}")
        models[key] = NNsight(AutoModelForCausalLM.from_pretrained(data["repo_id"], dtype=torch.float32).eval())
    return models[key]


@torch.no_grad()
def execute(key: str, env: dict[str, Any], blob: bytes, compress: bool) -> bytes:
    with one_at_a_time:
        model = wrapped(key)
        model._module.set_attn_implementation(env["attn_implementation"])
        there = {f"Module:{part.path}": part._module for part in model.modules()}
        tracer = RequestModel.deserialize(blob, {"Interleaver": model.interleaver, **there}, compress)
        before = dict(tracer.info.frame.f_locals)
        # As on leaving the block: only what is saved inside comes back.
        inc()
        try:
            tracer.execute(tracer.info.code)
        finally:
            dec()
        after = tracer.info.frame.f_locals
    saved = {name: value for name, value in after.items() if name not in before or before[name] is not value}
    with io.BytesIO() as file:
        torch.save(saved, file)
        data = file.getvalue()
    return zstandard.ZstdCompressor().compress(data) if compress else data


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        if self.headers.get("ndif-api-key") == KEY:
            return True
        self.answer(401, {"detail": "Invalid or missing API key"})
        return False

    def do_GET(self) -> None:
        if self.path != "/subscribe" or not self.allowed():
            return
        self.close_connection = True
        digest = hashlib.sha1((self.headers["Sec-WebSocket-Key"] + GUID).encode()).digest()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(digest).decode())
        self.end_headers()
        name = os.urandom(8).hex()
        waiting = sessions[name] = queue.Queue()
        self.frame(json.dumps({"session_id": name}))
        while (message := waiting.get()) is not None:
            if message == b"":
                self.wfile.write(bytes([0x89, 0]))
                self.wfile.flush()
            else:
                self.frame(message)

    def frame(self, message: str | bytes) -> None:
        data = message.encode() if isinstance(message, str) else message
        head = bytes([0x81 if isinstance(message, str) else 0x82])
        if len(data) < 126:
            head += bytes([len(data)])
        elif len(data) < 1 << 16:
            head += struct.pack("!BH", 126, len(data))
        else:
            head += struct.pack("!BQ", 127, len(data))
        self.wfile.write(head + data)
        self.wfile.flush()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed():
            return
        lines = FAILURES.read_text().splitlines() if FAILURES.exists() else []
        fails = lines[0] if lines else ""
        FAILURES.write_text("\n".join(lines[1:]))
        if fails.isdigit():
            self.answer(int(fails), {"detail": "as told"})
            return
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
                 for part in BytesParser().parsebytes(head + body).get_payload()}  # type: ignore[union-attr]  # fmt: skip
        told = json.loads(parts["data"])  # type: ignore[arg-type]
        self.answer(200, {"id": "1", "status": "RECEIVED"})
        waiting = sessions[told["session_id"]]
        threading.Thread(target=self.work, args=(told, parts["blob"], waiting, fails), daemon=True).start()

    def work(self, told: dict[str, Any], blob: bytes, waiting: queue.Queue[Any], fails: str) -> None:
        def say(status: Status, **more: Any) -> ResponseModel:
            return ResponseModel(id="1", status=status, **more)

        waiting.put(say(Status.RUNNING).model_dump_json())
        if fails == "silent":
            # Its machine is there: it says so without a word about the job.
            for _ in range(600):
                waiting.put(b"")
                time.sleep(0.1)
        if fails == "slow":
            time.sleep(60)
        if fails == "drop":
            waiting.put(None)
            return
        try:
            if fails in ("error", "memory"):
                raise RuntimeError("CUDA out of memory" if fails == "memory" else "as told")
            data = execute(told["model_key"], told["env"], blob, told["compress"])
        except Exception as error:
            waiting.put(say(Status.ERROR, description=f"{type(error).__name__}: {error}").model_dump_json())
        else:
            if fails == "garbage":
                data = data[: len(data) // 2]
            if fails == "nothing":
                data = zstandard.ZstdCompressor().compress(_saved_nothing())
            waiting.put(say(Status.COMPLETED, data=data).pickle())
            print(f"served {len(blob)} {len(data)}", flush=True)
        waiting.put(None)


def _saved_nothing() -> bytes:
    with io.BytesIO() as file:
        torch.save({}, file)
        return file.getvalue()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.daemon_threads = True
    print(service.server_address[1], flush=True)
    service.serve_forever()
