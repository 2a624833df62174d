"""Datasets that were pulled: what they hold answers as if it were stored here, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.errors import (
    DatasetFormatError,
    DatasetLayerError,
    DatasetNotFoundError,
    NotCachedError,
    OptionError,
    ResultsNotCachedError,
    ValueOverflowError,
)
from actcache.share import fetching
from actcache.store.given import read as read_given
from actcache.store.records import PULLED, Records
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from lmprobe_datasets import FIXTURES, WRITTEN, needs_fixtures, plain_read
from made_datasets import INDEX, VERSIONS, make, pq
from share_helpers import new_store

TEXTS = ["the cat sat", "a dog", "x", "rain fell over hills"]


@pytest.fixture(autouse=True)
def _anew():
    """What one test has opened is no other's."""
    yield
    fetching._open.clear()


@pytest.fixture
def store(tmp_path):
    with ac.Store(tmp_path / "there", index_dir=tmp_path / "there-index") as store:
        yield store


def pulled(store):
    (space,) = [space for space in store.spaces() if space.pulled]
    return space


def fetched(store, space):
    """What is in the store of a pulled space, beside where it is: layout -> sites."""
    return {layout: sites for layout, sites in store.held(space).items() if layout != PULLED}


# -- every version ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("materialize", [False, True])
def test_every_version(tmp_path, store, version, materialize, monkeypatch):
    monkeypatch.setattr(fetching, "SLICE_BYTES", 100)
    monkeypatch.setattr("actcache.share.pull._STEP_BYTES", 300)
    made = make(tmp_path / "set", version, labels=list(range(11)), extra={"score": [i / 2 for i in range(11)]})
    assert ac.pull_dataset(made.folder, store=store, materialize=materialize) == 11
    space = pulled(store)
    held = fetched(store, space)
    layout = "last_token" if "pooled" in version else "tokens"
    whole = {f"resid_post.{layer}" for layer in (0, 2, 5)} <= set(held.get(layout, ()))
    assert whole == materialize
    if materialize:
        shutil.rmtree(made.folder)
    order = [7, 0, 3, 10]
    texts = [made.texts[i] for i in order]
    assert store.contains(space, texts, "resid_post.5", pooling=None if layout == "tokens" else layout).all()
    for j, layer in enumerate((0, 2, 5)):
        site = f"resid_post.{layer}"
        if layout == "tokens":
            for mine, i in zip(store.read(space, texts, site), order, strict=True):
                assert mine.dtype == torch.float32 and np.array_equal(mine.numpy(), made.vectors[i][:, j])
        else:
            found = store.read(space, texts, site, pooling="last_token")
            assert np.array_equal(found.numpy(), np.stack(made.expected())[order, j])
    values = store.read(space, texts, "logits.top3.values", pooling="last_token")
    indices = store.read(space, texts, "logits.top3.indices", pooling="last_token")
    logits = made.files["tensors/logits_topk_000.safetensors"]
    assert np.array_equal(values.numpy(), logits["logits_topk.values"][order])
    assert np.array_equal(indices.numpy(), logits["logits_topk.indices"][order]) and indices.dtype == torch.int32
    report = store.verify()
    assert report.ok and report.segments


@needs_fixtures
@pytest.mark.parametrize("name", WRITTEN)
def test_what_releases_of_lmprobe_wrote(store, name):
    plain = plain_read(FIXTURES / name)
    assert ac.pull_dataset(FIXTURES / name, store=store) == 12
    space = pulled(store)
    assert space.model_name == "fixtures/tiny-llama" and not fetched(store, space).get("tokens", ["token_nll"])[1:]
    for layer in range(4):
        site = f"resid_post.{layer}"
        found = store.read(space, list(plain), site, pooling="last_token")
        assert np.array_equal(found.numpy(), np.stack([rows[-1, layer] for rows in plain.values()]))
        if "fullseq" in name:
            for found, rows in zip(store.read(space, list(plain), site), plain.values(), strict=True):
                assert np.array_equal(found.numpy(), rows[:, layer])
    given = json.loads((FIXTURES / "prompts.json").read_text("utf-8"))
    from actcache.store.given import read

    table = store.prompts(space, site="label")
    labels = dict(zip(map(str, store.prompts(space).texts), range(12), strict=True))
    found = {}
    for prompt in labels:
        one = store.find_prompt(space, prompt)
        found[prompt] = read(store, space.space, "label", one)[0], read(store, space.space, "metadata", one)[0]
    for prompt, label, said in zip(given["prompts"], given["labels"], given["metadata"], strict=True):
        assert found[prompt][0] == label
        # Releases before 0.8.9 wrote no truth values.
        assert {**found[prompt][1], **said} == {**said, **found[prompt][1]} and "score" in found[prompt][1]
    assert len(table) == sum(label is not None for label in given["labels"])
    expected = np.load(FIXTURES / "expected.npz")
    top = store.read(space, given["prompts"], "logits.top5.indices", pooling="last_token")
    assert np.array_equal(top.numpy(), expected["topk_indices"][:, :5])


