"""The numbers of a model that its configuration tells, whatever that architecture calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actcache.model.invariance import POSITIONS_FROM_IDS

WIDTH = ("hidden_size", "n_embd", "d_model", "n_embed", "dim", "emb_dim", "model_dim")
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_CONTEXT_OF_STACKS = ("max_encoder_position_embeddings", "max_decoder_position_embeddings")


def text_values(config: Mapping[str, Any], stack: str | None = None) -> Mapping[str, Any]:
    """The values that describe the language model (of an encoder-decoder, one stack of it): those of a nested
    configuration over those around it."""
    merged = dict(config)
    for name in ("text_config", stack):
        part = config.get(name) if name is not None else None
        merged |= part if isinstance(part, Mapping) else {}
    return merged


def first_int(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these values that is an integer."""
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def depth_names(config: Mapping[str, Any], stack: str | None) -> tuple[str, ...]:
    """Names under which the number of blocks of a stack may be found, the surest first."""
    if stack == "encoder":
        return ("encoder_layers", "num_encoder_layers", *_DEPTH)
    # A decoder on its own keeps the names it had beside its encoder.
    if stack == "decoder" or config.get("is_decoder"):
        return ("decoder_layers", "num_decoder_layers", *_DEPTH)
    return _DEPTH


def context_length(config: Mapping[str, Any]) -> int | None:
    """The longest sequence that has positions; None for positions without an end (relative, ALiBi, a state)."""
    if config.get("alibi") is True:
        return None
    of_stacks = [n for name in _CONTEXT_OF_STACKS if (n := first_int(config, name)) is not None]
    if of_stacks:
        return min(of_stacks)
    limit = first_int(config, "max_position_embeddings")
    if limit is None:
        # Relative positions fall into buckets, the last of which has no end; `n_positions` then limits nothing.
        bucketed = "relative_attention_num_buckets" in config
        limit = None if bucketed else first_int(config, *_CONTEXT)
    if limit is None or limit <= 0:
        return None
    limit = _stretched(config, limit)
    if config.get("model_type") in POSITIONS_FROM_IDS:
        # Rows of the table up to the padding id's are not for tokens. Of config files that do not name it: 1.
        padding = config.get("pad_token_id", 1)
        limit -= (padding if isinstance(padding, int) else 0) + 1
    return limit


def _stretched(config: Mapping[str, Any], limit: int) -> int:
    """The limit of a rotary embedding that is made to reach further than the model was trained for."""
    # The limits of this family are given as they are after stretching.
    if str(config.get("model_type")).startswith("gemma3"):
        return limit
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if not isinstance(rope, Mapping):
            continue
        factor = rope.get("factor")
        if not isinstance(factor, int | float) or factor <= 1:
            continue
        original = first_int(rope, "original_max_position_embeddings")
        if original is None and rope.get("rope_type", rope.get("type")) in ("dynamic", "linear"):
            original = limit
        return max(limit, int((original or 0) * factor))
    return limit


def ids_of(value: Any) -> list[int]:
    """Token ids as configs give them: one, several, or none."""
    return [value] if isinstance(value, int) else list(value or ())
