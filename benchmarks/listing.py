"""What many segments cost before anything is read of them: listing, headers, the index, in a folder and in a bucket.

    python benchmarks/listing.py [--segments 2000] [--prompts 100] [--where folder] [--json FILE] [--folder DIR]
    python benchmarks/listing.py --segments 1000000 --prompts 10

A store of that many segments is made, of real headers with `--prompts` prompts each and next to no data (one number
each), in a folder and in a bucket that lies in memory and is listed in pages of 1,000 names. Measured, at a tenth of
the segments and at all of them (from 100,000 on at a hundredth, too): opening it on a host that knows nothing of it,
opening it again, a look whether anything has changed, one prompt found, memory. The first is bounded: ten times the
segments may take at most 15 times as long. Everything is printed as it is measured.

A million segments of 10 prompts take 4 GB of disk, 2 GB of memory and half an hour to an hour. What is bounded is
processor time: files by the hundred thousand are slow or fast by what else the disk does.

`docs/scale.md` takes its figures per segment and per prompt from here; they are of the machine that it names.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from _measure import arguments, reporting
from actcache.store import container
from actcache.store.backend import Bytes, MemoryBackend, ObjectInfo
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.segment import validate, write
from actcache.store.store import Store
from actcache.testing.memory import anonymous

PAGE, AT_ONCE = 1_000, 1_000
LAYOUT, SITE, CONTEXT = "last_token", "resid_post.0", "benchmark"
GROWTH, LARGE = 15.0, 100_000
FIRST = "first open, processor"


class Bucket(MemoryBackend):
    """A place that counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()
        self._counting = threading.Lock()

    def forget(self) -> None:
        self.pages = self.reads = self.nbytes = 0

    def has(self, name: str) -> bool:
        return name in self._objects

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
    """Of the same length for all, so that all segments have the same layout."""
    return f"prompt {prompt:05} of segment {segment:08}"


def fill(folder: Path, segments: range, prompts: int) -> str:
    """Add segments to a store in `folder`; its space. Nothing is synced: it is made to be looked at, and thrown away.

    One is written as always; the others are its bytes with prompts, keys and time of their own in place of its. Writing
    each from scratch takes ten times as long. Some are held against the format.
    """
    with Store(folder, index_dir=folder.parent / "made") as store:
        space = store.open_space({"benchmark": "listing"}, {"model_name": "benchmark"})
    into = folder / "v1" / space
    rows = np.zeros((prompts, 1), np.float16)
    first = write(into, Records.pooled(_prompts(segments[:1], prompts), LAYOUT, {SITE: rows}), space=space)
    path = into / f"{first.name}.safetensors"
    data = bytearray(path.read_bytes())
    head = container.header_size(bytes(data[:8]), len(data))
    tensors = container.parse(bytes(data[:head]), len(data))[1]
    index_from, index_to = tensors["digest"].stop, min(t.start for t in tensors.values() if SITE in t.name)
    when = data.index(str(first.created_ns).encode())
    for start in range(1, len(segments), AT_ONCE):
        some = segments[start : start + AT_ONCE]
        table = _prompts(some, prompts)
        fields = {"prompt_key": table.token_key, "text_key": table.text_key, "token_ids": table.token_ids}
        fields["text"] = table.text
        own = [(tensors[name].start, a.reshape(len(some), -1).view(np.uint8)) for name, a in fields.items()]
        for number in range(len(some)):
            for at, shares in own:
                data[at : at + shares.shape[1]] = shares[number].data
            data[when : when + 19] = b"%019d" % time.time_ns()
            with memoryview(data) as view:
                digests = (xxhash.xxh3_64_digest(view[:head]), xxhash.xxh3_64_digest(view[index_from:index_to]))
            data[head:index_from] = b"".join(d[::-1] for d in digests)  # little-endian in the file
            path = into / f"{uuid.uuid4().hex}.safetensors"
            with open(path, "xb", buffering=0) as file:
                file.write(data)
        wrong = validate(path)
        assert not wrong, wrong
    return space


def _prompts(segments: range, prompts: int) -> PromptTable:
    numbers = np.arange(segments.start * prompts, segments.stop * prompts, dtype=np.int32)
    ids = list(numbers[:, None] * 8 + np.arange(8, dtype=np.int32))
    texts = [text_of(segment, k) for segment in segments for k in range(prompts)]
    return PromptTable.build(ids, texts, text_context=CONTEXT)


class Took(float):
    """Seconds by the clock, and of processor time, which other work on the machine changes less."""

    cpu: float


def timed(run: Callable[[], object]) -> Took:
    gc.collect()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    took = Took(time.perf_counter() - start)
    took.cpu = time.process_time() - cpu
    return took


