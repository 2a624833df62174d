"""What several store tests need: prompts, records, stores, and children that never import torch."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

import children  # noqa: F401  # they end with this process
from actcache.store.appending import Appender
from actcache.store.prompts import PromptTable
from actcache.store.quantize import BLOCK_ROWS
from actcache.store.records import Records
from actcache.store.store import Store

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int32, np.int64, np.uint8, np.int8, np.bool_]
CONTEXT = "tokenizer"
SITES = ["resid_post.0", "resid_post.1"]


def make_store(folder: Path) -> tuple[Store, str]:
    store = Store(folder / "store", index_dir=folder / "index")
    return store, store.open_space(
        {"weights": "abc"}, {"model_name": "org/model", "revision": "r1", "dtype": "float32"}
    )


def text(i: int) -> str:
    return f"prompt {i} " + "é" * (i % 5)


def make_table(numbers: Sequence[int]) -> PromptTable:
    """Prompt `i` has ``1 + i % 7`` tokens that begin with `i`, and its own text."""
    ids = [[i, *range(i % 7)] for i in numbers]
    return PromptTable.build(ids, [text(i) for i in numbers], text_context=CONTEXT)


def vector(i: int, site: str, dim: int = 8) -> npt.NDArray[np.float32]:
    """What prompt `i` has at `site`: anyone can recompute it."""
    return np.random.default_rng([i, len(site), ord(site[-1])]).standard_normal(dim).astype(np.float32)


def pooled(numbers: Sequence[int], sites: Sequence[str] = SITES, dim: int = 8, dtype: Any = np.float32) -> Records:
    data = {s: np.stack([vector(i, s, dim) for i in numbers]).astype(dtype) for s in sites}
    return Records.pooled(make_table(numbers), "last_token", data)


def block_offsets(rows: int) -> npt.NDArray[np.int64]:
    """Where blocks of 64 of `rows` rows begin and end: int64 ``[blocks + 1]``; 0 alone where there are no rows."""
    return np.append(np.arange(0, rows, BLOCK_ROWS, dtype=np.int64), rows).astype(np.int64)


def every_token(numbers: Sequence[int], sites: Sequence[str] = SITES, dim: int = 8) -> Records:
    table = make_table(numbers)
    data = {
        s: np.concatenate([vector(i, s, dim) + np.arange(1 + i % 7, dtype=np.float32)[:, None] for i in numbers])
        for s in sites
    }
    return Records.tokens(table, data)


def check_pooled(
    store: Store, space: str, numbers: Sequence[int], sites: Sequence[str] = SITES
) -> npt.NDArray[np.bool_]:
    """Every prompt found must have exactly its own vectors; which ones were found."""
    place = store.locate(
        space, texts=[text(i) for i in numbers], text_context=CONTEXT, sites=sites, layout="last_token"
    )
    members = np.flatnonzero(place.found)
    taken = place.take(index=members)
    for row, k in zip(taken, members.tolist(), strict=True):
        for j, site in enumerate(sites):
            np.testing.assert_array_equal(row[j], vector(numbers[k], site))
    return place.found


def fresh(store: Store, folder: Path, name: str = "other host") -> Store:
    """The same store, of which nothing is known yet."""
    return Store(store.location, index_dir=folder / name)


def flip(path: Path, at: int, bits: int = 1) -> None:
    """Change those bits of the byte there; once more puts them back."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bits]))


class _Everything(set[Any]):
    def __contains__(self, _: object) -> bool:
        return True


def growing_writer(store: Store, space: str) -> Appender:
    """What the thread of a writer does, without the thread; also the first group goes into a file that grows."""
    appender = Appender(
        partial(store.append, space), partial(store._prepared, space), partial(store._index, space), store.index_dir
    )
    appender._known = _Everything()
    return appender


def open_files(store: Store, space: str) -> list[Path]:
    return sorted((store.root / space).glob("*.open"))


def segment_files(store: Store, space: str) -> list[Path]:
    return sorted((store.root / space).glob("*.safetensors"))


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child, which ends with this process at the latest; its process id."""
    with warnings.catch_warnings():
        # From Python 3.12 a fork beside idle threads of a numerical library warns.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for(pid: int) -> int:
    """Exit status of a child; negative for a signal."""
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert wait_for(pid) == -signal.SIGKILL
