"""A small model of the same build as one whose weights are not here: as deep, with the same modules, only narrow.

What is read where follows from how a model computes, not from how wide it is: so it is found on the sketch.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from actcache.errors import SiteUnavailableError

if TYPE_CHECKING:
    import torch

_HEAD_DIM, _HEADS, _VOCABULARY = 16, 4, 64
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_HEAD_COUNTS = ("num_attention_heads", "n_head", "num_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size")
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")


def sketch(kind: Any, config: Any, like: torch.nn.Module, **arguments: Any) -> torch.nn.Module:
    """A model of `config` made narrow, by the auto class `kind`, with random weights that leave nothing out.

    Raises `SiteUnavailableError` where none can be made that has the modules of `like`.
    """
    import torch

    narrow = copy.deepcopy(config)
    _narrow(narrow)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model: torch.nn.Module = kind.from_config(narrow, dtype=torch.float32, **arguments).eval()
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
            raise _none(like, str(error)) from error
    if _build(model) != _build(like):
        raise _none(like, "its modules follow from its widths")
    return model


def _narrow(config: Any) -> None:
    heads = min(_HEADS, max([_of(config, name) or 1 for name in _HEAD_COUNTS]))
    keys = next((n for name in _KEY_HEADS if (n := _of(config, name))), None)
    every = max([_of(config, name) or 1 for name in _HEAD_COUNTS])
    values = dict.fromkeys(_WIDTHS, heads * _HEAD_DIM) | dict.fromkeys(_HEAD_COUNTS, heads)
    values |= dict.fromkeys(_KEY_HEADS, heads if keys == every else 1 if keys == 1 or heads == 1 else heads // 2)
    values |= dict.fromkeys(_INNER, 2 * heads * _HEAD_DIM) | dict.fromkeys(_IDS, 0)
    values |= {"head_dim": _HEAD_DIM, "word_embed_proj_dim": heads * _HEAD_DIM, "vocab_size": _VOCABULARY}
    for name, value in values.items():
        if _of(config, name) is not None:
            setattr(config, name, value)
    if (rotary := _of(config, "rotary_dim")) is not None:
        config.rotary_dim = min(rotary, _HEAD_DIM)
    if isinstance(getattr(config, "initializer_range", None), float):
        # A branch that is much smaller than the stream would hide in its rounding.
        config.initializer_range = 0.2


def _of(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _build(model: torch.nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules()]


def _none(like: torch.nn.Module, why: str) -> SiteUnavailableError:
    return SiteUnavailableError(
        f"where sites are read on {type(like).__name__} is found on a small model of its build, which cannot be made "
        f"here ({why}): run it with its weights (remote=False)."
    )
