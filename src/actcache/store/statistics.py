"""Exact, mergeable moments: count, mean and sum of squared deviations of each dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_CHUNK_BYTES = 512 << 10
_GROUP = 16
_INF = 65536.0
# Of what takes the place of inf the square is at least this, less what rounding takes.
_INF_SQUARED = 0.99 * _INF**2


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
        if not dim:
            self.count += n
            return
        step = max(_GROUP, _CHUNK_BYTES // (4 * dim) // _GROUP * _GROUP)
        # Fresh memory would cost more than the arithmetic.
        scratch = np.empty((min(step, n), dim), np.float64 if rows.dtype == np.float64 else np.float32)
        quick = rows.dtype == np.float16 and not _flushes_subnormals()
        with np.errstate(all="ignore"):
            for start in range(0, n, step):
                part, wide = rows[start : start + step], scratch[: min(step, n - start)]
                values = _widened(part, wide) if quick else as_float(part, wide)
                squares = np.matmul(values[:, None, :], values[:, :, None])
                if quick and squares.max() >= _INF_SQUARED:
                    values = as_float(part, wide)
                    squares = np.matmul(values[:, None, :], values[:, :, None])
                norms = float(np.sqrt(squares).sum(dtype=np.float64))
                self._update_chunk(values, norms, wide)

    def _update_chunk(self, rows: npt.NDArray[Any], norms: float, away: npt.NDArray[Any]) -> None:
        """Take in rows of which the lengths add up to `norms`; `away` is written to, and may be the rows themselves."""
        n = len(rows)
        # Deviations from about the mean are small beside it (outlier dimensions), and 16 of them are added in
        # float32 before float64 takes over: what that loses is lost in the noise, and it is several times as fast.
        # The first row would not do: that of the first token is often a hundred times as long as others.
        centre = (self.mean if self.count else rows[n // 2]).astype(away.dtype)
        np.subtract(rows, centre, out=away)
        total = _column_sums(away)
        squares = _column_sums(np.multiply(away, away, out=away))
        shift = total / n
        m2 = np.maximum(squares - n * shift * shift, 0)
        self.merge(Moments(n, centre.astype(np.float64) + shift, m2, norms))


def _column_sums(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    whole = len(rows) // _GROUP * _GROUP
    groups = np.add.reduce(rows[:whole].reshape(whole // _GROUP, _GROUP, rows.shape[1]), axis=1)
    sums: npt.NDArray[np.float64] = np.add.reduce(groups, axis=0, dtype=np.float64)
    if whole < len(rows):
        sums += np.add.reduce(rows[whole:], axis=0)
    return sums


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
    _widened(rows, out)
    if out.max(initial=0) >= _INF or out.min(initial=0) <= -_INF:
        # inf and nan, whose exponent is no number.
        strange = np.abs(out) >= _INF
        out[strange] = rows[strange]
    return out


def _widened(rows: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`rows` of float16 in `out`; what is inf or nan becomes a number from 65536 on. Several times as fast as numpy."""
    bits = out.view(np.int32)
    np.copyto(bits, rows.view(np.int16))
    bits <<= 13
    # The sign was spread over what is now the exponent's upper half.
    bits &= np.int32(-0x70000001)
    out *= np.float32(2.0**112)
    return out


def _flushes_subnormals() -> bool:
    """Whether this thread's arithmetic takes subnormal numbers for zero, as `torch.set_flush_denormal` makes it."""
    return bool(np.float32(2.0**-130) * np.float32(2.0**20) == 0)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether values of `dtype` have moments (the extra floating dtypes of ml_dtypes included)."""
    return dtype.kind == "f" or "float" in dtype.name