@needs_fixtures
@pytest.mark.parametrize("name", ["dataset_v1.2_fullseq_split", "dataset_v2_pooled", "dataset_v1.0_fullseq"])
def test_datasets_of_lmprobe_answer_only_when_names_are_trusted(tmp_path, store, name):
    model = str((FIXTURES / "fixtures" / "tiny-llama").resolve())
    folder = _of_model(tmp_path / "set", FIXTURES / name, model)
    prompts = json.loads((FIXTURES / "prompts.json").read_text("utf-8"))["prompts"]
    ac.pull_dataset(folder, store=store)
    options = {"compute_perplexity": False, "store": store}
    assert ac.UnifiedCache(model, **options).plan(prompts).cached == 0
    trusting = ac.UnifiedCache(model, **options, trust_names=True)
    plan = trusting.plan([*prompts, "a new prompt"])
    assert (plan.cached, plan.missing) == (12, 1)
    found = trusting.get_activations(prompts)[0].reshape(12, 4, 32)
    assert not trusting.model_loaded
    plain = plain_read(FIXTURES / name)
    assert np.array_equal(found.numpy(), np.stack([plain[prompt][-1] for prompt in prompts]))
    assert (
        ac.UnifiedCache(model, **options, edits=[ac.ablate("resid_post.0")], trust_names=True).plan(prompts).cached == 0
    )
    # Pulled again with trust, it answers whoever asks.
    ac.pull_dataset(folder, store=store, trust_names=True, target_prompts=prompts[:5])
    assert ac.UnifiedCache(model, **options).plan(prompts).cached == 5
    labels = json.loads((FIXTURES / "prompts.json").read_text("utf-8"))["labels"]
    assert ac.UnifiedCache(model, **options).get_labels(prompts[:5]) == labels[:5]
    own = ac.UnifiedCache(model, **options)
    own.warmup(prompts)
    assert not trusting.model_loaded
    kinds = [bool(v.pulled) for v in store.discover(model, prompts[0]).variants]
    # What was computed here comes first, although it is of fewer prompts.
    assert kinds in ([False, True], [True]) and store.discover(model, prompts[7]).variants[0].pulled is None


def _of_model(folder, source, model):
    """A copy of a dataset that claims another model."""
    shutil.copytree(source, folder)
    info = folder / "lmprobe_info.json"
    if info.exists():
        said = json.loads(info.read_text())
        info.write_text(json.dumps({**said, "model": {"name": model, "revision": None}}))
    table = pq.read_table(folder / INDEX)
    said = table.schema.metadata or {}
    if b"lmprobe:model" in said:
        said = {**said, b"lmprobe:model": json.dumps({"name": model, "revision": None}).encode()}
        pq.write_table(table.replace_schema_metadata(said), folder / INDEX)
    return folder


# -- what was pushed from here ---------------------------------------------------------------------------


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


def test_texts_whose_ids_are_not_told_are_told_apart(tmp_path, store):
    made = make(tmp_path / "set", "2.0 split", longest=1, labels=list(range(11)))
    # The digests of these agree in the 31 bits that stand for the one token of each.
    alike = ["word 17675", "word 126757"]
    made.columns["text"][3], made.columns["text"][7] = alike
    made.write()
    assert ac.pull_dataset(made.folder, store=store) == 11
    space = pulled(store)
    for texts in (alike, alike[::-1]):
        found = store.read(space, texts, "resid_post.2")
        for mine, text in zip(found, texts, strict=True):
            assert np.array_equal(mine.numpy(), made.vectors[made.columns["text"].index(text)][:, 1])
    table = store.prompts(space)
    assert len(table) == 11
    said = dict(zip(table.texts, read_given(store, space.space, "label", table), strict=True))
    assert said == dict(zip(made.columns["text"], range(11), strict=True))
    assert store.verify().ok


