"""Which tokens of a prompt are kept, and how its tokens become one vector.

Positions count real tokens, never padding. Pooling means the same for a batch on the device (`pool`), for one prompt
(`pool_rows`) and for stored rows (`pool_numpy`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actcache.errors import LayerRangeError, OptionError, require_choice

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_EXPECTED = "'all', 'last', 'first', an int, (start, stop), or a non-empty list of these"
POOLINGS = ("last_token", "first_token", "mean", "max", "min")


def pool(hidden: Tensor, lengths: Tensor, pooling: str, *, offsets: Tensor | None = None) -> Tensor:
    """Pool a padded batch: hidden ``[B, S, D]`` -> ``[B, D]`` in the dtype of `hidden`, on its device.

    Prompt ``b`` owns the `lengths[b]` positions that start at `offsets[b]` (0 when not given: right padding). "mean"
    accumulates in float32 (float64 stays float64). Every length must be at least 1.
    """
    import torch

    require_choice(pooling, POOLINGS, "pooling")
    lengths = lengths.to(hidden.device)
    start = torch.zeros_like(lengths) if offsets is None else offsets.to(hidden.device)
    if pooling in ("last_token", "first_token"):
        at = start if pooling == "first_token" else start + lengths - 1
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), at]
    position = torch.arange(hidden.shape[1], device=hidden.device)
    real = (position >= start[:, None]) & (position < (start + lengths)[:, None])
    if pooling == "mean":
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # where, not a product: padding may hold inf or nan.
        total = torch.where(real[..., None], hidden, 0).sum(1, dtype=wide)
        return (total / lengths[:, None]).to(hidden.dtype)
    if pooling == "max":
        return torch.where(real[..., None], hidden, -torch.inf).amax(1)
    return torch.where(real[..., None], hidden, torch.inf).amin(1)


def pool_rows(rows: Tensor, pooling: str) -> Tensor:
    """Pool one prompt: ``[T, D]`` -> ``[D]``, the same arithmetic as `pool`."""
    import torch

    require_choice(pooling, POOLINGS, "pooling")
    _some(rows.shape[0])
    if pooling == "last_token":
        return rows[-1]
    if pooling == "first_token":
        return rows[0]
    if pooling == "mean":
        wide = torch.promote_types(rows.dtype, torch.float32)
        return (rows.sum(0, dtype=wide) / rows.shape[0]).to(rows.dtype)
    return rows.amax(0) if pooling == "max" else rows.amin(0)


def pool_numpy(rows: np.ndarray[Any, Any], pooling: str) -> np.ndarray[Any, Any]:
    """Pool one prompt's stored rows: ``[T, D]`` -> ``[D]`` in their dtype (bfloat16 from ml_dtypes too)."""
    import numpy as np

    require_choice(pooling, POOLINGS, "pooling")
    _some(rows.shape[0])
    if pooling in ("last_token", "first_token"):
        end: np.ndarray[Any, Any] = rows[-1 if pooling == "last_token" else 0]
        return end
    wide = np.float64 if rows.dtype == np.float64 else np.float32
    if pooling == "mean":
        pooled = rows.sum(0, dtype=wide) / wide(rows.shape[0])
    else:
        # In the wide type, which holds every narrower value exactly: ml_dtypes has no reductions of its own for nan.
        pooled = rows.astype(wide).max(0) if pooling == "max" else rows.astype(wide).min(0)
    result: np.ndarray[Any, Any] = pooled.astype(rows.dtype)
    return result


def check_positions(positions: Any) -> None:
    """Raise `OptionError` for what can name no position, whatever the prompt's length; None means "all"."""
    if isinstance(positions, str):
        require_choice(positions, ("all", "last", "first"), "position")
    elif isinstance(positions, list) and positions:
        for item in positions:
            check_positions(item)
    elif isinstance(positions, tuple):
        if len(positions) != 2 or not all(_is_int(p) for p in positions):
            raise OptionError(f"position {positions!r} is not a pair (start, stop); write a list for several positions")
    elif positions is not None and not _is_int(positions):
        raise OptionError(f"positions is {positions!r}: expected {_EXPECTED}")


def check_named(positions: Any) -> None:
    """`check_positions`, for what may also be a dict of named positions: ``{"subject": (3, 6), "last": -1}``."""
    if not isinstance(positions, dict):
        check_positions(positions)
    elif not positions:
        raise OptionError("positions is an empty dict: name at least one, such as {'last': -1}")
    else:
        for name, choice in positions.items():
            if not isinstance(name, str) or not name:
                raise OptionError(f"position {name!r} has no name: the keys of positions are non-empty strings")
            if choice is None:
                raise OptionError(f"position {name!r} is None: expected {_EXPECTED}")
            check_positions(choice)


def is_single(choice: Any) -> bool:
    """Whether this names exactly one token of every prompt."""
    return _is_int(choice) or choice in ("first", "last")


def each_prompt(positions: Any, n_prompts: int) -> list[Any]:
    """The positions of each prompt: a list of lists is one list per prompt, anything else holds for all of them."""
    if isinstance(positions, list) and positions and all(isinstance(item, list) for item in positions):
        if len(positions) != n_prompts:
            raise OptionError(f"positions holds lists for {len(positions)} prompts, the batch has {n_prompts} prompts")
        return positions
    return [positions] * n_prompts


def resolve_positions(positions: Any, length: int) -> list[int]:
    """Real-token positions of one prompt of `length` tokens: "all", "last", "first", an int (negative from the end), a
    pair ``(start, stop)`` as a tuple (`stop` excluded, both may be negative), or a list of these, in the order asked.
    None means "all".

    Raises `LayerRangeError` (an `IndexError`) for a position outside the prompt, `OptionError` for anything else.
    """
    check_positions(positions)
    if isinstance(positions, str):
        if positions == "all":
            return list(range(length))
        return [_inside(-1 if positions == "last" else 0, length)]
    if _is_int(positions):
        return [_inside(int(positions), length)]
    if isinstance(positions, tuple):
        start, stop = (int(p) + length if p < 0 else int(p) for p in positions)
        if not 0 <= start < stop <= length:
            raise LayerRangeError(f"positions {positions!r} are out of range: the prompt has {length} tokens")
        return list(range(start, stop))
    if isinstance(positions, list):
        return [p for item in positions for p in resolve_positions(item, length)]
    return list(range(length))


def _inside(position: int, length: int) -> int:
    if not -length <= position < length:
        raise LayerRangeError(f"position {position} is out of range: the prompt has {length} tokens")
    return position % length


def _is_int(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "shape", ()) == ()


def _some(n_rows: int) -> None:
    if n_rows == 0:
        raise OptionError("cannot pool a prompt of 0 tokens")
