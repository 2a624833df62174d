"""Which layers of a dataset are meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from actcache.errors import DatasetLayerError, OptionError
from actcache.model.site_list import ranges

EXPECTED = "expected block numbers, or 'all' (None) for every layer"


def is_every(layers: Any) -> bool:
    """Whether every layer is meant. OptionError for another word."""
    if isinstance(layers, str) and layers != "all":
        raise OptionError(f"layers is {layers!r:.80}: {EXPECTED}.")
    return layers is None or isinstance(layers, str)


def numbers_of(layers: Any, known: Iterable[int], where: str, of: str = "") -> list[int]:
    """The block numbers `layers`, in their order, of which all are `known`; `where` and `of` say in errors of what.

    Raises:
        OptionError: what is no number, no numbers at all.
        DatasetLayerError: a layer that is not there, or one that is counted from an end that no dataset names.
    """
    there = sorted(known)
    has = f"it has {ranges(there) or 'none'}."
    asked: Sequence[Any] = list(layers) if isinstance(layers, Iterable) else [layers]
    for layer in asked:
        if not hasattr(layer, "__index__") or isinstance(layer, bool):
            raise OptionError(f"layers holds {layer!r}: {EXPECTED}.")
        if int(layer) < 0:
            # The last layer that is there need not be the model's last one.
            raise DatasetLayerError(
                f"layer {int(layer)} counts from the end of the model, and {where} does not say how many layers its "
                f"model has: name the layer; {has}"
            )
        if int(layer) not in there:
            raise DatasetLayerError(f"{where} has no layer {layer}{of}: {has}")
    if not asked:
        raise OptionError(f"layers is empty: {EXPECTED}.")
    return [int(layer) for layer in asked]
