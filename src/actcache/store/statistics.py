"""Exact, mergeable moments: count, mean and sum of squared deviations of each dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_CHUNK_BYTES = 256 << 10
_FEW = 8


@dataclass
class Moments:
    """Moments of rows ``[*, D]``: `count`, `mean` float64 ``[D]``, `m2` float64 ``[D]``."""

    count: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, dim: int) -> Moments:
        return cls(0, np.zeros(dim), np.zeros(dim))

    @property
    def variance(self) -> npt.NDArray[np.float64]:
        """Population variance of each dimension; zeros without rows."""
        return self.m2 / max(self.count, 1)

    @property
    def std(self) -> npt.NDArray[np.float64]:
        return np.sqrt(self.variance)

    def merge(self, count: int, mean: npt.NDArray[Any], m2: npt.NDArray[Any]) -> None:
        """Take in the moments of other rows (Chan, Golub and LeVeque)."""
        if not count:
            return
        total = self.count + count
        delta = mean - self.mean
        with np.errstate(all="ignore"):
            self.m2 += m2 + delta * delta * (self.count * count / total)
            self.mean += delta * (count / total)
        self.count = total

    def update(self, rows: npt.NDArray[Any]) -> None:
        """Take in `rows` ``[n, D]`` of any floating dtype."""
        n, dim = rows.shape
        if not n or not dim:
            self.count += n
            return
        step = max(1, _CHUNK_BYTES // (4 * dim))
        kind = np.float64 if rows.dtype == np.float64 else np.float32
        scratch = np.empty((min(step, n), dim), kind)
        total, squares = np.zeros(dim), np.zeros(dim)
        with np.errstate(all="ignore"):
            # Deviations from about the mean: float32 sums of a chunk of them lose nothing that matters, even
            # where the mean is a thousand times the spread (outlier dimensions).
            centre = (self.mean if self.count else as_float(rows[:_FEW]).mean(axis=0)).astype(kind)
            for start in range(0, n, step):
                part = as_float(rows[start : start + step])
                away = np.subtract(part, centre, out=scratch[: len(part)])
                total += away.sum(axis=0)
                squares += np.einsum("ij,ij->j", away, away)
            shift = total / n
            self.merge(n, centre.astype(np.float64) + shift, np.maximum(squares - n * shift * shift, 0))


def as_float(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`rows` as float32, or as they are when float64; bfloat16 by widening its bits, which is exact."""
    if rows.dtype == np.float32 or rows.dtype == np.float64:
        return rows
    if rows.dtype.name == "bfloat16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether values of `dtype` have moments (the extra floating dtypes of ml_dtypes included)."""
    return dtype.kind == "f" or "float" in dtype.name