def test_metadata_of_a_folder_that_changed_are_another_dataset(tmp_path, store):
    made = make(tmp_path / "set", "1.2 pooled")
    ac.pull_dataset(made.folder, store=store)
    path = made.folder / "lmprobe_info.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DatasetFormatError, match="was changed since it was pulled"):
        store.read(pulled(store), made.texts[:2], "resid_post.0", pooling="last_token")
    ac.pull_dataset(made.folder, store=store)
    assert len(store.spaces()) == 2


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


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"tensors": ["hidden_layer"]}, OptionError, "no tensors 'hidden_layer'.*mean 'hidden_layers'"),
        ({"tensors": []}, OptionError, "tensors is empty"),
        ({"layers": [1]}, DatasetLayerError, "no layer 1: it has 0, 2, 5"),
        ({"layers": ["1"]}, OptionError, "layers holds '1'"),
        ({"layers": []}, OptionError, "layers is empty"),
        ({"target_prompts": ["prompt 3: grosse"]}, NotCachedError, "no prompt.*mean"),
        ({"num_workers": -1}, OptionError, "num_workers is -1"),
        ({"num_workers": True}, OptionError, "num_workers is True"),
        ({"revision": "main"}, OptionError, "no meaning for the folder"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, store, options, error, named):
    made = make(tmp_path / "set")
    with pytest.raises(error, match=named):
        ac.pull_dataset(made.folder, store=store, **options)
    assert not store.root.exists() or not store.spaces()


def test_a_store_that_keeps_nothing(tmp_path):
    made = make(tmp_path / "set")
    with ac.Store(tmp_path / "none", limit_gb=0) as store, pytest.raises(OptionError, match="limit of the store is 0"):
        ac.pull_dataset(made.folder, store=store)
    assert not (tmp_path / "none").exists()


# -- what becomes of it ----------------------------------------------------------------------------------


def test_it_works_without_the_dataset_once_it_was_read(tmp_path, store):
    made = make(tmp_path / "set")
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    store.read(space, made.texts[:4], "resid_post.0", pooling="last_token")
    shutil.rmtree(made.folder)
    fetching._open.clear()
    found = store.read(space, made.texts[:4], "resid_post.0", pooling="last_token")
    assert np.array_equal(found.numpy(), np.stack(made.expected())[:4, 0])
    with pytest.raises(DatasetNotFoundError, match=r"can no longer be read.*clear_cache\("):
        store.read(space, made.texts, "resid_post.0", pooling="last_token")


def test_what_was_evicted_is_fetched_again(tmp_path, store):
    made = make(tmp_path / "set", n=200, dim=64, k=0, labels=list(range(200)))
    ac.pull_dataset(made.folder, store=store, materialize=True)
    space = pulled(store)
    registered = sum(p.stat().st_size for p in store.root.rglob("*.safetensors"))
    store.evict(60_000 / 2**30)
    assert sum(p.stat().st_size for p in store.root.rglob("*.safetensors")) < registered
    assert "last_token" not in fetched(store, space) and store.verify().ok
    found = store.read(space, made.texts, "resid_post.2", pooling="last_token")
    assert np.array_equal(found.numpy(), np.stack(made.expected())[:, 1])
    assert len(store.prompts(space, site="label")) == 200, "what was said of prompts stays while they can be read"
    store.evict(0)
    assert store.spaces() == [] and store.info().total_size_bytes == 0


def test_invalidate_and_clear(tmp_path, store):
    made = make(tmp_path / "set", labels=list(range(11)))
    ac.pull_dataset(made.folder, store=store, materialize=True)
    space = pulled(store)
    assert store.invalidate(space, made.texts[:3]) == 3
    assert not store.contains(space, made.texts[:3]).any() and store.contains(space, made.texts[3:]).all()
    with pytest.raises(NotCachedError):
        store.read(space, made.texts[:1], "resid_post.0", pooling="last_token")
    # Whoever pulls again wants them back.
    assert ac.pull_dataset(made.folder, store=store) == 11
    assert np.array_equal(
        store.read(space, made.texts[:1], "resid_post.0", pooling="last_token").numpy(),
        np.stack(made.expected())[:1, 0],
    )
    assert store.clear("org/model") == 11 and store.spaces() == []
    assert made.folder.is_dir(), "what was pulled from is nobody's cache"


