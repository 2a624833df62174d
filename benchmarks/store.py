"""The store against the physical limits of the same run: writing, finding, reading.

    python benchmarks/store.py [--quick] [--json FILE] [--folder DIR]

Every row is a ratio against its reference, interleaved on one thread; GB/s are of the caller's bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from _measure import Row, compare, print_table
from actcache.store import gather
from actcache.store.prompts import PromptTable, text_keys
from actcache.store.records import Records
from actcache.store.store import Store

PROMPTS, LAYERS, WIDTH = 2000, 12, 768
CONTEXT = "benchmark"
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


def writing(folder: Path, rounds: int) -> list[tuple[str, list[Row], dict[str, Any]]]:
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


def pooled_reading(folder: Path, rounds: int) -> list[tuple[str, list[Row], dict[str, Any]]]:
    """All layers of 2,000 prompts by text into a fresh result, against copying the bytes of one mapped file."""
    table, texts = make_prompts(PROMPTS)
    data = {site: _rng.standard_normal((PROMPTS, WIDTH)).astype(np.float32) for site in SITES}
    flat = np.stack(list(data.values()), 1).reshape(PROMPTS, -1)
    np.save(folder / "flat.npy", flat)
    mapped: npt.NDArray[np.float32] = np.load(folder / "flat.npy", mmap_mode="r")

    def memcpy() -> None:
        np.copyto(np.empty((PROMPTS, LAYERS * WIDTH), np.float32), mapped)

    ways: dict[str, Callable[[], object]] = {}
    orders = {"stored order": np.arange(PROMPTS), "another order": _rng.permutation(PROMPTS)}
    for name, order in orders.items():
        for parts in (1, 8):
            store, space = new_store(folder / f"pooled {name} {parts}")
            for members in np.array_split(order, parts):
                part = {s: a[members] for s, a in data.items()}
                store.append(space, Records.pooled(table.select(members), "last_token", part))

            def read(store: Store = store, space: str = space) -> npt.NDArray[Any]:
                place = store.locate(space, texts=texts, text_context=CONTEXT, sites=SITES, layout="last_token")
                return place.take()

            assert (read().reshape(PROMPTS, -1) == flat).all()
            label = f"{name}, {parts} segment{'s' if parts > 1 else ''}"
            ways[label] = read
            if parts == 1:
                located = store.locate(space, texts=texts, text_context=CONTEXT, sites=SITES, layout="last_token")
                ways[f"{label}, take only"] = located.take
    rows = compare(memcpy, ways, rounds, reference_name="memcpy of a mapped file")
    bounds = dict.fromkeys(ways, 0.4)
    title = f"{PROMPTS} prompts x {LAYERS} x {WIDTH} float32 located by text and taken, warm"
    result = [(title, rows, {"nbytes": flat.nbytes, "bounds": bounds})]

    one = data[SITES[5]]
    np.save(folder / "one.npy", one)
    one_mapped: npt.NDArray[np.float32] = np.load(folder / "one.npy", mmap_mode="r")
    store, space = new_store(folder / "pooled stored order 1")
    located = store.locate(space, texts=texts, text_context=CONTEXT, sites=[SITES[5]], layout="last_token")
    target = np.empty((PROMPTS, 1, WIDTH), np.float32)
    rows = compare(
        lambda: np.copyto(target[:, 0], one_mapped),
        {"take one layer": lambda: located.take(target)},
        rounds,
        reference_name="memcpy of a mapped file",
    )
    result.append(("one layer of all prompts into a given array, warm", rows, {"nbytes": one.nbytes}))
    return result


def sequences(folder: Path, rounds: int) -> list[tuple[str, list[Row], dict[str, Any]]]:
    """Every token of 100 random prompts, one layer, against copying the same bytes of one mapped file."""
    table, _ = make_prompts(400, tokens=100)
    rows_in_all = len(table.token_ids)
    store, space = new_store(folder / "sequences")
    for start in range(0, 400, 100):
        part = table.select(np.arange(start, start + 100))
        data = {s: _rng.standard_normal((len(part.token_ids), WIDTH)).astype(np.float32) for s in SITES[:4]}
        store.append(space, Records.tokens(part, data))
    chosen = _rng.permutation(400)[:100]
    asked = table.select(chosen)
    place = store.locate(space, table=asked, sites=[SITES[2]], layout="tokens")
    np.save(folder / "rows.npy", np.ones((rows_in_all, WIDTH), np.float32))
    mapped: npt.NDArray[np.float32] = np.load(folder / "rows.npy", mmap_mode="r")
    mapped.sum()
    target = np.empty((100, 100, WIDTH), np.float32)

    def memcpy() -> None:
        for k, i in enumerate(chosen.tolist()):
            target[k] = mapped[i * 100 : i * 100 + 100]

    def rows() -> None:
        for k in range(100):
            target[k] = place.rows(k)[0]

    def everything() -> None:
        store.locate(space, table=asked, sites=[SITES[2]], layout="tokens").take_padded(target)

    found = compare(
        memcpy, {"rows()": rows, "locate + take_padded": everything}, rounds, reference_name="memcpy of a mapped file"
    )
    return [("every token of 100 random prompts, one layer, warm", found, {"nbytes": target.nbytes})]


def finding(folder: Path, rounds: int, n: int) -> list[tuple[str, list[Row], dict[str, Any]]]:
    """Membership of 100,000 texts against the same number of look-ups in a Python set of 16-byte keys."""
    table, texts = make_prompts(n, tokens=4)
    store, space = new_store(folder / "finding")
    for members in np.array_split(np.arange(n), 4):
        data = {"embed": np.zeros((len(members), 4), np.float32)}
        store.append(space, Records.pooled(table.select(members), "last_token", data))
    order = _rng.permutation(n)
    asked = [texts[i] for i in order]
    keys = text_keys(asked, 1, CONTEXT)
    as_bytes = [k.tobytes() for k in keys]
    known = set(as_bytes)
    index = store._index(space)
    index.refresh()
    (group,) = index.groups("last_token")

    def in_set() -> int:
        return sum(k in known for k in as_bytes)

    def by_key() -> int:
        return int((index.find(group, "text", keys)[0] >= 0).sum())

    def by_text() -> int:
        place = store.locate(space, texts=asked, text_context=CONTEXT, sites=["embed"], layout="last_token")
        return int(place.found.sum())

    assert by_key() == by_text() == in_set() == n
    rows = compare(
        in_set,
        {
            "keys in the index": by_key,
            "locate by text (hash, find, compare)": by_text,
            "hash only": lambda: text_keys(asked, 1, CONTEXT),
        },
        rounds,
        reference_name=f"{n:,} look-ups in a set",
    )
    few = texts[:PROMPTS]
    hashing = compare(
        lambda: [t.encode() for t in few],
        {f"text keys of {PROMPTS} texts": lambda: text_keys(few, 1, CONTEXT)},
        rounds,
        reference_name="encoding them to UTF-8",
    )
    return [(f"finding {n:,} prompts", rows, {}), ("keys of texts", hashing, {})]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a look, not a measurement")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    options = parser.parse_args()
    rounds = 7 if options.quick else 31
    # The references copy on one thread.
    gather._MAX_THREADS = 1
    folder = Path(tempfile.mkdtemp(prefix="actcache-benchmark-", dir=options.folder))
    ok, record = True, []
    try:
        parts = (
            lambda: writing(folder, rounds),
            lambda: pooled_reading(folder, rounds),
            lambda: sequences(folder, rounds),
            lambda: finding(folder, rounds, 20_000 if options.quick else 100_000),
        )
        for part in parts:
            for title, rows, how in part():
                ok &= print_table(title, rows, show="speed", **how)
                record.append({"title": title, "rows": [r.as_dict() for r in rows]})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
