"""What of a store is pushed: tensors, prompts and variants, in which order, and what is said of what is left out."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

import actcache as ac
from actcache.errors import AmbiguousVariantError, NotCachedError, OptionError
from actcache.store.records import Records
from share_helpers import (
    LAYERS,
    MODEL,
    TEXTS,
    N,
    fill_perplexity,
    fill_pooled,
    new_space,
    new_store,
    push,
    rows,
    table,
    text,
)


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


def test_a_name_that_is_no_name_is_left_out(store, space, tmp_path):
    store.append(space, Records.pooled(table(N), "last_token", {"my site": np.ones((20, 4), np.float32)}))
    fill_pooled(store, space, N)
    assert push(store, tmp_path / "set").tensors.keys() == {"hidden_layers"}
