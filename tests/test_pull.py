"""What was pushed and pulled answers the same model as if it were stored here, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.errors import DatasetFormatError, NotCachedError, ResultsNotCachedError
from actcache.share import fetching
from actcache.store.records import Records
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from made_datasets import INDEX, pq
from pull_helpers import fetched, pulled
from share_helpers import new_store

TEXTS = ["the cat sat", "a dog", "x", "rain fell over hills"]


@pytest.fixture
def store(tmp_path):
    with ac.Store(tmp_path / "there", index_dir=tmp_path / "there-index") as store:
        yield store
    fetching._open.clear()


@pytest.fixture(scope="module")
def model():
    return tiny_model("mixtral")


@pytest.fixture(scope="module", params=["tokens", "last_token"])
def published(request, model, tmp_path_factory):
    """A cache and what it pushed."""
    folder = tmp_path_factory.mktemp("published")
    sites = ["resid_post", "attn_out", "router_logits"]
    cache = ac.UnifiedCache(
        model, tokenizer=tiny_tokenizer(), store=folder / "store", cache_pooled=request.param != "tokens",
        cache_logits=True, logit_top_k=4, sites=sites,
    )  # fmt: skip
    prompts = [*TEXTS, [1, 70, 80], [{"role": "user", "content": "hi"}]][: 5 if request.param == "tokens" else 4]
    labels = [3, 1, None, 2, 7][: len(prompts)]
    cache.warmup(prompts, labels=labels, metadata={"score": [0.5, 1, 2, 3, None][: len(prompts)]})
    ac.push_dataset(folder / "set", cache.model_name, prompts, store=cache.store, shard_max_bytes=2000)
    return cache, folder / "set", prompts


def another(cache, model, store, **options):
    """A cache like `cache` with another store, that may not compute."""
    options = {
        "tokenizer": tiny_tokenizer(), "store": store, "cache_pooled": cache.cache_pooled, "cache_logits": True,
        "logit_top_k": 4, "sites": ["resid_post", "attn_out"], **options,
    }  # fmt: skip
    made = ac.UnifiedCache(model, **options)

    def computed(*args, **more):
        raise AssertionError("the model ran")

    made.extractor.batches = computed
    return made


def test_what_was_pushed_answers_the_same_model(published, model, store):
    cache, folder, prompts = published
    ac.pull_dataset(folder, store=store)
    there = another(cache, model, store)
    plan = there.plan(prompts)
    assert (plan.cached, plan.missing) == (len(prompts), 0)
    assert there.warmup(prompts).activations_cached == len(prompts)
    for site in ("resid_post", "attn_out"):
        for mine, theirs in zip(
            there.get_activations(prompts, site=site), cache.get_activations(prompts, site=site), strict=True
        ):
            assert mine is theirs is None or (torch.equal(mine, theirs) and mine.dtype == theirs.dtype)
    assert there.get_labels(prompts) == cache.get_labels(prompts)
    assert there.get_metadata(prompts) == cache.get_metadata(prompts)
    assert np.array_equal(there.get_perplexity(prompts), cache.get_perplexity(prompts))
    for mine, theirs in zip(there.get_token_perplexity(prompts), cache.get_token_perplexity(prompts), strict=True):
        assert np.allclose(mine, theirs, rtol=1e-6)
    assert torch.equal(there.get_logits(prompts).values, cache.get_logits(prompts).values)
    assert torch.equal(there.get_logits(prompts).indices, cache.get_logits(prompts).indices)
    space = pulled(store)
    assert space.dtype == "float32" and space.model_name == cache.model_name
    told = store.discover(cache.model_name, prompts[1])
    assert told.variants[0].pulled == space.pulled and told.has_perplexity and told.logits_top_k == 4
    assert (told.raw_layers or told.pooled["last_token"]) == [0, 1, 2, 3] and told.num_tokens == 6


def test_only_what_is_read_is_fetched(published, model, store):
    cache, folder, prompts = published
    ac.pull_dataset(folder, store=store)
    space = pulled(store)
    layout = "tokens" if not cache.cache_pooled else "last_token"
    assert "resid_post.1" not in fetched(store, space).get(layout, ())
    there = another(cache, model, store, layers=[1], sites="resid_post", compute_perplexity=False)
    there.get_activations(prompts[:2])
    assert [site for site in fetched(store, space)[layout] if "." in site] == ["resid_post.1"]
    assert len(store.prompts(space, site="resid_post.1", layout=layout)) == 2


def test_one_row_of_full_sequences(published, model, store):
    cache, folder, prompts = published
    if cache.cache_pooled:
        pytest.skip("these are pooled already")
    ac.pull_dataset(folder, store=store)
    space = pulled(store)
    wanted, mask = cache.get_activations(prompts, site="resid_post")
    for pooling, row in (("last_token", -1), ("first_token", 0), ("mean", None)):
        there = another(cache, model, store, cache_pooled=True, pooling=pooling, sites="resid_post")
        found = there.get_activations(prompts)[0]
        for i in range(len(prompts)):
            rows = wanted[i][mask[i]]
            assert torch.allclose(found[i], rows.mean(0) if row is None else rows[row], rtol=1e-6, atol=1e-6)
        held = fetched(store, space)
        if row is not None:
            assert "resid_post.0" in held[pooling] and "resid_post.0" not in held["tokens"], "only that row is fetched"
    # From here on all rows are there, of which nothing is fetched again.
    shutil.move(folder, folder.with_name("moved"))
    try:
        another(cache, model, store, cache_pooled=True, pooling="max", sites="resid_post").get_activations(prompts)
    finally:
        shutil.move(folder.with_name("moved"), folder)


def test_other_weights_are_not_answered(published, store):
    cache, folder, prompts = published
    ac.pull_dataset(folder, store=store)
    other = tiny_model("mixtral", seed=5)
    assert another(cache, other, store).plan(prompts).cached == 0
    # By name they are the same, and whoever wants that may have it.
    assert another(cache, other, store, trust_names=True).plan(prompts).cached == len(prompts)


def test_what_edits_made_is_no_answer_for_a_model_of_that_name(tmp_path, model, store):
    edited = ac.UnifiedCache(
        model, tokenizer=tiny_tokenizer(), store=tmp_path / "edited", sites="resid_post",
        edits=[ac.ablate("resid_post.0")],
    )  # fmt: skip
    edited.warmup(TEXTS)
    ac.push_dataset(tmp_path / "set", edited.model_name, TEXTS, store=edited.store)
    ac.pull_dataset(tmp_path / "set", store=store, trust_names=True)
    options = {"sites": "resid_post", "cache_logits": False, "logit_top_k": None}
    for trust in (False, True):
        assert another(edited, model, store, trust_names=trust, **options).plan(TEXTS).cached == 0
    same = another(edited, model, store, edits=[ac.ablate("resid_post.0")], **options)
    assert same.plan(TEXTS).cached == len(TEXTS), "it answers who makes the same edits"


def test_what_was_computed_here_is_never_outranked(published, model, store):
    cache, folder, prompts = published
    ac.pull_dataset(folder, store=store, materialize=True)
    other = new_store(folder.parent / f"forged-{cache.cache_pooled}-{os.getpid()}")
    there = another(cache, model, store)
    identity = cache.cached.identity()
    own = store.open_space(identity.values, identity.label)
    table = cache.store.prompts(cache.store.spaces()[0].space)
    names = there.extractor.sites
    layout = there.cached.layout
    rows = np.full((int(table.lengths.sum()) if layout == "tokens" else len(table), 32), 7.0, np.float32)
    data = dict.fromkeys(names, rows)
    records = Records.tokens(table, data) if layout == "tokens" else Records.pooled(table, layout, data)
    before = there.get_activations(prompts, site="resid_post")[0]
    store.append(own, records)
    # Then pulled once more, and so newer.
    ac.pull_dataset(folder, store=store, materialize=True, overwrite=True)
    after, mask = there.get_activations(prompts, site="resid_post")
    assert bool((after[mask] if mask is not None else after).eq(7).all()) and not torch.equal(before, after)
    other.close()


def test_layers_tensors_and_prompts_that_were_asked_for(published, model, store):
    cache, folder, prompts = published
    assert ac.pull_dataset(folder, store=store, layers=[1, 2], tensors="hidden_layers", target_prompts=prompts[:3]) == 3
    one = another(cache, model, store, layers=[2], sites="resid_post", compute_perplexity=False)
    assert one.plan(prompts).cached == 3
    assert another(cache, model, store, layers=[0, 1], sites="resid_post").plan(prompts).cached == 0
    with pytest.raises(ResultsNotCachedError):
        one.get_perplexity(prompts[:1])
    # A second pull adds to the first.
    assert ac.pull_dataset(folder, store=store, layers=[0], target_prompts=prompts[2:4]) == 2
    assert another(cache, model, store, layers=[0, 1], sites="resid_post").plan(prompts).cached == 1
    assert len([s for s in store.spaces() if s.pulled]) == 1
    before = len(list(store.root.rglob("*.safetensors")))
    ac.pull_dataset(folder, store=store, layers=[0], target_prompts=prompts[2:4])
    assert len(list(store.root.rglob("*.safetensors"))) <= before, "what is registered is not registered again"


def test_a_claim_that_does_not_fit_is_none(published, model, store, tmp_path, caplog):
    cache, folder, prompts = published
    shutil.copytree(folder, tmp_path / "set")
    table = pq.read_table(tmp_path / "set" / INDEX)
    said = dict(table.schema.metadata)
    claim = json.loads(said[b"actcache:space"])
    claim["identity"]["weights"] = "others"
    said[b"actcache:space"] = json.dumps(claim).encode()
    pq.write_table(table.replace_schema_metadata(said), tmp_path / "set" / INDEX)
    ac.pull_dataset(tmp_path / "set", store=store)
    assert "its name is all" in caplog.text
    assert another(cache, model, store).plan(prompts).cached == 0


def test_a_damaged_file_is_named_and_leaves_nothing(published, model, store, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "SLICE_BYTES", 600)
    cache, folder, _ = published
    shutil.copytree(folder, tmp_path / "set")
    victim = sorted((tmp_path / "set" / "tensors").glob("hidden_layer001_shard*.safetensors"))[0]
    status = victim.stat()
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DatasetFormatError, match=f"{victim.name}.*is damaged"):
        ac.pull_dataset(tmp_path / "set", store=store, materialize=True)
    space = pulled(store)
    layout = "tokens" if not cache.cache_pooled else "last_token"
    left = store.prompts(space, site="resid_post.1", layout=layout)
    index = {row["text"]: row for row in pq.read_table(tmp_path / "set" / INDEX).to_pylist()}
    for i in range(len(left)):
        row = index[left.text_of(i) if left.kind[i] else json.dumps(left.tokens(i).tolist())]
        assert row["shard_index"] != 0, "a prompt of the damaged file"
    with pytest.raises(DatasetFormatError, match=f"{victim.name}.*is damaged"):
        ac.load_activations(tmp_path / "set", show_progress=False)


def test_a_file_of_another_size_is_named(published, store, tmp_path):
    _, folder, _ = published
    shutil.copytree(folder, tmp_path / "set")
    victim = sorted((tmp_path / "set" / "tensors").glob("hidden_layer002_shard*.safetensors"))[0]
    with victim.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DatasetFormatError, match=f"{victim.name}.*bytes, and the dataset says"):
        ac.load_activations(tmp_path / "set", layers=[2], show_progress=False)


def test_results_that_are_stored_as_the_models_own_are_computed_from_its_own(published, model, store):
    cache, folder, prompts = published
    ac.pull_dataset(folder, store=store, tensors="hidden_layers")
    there = another(cache, model, store, sites="resid_post")
    assert there.plan(prompts).cached == len(prompts)
    with pytest.raises(NotCachedError, match="pulled from a dataset does not count"):
        there.compute_logits_from_cache(prompts)


def test_what_is_to_be_computed_again_is_not_taken_from_a_dataset(published, model, store):
    cache, folder, prompts = published
    ac.pull_dataset(folder, store=store)
    there = another(cache, model, store, sites="resid_post", compute_perplexity=False)
    assert there.cached.extract(prompts) is not None
    del there.extractor.batches
    there.cached.extract(prompts, invalidate_cache=True)
    identity = there.cached.identity()
    assert store.contains(store.open_space(identity.values, identity.label), prompts).all()
