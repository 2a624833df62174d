"""A store in a bucket against plain downloads and uploads of the same bytes by the same client, in the same run.

    python benchmarks/object_store.py [--quick] [--part NAME] [--json FILE] [--folder DIR]

Over a server of our own on 127.0.0.1 (`_s3_server.py`: those that the tests talk to would be the limit), which counts
requests and bytes. It runs beside the client on the same processors, for both sides of every ratio.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from _bucket import (
    LAYERS,
    LAYOUT,
    WIDTH,
    Server,
    batches,
    open_store,
    plain_client,
    recycle,
    serving,
    write,
)
from _bucket_reading import reading
from _measure import Report, Tables, arguments, compare, reporting
from actcache.store.beside import Beside
from actcache.store.mapped import start_writing
from actcache.store.records import BLOCK, Records
from actcache.store.statistics import JointMoments

WRITTEN = 10_000
_rng = np.random.default_rng(1)
_fresh = count()


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
