"""Activations as `ac.activations` and its like return them, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import OptionError

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class Layers:
    """Rows of several layers, one matrix ``[rows, D]`` each, under the layer's number or name."""

    names: list[Any]
    matrices: list[npt.NDArray[Any]]

    @property
    def rows(self) -> int:
        return len(self.matrices[0])

    def __iter__(self) -> Iterator[tuple[Any, npt.NDArray[Any]]]:
        return zip(self.names, self.matrices, strict=True)


def layers_of(values: Any, what: str) -> Layers:
    """`values` as layers: an array or tensor ``[B, L, D]``, or a mapping from layer to ``[B, D]``.

    Raises `OptionError`, which calls them `what`, for other shapes and for values that are no finite numbers.
    """
    if isinstance(values, Mapping):
        names, matrices = list(values), [as_array(matrix) for matrix in values.values()]
        wrong = [(n, m.shape) for n, m in zip(names, matrices, strict=True) if m.ndim != 2]
        if wrong or not names:
            raise OptionError(f"{what} as a mapping needs an array [B, D] for each layer, got {wrong[:1] or 'none'}.")
        if len({len(m) for m in matrices}) > 1:
            raise OptionError(f"{what} has other numbers of rows at other layers: {[len(m) for m in matrices]}.")
    else:
        array = as_array(values)
        if array.ndim != 3:
            raise OptionError(
                f"{what} has shape {array.shape}, expected [B, L, D] as ac.activations returns it, or a mapping from "
                "layer to [B, D]. One layer is X[:, None]."
            )
        names, matrices = list(range(array.shape[1])), [array[:, layer] for layer in range(array.shape[1])]
    found = Layers(names, matrices)
    if not found.names or not found.rows or any(m.shape[1] == 0 for m in matrices):
        raise OptionError(f"{what} is empty.")
    for name, matrix in found:
        if matrix.dtype.kind not in "fiubV":
            raise OptionError(f"{what} holds {matrix.dtype} at layer {name!r}, expected numbers.")
        finite = np.isfinite(matrix.astype(np.float64)).all(axis=1)
        if not finite.all():
            raise OptionError(
                f"{what} holds inf or nan at layer {name!r}, in {int((~finite).sum())} rows (the first is row "
                f"{int(np.flatnonzero(~finite)[0])}): leave those prompts out."
            )
    return found


def as_array(values: Any) -> npt.NDArray[Any]:
    """An array or tensor (bfloat16 included) as an array."""
    if hasattr(values, "detach"):
        from actcache.extract.arrays import to_numpy

        return to_numpy(values.detach().cpu())
    return np.asarray(values)
