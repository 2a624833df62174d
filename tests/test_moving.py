"""Long copies, against plain assignment, wherever both sides lie in memory."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from actcache.store import moving
from actcache.store.moving import move

DTYPES = [np.float16, np.float32, np.int8, np.bool_, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def lying_at(offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of zeros that begins so many bytes behind the beginning of a page, with a byte more on either side."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(size + 3 * 4096, np.uint8)
    start = -memory.ctypes.data % 4096 + 4096 + offset
    return memory[start : start + size].view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("offset", [0, 1, 16, 2064])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_every_bit_arrives_and_nothing_beside_it_changes(
    monkeypatch: pytest.MonkeyPatch, dtype: type, offset: int, rows: int
) -> None:
    dtype, shape = np.dtype(dtype), (rows, 96)
    # Of three rows and more, whatever the dtype: the others take the short way.
    monkeypatch.setattr(moving, "_LONG_BYTES", 3 * 96 * dtype.itemsize)
    source = lying_at(0, shape, dtype)
    # NaNs of every kind among them, whose bits a copy of numbers might change.
    bits = np.random.default_rng(rows).integers(0, 2 if dtype.kind == "b" else 256, source.nbytes, np.uint8)
    source.reshape(-1).view(np.uint8)[:] = bits
    target = lying_at(offset, shape, dtype)
    around = target.base
    while around.base is not None:
        around = around.base
    before = int(around.sum())
    source.flags.writeable = False
    move(target, source)
    assert (target.reshape(-1).view(np.uint8) == bits).all()
    assert int(around.sum(dtype=np.int64)) == before + int(bits.sum(dtype=np.int64))


@pytest.mark.parametrize("long", [1, 1 << 20])
def test_other_dtypes_and_gaps_between_rows(monkeypatch: pytest.MonkeyPatch, long: int) -> None:
    monkeypatch.setattr(moving, "_LONG_BYTES", long)
    source = np.random.default_rng(0).standard_normal((50, 2, 30), np.float32).astype(np.float16)
    wider = np.zeros((50, 30), np.float32)
    move(wider, source[:, 1])
    assert (wider == source[:, 1]).all()
    gaps = np.zeros((50, 3, 30), np.float16)
    move(gaps[:, 2], source[:, 0])
    assert (gaps[:, 2] == source[:, 0]).all() and not gaps[:, :2].any()
    turned = np.zeros((30, 50), np.float16)
    move(turned, source[:, 0].T)
    assert (turned == source[:, 0].T).all()


@pytest.mark.parametrize("long", [1, 1 << 20])
def test_shapes_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch, long: int) -> None:
    monkeypatch.setattr(moving, "_LONG_BYTES", long)
    with pytest.raises(ValueError, match=r"broadcast|shape"):
        move(np.zeros((4, 8), np.float16), np.ones((3, 8), np.float16))
