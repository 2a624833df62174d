"""Exact, mergeable moments of each dimension, to the last bits of float64: count, mean, sum of squared deviations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import OptionError

Floats = npt.NDArray[np.float64]

_CHUNK_BYTES, _TOGETHER_BYTES = 1 << 20, 2 << 20
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
        mean, m2, norms = _moments([rows])
        self.merge(Moments(n, mean[0], m2[0], float(norms[0])))


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Exact statistics of all rows of a site, computed in float64: of exactly the values that a reader gets.

    Attributes:
        count: how many rows: tokens, or prompts where they are pooled.
        mean: float64 ``[D]``.
        variance: of each dimension over all rows (population variance), float64 ``[D]``.
        mean_norm: mean length of a row.
    """

    count: int
    mean: Floats
    variance: Floats
    mean_norm: float

    @classmethod
    def of(cls, moments: Moments) -> SiteStatistics:
        """What `moments` say; nothing that happens to them later changes it."""
        return cls(moments.count, moments.mean.copy(), moments.variance, moments.mean_norm)

    @property
    def std(self) -> Floats:
        """Standard deviation of each dimension, float64 ``[D]``."""
        return np.sqrt(self.variance)

    def merge(self, other: SiteStatistics) -> SiteStatistics:
        """The statistics of the rows of both. OptionError where they are of different widths."""
        if self.mean.shape != other.mean.shape:
            raise OptionError(
                f"statistics of {len(self.mean)} and of {len(other.mean)} dimensions: expected those of the same site."
            )
        moments = self.moments()
        moments.merge(other.moments())
        return SiteStatistics.of(moments)

    def moments(self) -> Moments:
        """The same as moments that take in others."""
        return Moments(self.count, self.mean.copy(), self.variance * self.count, self.mean_norm * self.count)


