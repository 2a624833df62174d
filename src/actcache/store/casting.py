"""From the dtype that was given to the one that is stored: what does not fit, and what is lost, measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import ValueOverflowError
from actcache.store import quantize
from actcache.store.blocks import Rows
from actcache.store.dtypes import code_for, is_scaled, matrix_dtype, name_of
from actcache.store.records import Records
from actcache.store.statistics import Moments, as_float, is_float

_CHUNK_BYTES = 512 << 10
# Sums of squares in float32 are exact enough between these; others are computed in float64.
_LEAST_SQUARES, _MOST_SQUARES = 1e-20, 1e30


@dataclass
class CastError:
    """What storing changed, measured against the values that were given. Records of different rows add up.

    `rows`: how many were measured (all but those with inf or nan); `max`: the largest absolute error; `squares` and
    `given`: sums of squares of the errors and of the values; `angle` and `angle_max`: sum and largest of
    ``1 - cosine`` of a row with what is stored of it.
    """

    rows: int = 0
    max: float = 0.0
    squares: float = 0.0
    given: float = 0.0
    angle: float = 0.0
    angle_max: float = 0.0

    @property
    def numbers(self) -> tuple[float, ...]:
        """All of it, as a segment keeps it."""
        return self.rows, self.max, self.squares, self.given, self.angle, self.angle_max

    @property
    def relative(self) -> float:
        """Relative L2 error of all values together."""
        # Of values that were kept as they are, nan among them, nothing has changed.
        return float(np.sqrt(self.squares / self.given)) if self.given and self.squares else 0.0

    @property
    def cosine(self) -> float:
        """Mean cosine of a row with what is stored of it."""
        return 1 - self.angle / max(self.rows, 1)

    @property
    def cosine_min(self) -> float:
        """The smallest cosine of a row with what is stored of it."""
        return 1 - self.angle_max

    def add(self, other: CastError) -> None:
        """Take in what was measured of other rows."""
        self.rows += other.rows
        self.max = max(self.max, other.max)
        self.squares += other.squares
        self.given += other.given
        self.angle += other.angle
        self.angle_max = max(self.angle_max, other.angle_max)

    def measure(self, given: npt.NDArray[Any], stored: npt.NDArray[Any]) -> None:
        """Take in rows ``[n, D]`` as they were given and as a reader will get them, both float32 or float64."""
        with np.errstate(all="ignore"):
            error = stored - given
            squares = _dots(given, given)
            if not ((squares > _LEAST_SQUARES) & (squares < _MOST_SQUARES)).all() and given.dtype != np.float64:
                finite = np.isfinite(given).all(axis=1)
                self.measure(given[finite].astype(np.float64), stored[finite].astype(np.float64))
                return
            finite = np.isfinite(squares)
            if not finite.all():
                given, error, squares = given[finite], error[finite], squares[finite]
            if not len(given):
                return
            lost, along = _dots(error, error).astype(np.float64), _dots(error, given).astype(np.float64)
            squares = squares.astype(np.float64)
            # 1 - cosine from what differs, since the cosine itself is 1 to within rounding.
            before = np.sqrt(squares)
            after = np.sqrt(np.maximum(squares + 2 * along + lost, 0))
            apart = lost - ((2 * along + lost) / (before + after)) ** 2
            angle = np.where(lost > 0, np.where(before * after > 0, apart / (2 * before * after), 1.0), 0.0)
            # Without a copy of the signs: most of this is waiting for memory.
            largest = max(error.max(initial=0), -error.min(initial=0))
        self.add(
            CastError(
                len(given), float(largest), float(lost.sum()), float(squares.sum()), float(angle.sum()),
                float(angle.max(initial=0)),
            )
        )  # fmt: skip


def _dots(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The product of each row of one with that of the other, ``[n]``."""
    products: npt.NDArray[Any] = np.einsum("ij,ij->i", left, right)
    return products


@dataclass(frozen=True)
class Piece:
    """Rows of a column as they are stored: the matrix, float32 scales ``[blocks, D]`` where it has any, the moments of
    its values (None for integers), and what storing changed."""

    rows: npt.NDArray[Any]
    scales: npt.NDArray[np.float32] | None
    moments: Moments | None
    error: CastError


def is_cast(rows: npt.NDArray[Any], code: str) -> bool:
    """Whether a column of `code` keeps `rows` otherwise than they are given."""
    return rows.dtype != matrix_dtype(code) or is_scaled(code)


def nothing_lost(rows: int, moments: Moments | None) -> CastError:
    """What is measured of so many rows that are kept as they were given, of which these are the moments."""
    error = CastError(rows)
    if moments is not None:
        with np.errstate(all="ignore"):
            error.given = float(moments.m2.sum() + moments.count * (moments.mean @ moments.mean))
    return error


