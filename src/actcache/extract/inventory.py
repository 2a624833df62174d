"""Which blocks of a model have a site, and how wide it is: from its configuration where that tells, else from a look at
the model, which this host remembers.

A warm run chooses its layers by this, so that it need not load the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from actcache.model.config_values import first_int, text_values
from actcache.model.host_memo import host_memo
from actcache.model.identity import config_digest, digest_json
from actcache.model.sites import Site
from actcache.model.source import package_version

if TYPE_CHECKING:
    from actcache.model.source import ModelSource

# What every block has.
_EVERYWHERE = ("resid_pre", "resid_post")
_STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "final_norm", "attn_in", "mlp_in", "attn_out", "mlp_out")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_HIDDEN = ("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "n_inner")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Values that say of some blocks what they are; where one is there, blocks may differ.
_DIFFERING = re.compile(
    r".*layers?_(block_)?types?|layers_block_type|first_k_dense_replace|mlp_only_layers|moe_layers"
    r"|(.*_)?(attn|attention|expert|moe|mamba|ssm|linear|hybrid|sparse|dense|full)_.*layers?(_.*)?"
    r"|.*layer_(pattern|period|offset|freq|step|interval)|.*sparse_step|.*_(layer_)?interval|hybrid_override_pattern"
)
_STEP = re.compile(r".*(step|freq|period|interval)")
_ATTENTION = re.compile(r"(.*_)?attention|global|local")


def layers_of(source: ModelSource, name: str, stack: str | None) -> list[int]:
    """The blocks that have the site `name`, ascending; all of them where none has it, so that running tells why.

    Loads the model when its configuration says that blocks differ, and this host has not seen such a model.
    """
    every = list(range(source.depth(stack)))
    if name in _EVERYWHERE:
        return every
    if source.loaded:
        return [site.layer or 0 for site in _held(source, name, stack)] or every
    if _blocks_alike(text_values(source.config, stack)):
        return every
    return sorted(_looked_up(source, name, stack)) or every


def width_of(source: ModelSource, site: Site) -> int:
    """How wide a row of the complete `site` is; loads the model when its configuration does not tell, and this host
    has not seen such a model. Raises `SiteUnavailableError` when the model was looked at and does not have it."""
    declared = declared_width(source, site)
    if declared is not None:
        return declared
    widths = _looked_up(source, site.name, site.stack)
    if site.layer not in widths:
        from actcache.model.anatomy import describe

        describe(source.model_to_run()).require(site)
    return widths[site.layer or 0]


def declared_width(source: ModelSource, site: Site) -> int | None:
    """The width of `site` by the model's configuration, None where that does not tell."""
    config, name = text_values(source.config, site.stack), site.name
    if name == "logits":
        return source.vocab_size or source.d_model
    if name in _STREAM or name in ("cross_attn_out", "mixer_out") or site.head is not None:
        return source.d_model
    if name == "router_logits":
        return first_int(config, *_EXPERTS)
    # Sizes that other values decide too, or that differ from block to block.
    plain = not any(key in config for key in ("kv_lora_rank", "multi_query", "new_decoder_architecture"))
    if name == "mlp_act":
        return first_int(config, f"{site.stack}_ffn_dim", *_HIDDEN)
    heads = first_int(config, f"{site.stack}_attention_heads", *_HEADS)
    if heads is None or not plain:
        return None
    if name == "head_out":
        return heads * source.d_model
    size = first_int(config, "head_dim", "d_kv") or source.d_model // heads
    if name in ("k", "v"):
        return (first_int(config, *_KEY_HEADS) or heads) * size
    return heads * size if name in ("q", "z") else None


def _blocks_alike(config: Mapping[str, Any]) -> bool:
    """Whether the configuration says nothing by which blocks could differ."""
    return not any(_DIFFERING.fullmatch(key) and _differs(key, value) for key, value in config.items())


def _differs(key: str, value: Any) -> bool:
    if value is None or value is False or value in ([], {}, "", 0):
        return False
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        # Kinds of attention are all attention; linear attention is a mixer.
        return not all(_ATTENTION.fullmatch(item) and "linear" not in item for item in value)
    return not (value == 1 and _STEP.fullmatch(key))


def _looked_up(source: ModelSource, name: str, stack: str | None) -> dict[int, int]:
    """Width by layer of a site, for those blocks of the model that have it."""
    if source.loaded:
        return _measured(source, name, stack)
    versions = [package_version(package) for package in ("actcache", "transformers")]
    key = digest_json([config_digest(source.config), source.config.get("architectures"), stack, name, versions])
    known = host_memo().get("site widths", key)
    if known is None:
        widths = _measured(source, name, stack)
        host_memo().put("site widths", key, json.dumps(widths))
        return widths
    return {int(layer): int(width) for layer, width in json.loads(known).items()}


def _measured(source: ModelSource, name: str, stack: str | None) -> dict[int, int]:
    """The same, read from one short pass."""
    from actcache.capture.hooks import run_with_cache

    here = _held(source, name, stack)
    if not here:
        return {}
    tokens = [token % (source.vocab_size or 2) for token in range(5, 9)]
    cache = run_with_cache(source.model_to_run(), [tokens], sites=here, positions="last")[1]
    return {site.layer or 0: prod(cache[str(site)].shape[2:]) for site in here}


def _held(source: ModelSource, name: str, stack: str | None) -> list[Site]:
    """The sites of this name that the model has, block by block."""
    anatomy = source.anatomy()
    every = (Site(name, layer, stack=stack) for layer in range(anatomy.depth(stack)))
    return [site for site in every if anatomy.why_not(site) is None]
