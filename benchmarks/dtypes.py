"""Storage dtypes against float16: writing float32 vectors in each, and reading them back, from the page cache.

    python benchmarks/dtypes.py [--quick] [--json FILE] [--folder DIR]

Every row is a ratio against the same work with float16 in the same run, interleaved on one thread; GB/s are of the
caller's float32 bytes. Half the bytes and a multiplication for each value: on a warm page cache int8 and float8 cost
time, which they give back where the disk or the network is what limits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from _measure import Tables, arguments, compare, reporting
from actcache.store import gather
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.store import Store

PROMPTS, LAYERS, WIDTH = 4096, 8, 1024
DTYPES = ("float16", "bfloat16", "float32", "int8", "float8_e4m3")
SITES = [f"resid_post.{layer}" for layer in range(LAYERS)]
_rng = np.random.default_rng(0)


def vectors(rows: int) -> npt.NDArray[np.float32]:
    """Vectors with a few dimensions a thousand times as large as the others."""
    size = np.where(np.arange(WIDTH) % 300 == 7, 1000, 1)
    return (_rng.standard_normal((rows, WIDTH), np.float32) * size).astype(np.float32)


def new_store(folder: Path, dtype: str) -> tuple[Store, str]:
    store = Store(folder / dtype, dtype=dtype, index_dir=folder / f"index {dtype}")
    return store, store.open_space({"benchmark": True}, {"model_name": "benchmark"})


def make_prompts(n: int) -> PromptTable:
    return PromptTable.build(list(_rng.integers(0, 50_000, (n, 16), np.int32)))


def writing(folder: Path, rounds: int) -> Tables:
    """One durable segment, converted, measured and hashed on the way."""
    table = make_prompts(PROMPTS)
    records = Records.pooled(table, "last_token", {site: vectors(PROMPTS) for site in SITES})
    stores = {dtype: new_store(folder / "write", dtype) for dtype in DTYPES}

    def write(dtype: str) -> Callable[[], object]:
        store, space = stores[dtype]
        return lambda: store.append(space, records)

    def tidy(_: str) -> None:
        for store, space in stores.values():
            for file in (store.root / space).glob("*.safetensors"):
                file.unlink()

    ways = {dtype: write(dtype) for dtype in DTYPES[1:]}
    rows = compare(write("float16"), ways, rounds, reference_name="float16", before=tidy)
    size = sum(a.nbytes for a in records.data.values())
    return [(f"writing {PROMPTS} x {LAYERS} x {WIDTH} float32, durable", rows, {"nbytes": size})]


def reading(folder: Path, rounds: int) -> Tables:
    """Into a given float32 array, and as the caller gets them who asks for nothing."""
    table = make_prompts(PROMPTS)
    data = {site: vectors(PROMPTS) for site in SITES}
    places, orders = {}, {"all in stored order": np.arange(PROMPTS), "400 at random": _rng.permutation(PROMPTS)[:400]}
    for dtype in DTYPES:
        store, space = new_store(folder / "read", dtype)
        store.append(space, Records.pooled(table, "last_token", data))
        places[dtype] = store.locate(space, table=table, sites=SITES, layout="last_token")
    found: Tables = []
    for name, order in orders.items():
        out = np.empty((len(order), LAYERS, WIDTH), np.float32)

        def take(
            dtype: str, order: npt.NDArray[np.int64] = order, out: npt.NDArray[np.float32] = out
        ) -> Callable[[], object]:
            return lambda: places[dtype].take(out, index=order)

        ways = {dtype: take(dtype) for dtype in DTYPES[1:]}
        rows = compare(take("float16"), ways, rounds, reference_name="float16")
        found.append((f"reading {name} as float32, {LAYERS} layers, warm", rows, {"nbytes": out.nbytes}))
    return found


def main() -> int:
    options = arguments(__doc__).parse_args()
    # The reference copies on one thread.
    gather._MAX_THREADS = 1
    with reporting(options) as report:
        report.add(writing(report.folder, 5 if options.quick else 11), show="speed")
        report.add(reading(report.folder, 5 if options.quick else 31), show="speed")
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main())
