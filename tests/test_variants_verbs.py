"""Variants of a model in what the commands list, show and count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.errors import AmbiguousVariantError
from actcache.store import segment
from actcache.store.default import one_variant
from actcache.store.store import Store
from cli_helpers import Cli
from store_helpers import segment_files
from variants_helpers import MODEL, PROMPT, two_variants


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
