"""What benchmarks of stores in a bucket share: a server that counts, a plain client, prompts and their vectors."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from actcache.store.prompts import PromptTable
from actcache.store.records import TOKENS, Records
from actcache.store.store import Store

PROMPTS, LAYERS, WIDTH = 2000, 24, 1024
LAYOUT = "last_token"
SITES = [f"resid_post.{layer}" for layer in range(LAYERS)]
_rng = np.random.default_rng(0)
_fresh = count()


@dataclass(frozen=True)
class Seen:
    """What came by at the server: requests of a method, for objects and byte ranges of them."""

    requests: list[tuple[str, str, int, int]]

    def count(self, *methods: str) -> int:
        return sum(not methods or method in methods for method, *_ in self.requests)

    def rows(self) -> list[tuple[str, int, int]]:
        """The ranges of segments that do not begin with their head."""
        return [
            (name, start, stop)
            for method, name, start, stop in self.requests
            if method == "GET" and start and name.endswith(".safetensors")
        ]

    def heads(self) -> int:
        return sum(stop - start for method, _, start, stop in self.requests if method == "GET") - nbytes(self.rows())


@dataclass(frozen=True)
class Server:
    port: int

    def seen(self) -> Seen:
        """What came by since the last time."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/counts")
        return Seen([tuple(entry) for entry in json.loads(connection.getresponse().read())])


def nbytes(ranges: Sequence[tuple[str, int, int]]) -> int:
    return sum(stop - start for _, start, stop in ranges)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """The server, with its objects in `folder`; the environment says how to reach it."""
    folder.mkdir()
    command = [sys.executable, Path(__file__).with_name("_s3_server.py"), folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        port = int(process.stdout.readline())
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="any",
            AWS_REGION="us-east-1", AWS_CONFIG_FILE=str(folder / "none"),
            AWS_SHARED_CREDENTIALS_FILE=str(folder / "none"),
        )  # fmt: skip
        yield Server(port)
        process.stdin.close()


def plain_client(port: int, *, hashes: bool = True) -> Any:
    """obstore's own; `ObjectBackend` has one that does not hash (`hashes`) bodies that stay on this machine."""
    from obstore.store import S3Store

    return S3Store(
        "bucket", endpoint=f"http://127.0.0.1:{port}", access_key_id="any", secret_access_key="any",
        region="us-east-1", client_options={"allow_http": True}, config={"unsigned_payload": not hashes},
    )  # fmt: skip


def recycle(folder: Path, size: int) -> None:
    """Let the next `size` bytes that are written find pages that were in use just now.

    On machines that hand free memory back to their host the first touch of a page costs up to ten times as much.
    """
    junk, piece = folder / "junk", bytes(8 << 20)
    with junk.open("wb", buffering=0) as file:
        for _ in range(0, size, len(piece)):
            file.write(piece)
    junk.unlink()


def make_prompts(first: int, n: int, tokens: int) -> PromptTable:
    texts = [f"prompt {i}: {'word ' * (i % 17)}ends here" for i in range(first, first + n)]
    return PromptTable.build(list(_rng.integers(0, 50_000, (n, tokens), np.int32)), texts, text_context="benchmark")


def batches(n: int, size: int, tokens: int, layout: str) -> list[Records]:
    """Prompts of their own for each batch; the vectors are those of a few batches, too many for the caches."""
    rows = size * (tokens if layout == TOKENS else 1)
    each = rows * LAYERS * WIDTH * 2
    pool = [
        {site: _rng.standard_normal((rows, WIDTH), np.float32).astype(np.float16) for site in SITES}
        for _ in range(max(1, (32 << 20) // each))
    ]
    made = []
    for k, first in enumerate(range(0, n, size)):
        # Of one token there are too few to tell prompts apart.
        table = make_prompts(first, min(size, n - first), tokens if layout == TOKENS else max(16, tokens))
        here = len(table) * (tokens if layout == TOKENS else 1)
        data = {site: values[:here] for site, values in pool[k % len(pool)].items()}
        made.append(Records.tokens(table, data) if layout == TOKENS else Records.pooled(table, layout, data))
    return made


def open_store(folder: Path, prefix: str) -> tuple[Store, str]:
    """The store as a machine sees it that has never seen it."""
    store = Store(f"s3://bucket/{prefix}", index_dir=folder / f"index {next(_fresh)}")
    return store, store.open_space({"benchmark": prefix}, {"model_name": "benchmark"})


def write(store: Store, space: str, parts: Sequence[Records]) -> None:
    with store.writer(space) as writer:
        for part in parts:
            p = part.prompts
            fresh = PromptTable(p.token_ids, p.token_offset, p.kind, p.text, p.text_offset, p.text_context)
            writer.put(Records.tokens(fresh, part.data) if part.layout == TOKENS else
                       Records.pooled(fresh, part.layout, part.data))  # fmt: skip
    store.close()