def measure(open_store: Callable[[], Store], space: str, segments: int, prompts: int) -> dict[str, float]:
    """Seconds of each step, and bytes of memory that the index takes when it is there."""
    wanted = [text_of(segments // 2, prompts // 2)]

    def find(store: Store) -> None:
        assert store.contains(space, wanted, SITE, pooling=LAYOUT).all()

    found: dict[str, float] = {}

    def say(step: str, value: float) -> None:
        found[step] = value
        if isinstance(value, Took):
            found[f"{step}, processor"] = value.cpu
            shown = (
                f"{value:,.4f} s, {value.cpu:,.4f} of the processor, {value.cpu / segments * 1e6:.2f} us per segment"
            )
        else:
            shown = f"{value / 2**20:,.1f} MB, {value / segments:,.0f} bytes per segment"
        print(f"  {step:22} {shown}", flush=True)

    store = open_store()
    say("first open", timed(lambda: find(store)))
    store.close()
    del store
    gc.collect()
    before = anonymous()
    store = open_store()
    say("open again", timed(lambda: find(store)))
    say("memory", float(max(0, anonymous() - before)))
    say("nothing has changed", timed(lambda: store.refresh()))
    say("one prompt", min(timed(lambda: find(store)) for _ in range(5)))
    store.close()
    return found


def table(title: str, prompts: int, sizes: dict[int, dict[str, float]]) -> bool:
    print(f"\n{title}\n{'segments':32}" + "".join(f"{size:>14,}" for size in sizes) + "   growth, per segment")
    held = True
    many = max(sizes)
    for step in sizes[many]:
        values = [found[step] for found in sizes.values()]
        if step == "memory":
            shown = "".join(f"{v / 2**20:>11,.1f} MB" for v in values)
            print(
                f"{step:32}{shown} {'':8} {values[-1] / many:10,.0f} bytes, {values[-1] / many / prompts:.0f} a prompt"
            )
            continue
        if step in ("pages listed", "reads", "bytes read"):
            print(f"{step:32}{''.join(f'{v:>14,.0f}' for v in values)} {'':8} {values[-1] / many:10.3f}")
            continue
        growths = [(b / max(a, 1e-9), n / m, a) for (m, a), (n, b) in pairwise(zip(sizes, values, strict=True))]
        # What takes milliseconds in all does not tell how it grows.
        bounded = [growth <= GROWTH * more / 10 for growth, more, a in growths if step == FIRST and a > 0.05]
        verdict = "" if not bounded else "  ok" if all(bounded) else "  MISSED"
        held &= all(bounded)
        shown = "".join(f"{v * 1e3:>11,.1f} ms" for v in values)
        print(f"{step:32}{shown} {growths[-1][0]:8.1f} {values[-1] / many * 1e6:10.1f} us{verdict}")
    return held


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--segments", type=int, default=2_000)
    parser.add_argument("--prompts", type=int, default=100, help="in each segment")
    parser.add_argument("--where", choices=["folder", "bucket", "both"], default="both")
    options = parser.parse_args()
    many = options.segments
    if many < 100:
        parser.error("--segments: at least 100, so that there is something to see")
    local: dict[int, dict[str, float]] = {}
    bucket: dict[int, dict[str, float]] = {}
    there = 0
    with reporting(options) as report:
        store = report.folder / "store"
        backend = Bucket()
        for segments in [many // 100] * (many >= LARGE) + [many // 10, many]:
            place = report.folder / str(segments)
            start = time.perf_counter()
            space = fill(store, range(there, segments), options.prompts)
            took = time.perf_counter() - start
            print(f"{segments:,} segments of {options.prompts} prompts: the last {segments - there:,} in {took:.1f} s")
            there = segments
            if options.where != "bucket":
                print("in a folder", flush=True)
                opened = partial(Store, store, index_dir=place / "index")
                local[segments] = measure(opened, space, segments, options.prompts)
            if options.where != "folder":
                print("in a bucket", flush=True)
                with os.scandir(store / "v1" / space) as entries:
                    for entry in entries:
                        if not backend.has(name := f"v1/{space}/{entry.name}"):
                            backend.put(name, Path(entry.path))
                backend.forget()
                opened = partial(Store, backend, index_dir=place / "mirror")
                bucket[segments] = measure(opened, space, segments, options.prompts)
                asked = backend.pages, backend.reads, backend.nbytes
                bucket[segments] |= dict(zip(("pages listed", "reads", "bytes read"), map(float, asked), strict=True))
            shutil.rmtree(place)
        held = not local or table("a folder", options.prompts, local)
        if bucket:
            held &= table("a bucket in memory, no time on the way", options.prompts, bucket)
        report.record += [{"where": "folder", **v, "segments": k} for k, v in local.items()]
        report.record += [{"where": "bucket", **v, "segments": k} for k, v in bucket.items()]
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
