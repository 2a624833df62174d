"""What `push_dataset` writes, read by what reads datasets: the same as the store has."""

from __future__ import annotations

import numpy as np
import pytest

import actcache as ac
from actcache.errors import NotCachedError, OptionError, PromptTypeError

pytest.importorskip("pyarrow")

from share_helpers import (
    LAYERS,
    MODEL,
    fill_logits,
    fill_perplexity,
    fill_pooled,
    fill_tokens,
    new_space,
    new_store,
    rows,
    text,
)

N = list(range(20))
TEXTS = [text(i) for i in N]


@pytest.fixture
def store(tmp_path):
    with new_store(tmp_path) as store:
        yield store


@pytest.fixture
def space(store):
    return new_space(store)


def push(store, folder, prompts=TEXTS, **options):
    ac.push_dataset(folder, MODEL, prompts, store=store, **options)
    return folder


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("limit", [2**30, 200])
def test_pooled_rows_labels_and_columns(store, space, tmp_path, shuffle, limit):
    fill_pooled(store, space, N)
    fill_logits(store, space, N)
    fill_perplexity(store, space, N)
    labels = [i if i % 3 else None for i in N]
    metadata = [{"half": i / 2, "name": f"n{i}", "even": i % 2 == 0, "tags": ["a"] * (i % 3)} for i in N]
    folder = push(store, tmp_path / "set", labels=labels, metadata=metadata, shuffle=shuffle, shard_max_bytes=limit)
    found, given = ac.load_activations(folder, prompts=TEXTS, return_labels=True)
    assert given.tolist() == labels
    for layer in (0, 1):
        assert np.array_equal(found[layer], np.stack([rows(i, f"resid_post.{layer}")[-1] for i in N]))
    about = ac.fetch_dataset_metadata(folder)
    order = [TEXTS.index(prompt) for prompt in about.prompts]
    assert (order == N) is not shuffle and sorted(order) == N
    assert about.labels == [labels[i] for i in order]
    assert about.metadata == {key: [metadata[i][key] for i in order] for key in ("even", "half", "name", "tags")}
    assert (about.model_name, about.revision, about.available_layers) == (MODEL, "r1", [0, 1])
    tensors, _ = ac.load_activation_dataset(folder)
    wanted = np.stack([np.sort(rows(i, "logits", dim=3)[-1])[::-1] for i in order])
    assert np.array_equal(tensors["logits_topk.values"].numpy(), wanted)
    assert tensors["logits_topk.indices"][:, 0].tolist() == order
    assert tensors["perplexity"].shape == (20, 3) and not tensors["perplexity"].isnan().any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [2**30, 300])
def test_full_sequences(store, space, tmp_path, dtype, limit):
    fill_tokens(store, space, N, dtype=dtype)
    folder = push(store, tmp_path / "set", shard_max_bytes=limit)
    stored = [np.stack([rows(i, site).astype(dtype).astype(np.float32) for site in LAYERS], axis=1) for i in N]
    whole = ac.load_activations(folder, prompts=TEXTS, pooling=None, as_dict=False)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(whole, stored, strict=True))
    reduce = {"last_token": lambda v: v[-1], "max": lambda v: v.max(0), "mean": lambda v: v.mean(0)}
    for pooling, function in reduce.items():
        found = ac.load_activations(folder, prompts=TEXTS, pooling=pooling, as_dict=False)
        assert np.allclose(found, np.stack([function(value) for value in stored]), rtol=1e-6, atol=1e-7)


def test_sites_with_layers_and_without(store, space, tmp_path):
    fill_pooled(store, space, N, (*LAYERS, "attn_out.1", "final_norm", "head_out.0.3"))
    fill_pooled(store, space, N, ("router_logits.0", "router_logits.1"), dim=3)
    folder = push(store, tmp_path / "set", shard_max_bytes=200)
    some = [text(i) for i in (7, 0, 19)]
    found = ac.load_activations(folder, site="attn_out", prompts=some)
    assert list(found) == [1]
    assert np.array_equal(found[1], np.stack([rows(i, "attn_out.1")[-1] for i in (7, 0, 19)]))
    for site in ("final_norm", "head_out.0.3"):
        found = ac.load_activations(folder, site=site, prompts=some)
        assert list(found) == [None]
        assert np.array_equal(found[None], np.stack([rows(i, site)[-1] for i in (7, 0, 19)]))
        assert ac.load_activations(folder, site=site, as_dict=False).shape == (20, 1, 8)
        with pytest.raises(OptionError, match="of no layer"):
            ac.load_activations(folder, site=site, layers=[0])
    found = ac.load_activations(folder, site="router_logits", layers=[1], prompts=some)
    assert np.array_equal(found[1], np.stack([rows(i, "router_logits.1", dim=3)[-1] for i in (7, 0, 19)]))
    tensors, _ = ac.load_activation_dataset(folder, layers=[1])
    assert {"hidden.layer_1", "attn_out.layer_1", "final_norm", "head_out.0.3", "router.layer_1"} <= set(tensors)


def test_prompts_of_every_kind(store, space, tmp_path):
    import torch

    chat = [{"role": "user", "content": "hé"}]
    prompts = ["a text", "[5, 6, 7]", [5, 6, 7], chat]
    store.write(space, prompts, {"resid_post.0": list(torch.arange(32.0).reshape(4, 8))}, pooling="mean")
    folder = push(store, tmp_path / "set", prompts)
    about = ac.fetch_dataset_metadata(folder)
    assert len(about.prompts) == 4 and all(prompt in about.prompts for prompt in prompts)
    for asked in (prompts, about.prompts, [chat], [(5, 6, 7)], [np.array([5, 6, 7])], ["[5, 6, 7]"]):
        found = ac.load_activations(folder, prompts=asked, pooling="mean")[0]
        which = [next(i for i, p in enumerate(prompts) if type(p) is type(q) and p == q)
                 for q in (list(map(int, q)) if not isinstance(q, (str, list)) else q for q in asked)]  # fmt: skip
        assert found[:, 0].tolist() == [8.0 * i for i in which]
    with pytest.raises(NotCachedError, match=r"\[5, 6\]"):
        ac.load_activations(folder, prompts=[[5, 6]], pooling="mean")
    with pytest.raises(PromptTypeError):
        ac.load_activations(folder, prompts=[[0.5]], pooling="mean")
