"""The dtypes in which vectors are stored, by the names that people, columns and numpy have for them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

from actcache.store import container, quantize

SCALED = "*scale"
"""What the code of a column ends in whose values are codes times scales."""

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int8": "I8" + SCALED, "float8_e4m3": "F8_E4M3" + SCALED,
}  # fmt: skip
FLOATING = frozenset(_NAMES)
"""The names of the dtypes in which floating values can be stored."""
SCALED_DTYPES = frozenset(name for name, code in _NAMES.items() if code.endswith(SCALED))
"""Those of them whose values are codes times scales."""
_CODES = {code: name for name, code in _NAMES.items()}
_BY_REACH = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")
"""Floating dtypes in the order of their largest finite numbers."""
_FLOAT_CODES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@cache
def code_for(given: np.dtype[Any], storage: str | None) -> str:
    """The code under which values of dtype `given` are kept when `storage` is asked for (None: as they are).

    Only floating values are converted: token ids and indices stay what they are.
    """
    code = container.code_of(given)
    return code if storage is None or code not in _FLOAT_CODES else _NAMES[storage]


@cache
def matrix_dtype(code: str) -> np.dtype[Any]:
    """The dtype of the matrix in the file."""
    return container.DTYPES[code.removesuffix(SCALED)]


def value_dtype(code: str) -> np.dtype[Any]:
    """The dtype in which a reader gets the values."""
    return np.dtype(np.float32) if is_scaled(code) else matrix_dtype(code)


def is_scaled(code: str) -> bool:
    return code.endswith(SCALED)


def is_quantised(matrix: np.dtype[Any]) -> bool:
    """Whether a matrix of this dtype may have scales."""
    return matrix in quantize.LARGEST


def name_of(code: str) -> str:
    """What people call it: "float16", "int8" (with scales), "float8_e4m3" (with scales), else numpy's name."""
    return _CODES.get(code) or matrix_dtype(code).name


def reaches(target: np.dtype[Any], stored: np.dtype[Any]) -> bool:
    """Whether no finite value of dtype `stored` becomes inf in `target`."""
    if target == stored:
        return True
    known = target.name in _BY_REACH and stored.name in _BY_REACH
    return known and _BY_REACH.index(target.name) >= _BY_REACH.index(stored.name)


def common_dtype(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """The dtype of a result that takes values of all `dtypes`: with floating ones float32, or float64 where one is."""
    kinds = set(dtypes)
    if len(kinds) < 2:
        return kinds.pop() if kinds else np.dtype(np.float32)
    if any(kind.name in _BY_REACH for kind in kinds):
        return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)
    return np.result_type(*kinds)
