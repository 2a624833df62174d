"""What is computed in a second thread while rows are written: waited for, told of, and the same."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actcache.store import growing
from actcache.store import segment as segments
from actcache.store.beside import Beside
from actcache.store.growing import GrowingFile
from actcache.store.records import Records
from store_helpers import make_table

SITES = ["a", "b"]


def parts(seed: int, sizes: tuple[int, ...] = (3, 1, 40), dtype: str = "float16") -> list[Records]:
    rng = np.random.default_rng(seed)
    first, made = 0, []
    for n in sizes:
        data = {s: (rng.standard_normal((n, 32)) * 50 + k).astype(dtype) for k, s in enumerate(SITES)}
        made.append(Records.pooled(make_table(range(first, first + n)), "mean", data))
        first += n
    return made


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_moments_of_many_small_parts_are_those_of_the_rows(tmp_path: Path, dtype: str) -> None:
    given = parts(0, dtype=dtype)
    info = segments.write(tmp_path, given, space="0" * 32)
    found = segments.open(tmp_path / f"{info.name}.safetensors")
    for site in SITES:
        rows = np.concatenate([part.data[site] for part in given]).astype(np.float64)
        moments, error = found.moments(site), found.error(site)
        assert moments is not None and moments.count == len(rows) == error.rows
        np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.m2, ((rows - rows.mean(0)) ** 2).sum(0), rtol=1e-9)
        np.testing.assert_allclose(moments.norms, np.linalg.norm(rows, axis=1).sum(), rtol=1e-12)
        assert error.max == error.squares == 0 and error.given == pytest.approx((rows**2).sum(), rel=1e-9)
        np.testing.assert_array_equal(found.matrix(site), np.concatenate([part.data[site] for part in given]))
    assert segments.validate(found.path) == []


def test_parts_of_which_one_must_be_cast_are_measured_as_they_are_stored(tmp_path: Path) -> None:
    given = parts(1)
    for part in given:
        part.data["a"] = part.data["a"].astype(np.float32) + np.float32(1e-3)
    given = [replace(part, storage="float16") for part in given]
    found = segments.open(tmp_path / f"{segments.write(tmp_path, given, space='0' * 32).name}.safetensors")
    for site in SITES:
        stored = np.concatenate([p.data[site] for p in given]).astype(np.float16).astype(np.float64)
        moments, error = found.moments(site), found.error(site)
        assert moments is not None and error.rows == len(stored)
        np.testing.assert_allclose(moments.mean, stored.mean(0), rtol=1e-6)
        assert (error.max > 0) == (site == "a")


@pytest.mark.parametrize("fails", ["measuring", "writing", "both"])
def test_a_batch_that_fails_waits_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    monkeypatch.setattr(growing, "LARGE", 0)
    given = parts(2)
    file = GrowingFile(tmp_path, "0" * 32, given, 1 << 20)
    file.add(given)
    written, measured = threading.Event(), threading.Event()
    real = file._measured.add_given

    def measure(*arguments: object) -> None:
        assert written.wait(10), "rows are written beside it"
        real(*arguments)  # type: ignore[arg-type]
        measured.set()
        if fails != "writing":
            raise MemoryError("measuring")

    def write(*_: object) -> int:
        written.set()
        if fails != "measuring":
            raise ValueError("writing")
        return 0

    monkeypatch.setattr(file._measured, "add_given", measure)
    if fails == "measuring":
        real_write = growing.write_all
        monkeypatch.setattr(growing, "write_all", lambda *a: (written.set(), real_write(*a))[1])
    else:
        monkeypatch.setattr(growing, "write_all", write)
    with pytest.raises(MemoryError if fails == "measuring" else ValueError):
        file.add(parts(3))
    assert measured.is_set(), "nothing uses what was given any more"
    file.close()


def test_what_a_thread_raises_is_raised_at_the_end_of_the_block() -> None:
    def work() -> None:
        raise KeyError("work")

    with pytest.raises(KeyError, match="work"), Beside(work):
        pass
    with pytest.raises(ValueError, match="block"), Beside(work):
        raise ValueError("block")
    beside = Beside(work)
    for _ in range(2):
        with pytest.raises(KeyError):
            beside.wait()


def test_where_no_thread_can_be_started_it_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    done = []
    monkeypatch.setattr(threading.Thread, "start", start)
    with Beside(lambda: done.append(1)):
        assert done == [1]
