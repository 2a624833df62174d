"""Variants of a model: told apart in words, and never one with edits for the model's own."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.demo import model_path
from actcache.errors import AmbiguousVariantError, NotCachedError
from actcache.store import segment
from actcache.store.default import one_variant
from actcache.store.records import Records
from actcache.store.spaces import SpaceInfo
from actcache.store.store import Store
from actcache.store.variants import by_preference, variant_names
from cli_helpers import Cli
from store_helpers import segment_files

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
    assert status == 2
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
    opened = [segment.open(path) for path in segment_files(store, new.space)]
    (scales,) = [one.scales("resid_post.10") for one in opened if "resid_post.10" in one.info.sites]
    assert scales is not None
    assert ten["size_bytes"] == 500 * 64 + scales.nbytes
    assert (ids["rows"], ids["stored"], ids["mean_norm"]) == (500, [], None)
    assert (nine["layout"], nine["rows"], nine["stored"][0]["error_max"]) == ("tokens", 3, 0)
    assert store.summaries(new)[1].stored[0].error_relative == stored["error_relative"]
    status, out, _ = cli("stats", "org/m", "--store", str(tmp_path))
    assert status == 0
    assert "every token" in out
    for number in (f"{ten['mean_norm']:.4g}", f"{stored['error_relative']:.2g}", "int8", "integers"):
        assert number in out
    (tmp_path / "empty").mkdir()
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


def two_variants(folder: Path) -> tuple[Store, dict[str, SpaceInfo]]:
    """One prompt in a float32 and a bfloat16 variant of other revisions, with other sites; the second is newer."""
    store = Store(folder, index_dir=folder / "index")
    spaces = {}
    for dtype, sites in (("float32", ["resid_post.10", "resid_post.9"]), ("bfloat16", ["mlp_out.3"])):
        one = ac.new_space("org/m", dtype=dtype, revision=f"{dtype}-revision")
        for texts in ([PROMPT], [f"{dtype} {i}" for i in range(len(sites))]):
            store.write(one, texts, {site: [np.ones((4, 8), np.float32)] * len(texts) for site in sites})
        spaces[dtype] = one
    return store, spaces


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


def test_list_and_info_give_the_numbers_of_each_variant(tmp_path: Path, cli: Cli) -> None:
    store, _ = two_variants(tmp_path)
    listed = {v["space"]: v for v in json.loads(cli("list", "org/m", "--store", str(tmp_path), "--json")[1])}
    models = {m["model_hash"]: m for m in json.loads(cli("info", "--store", str(tmp_path), "--json")[1])["models"]}
    out = cli("list", "org/m", "--store", str(tmp_path))[1]
    for measured in store.spaces():
        entry, model = listed[measured.space], models[measured.space]
        for key in ("num_prompts", "size_bytes", "revision", "dtype", "variant"):
            assert entry[key] == model[key]
        assert entry["num_prompts"] == len(entry["prompts"]) == measured.num_prompts
        assert f"revision {measured.dtype}-revision, space {measured.space}: {measured.num_prompts} prompts" in out


def test_an_ambiguous_name_lists_and_counts_those_that_fit(tmp_path: Path) -> None:
    store, spaces = two_variants(tmp_path)
    store.write(ac.new_space("org/m", dtype="float32"), ["a", "b"], {"x": [np.ones(4)] * 2}, pooling="mean")
    with pytest.raises(AmbiguousVariantError, match="in 2 variants that fit") as raised:
        one_variant(store, "org/m", dtype="float32")
    assert str(raised.value).count("space=") == 2
    assert spaces["bfloat16"].space not in str(raised.value)
    assert "3 prompts" in str(raised.value) and "2 prompts" in str(raised.value)


@pytest.mark.parametrize("width", [80, 200])
def test_stats_can_be_read_at_any_width(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """No name and no number is broken into two lines; where the table is too wide there are two."""
    store = Store(tmp_path, dtype="int8")
    new = ac.new_space("org/m")
    sites = [f"decoder.cross_attn_out.{layer}" for layer in (3, 11)]
    rows = list(np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32) * 100)
    values = {**dict.fromkeys(sites, rows), "ids": [np.arange(3)] * 200}
    store.write(new, [f"p{i}" for i in range(200)], values, pooling="mean")
    Store(tmp_path, dtype="float16").write(new, ["more"], {sites[0]: rows[:1]}, pooling="mean")
    summaries = {s.site: s for s in store.summaries(new)}
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, _ = cli("stats", "org/m", "--store", str(tmp_path))
    assert status == 0
    assert max(map(len, out.splitlines()[1:])) <= width
    lines = [line.split() for line in out.splitlines()]
    one_table = width == 200
    for site in sites:
        entry = summaries[site]
        found = [line for line in lines if line[:1] == [site]]
        assert len(found) == (1 if one_table else 2)
        assert found[0][1:3] == [f"{entry.rows:,}", "64"]
        assert f"{entry.mean_norm:.4g}" in found[0] and f"{entry.std:.4g}" in found[0]
        stored = found[-1][-6 if "-" in found[-1] else -4 :]
        assert stored[0] == entry.stored[0].dtype
        assert f"{entry.stored[0].error_max:.3g}" in stored
    assert sum(line[:1] == ["int8"] for line in lines) == 1, "a second dtype has its own line"
    assert sum(line[:1] == ["site"] for line in lines) == (1 if one_table else 2)
