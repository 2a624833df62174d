"""Pushing into a folder: what is written is what is stored, in the published format."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache as ac
from actcache.errors import NotCachedError, OptionError
from actcache.share.shard_files import greedy
from actcache.store.prompts import PromptTable
from actcache.store.records import DERIVED, Records
from share_helpers import (
    INDEX,
    LAYERS,
    MODEL,
    TEXTS,
    N,
    Published,
    fill_logits,
    fill_perplexity,
    fill_pooled,
    fill_tokens,
    length,
    losses,
    new_space,
    new_store,
    push,
    rows,
    table,
    text,
)


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
