"""Datasets of every version, of every dtype, and of every release of lmprobe, pulled."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.errors import ValueOverflowError
from actcache.share import fetching
from lmprobe_datasets import FIXTURES, WRITTEN, needs_fixtures, plain_read
from made_datasets import INDEX, VERSIONS, make, pq
from pull_helpers import fetched, pulled


@pytest.fixture
def store(tmp_path):
    with ac.Store(tmp_path / "there", index_dir=tmp_path / "there-index") as store:
        yield store
    fetching._open.clear()


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