def test_overwrite_forgets_what_was_pulled_of_this_dataset_alone(tmp_path, store):
    made, other = make(tmp_path / "set"), make(tmp_path / "other", seed=1)
    for dataset in (made, other):
        ac.pull_dataset(dataset.folder, store=store, materialize=True)
    changed = make(tmp_path / "set", seed=2)
    ac.pull_dataset(made.folder, store=store, overwrite=True)
    names = sorted(space.pulled.rpartition("@")[0] for space in store.spaces())
    assert names == [str(other.folder), str(made.folder)]
    space = next(space for space in store.spaces() if space.pulled.startswith(f"{made.folder}@"))
    found = store.read(space, made.texts, "resid_post.0", pooling="last_token")
    assert np.array_equal(found.numpy(), np.stack(changed.expected())[:, 0])


def test_a_folder_that_changed_is_not_mixed_with_what_was_read_of_it(tmp_path, store):
    made = make(tmp_path / "set")
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    store.read(space, made.texts[:1], "resid_post.0", pooling="last_token")
    make(tmp_path / "set", seed=3)
    for _ in range(2):
        with pytest.raises(DatasetFormatError, match="changed since it was pulled: pull it again"):
            store.read(space, made.texts, "resid_post.0", pooling="last_token")
        fetching._open.clear()
    ac.pull_dataset(made.folder, store=store)
    assert len([s for s in store.spaces() if s.pulled]) == 2, "another commit is another space"


def test_the_dtype_of_a_file_is_kept_and_that_of_the_store_applies(tmp_path, store):
    import ml_dtypes

    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        made = make(tmp_path / np.dtype(dtype).name, dtype=dtype, k=0)
        ac.pull_dataset(made.folder, store=store)
        (space,) = [space for space in store.spaces() if space.pulled.startswith(f"{made.folder}@")]
        found = store.read(space, made.texts, "resid_post.0", pooling="last_token")
        assert str(found.dtype) == f"torch.{np.dtype(dtype).name}"
        wanted = np.stack([vectors[-1, 0] for vectors in made.vectors])
        assert np.array_equal(found.double().numpy(), wanted.astype(np.float64))
    with ac.Store(tmp_path / "half", dtype="float16") as half:
        made = make(tmp_path / "large")
        name = "tensors/hidden_layer000_shard000.safetensors"
        made.files[name]["hidden.layer_0"] = made.files[name]["hidden.layer_0"] + np.float32(1e6)
        made.write()
        with pytest.raises(ValueOverflowError, match=r"large.*resid_post\.0"):
            ac.pull_dataset(made.folder, store=half, materialize=True)


def test_shards_of_different_dtypes_lose_nothing(tmp_path, store):
    made = make(tmp_path / "set", k=0)
    name = "tensors/hidden_layer002_shard000.safetensors"
    made.files[name]["hidden.layer_2"] = made.files[name]["hidden.layer_2"].astype(np.float16)
    made.write()
    ac.pull_dataset(made.folder, store=store)
    found = store.read(pulled(store), made.texts, "resid_post.2", pooling="last_token")
    wanted = np.stack(made.expected())[:, 1]
    wanted[:4] = wanted[:4].astype(np.float16)
    assert np.array_equal(found.numpy(), wanted)


def test_threads_that_read_the_same_fetch_it_once(tmp_path, store, monkeypatch):
    made = make(tmp_path / "set", "2.0 split", n=40)
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    read = []
    original = fetching.Dataset.read

    def counted(self, rows, *args, **options):
        read.append(len(rows))
        return original(self, rows, *args, **options)

    monkeypatch.setattr(fetching.Dataset, "read", counted)
    gate = threading.Barrier(6)
    found: list = [None] * 6

    def work(i):
        gate.wait()
        found[i] = store.read(space, made.texts, "resid_post.0")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(read) == 40
    for rows in found:
        assert all(np.array_equal(a.numpy(), b[:, 0]) for a, b in zip(rows, made.vectors, strict=True))


