"""Variants of a model: told apart in words, and never one with edits for the model's own."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.errors import NotCachedError
from actcache.store.records import Records
from actcache.store.store import Store
from actcache.store.variants import by_preference, variant_names
from variants_helpers import MODEL, PROMPT, space, two_variants

STEER = {
    "kind": "steer",
    "site": "resid_post.5",
    "positions": "last",
    "scale": 2.0,
    "vector": ["torch.float32", [4], "aa"],
}


def test_a_name_says_what_differs_and_no_more() -> None:
    names = variant_names(
        [
            space(1),
            space(2, dtype="bfloat16"),
            space(3, attn_implementation="eager"),
            space(4, edits=[STEER]),
            space(5, weights="files:bbbbbbbbbbbbbbbb"),
            space(6, quantization={"quant_method": "gptq", "bits": 4}),
            space(7, model="other", dtype="float16"),
            space(8, model="third", revision=None),
            space(9, model="third", revision="s" * 40),
        ]
    )
    told = [names[f"{n:08x}{0:024x}"] for n in range(1, 10)]
    assert len(set(told[:6])) == 6
    assert told[6] == "float16"
    assert told[7:] == ["float32, no revision", "float32, revision ssssssssssss"]
    assert "bfloat16" in told[1]
    assert "eager attention" in told[2]
    assert told[3].endswith("edited: steer resid_post.5 at last x 2.0")
    assert "weights bbbbbbbbbbbb" in told[4]
    assert "quantised gptq" in told[5]
    assert not any("edited" in t or "imported" in t for k, t in enumerate(told) if k != 3)


def test_what_words_cannot_tell_apart_is_told_by_its_space() -> None:
    other = {**STEER, "vector": ["torch.float32", [4], "bb"]}
    names = variant_names([space(1, edits=[STEER]), space(2, edits=[other])])
    assert len(set(names.values())) == 2
    assert all(f"space {space[:8]}" in name for space, name in names.items())


def test_the_model_as_it_is_comes_first_then_imports_then_edits() -> None:
    spaces = [space(1), space(2), space(3, imported="lmprobe"), space(4, edits=[STEER])]
    assert [s.created_ns for s in by_preference(spaces[::-1])] == [2, 1, 3, 4]


def test_discovery_never_takes_an_edited_run_for_the_model(tmp_path: Path) -> None:
    store = Store(tmp_path, index_dir=tmp_path / "index")
    ac.UnifiedCache(MODEL, [0, 1], store=store, edits=[ac.ablate("resid_post.0")]).warmup([PROMPT])
    only = store.discover(MODEL, PROMPT)
    assert only is not None
    assert (only.pooled, only.sites, only.raw_layers, only.num_tokens) == ({}, {}, [], None)
    assert [len(v.edits) for v in only.variants] == [1]
    ac.UnifiedCache(MODEL, [1], store=store).warmup([PROMPT])
    ac.UnifiedCache(MODEL, [0], store=store, edits=[ac.steer("resid_post.0", torch.ones(128))]).warmup([PROMPT])
    found = store.discover(MODEL, PROMPT)
    assert found is not None
    assert found.pooled == {"last_token": [1]}
    assert [len(v.edits) for v in found.variants] == [0, 1, 1]


def test_discovery_tells_variants_apart(tmp_path: Path) -> None:
    store, spaces = two_variants(tmp_path)
    store.write(spaces["float32"], [PROMPT], {"resid_post.2": [np.ones(8, np.float32)]}, pooling="mean")
    found = store.discover("org/m", PROMPT)
    assert found is not None
    newer, older = found.variants
    measured = {s.space: s for s in store.spaces()}
    for variant, dtype, sites, layers, prompts in (
        (newer, "bfloat16", {"tokens": ["mlp_out.3"]}, [3], 2),
        (older, "float32", {"mean": ["resid_post.2"], "tokens": ["resid_post.9", "resid_post.10"]}, [2, 9, 10], 3),
    ):
        assert (variant.space, variant.dtype, variant.revision) == (spaces[dtype].space, dtype, f"{dtype}-revision")
        assert (variant.sites, variant.layers, variant.num_tokens) == (sites, layers, 4)
        assert (variant.num_prompts, variant.size_bytes) == (prompts, measured[variant.space].size_bytes)
        assert variant.size_bytes > 0
        assert dtype in variant.variant
    assert found.sites == newer.sites
    assert found.all_sites == ["mlp_out.3", "resid_post.2", "resid_post.9", "resid_post.10"]


def test_discovery_of_a_chosen_variant(tmp_path: Path) -> None:
    store, spaces = two_variants(tmp_path)
    space = spaces["float32"].space
    for chosen in ({"dtype": "float32"}, {"revision": "float32-revision"}, {"space": space}):
        found = store.discover("org/m", PROMPT, **chosen)
        assert found is not None
        assert [v.space for v in found.variants] == [space]
        assert found.raw_layers == [9, 10]
        assert store.discover("org/m", "bfloat16 0", **chosen) is None
    with pytest.raises(
        NotCachedError, match=r"has dtype 'float23'\. Did you mean dtype='float32'\? Stored: .*bfloat16"
    ):
        store.discover("org/m", PROMPT, dtype="float23")
    with pytest.raises(NotCachedError, match=f"Did you mean space={space!r}"):
        store.discover("org/m", PROMPT, space=space[:-1])
    with pytest.raises(NotCachedError, match=r"dtype 'bfloat16', revision|revision 'float32-revision', dtype"):
        store.discover("org/m", PROMPT, dtype="bfloat16", revision="float32-revision")
    assert store.discover("another", PROMPT, dtype="float32") is None
    ac.set_cache_backend(store)
    try:
        found = ac.discover_cached("org/m", PROMPT, dtype="float32")
        assert found is not None and found.variants[0].space == space
    finally:
        ac.set_cache_backend(None)


def test_an_edited_variant_that_is_chosen_is_described(tmp_path: Path) -> None:
    store = Store(tmp_path, index_dir=tmp_path / "index")
    ac.UnifiedCache(MODEL, [0], store=store, edits=[ac.ablate("resid_post.0")], compute_perplexity=False).warmup(
        [PROMPT]
    )
    (space,) = store.spaces()
    hidden, chosen = store.discover(MODEL, PROMPT), store.discover(MODEL, PROMPT, space=space.space)
    assert hidden is not None and chosen is not None
    assert (hidden.pooled, chosen.pooled) == ({}, {"last_token": [0]})
    assert chosen.variants[0].edits == ["ablate resid_post.0"]
    assert hidden.all_sites == ["resid_post.0"]


@pytest.mark.parametrize(
    ("layout", "names", "answers"),
    [
        ("tokens", ["logits"], [("all", None), ("all", 3), ("last", None), ("last", 3)]),
        ("last_token", ["logits"], [("last", None), ("last", 3)]),
        ("mean", ["logits"], []),
        ("last_token", ["logits.top3.values", "logits.top3.indices"], [("last", 3)]),
        ("tokens", ["logits.top3.values", "logits.top3.indices"], [("all", 3), ("last", 3)]),
        ("last_token", ["logits.top3.values"], []),
    ],
)
def test_what_is_said_of_logits_is_what_can_be_read(
    tmp_path: Path, layout: str, names: list[str], answers: list[tuple[str, int | None]]
) -> None:
    """Asked of the cache itself, which looks in its own way."""
    store = Store(tmp_path, index_dir=tmp_path / "index")
    cache = ac.UnifiedCache(MODEL, [0], store=store, compute_perplexity=False)
    cache.warmup([PROMPT])
    (space,) = store.spaces()
    table = store.prompts(space)
    vocabulary = cache.extractor.source.vocab_size
    assert vocabulary is not None
    rows = len(table.token_ids) if layout == "tokens" else 1
    data: dict[str, Any] = {}
    for name in names:
        width = vocabulary if name == "logits" else 3
        data[name] = np.zeros((rows, width), np.int32 if name.endswith("indices") else np.float32)
    records = Records.tokens(table, data) if layout == "tokens" else Records.pooled(table, layout, data)
    store.append(space.space, records)
    found = []
    for positions in ("all", "last"):
        for top_k in (None, 3):
            with contextlib.suppress(NotCachedError):
                cache.get_logits([PROMPT], top_k=top_k, positions=positions)
                found.append((positions, top_k))
    assert found == answers
    info = store.discover(MODEL, PROMPT)
    assert info is not None
    assert info.has_logits is any(top_k is None for _, top_k in answers)
    assert info.logits_positions == sorted({positions for positions, _ in answers})
    assert info.logits_top_k == (None if info.has_logits or not answers else 3)
    assert store.info().models[0].has_logits is bool(answers)


def test_perplexity_counts_where_it_is_read_from(tmp_path: Path) -> None:
    store = Store(tmp_path, index_dir=tmp_path / "index")
    store.write(ac.new_space("org/m"), [PROMPT], {"perplexity": [np.ones(3, np.float32)]}, pooling="mean")
    info = store.discover("org/m", PROMPT)
    assert info is not None
    assert not info.has_perplexity
    assert not store.info().models[0].has_perplexity
