"""What models keep in mind of the lengths of earlier passes, first of all rotary embeddings.

With RoPE types ``dynamic`` and ``longrope`` a short prompt beside a long one gets other frequencies than alone
(transformers, ``modeling_rope_utils.dynamic_rope_update``), and ``dynamic`` also remembers the longest pass so far.
BigBird's sparse attention gives way to a full one in the first short pass, for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_TYPES = ("longrope", "su")
ORIGINAL = "original_inv_freq"


def depends_on_longest(config: Mapping[str, Any]) -> bool:
    """Whether a prompt's values depend on the longest prompt of its batch: `config` of either generation."""
    # Older files of these families say "su" or "yarn" and mean what is called longrope now.
    types = (*_TYPES, "yarn") if str(config.get("model_type")).startswith(("phi3", "phi4")) else _TYPES
    return any("dynamic" in found or found in types for found in _rope_types(config))


def _rope_types(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _rope_types(value)
        elif key in ("rope_type", "type") and isinstance(value, str):
            yield value


def forget_lengths(model: torch.nn.Module) -> None:
    """Put every rotary embedding of `model`, and sparse attention, back to where it was before its first pass."""
    restore_attention(model)
    for module in model.modules():
        known = {**module.__dict__, **module._buffers}
        for name in [name for name in known if name.endswith(ORIGINAL)]:
            prefix = name.removesuffix(ORIGINAL)
            current = getattr(module, f"{prefix}inv_freq", None)
            if current is None or not hasattr(module, "original_max_seq_len"):
                continue
            module.register_buffer(f"{prefix}inv_freq", known[name].to(current.device, copy=True), persistent=False)
            module.__dict__[f"{prefix}max_seq_len_cached"] = module.original_max_seq_len


def switches_attention(config: Mapping[str, Any]) -> bool:
    """Whether a short pass of a model of this configuration changes the attention of all later ones."""
    return str(config.get("model_type")) in ("big_bird", "bigbird_pegasus")


def restore_attention(model: torch.nn.Module) -> None:
    """Give modules whose attention a short pass has exchanged the one of their configuration again."""
    # Outermost first: each takes those inside along. The list, since modules are exchanged.
    for module in [m for m in model.modules() if hasattr(type(m), "set_attention_type")]:
        config: Any = getattr(module, "config", None)
        wanted = getattr(config, "attention_type", None)
        switch: Any = module.set_attention_type
        # Beside cross-attention it is full from the beginning.
        if isinstance(wanted, str) and not getattr(config, "add_cross_attention", False):
            switch(wanted)
