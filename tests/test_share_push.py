"""Pushing into a folder: what is written is what is stored, in the published format, or nothing is."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache as ac
from actcache.errors import (
    AmbiguousVariantError,
    DatasetExistsError,
    DiskFullError,
    NotCachedError,
    OptionError,
    PromptError,
    PromptTypeError,
)
from actcache.share.columns import label_column, metadata_columns
from actcache.share.shard_files import greedy
from actcache.store import given as said
from actcache.store.prompts import PromptTable
from actcache.store.records import DERIVED, LABEL, METADATA, Records
from share_helpers import (
    BLOCKS,
    INDEX,
    LAYERS,
    MODEL,
    Published,
    fill_logits,
    fill_perplexity,
    fill_pooled,
    fill_tokens,
    has_right_digests,
    length,
    losses,
    new_space,
    new_store,
    rows,
    table,
    text,
)

N = range(20)
TEXTS = [text(i) for i in N]


@pytest.fixture
def store(tmp_path):
    return new_store(tmp_path)


@pytest.fixture
def space(store):
    return new_space(store)


@pytest.fixture
def pooled(store, space):
    fill_pooled(store, space, N)
    return store


def push(store, folder, prompts=TEXTS, model=MODEL, **options):
    assert ac.push_dataset(folder, model, prompts, store=store, **options) == str(folder)
    assert not list(folder.parent.glob(".*pushing"))
    return Published(folder)


def test_what_is_given_as_ids_is_published_as_ids(store, tmp_path):
    space = new_space(store)
    fill_pooled(store, space, range(6))
    ids = [table([i]).tokens(0).tolist() for i in range(6)]
    given = [text(0), ids[1], text(2), ids[3]]
    ac.push_dataset(tmp_path / "set", MODEL, given, store=store, labels=[0, 1, 2, 3], shuffle=False)
    made = Published(tmp_path / "set")
    assert [row["text"] for row in made.index] == [text(0), str(ids[1]), text(2), str(ids[3])]
    assert [row["prompt_kind"] for row in made.index] == ["text", "ids", "text", "ids"]
    assert [row["token_ids"] for row in made.index] == ids[:4] and [row["label"] for row in made.index] == [0, 1, 2, 3]
    assert text(1) not in (tmp_path / "set" / INDEX).read_bytes().decode("latin-1")
    assert ac.fetch_dataset_metadata(tmp_path / "set").prompts == given
    found = ac.load_activations(tmp_path / "set", prompts=[ids[3], text(0)], layers=[1], show_progress=False)
    assert np.array_equal(found[1], np.stack([rows(i, "resid_post.1")[-1] for i in (3, 0)]))
    with pytest.raises(NotCachedError, match="has no prompt"):
        ac.load_activations(tmp_path / "set", prompts=[text(1)], show_progress=False)
    for ids_of_none in ([2**31], [2**70], [-1]):
        with pytest.raises(NotCachedError, match="has no prompt"):
            ac.load_activations(tmp_path / "set", prompts=[ids_of_none], show_progress=False)
    # Found by the ids of a text, whichever whole numbers the column has.
    index = pq.read_table(tmp_path / "set" / INDEX)
    at = index.schema.get_field_index("token_ids")
    for kind in (pa.uint8(), pa.uint64()):
        column = index["token_ids"].cast(pa.list_(kind))
        pq.write_table(index.set_column(at, "token_ids", column), tmp_path / "set" / INDEX)
        found = ac.load_activations(tmp_path / "set", prompts=[ids[2]], layers=[1], show_progress=False)
        assert np.array_equal(found[1][0], rows(2, "resid_post.1")[-1])
    # Whose text is what all of them are known by.
    ac.push_dataset(tmp_path / "all", MODEL, None, store=store)
    assert {row["text"] for row in Published(tmp_path / "all").index} == {text(i) for i in range(6)}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("others", [[7, 8, 9], [5, 6]])
def test_a_text_of_two_tokenizers_is_not_published_as_one(store, tmp_path, whole, others):
    space, ids = new_space(store), {"resid_post.0": [4, 5, 6], "attn_out.0": others}
    for site, tokens in ids.items():
        told = PromptTable.build([tokens], ["a text"], text_context=str(tokens))
        values = np.full((len(tokens), 3), tokens[0], np.float32)
        records = Records.tokens(told, {site: values}) if whole else Records.pooled(told, "mean", {site: values[:1]})
        store.append(space, records)
    for prompts in (["a text"], None):
        with pytest.raises(OptionError, match="1 prompts are stored with other token ids at attn_out than at hidden_l"):
            ac.push_dataset(tmp_path / "set", MODEL, prompts, store=store)
    assert not (tmp_path / "set").exists()
    for site, tokens in ids.items():
        folder = tmp_path / site
        ac.push_dataset(folder, MODEL, ["a text"], store=store, tensors=[site])
        assert [row["token_ids"] for row in Published(folder).index] == [tokens]
        name = site.partition(".")[0]
        found = ac.load_activations(folder, site=name, pooling="mean", show_progress=False)[0]
        assert (found == tokens[0]).all()


def test_the_perplexity_of_other_tokens_is_left_out(store, tmp_path):
    space = new_space(store)
    fill_pooled(store, space, range(3))
    other = PromptTable.build([[90, 91]], ["a text"], text_context="another")
    own = PromptTable.build([[1, 2, 3]], ["a text"], text_context="tokenizer")
    store.append(space, Records.pooled(own, "last_token", {site: np.ones((1, 8), np.float32) for site in LAYERS}))
    store.append(space, Records.pooled(other, DERIVED, {"perplexity": np.full((1, 3), 7, np.float32)}))
    fill_perplexity(store, space, range(3))
    found = push(store, tmp_path / "set", None).by_text
    assert found["a text"]["perplexity_mean"] is None and found["a text"]["token_ids"] == [1, 2, 3]
    assert all(found[text(i)]["perplexity_mean"] is not None for i in range(3))


class TestPooled:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
    def test_every_row_is_the_stored_one(self, store, space, tmp_path, dtype):
        fill_pooled(store, space, N, dtype=dtype)
        found = push(store, tmp_path / "set", shard_max_bytes=100)
        told = found.tensors["hidden_layers"]
        assert told["storage"] == "pooled" and told["pooling"] == "last_token" and told["dtype"] == dtype
        assert told["layers"] == [0, 1] and told["dim"] == 8 and told["layout"] == "per_layer"
        for i in N:
            for layer in (0, 1):
                row = found.row(text(i), layer=layer)
                wanted = torch.from_numpy(rows(i, f"resid_post.{layer}")[-1]).to(getattr(torch, dtype))
                assert row.dtype == wanted.dtype and torch.equal(row, wanted)

    def test_shards_hold_what_the_limit_allows(self, pooled, tmp_path):
        found = push(pooled, tmp_path / "set", shard_max_bytes=3 * 8 * 4 + 5)
        sizes = [shard["num_prompts"] for shard in found.tensors["hidden_layers"]["shards"]]
        assert sizes == [3] * 6 + [2]
        assert [len(found.tensor("hidden_layers", 1, shard)) for shard in range(7)] == sizes
        # One that fits nowhere still has to be somewhere.
        assert len(push(pooled, tmp_path / "tiny", shard_max_bytes=1).tensors["hidden_layers"]["shards"]) == len(N)

    def test_other_sites_lie_in_the_same_shards_under_their_own_names(self, store, space, tmp_path):
        sites = (*LAYERS, "attn_out.1", "mlp_out.0", "mlp_out.1", "final_norm", "head_out.0.3", "encoder.resid_post.5")
        fill_pooled(store, space, N, sites)
        fill_pooled(store, space, N, ("router_logits.0", "router_logits.1"), dim=3)
        found = push(store, tmp_path / "set", shard_max_bytes=200)
        groups = {
            "hidden_layers": "resid_post",
            "attn_out": "attn_out",
            "mlp_out": "mlp_out",
            "final_norm": "final_norm",
        }
        groups |= {"head_out.0.3": "head_out.0.3", "encoder.resid_post": "encoder.resid_post"}
        assert found.tensors.keys() == {*groups, "router_logits"}
        assert found.tensors["mlp_out"]["layers"] == [0, 1] and found.tensors["encoder.resid_post"]["layers"] == [5]
        for group, site in groups.items():
            assert found.tensors[group]["site"] == site
            for layer in found.tensors[group]["layers"] or [None]:
                stored = site if layer is None else f"{site}.{layer}"
                for i in (0, 7, 19):
                    wanted = rows(i, stored)[-1]
                    assert np.array_equal(found.row(text(i), group, layer).numpy(), wanted)
        for layer in (0, 1):
            for i in (0, 7, 19):
                wanted = rows(i, f"router_logits.{layer}", dim=3)[-1]
                assert np.array_equal(found.row(text(i), "router_logits", layer).numpy(), wanted)
        assert found.tensors["router_logits"]["num_experts"] == 3

    def test_quantised_vectors_are_those_a_reader_of_the_store_gets(self, tmp_path):
        store = new_store(tmp_path, dtype="int8")
        space = new_space(store)
        fill_pooled(store, space, N)
        found = push(store, tmp_path / "set")
        read = store.read(space, TEXTS, "resid_post.0", pooling="last_token")
        assert all(torch.equal(found.row(text(i)), read[i]) for i in N)
        assert found.tensors["hidden_layers"]["stored_as"] == ["int8"]

    def test_prompts_of_every_kind(self, store, space, tmp_path):
        chat = [{"role": "user", "content": "hé"}]
        values = torch.arange(24.0).reshape(3, 8)
        store.write(space, ["a text", [5, 6, 7], chat], {"resid_post.0": list(values)}, pooling="mean")
        found = push(store, tmp_path / "set", ["a text", [5, 6, 7], chat])
        by_kind = {row["prompt_kind"]: row for row in found.index}
        assert by_kind["text"]["text"] == "a text" and by_kind["ids"]["text"] == "[5, 6, 7]"
        assert json.loads(by_kind["chat"]["text"]) == chat
        assert by_kind["ids"]["token_ids"] == [5, 6, 7] and by_kind["ids"]["num_tokens"] == 3
        # Without a tokenizer nobody knows the tokens of a text.
        assert by_kind["text"]["token_ids"] is None and by_kind["text"]["num_tokens"] is None
        for row, value in ((by_kind["text"], 0), (by_kind["ids"], 1), (by_kind["chat"], 2)):
            assert torch.equal(found.row(row["text"]), values[value])
        assert found.tensors["hidden_layers"]["pooling"] == "mean"
        read = ac.load_activations(tmp_path / "set", prompts=[[5, 6, 7], "a text"], layers=[0], pooling="mean")[0]
        assert np.array_equal(read, values[[1, 0]].numpy())

    def test_one_prompt_as_text_and_as_ids(self, store, tmp_path):
        """As a text it is found by both, as ids by these alone, whatever is stored of it."""
        fill_tokens(store, new_space(store), N)
        ids = table([3, 9]).tokens(0).tolist(), table([3, 9]).tokens(1).tolist()
        of_text = table([1]).tokens(0).tolist()
        found = push(store, tmp_path / "set", [ids[0], text(3), text(1), ids[1]], labels=["a", "a", "b", "c"])
        assert sorted(found.by_text) == sorted([text(3), text(1), *map(str, ids)]) and len(found.index) == 4
        values, labels = ac.load_activations(
            tmp_path / "set", prompts=[ids[1], text(3), ids[0], text(1), of_text], layers=[0], return_labels=True
        )
        wanted = [rows(i, "resid_post.0")[-1] for i in (9, 3, 3, 1, 1)]
        assert np.array_equal(values[0], np.stack(wanted)) and labels.tolist() == ["c", "a", "a", "b", "b"]
        for absent in (text(9), [3], ids[0][:-1], [*ids[0], 7], [4, *ids[0][1:]]):
            with pytest.raises(NotCachedError, match=re.escape(str(absent))):
                ac.load_activations(tmp_path / "set", prompts=[text(3), absent])
        with pytest.raises(OptionError, match="prompts 0 and 1 are the same, and their 'label' is not"):
            push(store, tmp_path / "other", [ids[0], text(3)], labels=["a", "b"])

    def test_all_that_is_stored(self, pooled, tmp_path):
        assert {row["text"] for row in push(pooled, tmp_path / "set", None).index} == set(TEXTS)

    def test_a_prompt_twice_is_two_rows_unless_something_else_is_said_of_it(self, pooled, tmp_path):
        found = push(pooled, tmp_path / "set", [text(1), text(2), text(1)], labels=[1, 2, 1])
        assert sorted(row["text"] for row in found.index) == [text(1), text(1), text(2)]
        with pytest.raises(OptionError, match="prompts 0 and 2 are the same"):
            ac.push_dataset(tmp_path / "b", MODEL, [text(1), text(2), text(1)], labels=[1, 2, 3], store=pooled)
        assert not (tmp_path / "b").exists()

    @pytest.mark.parametrize("preload", ["per_layer", "full"])
    @pytest.mark.parametrize("whole", [False, True])
    def test_what_is_read_before_is_the_same(self, store, space, tmp_path, preload, whole):
        (fill_tokens if whole else fill_pooled)(store, space, N)
        options = {"shard_max_bytes": 200, "num_workers": 2}
        plain = push(store, tmp_path / "a" / "set", **options)
        other = push(store, tmp_path / "b" / "set", preload=preload, preload_workers=3, **options)
        assert plain.ours["files"] == other.ours["files"] and len(plain.files) == len(other.files) > 6


class TestFullSequences:
    @pytest.mark.parametrize("limit", [1, 200, 500, 10**9])
    def test_every_token_is_the_stored_one(self, store, space, tmp_path, limit):
        fill_tokens(store, space, N, (*LAYERS, "attn_out.1"))
        fill_pooled(store, space, N)
        found = push(store, tmp_path / "set", shard_max_bytes=limit)
        told = found.tensors["hidden_layers"]
        assert told["storage"] == "full_sequence" and "pooling" not in told
        placed, rest = told["shards"][: told["last_token_shards"]], told["shards"][told["last_token_shards"] :]
        assert sum(s["num_prompts"] for s in placed) == sum(s["num_prompts"] for s in rest) == len(N)
        assert sum(s["num_tokens"] for s in rest) == sum(length(i) - 1 for i in N)
        assert all(s["num_tokens"] > 0 for s in rest)
        for i in N:
            for group, layer in (("hidden_layers", 0), ("hidden_layers", 1), ("attn_out", 1)):
                site = f"{'resid_post' if group == 'hidden_layers' else group}.{layer}"
                wanted = rows(i, site)
                assert np.array_equal(found.tokens(text(i), group, layer).numpy(), wanted)
                assert np.array_equal(found.row(text(i), group, layer).numpy(), wanted[-1])
            row = found.by_text[text(i)]
            assert row["num_tokens"] == length(i) and row["token_offset"] == row["row_offset"]
            assert row["token_ids"] == table([i]).tokens(0).tolist()
            # The rest of a prompt is in one shard, as the format has it.
            assert len(set(row["token_shard_ids"][:-1])) <= 1

    def test_prompts_of_one_token_have_no_rest(self, store, space, tmp_path):
        fill_tokens(store, space, [0, 7, 14])
        found = push(store, tmp_path / "set", [text(i) for i in (0, 7, 14)])
        assert found.tensors["hidden_layers"]["shards"] == [{"num_prompts": 3, "num_tokens": 3}]
        assert np.array_equal(found.tokens(text(7)).numpy(), rows(7, "resid_post.0"))

    def test_either_form_may_be_asked_for(self, store, space, tmp_path):
        fill_tokens(store, space, N)
        fill_pooled(store, space, N)
        fill_pooled(store, space, N, layout="mean", seed=3)
        found = push(store, tmp_path / "set", pooling="mean")
        assert found.tensors["hidden_layers"]["pooling"] == "mean"
        assert np.array_equal(found.row(text(4)).numpy(), rows(4, "resid_post.0", seed=3)[-1])
        with pytest.raises(OptionError, match=r"pooling='men'.*Did you mean 'mean'"):
            push(store, tmp_path / "b", pooling="men")

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 20))
    def test_no_shard_is_empty_and_none_is_too_large_for_nothing(self, sizes, limit):
        shards = greedy(np.array(sizes), limit)
        held = [sum(sizes[a:b]) for a, b in shards]
        assert all(held) and sum(held) == sum(sizes)
        if shards:
            assert [a for a, _ in shards[1:]] == [b for _, b in shards[:-1]]
            assert shards[0][0] == 0 and shards[-1][1] == len(sizes)
        for (a, b), size in zip(shards, held, strict=True):
            assert size <= limit or sum(1 for n in sizes[a:b] if n) == 1


class TestResults:
    def test_logits_perplexity_and_tokens(self, pooled, space, tmp_path):
        fill_logits(pooled, space, N, 3)
        fill_perplexity(pooled, space, N)
        found = push(pooled, tmp_path / "set", shard_max_bytes=24 * 3)
        told = found.tensors["logits_topk"]
        assert told["k"] == 3 and len(told["shards"]) == 7
        from safetensors.torch import load_file

        for i in N:
            row = found.by_text[text(i)]
            tensors = load_file(found.folder / told["shards"][row["shard_index_logits"]]["file"])
            at = row["row_offset_logits"]
            assert np.array_equal(tensors["logits_topk.values"][at], np.sort(rows(i, "logits", dim=3)[-1])[::-1])
            assert tensors["logits_topk.indices"][at].tolist() == [i, i + 1, i + 2]
            c = losses(i).astype(np.float64)
            assert row["token_perplexity"] == pytest.approx(np.exp(c).tolist(), rel=1e-6)
            features = [row[f"perplexity_{name}"] for name in ("mean", "min", "max")]
            wanted = np.exp([c.mean(), c.min(), c.max()]) if len(c) else [1, 1, 1]
            assert features == pytest.approx(list(wanted), rel=1e-6)

    def test_of_some_prompts_only(self, pooled, space, tmp_path):
        fill_logits(pooled, space, N[:5])
        fill_perplexity(pooled, space, N[:5])
        found = push(pooled, tmp_path / "set")
        assert found.tensors.keys() == {"hidden_layers"} and len(found.index) == 20
        assert [row["perplexity_mean"] is None for row in found.index].count(True) == 15
        assert found.ours["provenance"]["left_out"] == ["logits_topk: not every prompt has it"]
        # Named, they decide who is in.
        only = push(pooled, tmp_path / "b", tensors=["hidden_layers", "logits_topk", "perplexity"])
        assert {row["text"] for row in only.index} == {text(i) for i in range(5)}
        with pytest.raises(NotCachedError, match="15 of 20 prompts lack"):
            push(pooled, tmp_path / "c", tensors=["logits_topk"], skip_missing=False)

    def test_nothing_but_logits(self, store, space, tmp_path):
        fill_logits(store, space, N)
        found = push(store, tmp_path / "set", shard_max_bytes=24 * 6)
        row = found.by_text[text(9)]
        path = found.tensors["logits_topk"]["file_pattern"].format(shard=row["shard_index"])
        from safetensors.torch import load_file

        assert load_file(found.folder / path)["logits_topk.indices"][row["row_offset"]].tolist() == [9, 10, 11]


class TestChoice:
    def test_tensors_that_are_named(self, store, space, tmp_path):
        fill_pooled(store, space, N, (*LAYERS, "attn_out.0", "attn_out.1", "mlp_out.0"))
        found = push(store, tmp_path / "set", tensors=["resid_post.1", "attn_out"])
        assert {g: t["layers"] for g, t in found.tensors.items()} == {"hidden_layers": [1], "attn_out": [0, 1]}
        found = push(store, tmp_path / "b", tensors=["hidden_layers"])
        assert {g: t["layers"] for g, t in found.tensors.items()} == {"hidden_layers": [0, 1]}

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            (["hiden_layers"], "Did you mean 'hidden_layers'\\?"),
            (["attn_out.3"], r"'attn_out.3' is not stored.*Stored: hidden_layers"),
            (["resid_post.7"], "'resid_post.7' is not stored"),
            (["logits_topk"], "'logits_topk' is not stored"),
            ([], "tensors is empty"),
            (["perplexity"], "name some of these, too"),
        ],
    )
    def test_tensors_that_are_not_there(self, pooled, space, tmp_path, tensors, message):
        fill_perplexity(pooled, space, N)
        with pytest.raises(OptionError, match=message):
            push(pooled, tmp_path / "set", tensors=tensors)
        assert not (tmp_path / "set").exists()

    def test_what_only_some_prompts_have_costs_no_prompt(self, store, space, tmp_path):
        fill_pooled(store, space, N)
        fill_pooled(store, space, N[:3], ("resid_post.2", "attn_out.0"))
        found = push(store, tmp_path / "set")
        assert {g: t["layers"] for g, t in found.tensors.items()} == {"hidden_layers": [0, 1]} and len(
            found.index
        ) == 20
        assert found.ours["provenance"]["left_out"] == [
            "hidden_layers: not every prompt has the layers 2",
            "attn_out: not every prompt has it",
        ]

    def test_missing_prompts_are_left_out_or_refused(self, pooled, tmp_path):
        prompts = [*TEXTS, "never seen"]
        found = push(pooled, tmp_path / "set", prompts, labels=list(range(21)))
        assert len(found.index) == 20 and found.by_text[text(4)]["label"] == 4
        with pytest.raises(NotCachedError, match=r"1 of 21 prompts lack .*prompt 20, 'never seen'.*skip_missing=True"):
            push(pooled, tmp_path / "b", prompts, skip_missing=False)
        with pytest.raises(NotCachedError, match="Warm them up first"):
            push(pooled, tmp_path / "b", ["never seen"])
        with pytest.raises(NotCachedError, match=r"nothing is stored for 'org/modle'.*Did you mean 'org/model'"):
            push(pooled, tmp_path / "b", model="org/modle")
        assert not (tmp_path / "b").exists()

    def test_who_is_left_out_of_all_that_are_stored_is_said(self, store, space, tmp_path, caplog):
        fill_pooled(store, space, N[:5])
        fill_pooled(store, space, N[5:8], layout="mean")
        found = push(store, tmp_path / "set", None)
        assert len(found.index) == 5
        (said,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
        assert "3 of 8 prompts are left out" in said and said.count("lacks hidden_layers (as last_token)") == 3
        assert all(repr(text(i)) in said for i in N[5:8])
        lacks = "3 of 8 prompts, which lack some of it"
        assert lacks in found.ours["provenance"]["left_out"]
        assert f"not part of it: {lacks}" in (found.folder / "README.md").read_text()

    def test_who_is_left_out_and_why_is_said(self, store, space, tmp_path, caplog):
        fill_pooled(store, space, N[:12])
        fill_pooled(store, space, N[12:15], ("resid_post.0",))
        fill_pooled(store, space, N[:4], ("attn_out.0",))
        prompts = ["never seen", *TEXTS[10:15]]
        chosen = ["hidden_layers", "attn_out"]
        found = push(store, tmp_path / "set", prompts, tensors=chosen[:1])
        assert {row["text"] for row in found.index} == set(TEXTS[10:12])
        (said,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
        assert "4 of 6 prompts are left out" in said
        assert "prompt 0, 'never seen', which lacks hidden_layers (as last_token); prompt 3, " in said
        assert f"prompt 5, {text(14)!r}, which lacks hidden_layers of layers 1 (as last_token)" in said
        caplog.clear()
        push(store, tmp_path / "b", tensors=chosen, prompts=TEXTS[:15])
        (said,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
        assert f"prompt 4, {text(4)!r}, which lacks attn_out (as last_token); prompt 5, " in said
        assert said.endswith("; and 6 more") and "prompt 9," not in said
        with pytest.raises(
            NotCachedError, match=r"prompt 0, 'never seen', which lacks hidden_layers .as last_token.\. "
        ):
            push(store, tmp_path / "c", prompts, skip_missing=False)

    def test_of_several_variants_one_is_to_be_chosen(self, pooled, space, tmp_path):
        other = new_space(pooled, weights="def")
        fill_pooled(pooled, other, N, seed=5)
        with pytest.raises(AmbiguousVariantError) as error:
            push(pooled, tmp_path / "set")
        assert space in str(error.value) and other in str(error.value)
        found = push(pooled, tmp_path / "set", space=other)
        assert np.array_equal(found.row(text(3)).numpy(), rows(3, "resid_post.0", seed=5)[-1])
        assert found.ours["space"]["space"] == other

    def test_what_a_model_gives_with_edits_is_not_called_the_model(self, store, tmp_path):
        edits = [{"kind": "ablate", "site": "resid_post.5"}]
        fill_pooled(store, new_space(store, edits=edits), N)
        found = push(store, tmp_path / "set")
        assert found.metadata["model"]["name"] == "org/model (edited: ablate resid_post.5)"
        assert "run with edits" in (found.folder / "README.md").read_text()

    def test_a_folder_s_path_is_not_published(self, store, tmp_path):
        model = tmp_path / "private" / "mine"
        model.mkdir(parents=True)
        fill_pooled(store, new_space(store, name=str(model)), N)
        found = push(store, tmp_path / "set", model=model)
        assert found.metadata["model"]["name"] == "mine" and found.ours["space"]["label"]["model_name"] == "mine"
        for path in found.files:
            assert str(tmp_path).encode() not in (found.folder / path).read_bytes()

    def test_a_damaged_prompt_is_never_published(self, pooled, space, tmp_path):
        (segment,) = (pooled.root / space).glob("*.safetensors")
        data = bytearray(segment.read_bytes())
        wanted = rows(3, "resid_post.1")[-1].tobytes()
        data[data.find(wanted)] ^= 1
        segment.write_bytes(data)
        fresh = new_store(tmp_path)
        with pytest.raises(NotCachedError, match=r"can no longer be read at hidden_layers .*verify"):
            ac.push_dataset(tmp_path / "set", MODEL, TEXTS, store=fresh)
        assert not (tmp_path / "set").exists()


class TestOrder:
    def test_rows_are_shuffled_by_the_rule_of_the_format(self, pooled, tmp_path):
        seed = int.from_bytes(hashlib.sha256(b"set").digest()[:8], "big") % 2**31
        order = list(N)
        random.Random(seed).shuffle(order)
        found = push(pooled, tmp_path / "set")
        assert [row["text"] for row in found.index] == [text(i) for i in order]

    def test_as_given(self, pooled, tmp_path):
        shuffled = push(pooled, tmp_path / "set")
        assert [row["text"] for row in shuffled.index] != TEXTS
        assert shuffled.metadata["prompt_ordering"] == "random"
        found = push(pooled, tmp_path / "b", TEXTS[::-1], shuffle=False, labels=list(N))
        assert [row["text"] for row in found.index] == TEXTS[::-1]
        assert [row["label"] for row in found.index] == list(N)
        assert np.array_equal(found.row(text(3)).numpy(), rows(3, "resid_post.0")[-1])


class TestColumns:
    @pytest.mark.parametrize(
        ("labels", "type_", "values"),
        [
            ([1, None, 3], "int32", [1, None, 3]),
            ([1, 2**40, None], "int64", [1, 2**40, None]),
            (["a", None, "b"], "string", ["a", None, "b"]),
            ([None, None, None], "int32", [None, None, None]),
            ([True, False, None], "int32", [1, 0, None]),
            (np.array([3, 4, 5]), "int32", [3, 4, 5]),
        ],
    )
    def test_labels(self, pooled, tmp_path, labels, type_, values):
        found = push(pooled, tmp_path / "set", TEXTS[:3], labels=labels)
        assert str(found.table.schema.field("label").type) == type_
        assert [found.by_text[t]["label"] for t in TEXTS[:3]] == values

    @pytest.mark.parametrize("labels", [[1.5, 1, 2], [1, 2], [[1], 1, 1], "abc", [2**70, 1, 1], {"a": 1}, {1, 2, 3}, 5])
    def test_labels_that_cannot_be(self, labels):
        with pytest.raises(OptionError, match="labels"):
            label_column(labels, 3)

    def test_labels_of_both_types_are_named(self, pooled, tmp_path):
        with pytest.raises(OptionError, match=r"labels\[2\] is 7, an int, and labels\[1\] is 'a', a str"):
            push(pooled, tmp_path / "set", TEXTS[:3], labels=[None, "a", 7])
        with pytest.raises(OptionError, match=r"labels\[0\] is 1, an int, and labels\[1\] is 'a', a str"):
            label_column([True, "a"], 2)
        assert not (tmp_path / "set").exists()

    def test_prompts_without_an_order_are_refused(self, pooled, tmp_path):
        with pytest.raises(PromptTypeError, match="prompts is a set"):
            push(pooled, tmp_path / "set", set(TEXTS[:3]), labels=[1, 2, 3])
        assert not (tmp_path / "set").exists()

    def test_metadata_keeps_its_types(self, pooled, tmp_path):
        given = [
            {"f": 1.0, "g": None, "i": 2**40, "b": True, "s": "x", "l": [1, 2], "m": [1.0, None], "n": None, "mix": 1},
            {"f": 2.0, "g": 0.1, "i": None, "b": False, "s": "é", "l": [], "m": None, "n": None, "mix": 2.5},
        ]
        found = push(pooled, tmp_path / "set", TEXTS[:2], metadata=given)
        types = {name: str(found.table.schema.field(name).type).replace("element: ", "") for name in given[0]}
        assert types == {
            "f": "double", "g": "double", "i": "int64", "b": "bool", "s": "string", "l": "list<int64>",
            "m": "list<double>", "n": "string", "mix": "double",
        }  # fmt: skip
        for i in range(2):
            assert {name: found.by_text[text(i)][name] for name in given[i]} == given[i]
        assert isinstance(found.by_text[text(0)]["f"], float)

    def test_metadata_as_columns(self, pooled, tmp_path):
        found = push(pooled, tmp_path / "set", TEXTS[:2], metadata={"f": np.array([1.5, 2.0]), "s": ["a", "b"]})
        assert [(found.by_text[t]["f"], found.by_text[t]["s"]) for t in TEXTS[:2]] == [(1.5, "a"), (2.0, "b")]

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ([{"text": "x"}] * 2, "a column 'text' of its own"),
            ([{"shard_index_logits": 1}] * 2, "of its own"),
            ([{"a": 1}, {"b": 1}], r"metadata\[1\] has other keys"),
            ([{"a": 1}, {"a": "x"}], r"several types \(int, str\)"),
            ([{"a": True}, {"a": 1}], "several types"),
            ([{"a": [1]}, {"a": 1}], "lists for some"),
            ([{"a": float("nan")}] * 2, "finite"),
            ([{"a": {"b": 1}}] * 2, "expected a string"),
            ([{"a": 2**64}] * 2, "64 bits"),
            ([{"a": 2**53 + 1}, {"a": 0.5}], r"metadata\['a'\] has .*9007199254740993, which becomes another"),
            ([{"a": [0.5, 10**400]}] * 2, "becomes another"),
            ([{"a": "\ud800"}] * 2, "Unicode"),
            ([{"": 1}] * 2, "name of a column"),
            ([{"a": 1}], "1 values for 2 prompts"),
            ({"a": [1]}, "1 values for 2 prompts"),
            ([1, 2], "expected a dict"),
        ],
    )
    def test_metadata_that_cannot_be(self, metadata, message):
        with pytest.raises(OptionError, match=message):
            metadata_columns(metadata, 2)

    def test_stored_labels_that_no_dataset_holds(self, pooled, space, tmp_path):
        for records in said.records(LABEL, table(N), [said.encoded(i / 2) for i in N]):
            pooled.append(space, records)
        with pytest.raises(OptionError, match=r"labels that are stored.*pass labels="):
            push(pooled, tmp_path / "set")
        assert push(pooled, tmp_path / "set", labels=list(N)).by_text[text(3)]["label"] == 3

    def test_stored_metadata_that_no_dataset_holds(self, pooled, space, tmp_path):
        values = [said.encoded({"topic": i if i % 2 else str(i)}) for i in N]
        for records in said.records(METADATA, table(N), values):
            pooled.append(space, records)
        with pytest.raises(OptionError, match=r"metadata that is stored.*several types.*pass metadata="):
            push(pooled, tmp_path / "set")
        assert push(pooled, tmp_path / "set", metadata={}).by_text[text(3)]["label"] is None

    def test_a_text_that_no_index_can_hold(self, store, space, tmp_path):
        store.write(space, ["fine", "half of a pair \ud83d"], {"resid_post.0": [torch.ones(8)] * 2}, pooling="mean")
        with pytest.raises(PromptError, match="no valid Unicode"):
            ac.push_dataset(tmp_path / "set", MODEL, None, store=store)
        assert not (tmp_path / "set").exists()

    def test_many_row_groups(self, pooled, space, tmp_path, monkeypatch):
        monkeypatch.setattr("actcache.share.index_file._ROWS", 3)
        fill_perplexity(pooled, space, N[:9])
        found = push(pooled, tmp_path / "set", labels=list(N))
        assert pq.ParquetFile(found.folder / INDEX).num_row_groups == 7
        assert [found.by_text[text(i)]["label"] for i in N] == list(N)

    def test_what_is_stored_with_prompts_goes_along(self, pooled, space, tmp_path):
        for kind, values in ((LABEL, list(N)), (METADATA, [{"score": i / 2} for i in N])):
            for records in said.records(kind, table(N), [said.encoded(v) for v in values]):
                pooled.append(space, records)
        found = push(pooled, tmp_path / "set")
        assert all(found.by_text[text(i)]["label"] == i and found.by_text[text(i)]["score"] == i / 2 for i in N)
        # What the caller says counts instead.
        again = push(pooled, tmp_path / "b", labels=["x"] * 20)
        assert {row["label"] for row in again.index} == {"x"}

    def test_people_see_first_what_people_read(self, pooled, space, tmp_path):
        fill_perplexity(pooled, space, N)
        found = push(pooled, tmp_path / "set", metadata=[{"topic": "x"}] * 20)
        names = found.table.schema.names
        assert names[:7] == [
            "text",
            "label",
            "num_tokens",
            "perplexity_mean",
            "perplexity_min",
            "perplexity_max",
            "topic",
        ]


class TestFolders:
    def test_what_is_there_stays_unless_asked(self, pooled, tmp_path):
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "mine.txt").write_text("keep me")
        with pytest.raises(DatasetExistsError, match="exist_ok=True"):
            ac.push_dataset(folder, MODEL, TEXTS, store=pooled)
        assert {p.name for p in folder.iterdir()} == {"mine.txt"} and len(list(tmp_path.glob(".*"))) == 0
        push(pooled, folder, exist_ok=True)
        assert (folder / "mine.txt").read_text() == "keep me"

    def test_an_empty_folder_is_none(self, pooled, tmp_path):
        (tmp_path / "set").mkdir()
        push(pooled, tmp_path / "set")

    def test_a_smaller_dataset_leaves_nothing_of_a_larger_one(self, store, space, tmp_path):
        fill_tokens(store, space, N, (*LAYERS, "attn_out.0"))
        folder = tmp_path / "set"
        assert len(push(store, folder, shard_max_bytes=100).files) > 60
        small = push(store, folder, TEXTS[:2], tensors=["resid_post.0"], exist_ok=True)
        assert small.files == {"README.md", INDEX, BLOCKS, *small.ours["files"]} and len(small.files) == 5
        assert np.array_equal(small.tokens(text(1)).numpy(), rows(1, "resid_post.0"))

    def test_a_link_to_a_folder_stays_one(self, pooled, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "set").symlink_to(tmp_path / "real")
        found = push(pooled, tmp_path / "set")
        assert (tmp_path / "set").is_symlink() and INDEX in found.files

    @pytest.mark.parametrize("at", [1, 3, 15, 16])
    def test_killed_while_it_replaces_another_it_shows_neither(self, pooled, space, tmp_path, at):
        folder = tmp_path / "set"
        push(pooled, folder, shard_max_bytes=100)
        pooled.invalidate(space)
        fill_pooled(pooled, space, N, seed=1)
        options = {"shard_max_bytes": 100, "num_workers": 1}
        pid = os.fork()
        if not pid:
            _die_at_file(at, within=f"{folder}/", suffix="")
            ac.push_dataset(folder, MODEL, TEXTS, store=new_store(tmp_path), exist_ok=True, **options)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 77
        assert not (folder / INDEX).exists()
        # It was asked for when it began.
        found = push(pooled, folder, **options)
        assert not (folder / ".pushing").exists()
        assert all(np.array_equal(found.row(text(i)).numpy(), rows(i, "resid_post.0", seed=1)[-1]) for i in N)

    def test_a_file_is_no_folder(self, pooled, tmp_path):
        (tmp_path / "set").write_text("x")
        with pytest.raises(OptionError, match="is a file"):
            ac.push_dataset(tmp_path / "set", MODEL, TEXTS, store=pooled)

    def test_named_as_text(self, pooled, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert ac.push_dataset("./set", MODEL, TEXTS, store=pooled) == str(tmp_path / "set")
        assert ac.push_dataset(f"file://{tmp_path}/b", MODEL, TEXTS, store=pooled) == str(tmp_path / "b")

    def test_checksums_are_those_of_the_files(self, pooled, tmp_path):
        found = push(pooled, tmp_path / "set", shard_max_bytes=100)
        assert found.files - {"README.md", INDEX, BLOCKS} == found.ours["files"].keys()
        for path, (size, digest) in found.ours["files"].items():
            data = (found.folder / path).read_bytes()
            assert len(data) == size and hashlib.sha256(data).hexdigest() == digest
        assert has_right_digests(found)

    def test_no_room_is_told_before_anything_is_made(self, pooled, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(DiskFullError, match="stream=True"):
            ac.push_dataset(tmp_path / "set", MODEL, TEXTS, store=pooled)
        assert not (tmp_path / "set").exists()

    @pytest.mark.parametrize(
        "options",
        [
            {"shard_max_bytes": 0}, {"shard_max_bytes": True}, {"num_workers": 0}, {"commit_batch_size": -1},
            {"stream": True, "stream_batch_size": 0}, {"preload": "everything"}, {"preload_workers": 0},
            {"license": "mit\nhello: 1"}, {"license": ""}, {"description": 5}, {"token": "hf_x\n"},
        ],
    )  # fmt: skip
    def test_options_that_cannot_be(self, pooled, tmp_path, options):
        with pytest.raises(OptionError) as error:
            ac.push_dataset(tmp_path / "set", MODEL, TEXTS, store=pooled, **options)
        assert next(iter(options)) in str(error.value) or "stream_batch_size" in str(error.value)
        assert "hf_x" not in str(error.value) and not (tmp_path / "set").exists()

    @pytest.mark.parametrize("prompts", [[], [""], [5], "", {"a": 1}])
    def test_prompts_that_are_none(self, pooled, tmp_path, prompts):
        with pytest.raises((OptionError, PromptError, PromptTypeError)):
            ac.push_dataset(tmp_path / "set", MODEL, prompts, store=pooled)
        with pytest.raises(OptionError, match="belong to prompts"):
            ac.push_dataset(tmp_path / "set", MODEL, None, labels=[1], store=pooled)


class TestCard:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("form", ["pooled", "tokens", "site", "logits"])
    def test_what_it_says_to_load_with_loads(self, store, space, tmp_path, form, dtype, monkeypatch):
        fill = {"pooled": fill_pooled, "tokens": fill_tokens}
        if form == "logits":
            fill_logits(store, space, N)
        elif form == "site":
            fill_pooled(store, space, N, ("final_norm",), dtype=dtype)
        else:
            fill[form](store, space, N, dtype=dtype)
        found = push(store, tmp_path / "set", shard_max_bytes=100)
        _, snippet = re.findall(r"```python\n(.*?)```", (found.folder / "README.md").read_text(), re.DOTALL)
        imported = re.findall(r"^(?:import|from) (\w+)", snippet, re.MULTILINE)
        assert imported == ["json", "pyarrow", "safetensors"]
        monkeypatch.chdir(found.folder)
        names: dict = {}
        exec(snippet, names)
        i = next(i for i in N if text(i) == found.index[0]["text"])
        site = {"site": "final_norm", "logits": "logits"}.get(form, "resid_post.1")
        wanted = torch.from_numpy(rows(i, site, dim=3 if form == "logits" else 8)).to(getattr(torch, dtype))
        if form == "logits":
            wanted = torch.from_numpy(rows(i, site, dim=3)).sort(descending=True).values
        assert torch.equal(torch.as_tensor(names["vector"]), wanted[-1])
        if form == "tokens":
            assert torch.equal(torch.stack([torch.as_tensor(t) for t in names["tokens"]]), wanted)

    @pytest.mark.parametrize("site", ["resid_post.1", "attn_out.1", "final_norm"])
    @pytest.mark.parametrize("layout", ["last_token", "mean"])
    def test_what_it_says_for_actcache_works(self, store, space, tmp_path, monkeypatch, site, layout):
        fill_pooled(store, space, N, (site,), layout=layout)
        found = push(store, tmp_path / "set")
        snippet, _ = re.findall(r"```python\n(.*?)```", (found.folder / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(tmp_path)
        names: dict = {}
        exec(snippet, names)
        assert np.array_equal(
            names["vectors"], np.stack([rows(int(r["text"].split()[1]), site)[-1] for r in found.index])
        )

    def test_says_what_it_is(self, pooled, tmp_path):
        found = push(pooled, tmp_path / "set", license="mit", description="About *cats*.")
        card = (found.folder / "README.md").read_text()
        front = card.split("---")[1]
        assert "license: mit" in front and "path: index/train-*.parquet" in front
        for part in ("org/model", "`r1`", "About *cats*.", "| hidden_layers | resid_post | 0 to 1 | 8 | float32 |"):
            assert part in card

    @pytest.mark.parametrize(("name", "linked"), [("org/gpt", True), ("/home/me/models/gpt2", False)])
    def test_links_to_models_of_the_hub_alone(self, store, tmp_path, name, linked):
        fill_pooled(store, new_space(store, name=name), N)
        card = (push(store, tmp_path / "set", model=name).folder / "README.md").read_text()
        assert (
            ("](https://huggingface.co/" in card) is linked and name.rpartition("/")[2] in card and "/home" not in card
        )

    def test_nobody_s_name_breaks_it(self, store, tmp_path):
        name = "evil`\n---\n| x | [a](http://b) <script>"
        fill_pooled(store, new_space(store, name=name), N)
        card = (push(store, tmp_path / "set", model=name).folder / "README.md").read_text()
        body = card.split("---\n", 2)[2]
        assert "<script>" not in card and "](http://b)" not in card and "\n---\n" not in body
        assert "evil" in card


class TestInterrupted:
    @pytest.mark.parametrize("at", [1, 4, 9])
    def test_goes_on_where_it_was(self, pooled, tmp_path, at):
        folder = tmp_path / "set"
        pid = os.fork()
        if not pid:
            _die_at_file(at)
            ac.push_dataset(folder, MODEL, TEXTS, store=new_store(tmp_path), shard_max_bytes=100, num_workers=1)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 77
        assert not folder.exists()
        staged = {p: p.stat().st_mtime_ns for p in tmp_path.glob(".set.pushing/*/files/**/*.safetensors")}
        assert len(staged) == at - 1
        found = push(pooled, folder, shard_max_bytes=100)
        reused = [p for p in folder.rglob("*.safetensors") if p.stat().st_mtime_ns in staged.values()]
        assert len(reused) == at - 1
        assert all(np.array_equal(found.row(text(i)).numpy(), rows(i, "resid_post.0")[-1]) for i in N)

    def test_what_became_of_other_vectors_is_not_published(self, pooled, space, tmp_path):
        folder = tmp_path / "set"
        pid = os.fork()
        if not pid:
            _die_at_file(9)
            ac.push_dataset(folder, MODEL, TEXTS, store=new_store(tmp_path), shard_max_bytes=100, num_workers=1)
            os._exit(1)
        os.waitpid(pid, 0)
        pooled.invalidate(space)
        fill_pooled(pooled, space, N, seed=9)
        found = push(pooled, folder, shard_max_bytes=100)
        for i in N:
            assert np.array_equal(found.row(text(i)).numpy(), rows(i, "resid_post.0", seed=9)[-1])

    def test_a_file_that_a_crash_left_half_written_is_made_again(self, pooled, tmp_path):
        folder = tmp_path / "set"
        pid = os.fork()
        if not pid:
            _die_at_file(9)
            ac.push_dataset(folder, MODEL, TEXTS, store=new_store(tmp_path), shard_max_bytes=100, num_workers=1)
            os._exit(1)
        os.waitpid(pid, 0)
        for path in tmp_path.glob(".set.pushing/*/files/**/*.safetensors"):
            path.write_bytes(bytes(path.stat().st_size))
        found = push(pooled, folder, shard_max_bytes=100)
        for i in N:
            assert np.array_equal(found.row(text(i)).numpy(), rows(i, "resid_post.0")[-1])


def _die_at_file(number, *, within=".pushing", suffix=".safetensors"):
    """End this process when it would put its file `number` in place."""
    replace, seen = os.replace, []

    def dying(source, target):
        if str(target).endswith(suffix) and within in str(target):
            seen.append(target)
            if len(seen) == number:
                os._exit(77)
        replace(source, target)

    os.replace = dying


def test_a_name_that_is_no_name_is_left_out(store, space, tmp_path):
    store.append(space, Records.pooled(table(N), "last_token", {"my site": np.ones((20, 4), np.float32)}))
    fill_pooled(store, space, N)
    assert push(store, tmp_path / "set").tensors.keys() == {"hidden_layers"}
