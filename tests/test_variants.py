"""Variants of a model: told apart in words, and never one with edits for the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.demo import model_path
from actcache.errors import AmbiguousVariantError
from actcache.store.spaces import SpaceInfo
from actcache.store.store import Store
from actcache.store.variants import by_preference, variant_names
from cli_helpers import Cli

MODEL = str(model_path())
PROMPT = "The Eiffel Tower is in the city of"


def space(number: int, model: str = "org/m", **identity: Any) -> SpaceInfo:
    base = {"identity": 1, "weights": "files:aaaaaaaaaaaaaaaa", "dtype": "float32", "attn_implementation": "sdpa"}
    base |= {"quantization": None, "edits": []}
    whole = {**base, **identity}
    label = {"model_name": model, "revision": identity.get("revision", "r" * 40), "dtype": whole["dtype"]}
    return SpaceInfo(f"{number:08x}{0:024x}", whole, label, created_ns=number)


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


def test_info_names_variants_and_what_they_are_stored_as(tmp_path: Path, cli: Cli) -> None:
    for dtype, kind in (("int8", "float32"), ("float16", "bfloat16")):
        store = Store(tmp_path, dtype=dtype, index_dir=tmp_path / "index")
        ac.UnifiedCache(MODEL, [0], store=store, dtype=kind).warmup([PROMPT])
    ac.UnifiedCache(MODEL, [0], store=store, edits=[ac.ablate("resid_post.0")]).warmup([PROMPT])
    first, second, third = store.info().models
    assert (first.variant, first.stored_dtypes, first.edits, first.attn_implementation) == (
        "float32",
        ["int8"],
        [],
        "sdpa",
    )
    assert (second.variant, second.stored_dtypes) == ("bfloat16", ["float16"])
    assert (third.variant, third.edits) == ("float32, edited: ablate resid_post.0", ["ablate resid_post.0"])
    status, out, _ = cli("info", "--store", str(tmp_path), "--json")
    assert status == 0
    listed = json.loads(out)["models"]
    assert [m["variant"] for m in listed] == [m.variant for m in (first, second, third)]
    status, out, _ = cli("info", "--store", str(tmp_path))
    for model in (first, second, third):
        assert model.model_hash[:8] in out
    ac.set_cache_backend(store)
    try:
        with pytest.raises(AmbiguousVariantError, match=r"edited: ablate resid_post\.0"):
            ac.invalidate_extraction_cache(MODEL, dtype="float32")
    finally:
        ac.set_cache_backend(None)


def test_show_wants_an_edited_variant_to_be_chosen(tmp_path: Path, cli: Cli) -> None:
    where = ("--store", str(tmp_path))
    edited_cache = ac.UnifiedCache(MODEL, [0], store=tmp_path, edits=[ac.ablate("resid_post.0")])
    (edited_perplexity,) = edited_cache.get_perplexity([PROMPT])
    status, _, err = cli("show", MODEL, PROMPT, *where)
    assert status == 1
    assert "ablate resid_post.0" in err
    (edited,) = Store(tmp_path).spaces()
    assert edited.space in err
    status, out, _ = cli("show", MODEL, PROMPT, *where, "--space", edited.space[:6], "--json")
    assert status == 0
    shown = json.loads(out)
    assert [site["norm"] for site in shown["sites"]] == [0]
    assert shown["perplexity"] == [pytest.approx(float(p)) for p in edited_perplexity]
    ac.UnifiedCache(MODEL, [0], store=tmp_path).warmup([PROMPT])
    status, out, _ = cli("show", MODEL, PROMPT, *where)
    assert status == 0
    assert PROMPT in out
    assert "also stored: float32, edited: ablate resid_post.0" in out
    assert "perplexity" in out
    assert cli("list", MODEL, *where, "--space", "zzz")[0] == 1


def test_show_finds_token_ids_and_chats_given_as_json(tmp_path: Path, cli: Cli) -> None:
    where = ("--store", str(tmp_path), "--json")
    store = Store(tmp_path)
    chat = [{"role": "user", "content": "hi"}]
    new = ac.new_space(MODEL)
    store.write(new, [[5, 6, 7]], {"x": [np.full((3, 4), 2.0, np.float16)]})
    store.write(new, [chat, "["], {"x": [np.ones(4, np.float32)] * 2}, pooling="mean")
    for given, prompt, dtype, norm in (
        ("[5, 6, 7]", [5, 6, 7], "float16", 4.0),
        (json.dumps(chat), chat, "float32", 2.0),
        ("[", "[", "float32", 2.0),
    ):
        status, out, err = cli("show", MODEL, given, *where)
        assert status == 0, err
        shown = json.loads(out)
        assert (shown["prompt"], shown["token_ids"]) == (prompt, prompt if dtype == "float16" else None)
        (site,) = shown["sites"]
        assert (site["dtype"], site["norm"]) == (dtype, norm)
    assert cli("show", MODEL, "[1, 2]", *where)[0] == 1
    assert cli("show", MODEL, "[]", *where)[0] == 1


def test_stats_prints_the_numbers_of_numpy(tmp_path: Path, cli: Cli) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((500, 64)) * np.where(np.arange(64) == 7, 900, 1)).astype(np.float32)
    store = Store(tmp_path, dtype="int8")
    new = ac.new_space("org/m")
    texts = [f"p{i}" for i in range(500)]
    store.write(new, texts, {"resid_post.10": list(rows), "ids": [np.arange(3)] * 500}, pooling="mean")
    Store(tmp_path, dtype="float32").write(new, ["more"], {"resid_post.9": [rows[:3]]})
    status, out, _ = cli("stats", "--store", str(tmp_path), "--json")
    assert status == 0
    (variant,) = json.loads(out)
    ids, ten, nine = variant["sites"]
    read = store.read(new, texts, "resid_post.10", pooling="mean").double().numpy()
    exact = rows.astype(np.float64)
    assert (ten["layout"], ten["site"], ten["rows"], ten["width"]) == ("mean", "resid_post.10", 500, 64)
    assert ten["mean_norm"] == pytest.approx(np.linalg.norm(read, axis=1).mean())
    assert ten["mean"] == pytest.approx(np.linalg.norm(read.mean(axis=0)))
    assert ten["std"] == pytest.approx(np.sqrt(read.var(axis=0).mean()))
    (stored,) = ten["stored"]
    assert (stored["dtype"], stored["rows"]) == ("int8", 500)
    assert stored["error_max"] == pytest.approx(np.abs(read - exact).max())
    assert stored["error_relative"] == pytest.approx(np.linalg.norm(read - exact) / np.linalg.norm(exact))
    cosine = (read * exact).sum(axis=1) / np.linalg.norm(read, axis=1) / np.linalg.norm(exact, axis=1)
    assert [stored["cosine"], stored["cosine_min"]] == pytest.approx([cosine.mean(), cosine.min()], abs=1e-8)
    assert ten["size_bytes"] == 500 * 64 + 8 * 64 * 4
    assert (ids["rows"], ids["stored"], ids["mean_norm"]) == (500, [], None)
    assert (nine["layout"], nine["rows"], nine["stored"][0]["error_max"]) == ("tokens", 3, 0)
    assert store.summaries(new)[1].stored[0].error_relative == stored["error_relative"]
    status, out, _ = cli("stats", "org/m", "--store", str(tmp_path))
    assert status == 0
    assert "every token" in out
    for number in (f"{ten['mean_norm']:.4g}", f"{stored['error_relative']:.2g}", "int8", "integers"):
        assert number in out
    assert "nothing is stored" in cli("stats", "--store", str(tmp_path / "empty"))[1]


def test_list_tells_variants_apart_and_unknown_lengths(tmp_path: Path, cli: Cli) -> None:
    store = Store(tmp_path)
    store.write(ac.new_space("org/m", dtype="float32"), ["a text"], {"x": [np.ones(4)]}, pooling="mean")
    store.write(ac.new_space("org/m", dtype="float16"), [[1, 2]], {"x": [np.ones((2, 4))]})
    status, out, _ = cli("list", "org/m", "--store", str(tmp_path))
    assert status == 0
    assert [line.split() for line in out.splitlines() if not line.startswith("#")] == [
        ["?", "a", "text"],
        ["2", "[1,", "2]"],
    ]
    assert "# float32, space" in out
    assert "# float16, space" in out