def test_a_prompt_that_is_there_several_times(tmp_path, store, caplog):
    made = make(tmp_path / "set", labels=list(range(11)))
    made.columns["text"][4] = made.columns["text"][1]
    made.columns["text"][6] = made.columns["text"][2]
    made.columns["label"][6] = 2
    made.write()
    assert ac.pull_dataset(made.folder, store=store) == 9
    space = pulled(store)
    found = store.read(space, made.texts[1:3], "resid_post.0", pooling="last_token")
    assert np.array_equal(found.numpy(), np.stack(made.expected())[1:3, 0])
    from actcache.store.given import read

    said = [read(store, space.space, "label", store.find_prompt(space, made.texts[i]))[0] for i in (0, 1, 2)]
    assert said == [0, None, 2]
    assert "two labels" in caplog.text and made.texts[1] in caplog.text


# -- what is a stranger's --------------------------------------------------------------------------------


def refused(made, store, named, **options):
    with pytest.raises(DatasetFormatError, match=named):
        ac.pull_dataset(made.folder, store=store, **options)
    assert not store.root.exists() or store.spaces() == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t["hidden_layers"].update(pooling="label"), "pooled with 'label', which is no pooling"),
        (lambda t: t["hidden_layers"].update(pooling="tokens"), "pooled with 'tokens'"),
        (lambda t: t["hidden_layers"].update(pooling="../x"), "pooled with '../x'"),
        (lambda t: t["hidden_layers"].update(pooling="pulled"), "pooled with 'pulled'"),
        (lambda t: t["logits_topk"].update(pooling="metadata"), "logits_topk is pooled with"),
        (lambda t: t["logits_topk"].pop("k"), "how many logits"),
        (lambda t: t.update(label=dict(t["hidden_layers"])), "cannot be called 'label'"),
        (lambda t: t.update(pulled=dict(t["hidden_layers"])), "cannot be called 'pulled'"),
        (lambda t: t.update(perplexity=dict(t["hidden_layers"])), "cannot be called 'perplexity'"),
        (lambda t: t.update(resid_post=dict(t["hidden_layers"])), "both the site 'resid_post'"),
        (lambda t: t.update({"x.scale": dict(t["hidden_layers"])}), "cannot be called 'x.scale'"),
    ],
)
def test_names_that_mean_something_else_here(tmp_path, store, change, named):
    made = make(tmp_path / "set")
    change(made.metadata["tensors"])
    made.write()
    refused(made, store, named)


def test_places_outside_the_shards_are_refused_before_anything_is_stored(tmp_path, store):
    made = make(tmp_path / "set")
    made.columns["shard_index"] = [-1, *made.columns["shard_index"].to_pylist()[1:]]
    made.write()
    refused(made, store, "prompt 0 .*shard -1")


@pytest.mark.parametrize(
    ("column", "values", "named"),
    [
        ("token_ids", [[-1]] * 11, "no token id"),
        ("token_ids", [[2**40]] * 11, "no token id"),
        ("token_ids", [["a"]] * 11, "expected lists of whole numbers"),
        ("token_ids", [[1, None]] * 11, "no value for some tokens"),
        ("token_perplexity", [[1]] * 11, "expected lists of numbers"),
    ],
)
def test_columns_of_the_wrong_kind(tmp_path, store, column, values, named):
    made = make(tmp_path / "set", extra={column: values})
    if "perplexity" in column:
        made.columns |= {f"perplexity_{name}": [1.0] * 11 for name in ("mean", "min", "max")}
        made.write()
    refused(made, store, named)


def test_ids_that_do_not_fit_the_rows(tmp_path, store):
    made = make(tmp_path / "set", "2.0 split", extra={"token_ids": [[1, 2]] * 11})
    refused(made, store, "token ids and .* rows of vectors")


def test_nan_is_not_stored(tmp_path, store):
    made = make(tmp_path / "set")
    name = "tensors/hidden_layer002_shard001.safetensors"
    made.files[name]["hidden.layer_2"] = made.files[name]["hidden.layer_2"] * np.float32("nan")
    made.write()
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    with pytest.raises(DatasetFormatError, match=f"{name}.*NaN"):
        store.read(space, made.texts, "resid_post.2", pooling="last_token")
    assert store.read(space, made.texts, "resid_post.0", pooling="last_token").shape == (11, 6)
    assert store.read(space, made.texts[:4], "resid_post.2", pooling="last_token").shape == (4, 6)


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