class _Memory:
    """Arrays to compute in, the same ones again: the first touch of fresh memory costs as much as the arithmetic."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: type = np.float64) -> npt.NDArray[Any]:
        """The array of that name, of a shape of which only the first number may be another than before."""
        array = self._arrays.get(name)
        if array is None or len(array) < shape[0] or array.shape[1:] != shape[1:]:
            array = self._arrays[name] = np.empty(shape, dtype)
        return array[: shape[0]]


class JointMoments:
    """Moments of `columns` of one width `dim`, whose rows come together: less is done for each of them on its own."""

    def __init__(self, columns: int, dim: int) -> None:
        self.count = 0
        self._mean, self._m2, self._norms = np.zeros((columns, dim)), np.zeros((columns, dim)), np.zeros(columns)
        self._memory = _Memory()

    def update(self, matrices: Sequence[npt.NDArray[Any]]) -> None:
        """Take in rows ``[n, D]`` of every column, all of one floating dtype."""
        n, dim = matrices[0].shape
        if n and dim:
            mean, m2, norms = _moments(matrices, self._memory)
            if self.count:
                self._merge(n, mean, m2)
            else:
                # To merge it with nothing would square what may be too large for that.
                self._mean[:], self._m2[:] = mean, m2
            self._norms += norms
        self.count += n

    def _merge(self, n: int, mean: Floats, m2: Floats) -> None:
        """As `Moments.merge`; what is given is lost."""
        with np.errstate(all="ignore"):
            share = n / (self.count + n)
            delta = np.subtract(mean, self._mean, out=mean)
            self._m2 += m2
            np.multiply(delta, share, out=m2)
            self._mean += m2
            m2 *= delta
            m2 *= self.count
            self._m2 += m2

    def of(self, column: int) -> Moments:
        """Those of one column."""
        return Moments(self.count, self._mean[column].copy(), self._m2[column].copy(), float(self._norms[column]))


def _moments(matrices: Sequence[npt.NDArray[Any]], memory: _Memory | None = None) -> tuple[Floats, Floats, Floats]:
    """Means and sums of squared deviations ``[columns, D]`` of matrices ``[n, D]``, and sums of the lengths of rows.

    All is added in float64, in which values of every other dtype, and their squares, are exact. The arrays are those of
    `memory` where it is given.
    """
    n, dim = matrices[0].shape
    memory = memory or _Memory()
    total, squares = memory("total", (len(matrices), dim)), memory("squares", (len(matrices), dim))
    norms = np.empty(len(matrices))
    step = min(n, max(1, _CHUNK_BYTES // (8 * dim)))
    # A few columns at a time: fewer and longer calls, in memory that the processor's own cache holds.
    together = 1 if matrices[0].dtype == np.float64 else max(1, _TOGETHER_BYTES // (8 * step * dim))
    unit = _SMALL if matrices[0].dtype == np.float16 and not _flushes_subnormals() else 1.0
    with np.errstate(all="ignore"):
        for k in range(0, len(matrices), together):
            some = slice(k, k + together)
            norms[some] = _sums(matrices[some], total[some], squares[some], step, memory, unit)
        norms /= unit
        mean = np.divide(total, n * unit, out=total)
        m2 = np.divide(squares, unit**2, out=squares)
        of_mean = np.multiply(mean, mean, out=memory("of_mean", mean.shape))
        of_mean *= n
        m2 -= of_mean
        # Where the mean is large beside the spread this difference is inexact: such dimensions are few.
        far = ~(of_mean <= np.multiply(m2, _FAR, out=memory("bound", m2.shape)))
        for k in np.flatnonzero(far.any(axis=1)).tolist() if n > 1 else ():
            columns = np.flatnonzero(far[k] & np.isfinite(mean[k]))
            if len(columns):
                mean[k, columns], m2[k, columns] = _around(matrices[k], columns, mean[k, columns])
    return mean, m2, norms


def _sums(
    matrices: Sequence[npt.NDArray[Any]], total: Floats, squares: Floats, step: int, memory: _Memory, unit: float
) -> Floats:
    """The sums of the rows of some `matrices` times `unit` to `total`, those of their squares to `squares`; those of
    their lengths ``[columns]``. `step` rows of each are looked at together; of float64 it is one matrix.
    """
    norms = np.zeros(len(matrices))
    for start in range(0, len(matrices[0]), step):
        parts = [rows[start : start + step] for rows in matrices]
        here = parts[0][None]
        if here.dtype != np.float64:
            shape = (len(parts), *parts[0].shape)
            narrow = memory("narrow", (math.prod(shape),), np.float32).reshape(shape)
            here = memory("wide", (math.prod(shape),)).reshape(shape)
            if unit != 1:
                np.copyto(here, _by_bits(parts, narrow))
            else:
                _widen(parts, narrow, here)
        lengths = np.matmul(here[:, :, None, :], here[:, :, :, None])
        if unit != 1 and lengths.max() >= _INF_SQUARED * unit**2:
            _widen(parts, narrow, here)
            here *= unit
            lengths = np.matmul(here[:, :, None, :], here[:, :, :, None])
        norms += np.sqrt(lengths, out=lengths).sum(axis=(1, 2, 3))
        if start:
            total += np.add.reduce(here, axis=1)
            squares += np.einsum("kij,kij->kj", here, here)
        else:
            np.add.reduce(here, axis=1, out=total)
            np.einsum("kij,kij->kj", here, here, out=squares)
    return norms


def _widen(parts: Sequence[npt.NDArray[Any]], narrow: npt.NDArray[np.float32], wide: Floats) -> None:
    """The values of `parts` to `wide` ``[columns, n, D]``, through `narrow`."""
    for part, some, all_of_it in zip(parts, narrow, wide, strict=True):
        np.copyto(all_of_it, as_float(part, some))


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
    _by_bits([rows], out[None])
    out *= np.float32(1 / _SMALL)
    if out.max(initial=0) >= _INF or out.min(initial=0) <= -_INF:
        # inf and nan, whose exponent is no number.
        strange = np.abs(out) >= _INF
        out[strange] = rows[strange]
    return out


def _by_bits(parts: Sequence[npt.NDArray[Any]], out: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`parts` of float16, times 2**-112, in `out` ``[parts, ...]``; what is inf or nan becomes a number, from 65536
    times as much on.

    Several times as fast as numpy.
    """
    bits = out.view(np.int32)
    for part, some in zip(parts, bits, strict=True):
        np.copyto(some, part.view(np.int16))
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
