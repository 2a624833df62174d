"""What was computed here beside what was pulled: read site by site and prompt by prompt, its own always first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.share import fetching
from actcache.store.records import PULLED, Records
from actcache.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["the cat sat", "a dog", [1, 70, 80], "rain fell over hills"]
LAYERS = range(4)
POOLINGS = ("tokens", "last_token")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module", params=POOLINGS)
def published(request, model, tmp_path_factory):
    """A cache and what it pushed."""
    folder = tmp_path_factory.mktemp("published")
    cache = ac.UnifiedCache(
        model, tokenizer=tiny_tokenizer(), store=folder / "store", cache_pooled=request.param != "tokens",
        cache_logits=True, logit_top_k=4,
    )  # fmt: skip
    cache.warmup(PROMPTS, labels=[3, 1, 2, 7])
    ac.push_dataset(folder / "set", cache.model_name, PROMPTS, store=cache.store, shard_max_bytes=2000)
    return cache, folder / "set"


@pytest.fixture
def store(tmp_path):
    yield (made := ac.Store(tmp_path / "there", index_dir=tmp_path / "there-index"))
    made.close()
    fetching._open.clear()


def another(cache, model, store, *, pooled=None, **options):
    """A cache like `cache` with another store, that may not compute."""
    made = ac.UnifiedCache(
        model, tokenizer=tiny_tokenizer(), store=store, cache_pooled=cache.cache_pooled if pooled is None else pooled,
        cache_logits=True, logit_top_k=4, **options,
    )  # fmt: skip

    def computed(*args, **more):
        raise AssertionError("the model ran")

    made.extractor.batches = computed
    return made


def forge(cache, store, sites, members, *, layout=None, value=7.0, width=32):
    """Store rows of `value` as if the model of `cache` had given them at `sites`, for some of the prompts."""
    layout = layout or cache.cached.layout
    identity = cache.cached.identity()
    space = store.open_space(identity.values, identity.label)
    table = cache.store.prompts(cache.store.spaces()[0].space)
    order = [
        table.texts.index(p) if isinstance(p, str) else [t is None for t in table.texts].index(True) for p in PROMPTS
    ]
    table = table.select([order[i] for i in members])
    rows = np.full((int(table.lengths.sum()) if layout == "tokens" else len(table), width), value, np.float32)
    data = {site: rows.astype(np.int32) if site.endswith("indices") else rows for site in sites}
    records = Records.tokens(table, data) if layout == "tokens" else Records.pooled(table, layout, data)
    records.screened = True
    store.append(space, records)


def rows_of(cache, prompts=PROMPTS, **options):
    """``[T or 1, layers, D]`` of each prompt."""
    values, mask = cache.get_activations(prompts, **options)
    values = values[:, None] if values.ndim == 2 else values
    mask = torch.ones(values.shape[:2], dtype=torch.bool) if mask is None else mask
    return [row[real].reshape(int(real.sum()), -1, 32) for row, real in zip(values, mask, strict=True)]


def expected(cache, own):
    """What `cache` has, with 7 where something lies here: ``{prompt: layers}``."""
    wanted = [rows.clone() for rows in rows_of(cache)]
    for i, layers in own.items():
        wanted[i][:, list(layers)] = 7
    return wanted


@pytest.mark.parametrize("materialize", [False, True])
def test_each_layer_that_is_here_is_read_here(published, model, store, materialize):
    cache, folder = published
    there = another(cache, model, store)
    own = {0: [0], 1: [0], 3: [0, 2]}
    forge(cache, store, ["resid_post.0"], [0, 1, 3])
    forge(cache, store, ["resid_post.2"], [3])
    # What was pulled is the newer.
    ac.pull_dataset(folder, store=store, materialize=materialize)
    assert there.plan(PROMPTS).cached == len(PROMPTS)
    wanted = expected(cache, own)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2]):
        found = rows_of(there, [PROMPTS[i] for i in order])
        assert all(torch.equal(mine, wanted[i]) for mine, i in zip(found, order, strict=True))
    last = there.get_activations(PROMPTS, positions="last" if not cache.cache_pooled else None)[0].reshape(4, -1, 32)
    assert torch.equal(last, torch.stack([rows[-1] for rows in wanted]))
    space = next(space for space in store.spaces() if space.pulled)
    if not materialize:
        layout = "last_token" if cache.cache_pooled else "tokens"
        of_layer = {layer: len(store.prompts(space, site=f"resid_post.{layer}", layout=layout)) for layer in LAYERS}
        assert of_layer == {0: 1, 1: 4, 2: 3, 3: 4}, "nothing is fetched that is here"
        assert len(store.prompts(space, site=f"{PULLED}.resid_post.0", layout=PULLED)) == 4
    # One layer alone, and only layers that are here.
    (one,) = rows_of(another(cache, model, store, layers=[0]), PROMPTS[:1])
    assert bool(one.eq(7).all())


def test_one_row_of_full_sequences_that_are_here(published, model, store):
    cache, folder = published
    forge(cache, store, ["resid_post.0", "resid_post.3"], [0, 2], layout="tokens")
    forge(cache, store, ["resid_post.3"], [0, 1], layout="last_token", value=8)
    ac.pull_dataset(folder, store=store)
    there = another(cache, model, store, pooled=True, pooling="last_token")
    found = [rows[0] for rows in rows_of(there)]
    wanted = [rows[-1].clone() for rows in rows_of(cache)]
    wanted[0][0] = wanted[2][0] = wanted[2][3] = 7
    wanted[0][3] = wanted[1][3] = 8
    assert all(torch.equal(mine, rows) for mine, rows in zip(found, wanted, strict=True))


def test_logits_and_their_tokens_are_of_one_run(published, model, store):
    cache, folder = published
    layout = "last_token"
    # Of the first prompt half a pair is here, of the second a whole one.
    forge(cache, store, ["logits.top4.values"], [0], layout=layout, width=4)
    forge(cache, store, ["logits.top4.values", "logits.top4.indices"], [1], layout=layout, width=4)
    forge(cache, store, ["perplexity"], [1], layout="derived", width=3)
    forge(cache, store, ["token_nll"], [1], layout="tokens", width=1)
    ac.pull_dataset(folder, store=store)
    there = another(cache, model, store)
    mine, theirs = there.get_logits(PROMPTS), cache.get_logits(PROMPTS)
    for found, wanted in ((mine.values, theirs.values), (mine.indices, theirs.indices)):
        assert torch.equal(found[[0, 2, 3]], wanted[[0, 2, 3]]) and bool(found[1].eq(7).all())
    found, wanted = there.get_perplexity(PROMPTS), cache.get_perplexity(PROMPTS)
    assert np.array_equal(found[[0, 2, 3]], wanted[[0, 2, 3]]) and (found[1] == 7).all()
    each = there.get_token_perplexity(PROMPTS)
    assert np.allclose(each[1], np.exp(7.0)) and np.allclose(each[0], cache.get_token_perplexity(PROMPTS)[0], rtol=1e-6)


def test_labels_are_those_given_here(published, model, store):
    cache, folder = published
    ac.pull_dataset(folder, store=store)
    there = ac.UnifiedCache(
        model, tokenizer=tiny_tokenizer(), store=store, cache_pooled=cache.cache_pooled, compute_perplexity=False
    )
    assert there.get_labels(PROMPTS) == [3, 1, 2, 7]
    there.warmup(PROMPTS[:2], labels=["mine", None])
    assert there.get_labels(PROMPTS) == ["mine", None, 2, 7], "that there is none was said here"


def test_imports_answer_for_what_is_not_here(model, store, tmp_path):
    cache = ac.UnifiedCache(model, tokenizer=tiny_tokenizer(), store=tmp_path / "own", compute_perplexity=False)
    texts = ["the cat sat", "a dog"]
    cache.warmup(texts)
    arrays = {f"resid_post.{layer}": np.full((2, 32), 1 + layer, np.float32) for layer in LAYERS}
    ac.import_arrays(arrays, cache.model_name, texts, pooling="last_token", store=cache.store)
    assert not rows_of(cache, texts)[0].eq(1).any(), "all of it is here"
    one = another(cache, model, store, layers=[0], trust_names=True)
    ac.import_arrays(arrays, cache.model_name, texts, pooling="last_token", store=store)
    identity = one.cached.identity()
    space = store.open_space(identity.values, identity.label)
    table = cache.store.prompts(next(s.space for s in cache.store.spaces() if s.dtype))
    store.append(space, Records.pooled(table, "last_token", {"resid_post.0": np.full((2, 32), 7.0, np.float32)}))
    every = another(cache, model, store, trust_names=True)
    for rows in rows_of(every, texts):
        assert rows[0, :, 0].tolist() == [7, 2, 3, 4]


def test_sites_of_other_widths(model, store, tmp_path):
    mixtral = tiny_model("mixtral")
    options = {"tokenizer": tiny_tokenizer(), "sites": ["resid_post.0", "router_logits.1"], "pooling": "last_token"}
    extractor = ac.ActivationExtractor(mixtral, **options)
    cached = ac.CachedExtractor(extractor, tmp_path / "own")
    texts = ["the cat sat", "a dog"]
    whole = cached.extract(texts)[0]
    ac.push_dataset(tmp_path / "set", extractor.source.name, texts, store=cached.store)
    ac.pull_dataset(tmp_path / "set", store=store)
    there = ac.CachedExtractor(ac.ActivationExtractor(mixtral, **options), store)
    identity = there.identity()
    table = cached.store.prompts(cached.store.spaces()[0].space).select([0])
    rows = np.full((1, 32), 7.0, np.float32)
    store.append(
        store.open_space(identity.values, identity.label), Records.pooled(table, "last_token", {"resid_post.0": rows})
    )
    there.extractor.batches = None
    found = there.extract(texts)[0]
    i = texts.index(table.texts[0])
    assert bool(found[i, 0, :32].eq(7).all()) and torch.equal(found[i, 0, 32:], whole[i, 0, 32:])
    assert torch.equal(found[1 - i], whole[1 - i])
