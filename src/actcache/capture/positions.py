"""Which tokens of a prompt are kept, and how its tokens become one vector.

Positions count real tokens, never padding. Pooling means the same for a batch on the device (`pool`), for one prompt
(`pool_rows`) and for stored rows (`pool_numpy`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from actcache.errors import LayerRangeError, OptionError, require_choice
from actcache.model.media import KINDS
from actcache.model.sites import POOLINGS, is_int

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_EXPECTED = "'all', 'last', 'first', an int, (start, stop), or a non-empty list of these"


@dataclass(frozen=True)
class TokensOf:
    """Positions told by what a chat's messages say, or by token ids; made by `tokens_of`."""

    role: str
    which: str | int = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.role, str) or not self.role:
            raise OptionError(f"role is {self.role!r}: expected a role of the chats, such as 'assistant'")
        if not is_int(self.which):
            require_choice(self.which, ("all", "first", "last"), "which")

    @property
    def by_ids(self) -> bool:
        """Whether token ids tell them, and no chat."""
        return self.role in KINDS


def tokens_of(role: str, which: str | int = "all") -> TokensOf:
    """Positions of what one role says in a chat, or of images or text in the prompts of a multimodal model, as a value
    of ``positions=``.

        ac.run_with_cache(model, chats, sites="resid_post", positions=ac.tokens_of("assistant"))
        ac.run_with_cache(model, inputs, sites="resid_post", positions={"image": ac.tokens_of("image"), "last": -1})

    Of a role they are the tokens that hold any character of the content of its messages, as the tokenizer's chat
    template renders it: without the headers and end tokens that the template puts around a message, and without
    whitespace that it takes away. `which`: "all" messages of the role, the "first", the "last", or one by its number
    among them (negative from the end). It may stand wherever positions of prompts may, also in a dict of named
    positions or a list, as long as the prompts are chats (lists of messages).

    "image", "video" and "audio" are the tokens at whose places the model puts what its vision tower (or that for sound)
    makes, by the ids that its config names (``image_token_id`` or ``image_token_index``); "text" is every other real
    token, those around an image too that begin it, end it or separate its rows. `which` counts unbroken runs of them:
    one image is one run, unless the model's prompts put several together or divide one. These stand wherever positions
    do and token ids are seen: `capture`, `run_with_cache`, `extract_batches`, edits (`ablate`, `steer`, `patch`,
    `knockout`) and `AttentionBlocks`; in extraction, whose prompts are text, nowhere. In `generate` a step without any
    gives a capture none.

    Raises `OptionError` here, and for a model that has no such tokens; `PromptError` or `TokenizerError` for prompts
    that are no chats, that have no such message or token, or whose template changes what messages say.
    """
    return TokensOf(role, which)


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


def check_positions(positions: Any, *, chats: bool = False, ids: bool = False) -> None:
    """Raise `OptionError` for what can name no position, whatever the prompt's length; None means "all". `chats`: the
    prompts may be chats, which `TokensOf` a role needs; `ids`: token ids will be seen, which one of a kind needs."""
    if isinstance(positions, str):
        require_choice(positions, ("all", "last", "first"), "position")
    elif isinstance(positions, list) and positions:
        for item in positions:
            check_positions(item, chats=chats, ids=ids)
    elif isinstance(positions, TokensOf):
        if positions.by_ids and not ids:
            raise OptionError(
                f"tokens_of({positions.role!r}) cannot be used here, where prompts are text only: it is for passes "
                "that are given token ids, in capture, run_with_cache and extract_batches"
            )
        if not positions.by_ids and not chats:
            raise OptionError(
                f"tokens_of({positions.role!r}) cannot be used here, where nothing is known of a chat: it is for "
                "prompts that are handed over as chats, in run_with_cache, extract_batches and extraction"
            )
    elif isinstance(positions, tuple):
        if len(positions) != 2 or not all(is_int(p) for p in positions):
            raise OptionError(f"position {positions!r} is not a pair (start, stop); write a list for several positions")
    elif positions is not None and not is_int(positions):
        raise OptionError(f"positions is {positions!r}: expected {_EXPECTED}")


def check_named(positions: Any, *, chats: bool = False, ids: bool = False) -> None:
    """`check_positions`, for what may also be a dict of named positions: ``{"subject": (3, 6), "last": -1}``."""
    if not isinstance(positions, dict):
        check_positions(positions, chats=chats, ids=ids)
    elif not positions:
        raise OptionError("positions is an empty dict: name at least one, such as {'last': -1}")
    else:
        for name, choice in positions.items():
            if not isinstance(name, str) or not name:
                raise OptionError(f"position {name!r} has no name: the keys of positions are non-empty strings")
            if choice is None:
                raise OptionError(f"position {name!r} is None: expected {_EXPECTED}")
            check_positions(choice, chats=chats, ids=ids)


def is_single(choice: Any) -> bool:
    """Whether this names exactly one token of every prompt."""
    return is_int(choice) or choice in ("first", "last")


def has_fixed_size(choice: Any) -> bool:
    """Whether this names as many tokens in every prompt that is long enough; a list for each prompt need not."""
    if isinstance(choice, tuple):
        start, stop = choice
        return bool((start < 0) == (stop < 0))
    if isinstance(choice, list):
        return all(not isinstance(item, list) and has_fixed_size(item) for item in choice)
    return is_single(choice)


def is_per_prompt(positions: Any) -> TypeGuard[list[Any]]:
    """Whether this is a list for each prompt."""
    return isinstance(positions, list) and bool(positions) and all(isinstance(item, list) for item in positions)


def told_positions(positions: Any) -> Any:
    """Positions as JSON values, the same for two ways of writing the same."""
    if isinstance(positions, tuple):
        return {"from": int(positions[0]), "to": int(positions[1])}
    if isinstance(positions, list):
        return [told_positions(item) for item in positions]
    if isinstance(positions, TokensOf):
        return {"tokens_of": positions.role, "which": positions.which}
    if positions is None or isinstance(positions, str):
        return {"first": 0, "last": -1}.get(positions or "", "all")
    return int(positions)


def each_prompt(positions: Any, n_prompts: int) -> list[Any]:
    """The positions of each prompt: a list of lists is one list per prompt, anything else holds for all of them."""
    if is_per_prompt(positions):
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
    if is_int(positions):
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


def one_number(value: object, what: str, instead: str = "") -> int:
    """A layer or position that has to be one number; an `OptionError` for anything else, which says `instead` what
    takes several."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        pass
    raise OptionError(f"{what} is {value!r:.80}: expected one int, negative ones counted from the end{instead}")


def _some(n_rows: int) -> None:
    if n_rows == 0:
        raise OptionError("cannot pool a prompt of 0 tokens")
