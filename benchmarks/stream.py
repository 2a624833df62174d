"""Streams for training against the physical limit of the same run: shuffled, in order, through workers, and live.

    python benchmarks/stream.py [--part NAME] [--quick] [--json FILE] [--folder DIR]

The references take the same rows in random order from one mapped array, and copy a file of the same size. Everything is
warm: the segments have been checked, and lie in memory.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import actcache as ac
from _measure import Tables, arguments, compare, reporting
from actcache.store.prompts import PromptTable
from actcache.store.records import Records

WIDTH, LENGTH, BATCH, SITES = 768, 128, 4096, 24
SHUFFLED, IN_ORDER, WORKERS, LIVE = 0.5, 0.7, 1.0, 1.05
"""At least this share of the reference's speed; for `LIVE` at most so many times the reference's time."""
_SEGMENT = 1 << 17


def make_store(folder: Path, tokens: int) -> tuple[ac.Store, str]:
    """`tokens` vectors of float16 in segments of about 200 MB."""
    store = ac.Store(folder / "store", index_dir=folder / "index")
    space = store.open_space({"benchmark": True}, {"model_name": "benchmark", "dtype": "float16"})
    rng = np.random.default_rng(0)
    for start in range(0, tokens, _SEGMENT):
        prompts = range(start // LENGTH, min(start + _SEGMENT, tokens) // LENGTH)
        table = PromptTable.build([[number, *range(LENGTH - 1)] for number in prompts])
        rows = rng.integers(0, 1 << 14, (len(prompts) * LENGTH, WIDTH), np.int16).view(np.float16)
        store.append(space, Records.tokens(table, {"resid_post.0": rows}))
    return store, space


def drained(batches: Any) -> None:
    for _ in batches:
        pass


class Stored:
    """A store of `tokens` tokens: 0.4 GB, or 1 GB."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.tokens = (1 << 18) if quick else 5 << 17
        self.rounds = 5 if quick else 31
        self.nbytes = self.tokens * WIDTH * 2
        self._store, self._space = make_store(folder, self.tokens)

    def stream(self, **options: Any) -> ac.ActivationStream:
        """A stream all of which has been read, and checked, once."""
        made = ac.stream_activations(self._store, "resid_post.0", space=self._space, batch_size=BATCH, **options)
        drained(made)
        return made

    def flat(self, path: Path) -> Any:
        """The same rows in one array that is mapped from a file."""
        flat = np.lib.format.open_memmap(path, "w+", np.float16, (self.tokens, WIDTH))
        for k, batch in enumerate(self.stream(shuffle=False)):
            flat[k * BATCH : k * BATCH + len(batch)] = batch
        return np.load(path, mmap_mode="r")


def shuffled(folder: Path, quick: bool) -> Tables:
    made = Stored(folder, quick)
    flat = made.flat(folder / "flat.npy")
    order = np.random.default_rng(1).permutation(made.tokens)
    out = np.empty((BATCH, WIDTH), np.float16)

    def taken() -> None:
        for start in range(0, made.tokens, BATCH):
            some = order[start : start + BATCH]
            flat.take(some, 0, out[: len(some)], "clip")

    plain, ahead = made.stream(prefetch=0), made.stream()
    ways = {"shuffled": lambda: drained(plain), "shuffled, a thread ahead": lambda: drained(ahead)}
    rows = compare(taken, ways, made.rounds, reference_name="np.take, random order")
    return [("Shuffled", rows, {"show": "speed", "bounds": dict.fromkeys(ways, SHUFFLED), "nbytes": made.nbytes})]


def in_order(folder: Path, quick: bool) -> Tables:
    made = Stored(folder, quick)
    made.flat(folder / "flat.npy")
    stream = made.stream(shuffle=False)
    rows = compare(
        lambda: copyfile(folder / "flat.npy", folder / "copy.npy"), {"in stored order": lambda: drained(stream)},
        min(made.rounds, 15), reference_name="copying the file",
    )  # fmt: skip
    return [("In order", rows, {"show": "speed", "bounds": {"in stored order": IN_ORDER}, "nbytes": made.nbytes})]


