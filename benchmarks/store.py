"""The store against the physical limits of the same run: writing, reading warm and cold (finding: `lookups.py`).

    python benchmarks/store.py [--quick] [--rounds N] [--prompts N] [--part NAME] [--json FILE] [--folder DIR]

Every row is a ratio against its reference, interleaved on one thread; GB/s are of the caller's bytes.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import xxhash

from _measure import Row, Tables, arguments, compare, reporting
from _reading import cold, pooled, sequences
from actcache.store import gather
from actcache.store.beside import Background
from actcache.store.mapped import start_writing
from actcache.store.prompts import PromptTable
from actcache.store.records import BLOCK, Records
from actcache.store.statistics import JointMoments
from actcache.store.store import Store

PROMPTS, LAYERS, WIDTH = 2000, 12, 768
MANY_LAYERS, MANY_WIDTH = 24, 1024
CONTEXT = "benchmark"
LEAST = "same places, checksums and moments only"
# What is written of a batch beside its rows, roughly; after how many sites of 128 KiB each the disk is set to work.
RECORD, SENT = 16 << 10, 8
SITES = [f"resid_post.{layer}" for layer in range(LAYERS)]
_rng = np.random.default_rng(0)


def make_prompts(n: int, tokens: int = 24) -> tuple[PromptTable, list[str]]:
    texts = [f"prompt {i}: {'word ' * (i % 17)}ends here" for i in range(n)]
    ids = _rng.integers(0, 50_000, (n, tokens), np.int32)
    table = PromptTable.build(list(ids), texts, text_context=CONTEXT)
    return table, texts


def new_store(folder: Path) -> tuple[Store, str]:
    store = Store(folder / "store", index_dir=folder / "index")
    return store, store.open_space({"benchmark": True}, {"model_name": "benchmark"})


def writing(folder: Path, rounds: int) -> Tables:
    """One durable segment against one raw write with one fsync of the same bytes."""
    found = []
    for n in (64, 512, PROMPTS):
        table, _ = make_prompts(n)
        data = {site: _rng.standard_normal((n, WIDTH)).astype(np.float32) for site in SITES}
        records = Records.pooled(table, "last_token", data)
        size = sum(a.nbytes for a in data.values())
        blob = np.concatenate([a.reshape(-1) for a in data.values()]).view(np.uint8).data
        place = folder / f"write {n}"
        store, space = new_store(place)
        store.append(space, records)
        raw = place / "raw"

        def write_raw(raw: Path = raw, blob: memoryview = blob) -> None:
            fd = os.open(raw, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.pwritev(fd, [blob], 0)
            os.fsync(fd)
            os.close(fd)

        def append(store: Store = store, space: str = space, records: Records = records) -> None:
            # A fresh table each time: keys are part of the work.
            p = records.prompts
            fresh = PromptTable(p.token_ids, p.token_offset, p.kind, p.text, p.text_offset, p.text_context)
            store.append(space, Records.pooled(fresh, records.layout, records.data))

        def tidy(name: str, place: Path = place, space: str = space) -> None:
            # Unlinking gives the pages back, so that both write to recycled ones.
            for file in [*(place / "store" / "v1" / space).glob("*.safetensors"), place / "raw"]:
                file.unlink(missing_ok=True)

        rows = compare(write_raw, {"append": append}, rounds, reference_name="raw write + fsync", before=tidy)
        found.append((f"writing {n} prompts x {LAYERS} x {WIDTH} float32, durable", rows, {"nbytes": size}))
        shutil.rmtree(place)
    return found


def committing(folder: Path, rounds: int, n: int, *, by_files: bool = False) -> Tables:
    """A long run: `n` prompts, batch by batch, each durable before the next; merging included.

    Against raw writes, or `by_files` against a file for each prompt.
    """
    sites = [f"resid_post.{layer}" for layer in range(MANY_LAYERS)]
    per_prompt = MANY_LAYERS * MANY_WIDTH * 2
    large = -(-(64 << 20) // per_prompt)

    def batches(count: int, size: int) -> list[Records]:
        """Prompts of their own for each batch; the vectors are those of a few batches, too many for the caches."""
        pool = [
            {site: _rng.standard_normal((size, MANY_WIDTH)).astype(np.float16) for site in sites}
            for _ in range(max(1, (32 << 20) // (size * per_prompt)))
        ]
        table, _ = make_prompts(count)
        made = []
        for k, start in enumerate(range(0, count, size)):
            part = table.select(np.arange(start, min(start + size, count)))
            rows = {site: rows[: len(part)] for site, rows in pool[k % len(pool)].items()}
            made.append(Records.pooled(part, "last_token", rows))
        return made

    small_batches, large_batches = batches(n, 64), [] if by_files else batches(n, large)

    def raw(parts: Sequence[Records], *, each: bool) -> None:
        fd, at = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0
        for part in parts:
            at += os.pwritev(fd, list(part.data.values()), at)
            if each:
                os.fsync(fd)
        os.fsync(fd)
        os.close(fd)

    def stored(parts: Sequence[Records]) -> None:
        store, space = new_store(folder / "long")
        with store.writer(space) as writer:
            for part in parts:
                p = part.prompts
                fresh = PromptTable(p.token_ids, p.token_offset, p.kind, p.text, p.text_offset, p.text_context)
                writer.put(Records.pooled(fresh, part.layout, part.data))
                writer.flush()
        store.close()

    def least(parts: Sequence[Records]) -> None:
        """What no store with this format gets around: each site's rows where the finished file has them, checksums and
        moments while the disk works, and one more write, all in the plainest loop; nobody could find any of it."""
        rows, width = sum(len(part.prompts) for part in parts), MANY_WIDTH * 2
        fd = os.open(folder / "raw", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.ftruncate(fd, rows * len(sites) * width + len(parts) * RECORD)
        os.fsync(fd)
        moments, disk, first = JointMoments(len(sites), MANY_WIDTH), Background("disk"), 0

        def hand_over(matrices: list[Any], first: int) -> None:
            for j, matrix in enumerate(matrices):
                os.pwritev(fd, [matrix.reshape(-1).view(np.uint8).data], (j * rows + first) * width)
                if j % SENT == SENT - 1:
                    start_writing(fd, 0, 0)

        def commit(k: int) -> None:
            os.pwritev(fd, [bytes(RECORD)], rows * len(sites) * width + k * RECORD)
            os.fdatasync(fd)

        for k, part in enumerate(parts):
            matrices = list(part.data.values())
            with disk.waited_for():
                disk.do(partial(hand_over, matrices, first))
                for matrix in matrices:
                    data = matrix.reshape(-1).view(np.uint8).data
                    for block in range(0, len(data), BLOCK):
                        xxhash.xxh3_64_intdigest(data[block : block + BLOCK])
                disk.do(partial(commit, k))
                moments.update(matrices)
            first += len(part.prompts)
        disk.stop()
        os.fsync(fd)
        os.close(fd)

    def files(parts: Sequence[Records]) -> None:
        """The simplest cache that survives a crash: a safetensors file for each prompt, synced and renamed."""
        (folder / "long").mkdir()
        for part in parts:
            for i, key in enumerate(part.prompts.token_key):
                path = folder / "long" / f"{key.tobytes().hex()}.safetensors"
                fd = os.open(path.with_suffix(".tmp"), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                os.write(fd, safetensors.numpy.save({site: rows[i] for site, rows in part.data.items()}))
                os.fsync(fd)
                os.close(fd)
                path.with_suffix(".tmp").rename(path)

    def tidy(name: str) -> None:
        shutil.rmtree(folder / "long", ignore_errors=True)
        (folder / "raw").unlink(missing_ok=True)
        os.sync()

    def against(
        reference: tuple[str, Callable[[], object]],
        candidates: dict[str, Callable[[], object]],
        floors: Sequence[float],
    ) -> tuple[list[Row], dict[str, float]]:
        # A file for each of 20,000 prompts takes a minute or more.
        warmup = 0 if by_files else 1
        rows = compare(reference[1], candidates, rounds, reference_name=reference[0], warmup=warmup, before=tidy)
        return rows, dict(zip(candidates, floors, strict=False))

    by_64, by_size = "commits of 64 prompts", "commits of 64 MB"
    small: dict[str, Callable[[], object]] = {by_64: lambda: stored(small_batches)}
    large_too = {**small, by_size: lambda: stored(large_batches)}
    limited = {**small, LEAST: lambda: least(small_batches)}
    if by_files:
        tables = [against(("a file per prompt", lambda: files(small_batches)), limited, (12,))]
    else:
        tables = [
            against(("raw write, one fsync", lambda: raw(small_batches, each=False)), large_too, (0.2, 0.4)),
            against(("raw write, fsync per 64", lambda: raw(small_batches, each=True)), limited, (0.7,)),
        ]
    tidy("")
    title = f"writing {n:,} prompts x {MANY_LAYERS} x {MANY_WIDTH} float16, durable and merged"
    return [(title, rows, {"nbytes": n * per_prompt, "bounds": bounds}) for rows, bounds in tables]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "--prompts", type=int, default=0, help="how many the long run writes (20,000, by files 4,096; quick: 2,560)"
    )
    parser.add_argument("--rounds", type=int, default=0, help="of each table (31, the long run 5; quick: 7 and 5)")
    parser.add_argument("--part", action="append", help="only this part: writing, committing, ... (may be repeated)")
    options = parser.parse_args()
    rounds = options.rounds or (7 if options.quick else 31)
    few = options.rounds or 5
    n = 4_000 if options.quick else 20_000
    long, by_files = (options.prompts or (2560 if options.quick else size) for size in (20_000, 4096))
    # The references copy on one thread.
    gather._MAX_THREADS = 1
    parts: dict[str, Callable[[Path], Tables]] = {
        "writing": lambda folder: writing(folder, rounds),
        "committing": lambda folder: committing(folder, few, long),
        "files": lambda folder: committing(folder, few, by_files, by_files=True),
        "pooled": lambda folder: pooled(folder / "pooled", n, rounds),
        "sequences": lambda folder: sequences(folder / "sequences", n // 20, rounds),
        "cold": lambda folder: cold(folder / "pooled", n, rounds),
    }
    chosen = options.part or list(parts)
    if unknown := set(chosen) - parts.keys():
        parser.error(f"unknown part {sorted(unknown)[0]!r}: expected {', '.join(parts)}")
    with reporting(options) as report:
        # In their own order: what "pooled" has written is read again by "cold".
        for name in (name for name in parts if name in chosen):
            report.add(parts[name](report.folder), show="speed")
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main())
