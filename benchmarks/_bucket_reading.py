"""Reading one layer out of a bucket, beside a plain download of the same ranges."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from _bucket import (
    LAYERS,
    LAYOUT,
    PROMPTS,
    SITES,
    WIDTH,
    Server,
    batches,
    nbytes,
    open_store,
    plain_client,
    recycle,
    write,
)
from _measure import Report, Row, Tables, compare
from actcache.store import behind
from actcache.store.records import BLOCK, TOKENS, Records
from actcache.store.store import Store


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
