"""A store in a bucket against plain downloads and uploads of the same bytes by the same client, in the same run.

    python benchmarks/object_store.py [--quick] [--part NAME] [--json FILE] [--folder DIR]

Over a server of our own on 127.0.0.1 (`_s3_server.py`: those that the tests talk to would be the limit), which counts
requests and bytes. It runs beside the client on the same processors, for both sides of every ratio.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from _measure import Report, Row, Tables, arguments, compare, reporting
from actcache.store import behind
from actcache.store.beside import Beside
from actcache.store.mapped import start_writing
from actcache.store.prompts import PromptTable
from actcache.store.records import BLOCK, TOKENS, Records
from actcache.store.statistics import JointMoments
from actcache.store.store import Store

PROMPTS, LAYERS, WIDTH = 2000, 24, 1024
WRITTEN = 10_000
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


def reading(folder: Path, server: Server, report: Report, rounds: int, tokens: int) -> Tables:
    """One layer of 24 of all prompts, on a machine that knows the heads; and again, when it has the rows."""
    of_one = Layer(folder, server, LAYOUT, 1, "one vector each")
    of_each = Layer(folder, server, TOKENS, tokens, f"{tokens} tokens each")
    return [table for layer in (of_one, of_each) for table in layer.measured(report, rounds)]


@dataclass
class Layer:
    """One layer of every prompt, `rows` for each of them."""

    folder: Path
    server: Server
    layout: str
    rows: int
    what: str

    def measured(self, report: Report, rounds: int) -> Tables:
        self.prefix = f"read-{self.layout}"
        self.pooling = None if self.layout == TOKENS else self.layout
        self.nbytes = PROMPTS * self.rows * WIDTH * 2
        parts = batches(PROMPTS, 100, self.rows, self.layout)
        write(*open_store(self.folder, self.prefix), parts)
        ranges = self.transfers(report)
        cold = self.cold(ranges, rounds)
        warm = self.warm(parts, rounds)
        title = f"reading one layer of {PROMPTS:,} prompts, {self.what}"
        return [
            (title, cold, {"nbytes": self.nbytes, "bounds": {"read": 0.7}}),
            (f"{title}, once more", warm, {"nbytes": self.nbytes, "bounds": {"read": 0.9}}),
        ]

    def read(self, store: Store, space: str, site: str) -> Any:
        return store.read(space, None, site, pooling=self.pooling)

    def transfers(self, report: Report) -> dict[str, list[tuple[str, int, int]]]:
        """What is fetched for each layer; the first one brings the heads."""
        self.server.seen()
        store, space = open_store(self.folder, self.prefix)
        ranges = {}
        for site in SITES:
            self.read(store, space, site)
            seen = self.server.seen()
            ranges[site] = seen.rows()
            if site == SITES[0]:
                heads, first = seen.heads(), seen.count()
        store.close()
        worst = max(map(nbytes, ranges.values())) / self.nbytes
        held = worst <= 1.1
        report.held &= held
        others = max(map(len, ranges.values()))
        print(
            f"\none layer of {LAYERS} of {PROMPTS:,} prompts, {self.what} ({self.nbytes / 1e6:.1f} MB): transfers at "
            f"most {worst:.3f} x its bytes  (<= 1.1 {'ok' if held else 'MISSED'}) and {heads / 1e6:.2f} MB of heads; "
            f"{first} requests with the first layer, at most {others} with another"
        )
        report.record.append({
            "title": f"transfer, {self.what}", "ratio": worst, "heads": heads, "requests_first": first,
            "requests_another": others,
        })  # fmt: skip
        return ranges

    def cold(self, ranges: dict[str, list[tuple[str, int, int]]], rounds: int) -> list[Row]:
        """On a machine that has the heads and none of the rows, against the same ranges downloaded into memory."""
        import obstore

        client = plain_client(self.server.port)
        machines = {name: Fresh(self) for name in ("located, taken", "and on the disk", "read")}
        kept: list[Any] = []
        turn = count()

        def before(name: str) -> None:
            kept.clear()
            # What is written behind an answer takes no time of what is measured next.
            behind.settle()
            if name in machines:
                machines[name].forget()
            recycle(self.folder, max(128 << 20, 3 * self.nbytes))

        def one(what: tuple[str, int, int]) -> Any:
            name, start, stop = what
            return obstore.get_range(client, name, start=start, end=stop)

        def on_the_disk() -> None:
            kept.append(machines["and on the disk"].taken())
            behind.settle()

        def plain() -> None:
            kept.append(list(pool.map(one, ranges[SITES[next(turn) % LAYERS]])))

        def least() -> None:
            kept.append(self.least(pool, one, ranges[SITES[next(turn) % LAYERS]]))

        with ThreadPoolExecutor(open_store(self.folder, self.prefix)[0].backend.concurrency) as pool:
            rows = compare(
                plain,
                {"looked at and copied": least,
                 "located, taken": lambda: kept.append(machines["located, taken"].taken()),
                 "and on the disk": on_the_disk,
                 "read": lambda: kept.append(machines["read"].read())},
                rounds, reference_name="plain ranged download", before=before,
            )  # fmt: skip
        for machine in machines.values():
            machine.close()
        speed = {row.name: row for row in rows}
        limit = speed["looked at and copied"]
        share = limit.wall / speed["read"].wall
        print(
            f"\n{self.what}: the download, each block hashed and copied into what is returned, and nothing else, "
            f"reaches {limit.speed.median:.2f} of the download's speed; of that read: {share:.2f}"
        )
        return rows

    def least(
        self, pool: ThreadPoolExecutor, one: Callable[[tuple[str, int, int]], Any], ranges: list[tuple[str, int, int]]
    ) -> Any:
        """The same requests, and of what a store promises only a checksum of each block, and tensors of one's own.

        Where anything lies is known, no checksum is compared, and nothing is kept on the disk.
        """
        import torch

        ends = np.cumsum([stop - start for _, start, stop in ranges]).tolist()
        whole = np.empty(ends[-1], np.uint8)

        def bring(wanted: tuple[tuple[str, int, int], int]) -> None:
            what, end = wanted
            data = memoryview(one(what))
            for start in range(0, len(data), BLOCK):
                xxhash.xxh3_64_intdigest(data[start : start + BLOCK])
            whole[end - len(data) : end] = np.frombuffer(data, np.uint8)

        jobs = [pool.submit(bring, wanted) for wanted in zip(ranges, ends, strict=True)]
        rows = whole[: self.nbytes].view(np.float16).reshape(-1, WIDTH)
        # While it comes.
        if self.layout == TOKENS:
            answer = [torch.from_numpy(rows[i : i + self.rows]) for i in range(0, len(rows), self.rows)]
        else:
            answer = torch.from_numpy(rows)
        for job in jobs:
            job.result()
        return answer

    def warm(self, parts: Sequence[Records], rounds: int) -> list[Row]:
        """Once more, against a store on files."""
        local = Store(self.folder / "local", index_dir=self.folder / "local index")
        here = local.open_space({"benchmark": self.prefix}, {"model_name": "benchmark"})
        write(local, here, parts)
        bucket, there = open_store(self.folder, self.prefix)
        pairs = zip(self.read(local, here, SITES[3]), self.read(bucket, there, SITES[3]), strict=True)
        assert all((a == b).all() for a, b in pairs)
        self.server.seen()
        rows = compare(
            lambda: self.read(local, here, SITES[3]),
            {"read": lambda: self.read(bucket, there, SITES[3])},
            rounds,
            reference_name="store on files",
        )
        assert not self.server.seen().requests, "what is here is not asked for"
        for store in (local, bucket):
            store.close()
        return rows


class Fresh:
    """A machine that has the heads of a store, and of its rows only those that were read since it was new."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.left: list[str] = []
        self.store: Store | None = None

    def forget(self) -> None:
        """See to it that there is a layer next of which nothing is here."""
        if not self.left:
            self.close()
            self.store, self.space = open_store(self.layer.folder, self.layer.prefix)
            self.table = self.store.prompts(self.space)
            self.left = list(SITES)
        assert self.store is not None
        self.site = self.left.pop()
        self.place = self.store.locate(
            self.space, table=self.table, sites=[self.site], layout=self.layer.layout, check=False
        )

    def read(self) -> Any:
        assert self.store is not None
        return self.layer.read(self.store, self.space, self.site)

    def taken(self) -> Any:
        return self.place.all_rows() if self.layer.layout == TOKENS else self.place.take()

    def close(self) -> None:
        if self.store is not None:
            self.store.close()
            shutil.rmtree(self.store.index_dir)