def test_a_label_that_recurs_is_no_bomb(tmp_path, store, monkeypatch):
    monkeypatch.setattr("actcache.share.index_prompts._LEAST_ROOM", 1 << 20)
    made = make(tmp_path / "set", labels=["x" * (1 << 20)] * 11, k=0)
    assert (made.folder / INDEX).stat().st_size < 100_000
    refused(made, store, "more room than so many bytes can hold")
    monkeypatch.undo()
    assert ac.pull_dataset(made.folder, store=store) == 11


def test_many_layers_of_many_prompts_are_chosen_from(tmp_path, store, monkeypatch):
    made = make(tmp_path / "set")
    monkeypatch.setattr("actcache.share.pull._MOST_BYTES", 4 * 11 * 4)
    with pytest.raises(OptionError, match=r"promises 5 tensors of 11 prompts.*layers="):
        ac.pull_dataset(made.folder, store=store)
    assert not store.root.exists()
    assert ac.pull_dataset(made.folder, store=store, layers=[0, 2], tensors="hidden_layers") == 11


def test_tokens_that_no_file_holds(tmp_path, store, monkeypatch):
    monkeypatch.setattr("actcache.share.pull._MANY_TOKENS", 20)
    made = make(tmp_path / "set", "1.1 full", k=0)
    assert ac.pull_dataset(made.folder, store=store) == 11
    store.clear()
    lengths = made.columns["num_tokens"].to_pylist()
    made.columns["num_tokens"] = [*lengths[:-1], 10**9]
    made.hidden["shards"][-1]["num_tokens"] += 10**9 - lengths[-1]
    made.write()
    refused(made, store, "the dataset says 1,000,000,")


def test_whoever_waited_for_what_failed_asks_anew(tmp_path, store, monkeypatch):
    """Two threads, one dataset: what stops the first must not leave the second with rows that nobody has read."""
    made = make(tmp_path / "set", n=30)
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    begun, waiting, failed = threading.Event(), threading.Event(), []
    original = fetching.Dataset.read

    def fails_once(self, *args, **options):
        if not failed:
            failed.append(True)
            begun.set()
            assert waiting.wait(10)
            self.index.source.stop.set()
        return original(self, *args, **options)

    monkeypatch.setattr(fetching.Dataset, "read", fails_once)
    results: dict[int, object] = {}

    def work(i):
        try:
            results[i] = store.read(space, made.texts, "resid_post.0", pooling="last_token").numpy()
        except ac.ActCacheError as error:
            results[i] = error

    first = threading.Thread(target=work, args=(0,))
    first.start()
    assert begun.wait(10)
    second = threading.Thread(target=work, args=(1,))
    second.start()
    waiting.set()
    first.join()
    second.join()
    assert "reading was stopped" in str(results[0])
    assert np.array_equal(results[1], np.stack(made.expected())[:, 0])


def test_a_store_that_lies_elsewhere(tmp_path):
    made = make(tmp_path / "set", labels=list(range(11)))
    backend = ac.MemoryBackend()
    with ac.Store(backend, index_dir=tmp_path / "one") as one:
        ac.pull_dataset(made.folder, store=one)
        one.read(pulled(one), made.texts[:4], "resid_post.0", pooling="last_token")
    with ac.Store(backend, index_dir=tmp_path / "two") as two:
        space = pulled(two)
        assert space.label["pulled"]["forms"]["resid_post"] == "last_token"
        shutil.move(made.folder, tmp_path / "moved")
        found = two.read(space, made.texts[:4], "resid_post.0", pooling="last_token")
        assert np.array_equal(found.numpy(), np.stack(made.expected())[:4, 0])
        shutil.move(tmp_path / "moved", made.folder)
        assert two.read(space, made.texts, "resid_post.5", pooling="last_token").shape == (11, 6)


def test_statistics_are_of_what_is_here(tmp_path, store):
    made = make(tmp_path / "set", k=0)
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    assert store.summaries(space) == []
    store.read(space, made.texts, "resid_post.2", pooling="last_token")
    (summary,) = store.summaries(space)
    assert (summary.site, summary.rows) == ("resid_post.2", 11)


def test_logits_that_are_no_tokens(tmp_path, store):
    made = make(tmp_path / "set")
    made.files["tensors/logits_topk_000.safetensors"]["logits_topk.indices"][5, 0] = -7
    made.write()
    ac.pull_dataset(made.folder, store=store)
    with pytest.raises(DatasetFormatError, match="no token"):
        store.read(pulled(store), made.texts, "logits.top3.indices", pooling="last_token")


# -- what only the model itself may say ------------------------------------------------------------------


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
