"""Exact, mergeable moments of each dimension, to the last bits of float64: count, mean, sum of squared deviations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_CHUNK_BYTES = 1 << 20
_INF = 65536.0
# Of what takes the place of inf the square is at least this, less what rounding takes.
_INF_SQUARED = 0.99 * _INF**2
# What float16 is taken for when its bits are moved to where those of float32 are.
_SMALL = 2.0**-112
# A squared mean that is so many times the variance costs the variance as many times the last bit.
_FAR = 64.0


@dataclass
class Moments:
    """Moments of rows ``[*, D]``: `count`, float64 ``[D]`` `mean` and `m2`, and the sum of the rows' lengths."""

    count: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]
    norms: float = 0.0

    @classmethod
    def empty(cls, dim: int) -> Moments:
        return cls(0, np.zeros(dim), np.zeros(dim))

    @property
    def variance(self) -> npt.NDArray[np.float64]:
        """Population variance of each dimension; zeros without rows."""
        return self.m2 / max(self.count, 1)

    @property
    def mean_norm(self) -> float:
        """Mean length of a row; 0 without rows."""
        return self.norms / max(self.count, 1)

    @property
    def std(self) -> npt.NDArray[np.float64]:
        return np.sqrt(self.variance)

    def merge(self, other: Moments) -> None:
        """Take in the moments of other rows (Chan, Golub and LeVeque)."""
        if not other.count:
            return
        if not self.count:
            self.count, self.mean, self.m2, self.norms = other.count, other.mean.copy(), other.m2.copy(), other.norms
            return
        total = self.count + other.count
        with np.errstate(all="ignore"):
            delta = other.mean - self.mean
            self.m2 += other.m2 + delta * delta * (self.count * other.count / total)
            self.mean += delta * (other.count / total)
        self.norms += other.norms
        self.count = total

    def update(self, rows: npt.NDArray[Any]) -> None:
        """Take in `rows` ``[n, D]`` of any floating dtype."""
        n, dim = rows.shape
        if not n or not dim:
            self.count += n
            return
        with np.errstate(all="ignore"):
            self.merge(_moments(rows))


def _moments(rows: npt.NDArray[Any]) -> Moments:
    """All is added in float64, in which values of every other dtype, and their squares, are exact."""
    n, dim = rows.shape
    total, squares, norms = np.zeros(dim), np.zeros(dim), 0.0
    step = min(n, max(1, _CHUNK_BYTES // (8 * dim)))
    # Fresh memory would cost more than the arithmetic.
    double = rows.dtype == np.float64
    wide, narrow = np.empty((0 if double else step, dim)), np.empty((0 if double else step, dim), np.float32)
    quick = rows.dtype == np.float16 and not _flushes_subnormals()
    unit = _SMALL if quick else 1.0
    for start in range(0, n, step):
        part = rows[start : start + step]
        here = part if double else wide[: len(part)]
        if not double:
            np.copyto(here, _by_bits(part, narrow[: len(part)]) if quick else as_float(part, narrow[: len(part)]))
        lengths = np.matmul(here[:, None, :], here[:, :, None])
        if quick and lengths.max() >= _INF_SQUARED * unit**2:
            np.copyto(here, as_float(part, narrow[: len(part)]))
            here *= unit
            lengths = np.matmul(here[:, None, :], here[:, :, None])
        norms += float(np.sqrt(lengths).sum())
        total += np.add.reduce(here, axis=0)
        squares += np.einsum("ij,ij->j", here, here)
    mean = total / (n * unit)
    m2 = squares / unit**2 - n * mean * mean
    # Where the mean is large beside the spread this difference is inexact: such dimensions are few.
    far = np.flatnonzero(np.isfinite(mean) & ~(n * mean * mean <= _FAR * m2))
    if n > 1 and len(far):
        mean[far], m2[far] = _around(rows, far, mean[far])
    return Moments(n, mean, m2, norms / unit)


def _around(rows: npt.NDArray[Any], columns: npt.NDArray[np.int64], mean: npt.NDArray[np.float64]) -> Any:
    """Mean and sum of squared deviations of some columns, of which `mean` is the mean but for rounding."""
    rest, squares = np.zeros(len(columns)), np.zeros(len(columns))
    step = max(1, _CHUNK_BYTES // (8 * len(columns)))
    for start in range(0, len(rows), step):
        away = as_float(rows[start : start + step, columns]) - mean
        rest += np.add.reduce(away, axis=0)
        squares += np.einsum("ij,ij->j", away, away)
    return mean + rest / len(rows), np.maximum(squares - rest * rest / len(rows), 0)


def as_float(rows: npt.NDArray[Any], out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[Any]:
    """`rows` as float32, or as they are when float32 or float64; exact.

    `out`, of the same shape, spares the memory; it may or may not be what is returned.
    """
    if rows.dtype == np.float32 or rows.dtype == np.float64:
        return rows
    if out is None:
        out = np.empty(rows.shape, np.float32)
    if rows.dtype != np.float16 and rows.dtype.name == "bfloat16":
        np.left_shift(rows.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
        return out
    if rows.dtype != np.float16 or _flushes_subnormals():
        np.copyto(out, rows)
        return out
    _by_bits(rows, out)
    out *= np.float32(1 / _SMALL)
    if out.max(initial=0) >= _INF or out.min(initial=0) <= -_INF:
        # inf and nan, whose exponent is no number.
        strange = np.abs(out) >= _INF
        out[strange] = rows[strange]
    return out


def _by_bits(rows: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`rows` of float16, times 2**-112, in `out`; what is inf or nan becomes a number, from 65536 times as much on.

    Several times as fast as numpy.
    """
    bits = out.view(np.int32)
    np.copyto(bits, rows.view(np.int16))
    bits <<= 13
    # The sign was spread over what is now the exponent's upper half.
    bits &= np.int32(-0x70000001)
    return out


def _flushes_subnormals() -> bool:
    """Whether this thread's arithmetic takes subnormal numbers for zero, as `torch.set_flush_denormal` makes it."""
    return bool(np.float32(2.0**-130) * np.float32(2.0**20) == 0)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether values of `dtype` have moments (the extra floating dtypes of ml_dtypes included)."""
    return dtype.kind == "f" or "float" in dtype.name