def writing(folder: Path, server: Server, report: Report, rounds: int, n: int) -> Tables:
    """A long run, batch by batch, each durable on this host before the next; when it ends all is in the bucket."""
    large = -(-(64 << 20) // (LAYERS * WIDTH * 2))
    ways = {f"commits of {size} prompts": batches(n, size, 16, LAYOUT) for size in (64, large)}
    largest = f"commits of {large} prompts"
    size = n * LAYERS * WIDTH * 2
    for name, parts in ways.items():
        server.seen()
        write(*open_store(folder, f"first-{next(_fresh)}"), parts)
        seen = server.seen()
        per_10k = seen.count() * WRITTEN / n
        held = per_10k <= 20
        report.held &= held
        sizes = [stop for method, key, _, stop in seen.requests if method == "PUT" and key.endswith(".safetensors")]
        by_method = {method: seen.count(method) for method in sorted({r[0] for r in seen.requests})}
        print(
            f"\n{name}, {n:,} x {LAYERS} x {WIDTH} float16 ({size / 1e6:.0f} MB): {per_10k:.1f} requests for "
            f"{WRITTEN:,} prompts  (<= 20 {'ok' if held else 'MISSED'}): {by_method}; {len(sizes)} segments, "
            f"{sum(sizes) / size:.3f} x the bytes"
        )
        report.record.append(
            {"title": f"requests, {name}", "per_10k": per_10k, "methods": by_method, "segments": sizes}
        )
    client, unhashed = plain_client(server.port), plain_client(server.port, hashes=False)
    blobs = [_rng.bytes(length) for length in sizes]

    def put(i: int, client: Any = unhashed) -> None:
        import obstore

        obstore.put(client, f"plain/{i}", blobs[i], use_multipart=False)

    def tidy(name: str) -> None:
        for path in folder.glob("index *"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
        for path in (folder / "objects").iterdir():
            path.unlink()
        os.sync()
        recycle(folder, 3 * size)

    def stored(parts: Sequence[Records]) -> None:
        write(*open_store(folder, f"again-{next(_fresh)}"), parts)

    def least(pool: ThreadPoolExecutor, parts: Sequence[Records], *, measured: bool, kept: bool = False) -> None:
        """The same puts while the same bytes become durable here, at once, hashed and measured where `measured`.

        `kept`: what a store promises is kept, too: each commit is durable before the next one is written, and an object
        is put when all of it is there.
        """
        jobs = []
        moments = JointMoments(LAYERS, WIDTH)

        def look(data: list[Any]) -> None:
            for flat in (memoryview(rows).cast("B") for rows in data if measured):
                for start in range(0, len(flat), BLOCK):
                    xxhash.xxh3_64_intdigest(flat[start : start + BLOCK])
            if measured:
                moments.update(data)

        def send(durable: int) -> None:
            while len(jobs) < len(blobs) and sum(sizes[: len(jobs) + 1]) <= durable:
                jobs.append(pool.submit(put, len(jobs)))

        fd = os.open(folder / f"index {next(_fresh)}.least", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, size)
        at = 0
        send(0 if kept else sum(sizes))
        for part in parts:
            data = list(part.data.values())
            with Beside(lambda data=data: look(data)):  # type: ignore[misc]
                for rows in data:
                    at += os.pwrite(fd, memoryview(rows).cast("B"), at)
                    start_writing(fd, 0, 0)
                if kept:
                    os.fdatasync(fd)
            send(at if kept else 0)
        os.fdatasync(fd)
        os.close(fd)
        send(sum(sizes))
        for job in jobs:
            job.result()

    # As many at a time as a store puts.
    with ThreadPoolExecutor(4) as pool:
        rows = compare(
            lambda: list(pool.map(lambda i: put(i, client), range(len(blobs)))),
            {"bodies not hashed": lambda: list(pool.map(put, range(len(blobs)))),
             "and durable here": lambda: least(pool, ways[largest], measured=False),
             "and hashed and measured": lambda: least(pool, ways[largest], measured=True)}
            | {f"nothing but {name}": lambda parts=parts: least(pool, parts, measured=True, kept=True)  # type: ignore[misc]
               for name, parts in ways.items()}
            | {name: lambda parts=parts: stored(parts) for name, parts in ways.items()},  # type: ignore[misc]
            rounds, reference_name="plain puts", warmup=1, before=tidy,
        )  # fmt: skip
    speed = {row.name: row for row in rows}
    for name in ways:
        limit = speed[f"nothing but {name}"]
        print(
            f"\n{name}: what a store promises, and nothing else, beside plain puts on these processors and this disk "
            f"allows {limit.speed.median:.2f} of their speed; of that: {limit.wall / speed[name].wall:.2f}"
        )
    title = f"writing {n:,} prompts x {LAYERS} x {WIDTH} float16, from the first batch until all is in the bucket"
    return [(title, rows, {"nbytes": size, "bounds": dict.fromkeys(ways, 0.7)})]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--part", action="append", help="only this part: reading, writing (may be repeated)")
    options = parser.parse_args()
    rounds, long = (7, 3) if options.quick else (31, 5)
    tokens, n = (4, 4_000) if options.quick else (16, WRITTEN)
    parts: dict[str, Callable[[Path, Server, Report], Tables]] = {
        "reading": lambda folder, server, report: reading(folder, server, report, rounds, tokens),
        "writing": lambda folder, server, report: writing(folder, server, report, long, n),
    }
    chosen = options.part or list(parts)
    if unknown := set(chosen) - parts.keys():
        parser.error(f"unknown part {sorted(unknown)[0]!r}: expected {', '.join(parts)}")
    with reporting(options) as report:
        for name in chosen:
            (report.folder / name).mkdir()
            with serving(report.folder / name / "objects") as server:
                report.add(parts[name](report.folder / name, server, report), show="speed")
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main())
