"""What many segments cost before anything is read of them: listing, headers, the index, in a folder and in a bucket.

    python benchmarks/listing.py [--segments 2000] [--prompts 100] [--json FILE] [--folder DIR]

A store of that many segments is made, of real headers with `--prompts` prompts each and next to no data (one number
each), in a folder and in a bucket that lies in memory and is listed in pages of 1,000 names. Measured, at a tenth of
the segments and at all of them: opening it on a host that knows nothing of it, opening it again, a look whether
anything has changed, one prompt found, memory. The first is bounded: ten times the segments may take at most 15 times
as long, so that what is seen here can be scaled to a million (``--segments 1000000`` needs 5 GB and some hours).

`docs/scale.md` takes its figures per segment and per prompt from here; they are of the machine that it names.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

from _measure import arguments, reporting
from actcache.store.backend import Bytes, MemoryBackend, ObjectInfo
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.segment import write
from actcache.store.store import Store

PAGE = 1_000
LAYOUT, SITE, CONTEXT = "last_token", "resid_post.0", "benchmark"
GROWTH = 15.0


class Bucket(MemoryBackend):
    """A place that counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()
        self._counting = threading.Lock()

    def forget(self) -> None:
        self.pages = self.reads = self.nbytes = 0

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for number, info in enumerate(super().list(prefix)):
            self.pages += number % PAGE == 0
            yield info

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        found = super().read(name, start, stop)
        with self._counting:
            self.reads += 1
            self.nbytes += len(found)
        return found


def text_of(segment: int, prompt: int) -> str:
    return f"prompt {prompt} of segment {segment}"


def fill(folder: Path, segments: int, prompts: int) -> str:
    """A store in `folder`; its space. Nothing is synced: it is made to be looked at, and thrown away."""
    with Store(folder, index_dir=folder.parent / "made") as store:
        space = store.open_space({"benchmark": "listing"}, {"model_name": "benchmark"})
    ids = np.arange(8, dtype=np.int32)
    rows = np.zeros((prompts, 1), np.float16)
    with mock.patch.object(os, "fsync"), mock.patch.object(os, "fdatasync", create=True):
        for segment in range(segments):
            each = [ids + (segment * prompts + k) * 8 for k in range(prompts)]
            table = PromptTable.build(each, [text_of(segment, k) for k in range(prompts)], text_context=CONTEXT)
            write(folder / "v1" / space, Records.pooled(table, LAYOUT, {SITE: rows}), space=space)
    return space


def timed(run: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def anonymous() -> int:
    """Bytes of anonymous memory of this process; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure(open_store: Callable[[], Store], space: str, segments: int, prompts: int) -> dict[str, float]:
    """Seconds of each step, and bytes of memory that the index takes when it is there."""
    wanted = [text_of(segments // 2, prompts // 2)]

    def find(store: Store) -> None:
        assert store.contains(space, wanted, SITE, pooling=LAYOUT).all()

    found: dict[str, float] = {}
    store = open_store()
    found["first open"] = timed(lambda: find(store))
    store.close()
    del store
    gc.collect()
    before = anonymous()
    store = open_store()
    found["open again"] = timed(lambda: find(store))
    found["memory"] = float(max(0, anonymous() - before))
    found["nothing has changed"] = timed(lambda: store.refresh())
    found["one prompt"] = min(timed(lambda: find(store)) for _ in range(5))
    store.close()
    return found


def table(title: str, few: int, many: int, prompts: int, sizes: dict[int, dict[str, float]]) -> bool:
    print(f"\n{title}")
    print(f"{'':22} {few:>10,} {many:>12,} segments   growth   per segment")
    held = True
    for step in sizes[many]:
        a, b = sizes[few][step], sizes[many][step]
        if step == "memory":
            print(
                f"{step:22} {a / 2**20:>7.1f} MB {b / 2**20:>9.1f} MB {'':20} {b / many / prompts:8.0f} bytes a prompt"
            )
            continue
        if step in ("pages listed", "reads", "bytes read"):
            print(f"{step:22} {a:>10,.0f} {b:>12,.0f} {'':20} {b / many:10.3f}")
            continue
        growth = b / max(a, 1e-9)
        # What takes milliseconds in all does not tell how it grows.
        bounded = step == "first open" and a > 0.05
        verdict = "" if not bounded else "  ok" if growth <= GROWTH * many / few / 10 else "  MISSED"
        held &= "MISSED" not in verdict
        print(f"{step:22} {a * 1e3:>7.1f} ms {b * 1e3:>9.1f} ms {growth:>14.1f} {b / many * 1e6:>9.1f} us{verdict}")
    return held


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--segments", type=int, default=2_000)
    parser.add_argument("--prompts", type=int, default=100, help="in each segment")
    parser.add_argument("--where", choices=["folder", "bucket", "both"], default="both")
    options = parser.parse_args()
    many = options.segments
    few = max(1, many // 10)
    if few < 10:
        parser.error("--segments: at least 100, so that there is something to see")
    local: dict[int, dict[str, float]] = {}
    bucket: dict[int, dict[str, float]] = {}
    with reporting(options) as report:
        for segments in (few, many):
            place = report.folder / str(segments)
            start = time.perf_counter()
            space = fill(place / "store", segments, options.prompts)
            print(f"{segments:,} segments of {options.prompts} prompts made in {time.perf_counter() - start:.1f} s")
            if options.where != "bucket":
                opened = partial(Store, place / "store", index_dir=place / "index")
                local[segments] = measure(opened, space, segments, options.prompts)
            if options.where != "folder":
                backend = Bucket()
                for path in sorted((place / "store" / "v1" / space).iterdir()):
                    backend.put(f"v1/{space}/{path.name}", path)
                backend.forget()
                opened = partial(Store, backend, index_dir=place / "mirror")
                bucket[segments] = measure(opened, space, segments, options.prompts)
                asked = backend.pages, backend.reads, backend.nbytes
                bucket[segments] |= dict(zip(("pages listed", "reads", "bytes read"), map(float, asked), strict=True))
        held = not local or table("a folder", few, many, options.prompts, local)
        if bucket:
            held &= table("a bucket in memory, no time on the way", few, many, options.prompts, bucket)
        report.record += [{"where": "folder", **v, "segments": k} for k, v in local.items()]
        report.record += [{"where": "bucket", **v, "segments": k} for k, v in bucket.items()]
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