def cast(rows: npt.NDArray[Any], code: str) -> Iterator[Piece]:
    """`rows` ``[n, D]`` as a column of `code`, which has no scales, keeps them, in pieces."""
    dtype = matrix_dtype(code)
    if not is_cast(rows, code):
        moments = None
        if is_float(dtype):
            moments = Moments.empty(rows.shape[1])
            moments.update(rows)
        yield Piece(np.ascontiguousarray(rows), None, moments, nothing_lost(len(rows), moments))
        return
    step = max(1, _CHUNK_BYTES // (4 * max(rows.shape[1], 1)))
    for start in range(0, len(rows), step):
        given = np.ascontiguousarray(as_float(rows[start : start + step]))
        with np.errstate(over="ignore"):
            stored = given.astype(dtype)
        yield _measured(given, stored, None, as_float(stored))


def quantised(rows: Rows, offsets: npt.NDArray[np.int64]) -> Iterator[Piece]:
    """`rows` as codes and scales, in pieces of whole blocks, which `offsets` ``[blocks + 1]`` names."""
    edges, block = offsets.tolist(), 0
    most = quantize.blocks_at_once(rows.dim) * quantize.BLOCK_ROWS
    while block + 1 < len(edges):
        last = max(block + 1, int(np.searchsorted(offsets, edges[block] + most, "right")) - 1)
        given = np.ascontiguousarray(rows.between(edges[block], edges[last]))
        mine = offsets[block : last + 1] - edges[block]
        with np.errstate(over="ignore"):
            stored, scales = quantize.encode(given.astype(np.float32, copy=False), rows.dtype, mine)
        back = quantize.decode_run(stored, scales, mine, 0, len(given))
        yield _measured(given, stored, scales, back)
        block = last


def _measured(
    given: npt.NDArray[Any],
    stored: npt.NDArray[Any],
    scales: npt.NDArray[np.float32] | None,
    back: npt.NDArray[Any],
) -> Piece:
    """What is `stored` of rows that were `given`, and are read `back`."""
    moments, error = Moments.empty(given.shape[1]), CastError()
    moments.update(back)
    error.measure(given, back)
    return Piece(stored, scales, moments, error)


@dataclass(frozen=True)
class Overflow:
    """A prompt (its number in the records) that `dtype` cannot hold, and the first value of it that does not fit."""

    prompt: int
    site: str
    value: float
    dtype: str

    def __str__(self) -> str:
        value = f"{self.value:.6g}"
        if np.isfinite(self.value):
            return f"{self.site}: the value {value} becomes inf in {self.dtype}; store it as bfloat16 or float32"
        return f"{self.site}: {self.dtype} has no {value}; store it as bfloat16 or float32"


def overflowing(records: Records, storage: str | None) -> list[Overflow]:
    """The prompts of which a finite value would become inf, or a value that is not finite nan, and be lost."""
    found: dict[int, Overflow] = {}
    for site, rows in records.data.items():
        code = code_for(rows.dtype, storage)
        for row, value in _first_lost(rows, code):
            prompt = int(np.searchsorted(records.row_offset, row, "right")) - 1
            found.setdefault(prompt, Overflow(prompt, site, value, name_of(code)))
    return [found[prompt] for prompt in sorted(found)]


def screened(records: Records, storage: str | None, *, allow_inf: bool) -> tuple[Records | None, list[Overflow]]:
    """`records` as `storage` can hold them, and the prompts left out because it cannot; with `allow_inf` none is."""
    refused = [] if allow_inf else overflowing(records, storage)
    kept: Records | None = records
    if refused:
        keep = np.ones(len(records.prompts), bool)
        keep[[r.prompt for r in refused]] = False
        kept = records.select(keep) if keep.any() else None
    return None if kept is None else replace(kept, storage=storage, screened=True), refused


def fitting(records: Records, storage: str | None) -> Records:
    """`records`, checked, as `storage` can hold them. ValueOverflowError where it cannot hold all of them."""
    records.check()
    kept, refused = screened(records, storage, allow_inf=False)
    if refused or kept is None:
        more = f" ({len(refused) - 1} more prompts likewise)" if len(refused) > 1 else ""
        raise ValueOverflowError(f"prompt {refused[0].prompt}, {refused[0]}{more}; allow_inf=True stores it so.")
    return kept


def _first_lost(rows: npt.NDArray[Any], code: str) -> Iterator[tuple[int, float]]:
    """Rows that a column of `code` cannot hold, each with its first value that is lost."""
    dtype = matrix_dtype(code)
    if not is_float(rows.dtype) or (rows.dtype == dtype and not is_scaled(code)):
        return
    target = np.dtype(np.float32) if is_scaled(code) else dtype
    step = max(1, _CHUNK_BYTES // (4 * max(rows.shape[1], 1)))
    for start in range(0, len(rows), step):
        part = as_float(rows[start : start + step])
        low, high = part.min(initial=0), part.max(initial=0)
        with np.errstate(over="ignore"):
            # Rounding does not change an order, so that the ends tell of all that lies between.
            if np.isfinite(np.array([low, high]).astype(target)).all():
                continue
            lost = ~np.isfinite(part.astype(target))
        if not is_scaled(code):
            lost &= np.isfinite(part)
        for row in np.flatnonzero(lost.any(axis=1)).tolist():
            yield start + row, float(part[row, int(lost[row].argmax())])
