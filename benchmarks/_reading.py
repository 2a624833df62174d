"""Reading of merged segments against the physical limit of the same run: warm, ragged, and from a cold disk.

The references copy or take the same bytes of one mapped ``.npy`` file into the same result; nothing is faster than
that on the machine at hand. Results are given arrays where nothing else is said: the first touch of fresh memory costs
more than the copy. A copy that is large against the processor's caches goes past them, which makes it up to twice as
fast as shorter ones, such as a segment's part of a layer: the floor of one layer is held against copies of that length.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from _measure import Row, compare
from actcache.store.mapping import Segment
from actcache.store.prompts import PromptTable
from actcache.store.records import BLOCK, Records
from actcache.store.store import Store

LAYERS, WIDTH = 24, 1024
SITES = [f"resid_post.{layer}" for layer in range(LAYERS)]
ONE = SITES[11]
CONTEXT, LAYOUT = "benchmark", "last_token"
WHOLE = "copy of a mapped .npy"
TAKEN_APART = "np.take of rows, layer behind layer"
READ_APART = "read of each segment's part"
HASHED_APART = "the same, checksums computed"
FOUND_APART = "the same, with header and index of each"
ASKED = 1 << 20
_rng = np.random.default_rng(0)
_PATTERNS = _rng.standard_normal((4099, WIDTH), np.float32).astype(np.float16)

Table = tuple[str, list[Row], dict[str, Any]]


def new_store(folder: Path) -> tuple[Store, str]:
    store = Store(folder / "store", index_dir=folder / "index")
    return store, store.open_space({"benchmark": True}, {"model_name": "benchmark"})


def make_prompts(lengths: npt.NDArray[np.int64]) -> PromptTable:
    texts = [f"prompt {i}: {'word ' * (i % 17)}ends here" for i in range(len(lengths))]
    ids = [_rng.integers(0, 50_000, n, np.int32) for n in lengths.tolist()]
    return PromptTable.build(ids, texts, text_context=CONTEXT)


def vectors(rows: npt.NDArray[np.int64], layer: int) -> npt.NDArray[np.float16]:
    """The vectors of `rows` in one layer: neighbours differ, and so do layers."""
    found: npt.NDArray[np.float16] = _PATTERNS[(rows * 31 + layer * 101) % len(_PATTERNS)]
    return found


def saved(path: Path, shape: tuple[int, ...], fill: Callable[[npt.NDArray[np.float16]], None]) -> Any:
    """An array in a ``.npy`` file, mapped for reading."""
    array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    fill(array)
    array.flush()
    del array
    return np.load(path, mmap_mode="r")


def fill_pooled(folder: Path, n: int) -> tuple[Store, str, PromptTable]:
    """`n` prompts in batches of 64, merged."""
    folder.mkdir(parents=True)
    store, space = new_store(folder)
    table = make_prompts(np.full(n, 24))
    with store.writer(space) as writer:
        for start in range(0, n, 64):
            rows = np.arange(start, min(start + 64, n))
            data = {site: vectors(rows, layer) for layer, site in enumerate(SITES)}
            writer.put(Records.pooled(table.select(rows), LAYOUT, data))
    store.merge(space)
    return store, space, table


def pooled(folder: Path, n: int, rounds: int) -> list[Table]:
    store, space, table = fill_pooled(folder, n)
    rows = np.arange(n)
    texts = [table.text_of(i) or "" for i in range(n)]
    one_layer = saved(folder / "layer.npy", (n, WIDTH), lambda a: np.copyto(a, vectors(rows, 11)))
    out = np.empty((n, WIDTH), np.float16)
    result, tensor = out[:, None], torch.from_numpy(out)
    located = store.locate(space, table=table, sites=[ONE], layout=LAYOUT)

    def by_text() -> None:
        store.locate(space, texts=texts, text_context=CONTEXT, sites=[ONE], layout=LAYOUT).take(result)

    def everything() -> None:
        store.read(space, None, ONE, pooling=LAYOUT, out=tensor)

    segments = len(list((store.root / space).glob("*.safetensors")))
    ways: dict[str, Callable[[], object]] = {
        "located, taken": lambda: located.take(result),
        "read(None)": everything,
        "located by text, taken": by_text,
    }
    listed = store.prompts(space, site=ONE, layout=LAYOUT)
    numbers = {text: i for i, text in enumerate(texts)}
    as_listed = [numbers[listed.text_of(i) or ""] for i in range(n)]
    for name, way in ways.items():
        out[:] = 0
        way()
        assert (out == (one_layer[as_listed] if name == "read(None)" else one_layer)).all(), name
    lengths = [len(np.flatnonzero(located._parts[0].segment == k)) for k in range(segments)]
    ends = np.cumsum([0, *sorted(lengths, reverse=True)]).tolist()

    def in_pieces() -> None:
        for start, stop in pairwise(ends):
            out[start:stop] = one_layer[start:stop]

    what = f"one layer of all {n:,} prompts in {segments} segments, {LAYERS} x {WIDTH} float16, warm"
    pieces = "copy of a mapped .npy, a segment's part at a time"
    bounds = {"located, taken": 0.8, "read(None)": 0.8}
    whole = compare(lambda: np.copyto(out, one_layer), {pieces: in_pieces, **ways}, rounds, reference_name=WHOLE)
    parts = compare(in_pieces, ways, rounds, reference_name=pieces)
    tables: list[Table] = [
        (f"{what}, against one copy", whole, {"nbytes": out.nbytes}),
        (f"{what}, against copies of that length", parts, {"nbytes": out.nbytes, "bounds": bounds}),
    ]

    def fill_flat(array: npt.NDArray[np.float16]) -> None:
        for layer in range(LAYERS):
            array[:, layer * WIDTH : (layer + 1) * WIDTH] = vectors(rows, layer)

    flat = saved(folder / "flat.npy", (n, LAYERS * WIDTH), fill_flat)
    chosen = _rng.permutation(n)[:400]
    asked, some = table.select(chosen), [texts[i] for i in chosen.tolist()]
    every = np.empty((400, LAYERS, WIDTH), np.float16)
    taken = every.reshape(400, -1)
    place = store.locate(space, table=asked, sites=SITES, layout=LAYOUT)
    # Layer behind layer, as segments have them: a prompt's rows lie in as many places as there are layers.
    apart = saved(folder / "apart.npy", (LAYERS * n, WIDTH), lambda a: _fill_layers(a, n))
    index = (chosen[:, None] + np.arange(LAYERS) * n).reshape(-1)
    each = every.reshape(-1, WIDTH)
    ways = {
        TAKEN_APART: lambda: np.take(apart, index, axis=0, out=each, mode="clip"),
        "located, taken": lambda: place.take(every),
        "located by text, taken": lambda: store.locate(
            space, texts=some, text_context=CONTEXT, sites=SITES, layout=LAYOUT
        ).take(every),
        "located by ids, taken": lambda: store.locate(space, table=asked, sites=SITES, layout=LAYOUT).take(every),
    }
    for way in ways.values():
        every[:] = 0
        way()
        assert (taken == flat[chosen]).all()
    floors = {name: 0.4 for name in ways if name != TAKEN_APART}
    all_layers = compare(
        lambda: np.take(flat, chosen, axis=0, out=taken, mode="clip"), ways, rounds, reference_name="np.take of rows"
    )
    title = f"all {LAYERS} layers of 400 random prompts, warm"
    tables.append((title, all_layers, {"nbytes": every.nbytes, "bounds": floors}))
    store.close()
    return tables


def _fill_layers(array: npt.NDArray[np.float16], n: int) -> None:
    for layer in range(LAYERS):
        array[layer * n : (layer + 1) * n] = vectors(np.arange(n), layer)


def sequences(folder: Path, n: int, rounds: int) -> list[Table]:
    """Every token of 100 random prompts, one layer."""
    folder.mkdir(parents=True)
    store, space = new_store(folder)
    lengths = _rng.integers(60, 141, n)
    table = make_prompts(lengths)
    offset, layers = table.token_offset, 4
    with store.writer(space) as writer:
        for start in range(0, n, 16):
            part = table.select(np.arange(start, min(start + 16, n)))
            rows = np.arange(offset[start], offset[start] + len(part.token_ids))
            writer.put(Records.tokens(part, {SITES[j]: vectors(rows, j) for j in range(layers)}))
    store.merge(space)
    rows = np.arange(len(table.token_ids))
    mapped = saved(folder / "rows.npy", (len(rows), WIDTH), lambda a: np.copyto(a, vectors(rows, 2)))
    chosen = _rng.permutation(n)[:100]
    asked, texts = table.select(chosen), [table.text_of(i) or "" for i in chosen.tolist()]
    site = SITES[2]
    place = store.locate(space, table=asked, sites=[site], layout="tokens")
    longest = int(lengths[chosen].max())
    padded = np.zeros((100, longest, WIDTH), np.float16)
    bounds = [(offset[i], offset[i + 1], int(lengths[i])) for i in chosen.tolist()]

    def copy() -> None:
        for k, (start, stop, length) in enumerate(bounds):
            padded[k, :length] = mapped[start:stop]

    def views() -> None:
        for k in range(100):
            found = place.rows(k)[0]
            padded[k, : len(found)] = found

    def copy_padded() -> None:
        for k, (start, stop, length) in enumerate(bounds):
            padded[k, :length] = mapped[start:stop]
            padded[k, length:] = 0

    def by_text() -> None:
        store.locate(space, texts=texts, text_context=CONTEXT, sites=[site], layout="tokens").take_padded(padded)

    together: dict[str, Callable[[], object]] = {
        "located, take_padded": lambda: place.take_padded(padded), "located by text, take_padded": by_text,
    }  # fmt: skip
    for name, way in {"rows(), copied": views, **together}.items():
        padded[:] = 1
        way()
        assert all((padded[k, :m] == mapped[a:b]).all() for k, (a, b, m) in enumerate(bounds)), name
    for name in together:
        assert not any(padded[k, m:].any() for k, (_, _, m) in enumerate(bounds)), name
    how: dict[str, Any] = {"nbytes": sum(length for _, _, length in bounds) * WIDTH * 2}
    title = "every token of 100 random prompts of about 100, one layer, warm"
    return [
        (title, compare(copy, {"rows(), copied": views}, rounds, reference_name=WHOLE),
         {**how, "bounds": {"rows(), copied": 0.7}}),
        (f"{title}, padded", compare(copy_padded, together, rounds, reference_name=f"{WHOLE}, zeros behind"),
         {**how, "bounds": dict.fromkeys(together, 0.7)}),
        (f"{title}, fresh", compare(
            lambda: [torch.from_numpy(np.array(mapped[start:stop])) for start, stop, _ in bounds],
            {"read(texts)": lambda: store.read(space, texts, site)}, rounds, reference_name=WHOLE),
         {**how, "bounds": {"read(texts)": 0.7}}),
    ]  # fmt: skip


def cold(folder: Path, n: int, rounds: int) -> list[Table]:
    """One layer of everything after the page cache has let go of the files, checksums included."""
    if not folder.exists():
        fill_pooled(folder, n)[0].close()
    space_folder = next((folder / "store" / "v1").iterdir())
    rows = np.arange(n)
    blob = folder / "sequential"
    vectors(rows, 11).tofile(blob)
    out = np.empty((n, WIDTH), np.float16)
    target = memoryview(out.reshape(-1).view(np.uint8))
    held: list[Store] = []

    def forget(_: str) -> None:
        for store in held:
            store.close()
        held.clear()
        gc.collect()
        for path in [blob, *space_folder.glob("*.safetensors")]:
            drop(path)
        store = Store(folder / "store", index_dir=folder / "index")
        # The index is open, as it is for whoever has asked anything before; the files are not.
        assert not store.contains(space_folder.name, ["nothing"], ONE, pooling=LAYOUT).any()
        held.append(store)

    def sequential() -> None:
        with open(blob, "rb", buffering=0) as file:
            done = 0
            while done < len(target):
                done += file.readinto(target[done : done + (8 << 20)]) or 0

    parts: list[tuple[Path, int, int, int]] = []
    for path in sorted(space_folder.glob("*.safetensors")):
        segment = Segment(path)
        parts.append((path, segment.start_of(SITES[0]), segment.start_of(ONE), segment.info.rows * WIDTH * 2))
        del segment
    heads = bytearray(max(head for _, head, _, _ in parts))

    def apart(hashed: bool = False, found: bool = False) -> None:
        """The same bytes from where they are, without comparing their checksums; and what tells where they are."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb", buffering=0)).fileno() for path, *_ in parts]
            wanted = [(fd, 0, head) for fd, (_, head, _, _) in zip(files, parts, strict=True)] if found else []
            wanted += [(fd, start, size) for fd, (_, _, start, size) in zip(files, parts, strict=True)]
            for fd, start, size in wanted:
                for at in range(start, start + size, ASKED):
                    os.posix_fadvise(fd, at, min(ASKED, start + size - at), os.POSIX_FADV_WILLNEED)
            done = 0
            for fd, (_, head, start, size) in zip(files, parts, strict=True):
                end = start + size
                if found:
                    assert os.preadv(fd, [memoryview(heads)[:head]], 0) == head
                    xxhash.xxh3_64_intdigest(memoryview(heads)[:head])
                while start < end:
                    got = os.preadv(fd, [target[done : done + min(ASKED, end - start)]], start)
                    for block in range(done, done + got if hashed else 0, BLOCK):
                        xxhash.xxh3_64_intdigest(target[block : min(block + BLOCK, done + got)])
                    start, done = start + got, done + got

    def read() -> None:
        held[0].read(space_folder.name, None, ONE, pooling=LAYOUT, out=torch.from_numpy(out))

    ways = {
        READ_APART: apart, HASHED_APART: lambda: apart(True), FOUND_APART: lambda: apart(True, True),
        "read(None)": read,
    }  # fmt: skip
    found = compare(sequential, ways, rounds, reference_name="sequential read", before=forget)
    # In the order in which they are stored, which is not that in which they were given.
    given = np.fromfile(blob, np.float16).reshape(n, WIDTH)
    assert (np.sort(out[:, 0]) == np.sort(given[:, 0])).all()
    title = f"one layer of all {n:,} prompts, page cache dropped (posix_fadvise DONTNEED)"
    return [(title, found, {"nbytes": out.nbytes, "bounds": {"read(None)": 0.7}})]


def drop(path: Path) -> None:
    """Let the page cache forget a file, and make sure that it has."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        left = resident(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)
    if left > 0.01:
        raise RuntimeError(f"{left:.0%} of {path} is still in memory: somebody has it mapped")


def resident(fd: int, size: int) -> float:
    """The share of a file that is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found)
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return float((np.frombuffer(found, np.uint8) & 1).mean())