def workers(folder: Path, quick: bool) -> Tables:
    made = Stored(folder, quick)
    alone = made.stream()
    loader = DataLoader(alone, batch_size=None, num_workers=2, persistent_workers=True)
    drained(loader)
    ways = {"2 workers": lambda: drained(loader)}
    rows = compare(lambda: drained(alone), ways, min(made.rounds, 15), reference_name="no worker")
    return [("DataLoader", rows, {"show": "speed", "bounds": {"2 workers": WORKERS}, "nbytes": made.nbytes})]


def one_of_many(folder: Path, _: bool) -> bool:
    """Whether streaming one of 24 sites reads the bytes of no other, as the kernel counts pages that are mapped in."""
    store = ac.Store(folder / "store", index_dir=folder / "index")
    space = store.open_space({"benchmark": True}, {"model_name": "benchmark", "dtype": "float16"})
    table = PromptTable.build([[number, *range(LENGTH - 1)] for number in range(256)])
    rows = np.zeros((len(table.token_ids), WIDTH), np.float16)
    store.append(space, Records.tokens(table, {f"resid_post.{k}": rows for k in range(SITES)}))
    (path,) = (store.root / space).glob("*.safetensors")
    assert mapped_bytes(path) == 0
    drained(stream := ac.stream_activations(store, "resid_post.11", space=space, batch_size=BATCH))
    read = mapped_bytes(path)
    least, most = rows.nbytes, rows.nbytes * 1.1 + (1 << 20)
    print(f"\nOne site of {SITES}: {read / rows.nbytes:.2f} of its bytes mapped in, for {len(stream)} batches")
    return least <= read <= most


def mapped_bytes(path: Path) -> int:
    """How much of a file this process has touched."""
    found, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split(" ", 1)[0].count("-") == 1:
            mine = line.endswith(str(path))
        elif mine and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def live(folder: Path, quick: bool) -> Tables:
    """A stream while the model runs, with a consumer on the second core that takes four fifths of its time.

    Two that share memory and caches hinder each other though nothing connects them: that row is what the stream's is to
    be read beside.
    """
    from actcache.testing.tiny import tiny_model

    model = tiny_model("gpt2", seed=0, n_layer=4, n_embd=256, n_head=4, n_positions=128)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 60, 64).tolist() for _ in range(192 if quick else 512)]
    weight = torch.randn(256, 512)
    number = iter(range(10**6))

    def cache() -> ac.UnifiedCache:
        place = folder / f"live{next(number)}"
        return ac.UnifiedCache(
            model, layers=[2], cache_pooled=False, compute_perplexity=False, store=place, device="cpu"
        )

    cache().warmup(prompts[:8])

    repeats = 1

    def train(batch: torch.Tensor) -> None:
        for _ in range(repeats):
            torch.relu(batch @ weight) @ weight.T

    def extraction() -> None:
        cache().warmup(prompts)

    def consumer() -> None:
        for batch in torch.zeros(len(prompts) * 64, 256).split(512):
            train(batch)

    def both() -> None:
        for batch in ac.stream_activations(cache(), "resid_post.2", prompts=prompts, batch_size=512):
            train(batch)

    def longer() -> None:
        """What takes as long as the longer of the two: both at the same time, without anything between them."""
        threads = [threading.Thread(target=work) for work in (extraction, consumer)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    consumer()
    repeats = max(1, round(0.8 * min(seconds(extraction) for _ in range(2)) / seconds(consumer)))
    rows = compare(
        extraction,
        {"streamed while it runs": both, "both at once, unconnected": longer, "consumer alone": consumer}, 5,
        reference_name="extraction alone", warmup=1,
    )  # fmt: skip
    return [("Live", rows, {"bounds": {"streamed while it runs": LIVE}})]


PARTS: dict[str, Callable[[Path, bool], Tables | bool]] = {
    "shuffled": shuffled, "ordered": in_order, "workers": workers, "many": one_of_many, "live": live,
}  # fmt: skip


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=[*PARTS], help="only this table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with reporting(options) as report:
        for part in [options.part] if options.part else PARTS:
            (report.folder / part).mkdir()
            found = PARTS[part](report.folder / part, options.quick)
            shutil.rmtree(report.folder / part)
            if isinstance(found, bool):
                report.held &= found
            else:
                report.add(found)
    return 0 if report.held else 1


if __name__ == "__main__":
    raise SystemExit(main())
