"""How far attention looks in a model's layers, as its configuration tells it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actcache.model.config_values import text_values


def attention_window(config: Mapping[str, Any], layer: int) -> int | None:
    """How many keys a query of this layer sees at most, itself included, where the layer slides a window along the
    sequence; None where the configuration says nothing of a window (or of a kind of attention that has none)."""
    values = text_values(config)
    size = values.get("sliding_window")
    kinds = values.get("layer_types")
    if not isinstance(kinds, (list, tuple)):
        kinds = values.get("attention_layers")
        size = values.get("window_size") if isinstance(kinds, (list, tuple)) else size
    if isinstance(kinds, (list, tuple)):
        sliding = layer < len(kinds) and str(kinds[layer]) in ("sliding_attention", "local")
    else:
        sliding = values.get("use_sliding_window") is not False
    return size if sliding and isinstance(size, int) and not isinstance(size, bool) else None
