"""Which blocks have a site, and how wide it is: the same answer with and without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import actcache as ac
from actcache.errors import LayerRangeError, SiteUnavailableError, UnknownSiteError
from actcache.extract import inventory
from actcache.testing.tiny import tiny_model


@pytest.mark.parametrize("site", ["pattern", "pattern.1", "pattern.1.2", "blocks.1.attn.hook_pattern"])
def test_patterns_are_refused_before_any_work(site: str, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    for make in (ac.UnifiedCache, ac.ActivationExtractor):
        with pytest.raises(SiteUnavailableError, match=r"'.*pattern.*' has no row.*ac\.capture .*ac\.extract_batches"):
            make(tmp_path, sites=["resid_post", site])


def test_names_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    tiny_model("qwen3_next").save_pretrained(tmp_path)
    for sites, layers, error in (
        ("q.4", "all", LayerRangeError), ("q", [0, 4], LayerRangeError), ("qq", "all", UnknownSiteError),
        ("encoder.q", "all", SiteUnavailableError),
    ):  # fmt: skip
        with pytest.raises(error):
            ac.UnifiedCache(tmp_path, layers, sites=sites)


@pytest.mark.parametrize(
    ("config", "alike"),
    [
        ({"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"]}, True),
        ({"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"]}, False),
        ({"attention_layers": ["global", "local"], "encoder_layers": 4, "max_window_layers": 28}, True),
        ({"first_k_dense_replace": 1}, False),
        ({"first_k_dense_replace": 0, "mlp_only_layers": [], "decoder_sparse_step": 1, "moe_layer_freq": 1}, True),
        ({"mlp_only_layers": [2]}, False),
        ({"decoder_sparse_step": 2}, False),
        ({"attn_layer_period": 8, "attn_layer_offset": 4}, False),
        ({"layers_block_type": ["mamba", "attention"]}, False),
        ({"cross_attention_layers": [3, 8]}, False),
        ({"interleave_moe_layer_step": 1, "moe_layers": None}, True),
        ({"time_step_rank": 4, "rope_theta": 1e4, "layer_norm_eps": 1e-5, "num_hidden_layers": 1}, True),
    ],
)
def test_what_a_configuration_says_of_its_blocks(config: dict[str, Any], alike: bool) -> None:
    assert inventory._blocks_alike(config) is alike
